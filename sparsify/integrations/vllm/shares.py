"""What an engine puts together of packed layers, and what each process of it holds.

Shape suffixes: O output features (rows), I input features (columns).
"""

from __future__ import annotations

from collections.abc import Mapping

from sparsify.errors import InputError
from sparsify.packed.layout import Layer, index_bits


def fused_layer(name: str, parts: Mapping[str, Layer | None]) -> Layer | None:
    """The layer that several make, their rows one below the other, as q, k and v do.

    Args:
        name: of the whole, for messages.
        parts: layer name -> how it is stored, or None where it is dense; in order.

    Returns:
        How the whole is stored; None where all parts are dense.

    Raises:
        InputError: some are packed and some are not, or they are packed in different ways.
    """
    given = list(parts.items())
    first_name, first = given[0]
    for other_name, other in given[1:]:
        if _way(first) != _way(other):
            raise InputError(
                f"{name}: {first_name} is {_words(first)} and {other_name} is {_words(other)}, but "
                "vLLM computes them as one layer; prune and quantise both alike (prune.skip, "
                "quantize.skip)"
            )
    if first is None:
        return None
    num_rows = sum(layer.shape[0] for layer in parts.values() if layer is not None)
    return Layer((num_rows, first.shape[1]), first.scheme, first.pattern)


def share_of(name: str, layer: Layer, num_rows: int, num_columns: int) -> Layer:
    """What one process holds of a layer, of which others hold as much each.

    Rows may be cut anywhere. Columns are cut only where tensors can be cut at whole bytes, between
    groups of the pattern and between groups that share a scale; where a row has one scale, every
    process has it.

    Args:
        name: of the layer, for messages.
        layer: the whole.
        num_rows: that the process holds.
        num_columns: that the process holds.

    Raises:
        InputError: columns cannot be cut there; names the sizes that can be.
    """
    num_all = layer.shape[1]
    size, left_over = divmod(num_all, num_columns)
    if left_over or not size:
        raise InputError(
            f"{name}: is packed with {num_all} columns, which are no multiple of the {num_columns} "
            "that vLLM gives a process; configuration and weights are of different models"
        )
    if cut := _what_is_cut(layer, size):
        fits = [str(n) for n in range(1, size) if num_all % n == 0 and not _what_is_cut(layer, n)]
        raise InputError(
            f"{name}: tensor parallel size {size} gives a process {num_columns} of {num_all} "
            f"columns, which cuts {cut}; use --tensor-parallel-size {' or '.join(fits)}"
        )
    return Layer((num_rows, num_columns), layer.scheme, layer.pattern)


def _what_is_cut(layer: Layer, size: int) -> str | None:
    """What so many processes would cut in two where each takes as many columns; None: nothing."""
    if size == 1:
        return None
    pattern, scheme = layer.pattern, layer.scheme
    num_columns = layer.shape[1] // size
    if num_columns % pattern.m:
        return f"a group of {pattern}"
    num_kept = num_columns // pattern.m * pattern.n
    if num_kept * index_bits(pattern) % 8:
        return "a byte of positions"
    if scheme.bits == 4 and num_kept % 2:
        return "a byte of codes"
    if layer.num_groups > 1 and num_columns % (scheme.group_size or 1):
        return f"a group of {scheme.group_size} columns that share a scale"
    return None


def may_copy(additional_config: object) -> bool:
    """What vLLM's `--additional-config '{"twofour": {"may_copy": true}}'` says, false by default:
    whether layers on a GPU may hold their weight once more to be nowhere slower than dense.

    Raises:
        InputError: there is something else under that name.
    """
    given = additional_config.get("twofour", {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping) or given.keys() - {"may_copy"}:
        raise InputError(
            f"additional-config: twofour is {given!r}; it knows {{'may_copy': true}} alone"
        )
    copies = given.get("may_copy", False)
    if not isinstance(copies, bool):
        raise InputError(f"additional-config: twofour.may_copy is {copies!r}; give true or false")
    return copies


def _way(layer: Layer | None) -> tuple[object, ...] | None:
    return None if layer is None else (layer.scheme, layer.pattern, layer.shape[1])


def _words(layer: Layer | None) -> str:
    return "dense" if layer is None else f"{layer.scheme.name} of {layer.shape[1]} columns"
