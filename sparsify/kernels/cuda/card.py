"""The choice of ways on the card at hand: its own clock, and a file in the user's cache.

A layer asks when its tensors come into the order of the kernels, which is at its first product;
vLLM and `bench deploy` make that product while they load.
"""

from __future__ import annotations

import json
import math
import statistics
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparsify.errors import InputError
from sparsify.files import readable
from sparsify.kernels.cpu.library import LibraryError, cache_folder
from sparsify.kernels.cuda.choice import Choices, measure_ways, use, used
from sparsify.kernels.cuda.layout import Prepared
from sparsify.kernels.cuda.ways import WAYS, Problem
from sparsify.kernels.triton_jit import triton

_MAKING = threading.Lock()


def use_card(folder: Path | None = None, may_copy: bool = False) -> Choices:
    """Let packed layers of this process go by what is fastest on the current card.

    Layers do so by themselves; call it before the first product to say how.

    Args:
        folder: where times are kept; None: the folder of the user's compiled kernels.
        may_copy: whether a layer may hold its weight once more, in the form of the way that is
            nowhere slower than dense.

    Raises:
        InputError: the file of this card is damaged.
    """
    if folder is None:
        try:
            folder = cache_folder()
        except LibraryError as error:
            text = f"GPU kernels: {error}; ways are measured again by every process"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    assert triton is not None, "without it no layer is in the kernels' order"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    choices = Choices(folder, torch.cuda.get_device_name(), versions, may_copy)
    use(choices)
    return choices


def chosen_copy(
    problem: Problem, prepared: Prepared, choices: Choices | None = None
) -> tuple[str, list[Tensor]]:
    """Measure the ways of a problem where that has not been done, and make what the chosen holds.

    Args:
        prepared: of a layer on a GPU.
        choices: None: those of this process, of `use_card` if there are none yet.

    Returns:
        The name of the way that holds a copy, with it; or "" and nothing, as where the card has no
        room to measure, which a warning says.

    Raises:
        InputError: the file of this card is damaged.

    Cost: for each new problem the time of all ways at 8 numbers of tokens, a few seconds, and
    memory of one dense copy, 1 GiB and the inputs; of what is chosen, memory of a copy a layer if
    `choices.may_copy`.
    """
    device = prepared.values.device
    with _MAKING, torch.cuda.device(device), torch.inference_mode():
        choices = choices or (used() if used().card else use_card())

        def inputs(num_tokens: int) -> Tensor:
            shape = num_tokens, problem.num_columns
            return torch.randn(shape, dtype=problem.torch_dtype, device=device)

        try:
            choice = choices.get(problem, lambda: measure_ways(problem, prepared, cold_s, inputs))
        except torch.OutOfMemoryError:
            text = (
                f"GPU kernels: {problem.name}: no room to measure its ways; up to 64 tokens go by "
                "decode and more by expand"
            )
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return "", []
    make = WAYS[choice.copy].copy if choice.copy else None
    return ("", []) if make is None else (choice.copy or "", make(problem, prepared))


def elapsed_s(run_once: Callable[[], object], times: int = 1) -> float:
    """Seconds on the card of one run, the mean of several."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run_once()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / times


def cold_s(call: Callable[[], object]) -> float:
    """Median seconds of a call whose data are in no cache.

    Before each, 1 GiB is written: that empties the level-2 cache, and takes longer than Python
    takes to launch the call.
    """
    flushed = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    call()
    taken_s = []
    for _ in range(7):
        flushed.zero_()
        taken_s.append(elapsed_s(call))
    return statistics.median(taken_s)


def shown(folder: Path | None = None) -> str:
    """What was measured on this user's cards, as a table.

    Args:
        folder: where times are kept; None: as in `use_card`.

    Raises:
        InputError: a file is damaged.
    """
    folder = folder or cache_folder()
    lines = []
    for file in sorted(folder.glob("choices-*.json")):
        with readable(f"choices {file}"):
            try:
                about = json.loads(file.read_bytes())
                choices = Choices(folder, str(about["card"]), about["versions"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"choices {file}: damaged ({type(error).__name__}); delete it"
                ) from None
        made = ", ".join(f"{name} {version}" for name, version in choices.versions.items())
        lines.append(f"{choices.card} ({made})")
        lines += [
            f"  {name:<34} {tokens:>5} tokens  {way:<8} {1e6 * seconds:>9.1f} us"
            + ("" if math.isnan(ratio) else f", {ratio:.2f} times as fast as dense")
            for name, tokens, way, seconds, ratio in choices.rows()
        ]
    return "\n".join(lines) or f"nothing has been measured: {folder} has no choices-CARD.json"
