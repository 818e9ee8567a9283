"""Floating point operations of a model, and the share of a chip's peak that a run gets out of it.

Counted is what the model asks for, not what is spent: recomputed activations, padding and the zeros
of a pruned weight change nothing, so that two runs of one model can be compared by tokens/s alone.
The convention is the causal one: a token attends to half of its document on average, and documents
joined into one row cost the sum of their squares, not the square of the row. Figures with the full
square (57.9 GFLOP/token for training Llama-3.1-8B at 8192 instead of 51.5) are another convention.

Not counted: norms, activations, rotary angles, softmax, additions of biases, the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn

from sparsify.data.rows import TokenRows
from sparsify.errors import InputError
from sparsify.models.varlen import attention_windows, unknown_work

_CHUNKED = "chunked_attention"

# Dense bfloat16 with float32 accumulation, FLOP/s, from the maker's data sheets. The first entry
# whose words are all in the device's name counts, so a variant comes before the plain one.
_PEAKS = (
    ("B200", 2250e12),
    ("GH200", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100 80GB HBM2e", 756.5e12),
    ("H100", 989.4e12),
    ("H800 PCIe", 756.5e12),
    ("H800", 989.4e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362.05e12),
    ("A40", 149.7e12),
    ("L4", 121e12),
)


@dataclass(frozen=True)
class ModelFlops:
    """What one forward of a causal LM multiplies."""

    num_block_weights: float
    """weights that every token meets in a multiplication, outside the head; of experts the active
    share"""
    num_head_weights: int
    """weights of the output layer"""
    attention_width: int
    """query heads of a layer times their size"""
    windows: tuple[int | None, ...]
    """attention window of every layer in tokens, but of those in `chunks`; None: the whole
    document"""
    chunks: tuple[int, ...] = ()
    """of each layer whose tokens attend to those before them in their chunk of the row, the tokens
    of a chunk (Llama 4)"""

    def forward(self, lengths: Iterable[float], with_head: bool = True) -> float:
        """FLOPs of one forward over documents of these lengths.

        A weight costs 2 per token. A pair of a token and one before it costs 2 per head and
        dimension for the score and 2 for the value: 4 d with d the width of all query heads (query
        heads share keys in grouped-query attention, which saves memory and no multiplication). A
        document of n tokens has n^2 / 2 pairs, so a layer costs 2 d n^2; under a window w < n it
        has w n - w^2 / 2 of them. In chunks of c tokens it has c^2 / 2 for each whole chunk and
        r^2 / 2 for the r tokens left, as if a chunk began with the document; where chunks go by the
        row, a document that lies across their edge has fewer.

        Args:
            lengths: tokens of each document.
            with_head: whether the output layer is computed.
        """
        documents = list(lengths)
        weights = self.num_block_weights + (self.num_head_weights if with_head else 0)
        pairs = sum(
            self.windows.count(window) * _num_pairs(length, window)
            for window in set(self.windows)
            for length in documents
        )
        pairs += sum(
            self.chunks.count(chunk) * (length // chunk * chunk**2 + (length % chunk) ** 2) / 2
            for chunk in set(self.chunks)
            for length in documents
        )
        return 2 * weights * sum(documents) + 4 * self.attention_width * pairs


def _num_pairs(length: float, window: int | None) -> float:
    if window is None or length <= window:
        return length**2 / 2
    return window * length - window**2 / 2


def distillation_flops(
    student: ModelFlops,
    teacher: ModelFlops | None,
    lengths: Iterable[int],
    with_teacher_head: bool = True,
) -> float:
    """FLOPs of one step's documents: student forward and backward, teacher forward.

    Backward is two multiplications for every one of forward (the gradient of the input and of the
    weight), so the student counts three times.

    Args:
        student: counts of the model that is trained.
        teacher: counts of the frozen one; None if the losses need no teacher.
        lengths: tokens of each document; divide by their sum for FLOPs per token.
        with_teacher_head: whether a loss uses the teacher's logits.
    """
    documents = list(lengths)
    total = 3 * student.forward(documents)
    return total + (teacher.forward(documents, with_teacher_head) if teacher else 0)


def document_lengths(rows: TokenRows) -> list[int]:
    """Tokens of every document of packed rows; a document cut by a row's end counts as two."""
    starts = (rows.positions_NT.flatten() == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], rows.positions_NT.numel()]
    return [end - start for start, end in zip(starts, ends, strict=True)]


def mfu(
    tokens_per_s: float, flops_per_token: float, peak_flops: float, num_devices: int = 1
) -> float:
    """Model FLOPs utilisation: the share of the devices' peak that the model's work is.

    Args:
        tokens_per_s: of all devices together.
        flops_per_token: what the model asks for, from `distillation_flops` over real documents.
        peak_flops: FLOP/s of one device, from `peak_flops`.
        num_devices: how many there are.
    """
    return tokens_per_s * flops_per_token / (peak_flops * num_devices)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by the name that torch.cuda.get_device_name gives.

    None for a CPU, for a GPU that is not in the table and for a part of one (MIG): then there is
    no MFU, rather than a wrong one.
    """
    words = set(device_name.lower().replace("-", " ").split())
    if "mig" in words:
        return None
    return next((peak for name, peak in _PEAKS if words.issuperset(name.lower().split())), None)


def count_flops(model: nn.Module) -> ModelFlops:
    """The counts of a transformers causal LM, read from its module tree and config.

    Weights of nn.Linear (and transformers' Conv1D) meet every token once, those of an embedding
    none, those of experts the share `num_experts_per_tok` of them; a head tied to the embedding
    multiplies all the same.

    Args:
        model: may be on the meta device.

    Raises:
        InputError: a kind of layer whose work is not known here (recurrent, convolution, attention
            with compressed keys, encoder), so that the count would be a guess.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    name = type(model).__name__
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise InputError(f"{name}: has no output layer, so it is no causal LM whose work is known")
    num_layers, heads = config.num_hidden_layers, getattr(config, "num_attention_heads", None)
    odd = any(getattr(config, key, None) is not None for key in ("kv_lora_rank", "global_head_dim"))
    if heads is None or odd:
        raise unknown_work(name, "its attention is not plain multi-head attention")
    if getattr(config, "is_encoder_decoder", False):
        raise unknown_work(name, "it has an encoder")
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    weights = 0.0
    for where, module in model.named_modules():
        if module is not head:
            share = _active_share(model, where, config, name)
            weights += share * _num_active_weights(module, where, config, name)
    windows, chunks = _attended(config, num_layers, name)
    return ModelFlops(weights, head.weight.numel(), heads * size, windows, chunks)


def _attended(
    config: Any, num_layers: int, name: str
) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """Windows and chunks of the layers, see `ModelFlops`."""
    kinds = list(getattr(config, "layer_types", None) or ())
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is None or _CHUNKED not in kinds:
        return attention_windows(config, num_layers, name), ()
    others = [kind for kind in kinds if kind != _CHUNKED]
    rest = SimpleNamespace(
        layer_types=others, sliding_window=getattr(config, "sliding_window", None)
    )
    chunks = (chunk,) * (len(kinds) - len(others))
    return attention_windows(rest, len(others), name), chunks


def _num_active_weights(module: nn.Module, where: str, config: Any, name: str) -> float:
    """Weights of this module itself (not of its children) that a token is multiplied with, if it is
    sent here at all."""
    if isinstance(module, nn.modules.conv._ConvNd | nn.RNNBase):
        raise unknown_work(name, f"{where} is a {type(module).__name__}")
    if isinstance(module, nn.Embedding):
        return 0.0
    kind = type(module).__name__
    total = 0.0
    for key, weight in module.named_parameters(recurse=False):
        if "bias" in key or weight.ndim < 2:
            continue
        is_matmul = isinstance(module, nn.Linear) or kind == "Conv1D" or "Router" in kind
        if weight.ndim == 2 and is_matmul:
            total += weight.numel()
        elif weight.ndim == 3 and "Experts" in kind:
            total += weight.numel() * num_active_experts(config, name) / len(weight)
        else:
            shape = tuple(weight.shape)
            raise unknown_work(
                name, f"{where}.{key} {shape} of a {kind} is no known multiplication"
            )
    return total


def num_active_experts(config: Any, name: str) -> int:
    """Experts that a token is sent to.

    Args:
        config: of the text model.
        name: of the model, for the message.

    Raises:
        InputError: the config does not say.
    """
    inner = getattr(config, "ffn_config", None)  # DBRX
    active = getattr(config, "num_experts_per_tok", None) or getattr(inner, "moe_top_k", None)
    if active is None:
        raise unknown_work(name, "it has experts, and its config no num_experts_per_tok")
    return int(active)


def _active_share(model: nn.Module, where: str, config: Any, name: str) -> float:
    """1, or inside a list of experts (`...experts.3.w1`) the share of them that a token meets."""
    parts = where.split(".")
    for at, word in enumerate(parts[1:], start=1):
        if word.isdigit() and parts[at - 1] == "experts":
            num_experts = len(list(model.get_submodule(".".join(parts[:at])).children()))
            return num_active_experts(config, name) / num_experts
    return 1.0
