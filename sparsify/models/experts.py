"""Experts of a mixture as linear layers.

`models.unfuse` puts these modules in the place of the families' own.
Shape suffixes: E experts, M inner size of an expert, D hidden size, T tokens, K experts of a token,
S = T K pairs of a token and one of its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

STACK_BYTES = 2**28
"""of the largest matrix of experts that are solved together, in float32; 7 to 13 times as much is
in use meanwhile"""


def num_stacks(num_experts: int, num_outputs: int, num_inputs: int) -> int:
    """Stacks of even sizes, as large as `STACK_BYTES` lets them be, of a layer of every expert."""
    most = max(1, STACK_BYTES // (4 * num_inputs * max(num_outputs, num_inputs)))
    return -(-num_experts // most)


class Expert(nn.Module):
    """One expert; its linears are children under the names that the checkpoint has for them.

    Args:
        linears: gate (not in all families), up and down -> name and linear.
        mix: what comes between: (gate's output or None, up's output) -> down's input.
    """

    tokens_T: Tensor
    """ids, in rising order, of the tokens of the last forward, counted over the whole batch"""

    def __init__(
        self, linears: Mapping[str, tuple[str, nn.Linear]],
        mix: Callable[[Tensor | None, Tensor], Tensor],
    ) -> None:  # fmt: skip
        super().__init__()
        self._names = {role: name for role, (name, _) in linears.items()}
        self._mix = mix
        for name, linear in linears.values():
            self.add_module(name, linear)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """The expert's output for its tokens, (T, D)."""
        of = {role: self.get_submodule(name) for role, name in self._names.items()}
        gate_TM = of["gate"](hidden_TD) if "gate" in of else None
        output_TD: Tensor = of["down"](self._mix(gate_TM, of["up"](hidden_TD)))
        return output_TD

    def reads_input(self, name: str) -> bool:
        """Whether a child reads what the router sends here, and not what another child makes."""
        return name != self._names["down"]


class RoutedExperts(nn.Module):
    """All experts of one layer, children "0", "1", ...; computes what the fused module does.

    Every expert is called in every forward, also on no tokens: processes that share the weights
    then gather them in the same order, and each weight has a gradient.
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)

    def forward(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Send every token to its experts and add up what these make of it.

        Args:
            hidden_TD: all tokens of the batch; DBRX gives (rows, tokens, D).
            index_TK: int, the experts of each.
            weights_TK: how much each of them counts.

        Returns:
            As `hidden_TD` in shape and dtype, in which a token's experts are added up in the
            order of `index_TK`: the same numbers in every run.

        Cost: that of the experts on T K tokens, and one wait for the device; launches grow with E.
        """
        experts: list[Any] = list(self.children())
        size, hidden_TD = hidden_TD.shape, hidden_TD.flatten(0, -2)
        order_S = index_TK.flatten().argsort(stable=True)
        tokens_S = order_S // index_TK.shape[1]
        counts = token_counts(index_TK, len(experts))
        outputs = []
        for expert, tokens_T in zip(experts, tokens_S.split(counts), strict=True):
            expert.tokens_T = tokens_T
            outputs.append(expert(hidden_TD[tokens_T]))
        place_S = torch.empty_like(order_S)
        place_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        outputs_TKD = torch.cat(outputs)[place_S].view(*index_TK.shape, -1)
        return (outputs_TKD * weights_TK[..., None]).sum(1).to(hidden_TD.dtype).view(size)


class ScaledExperts(RoutedExperts):
    """Those of Llama 4, whose router scales what its experts read and not what they make of it.

    The family's code hands every token to every expert, scaled by 0 where it is not sent there.
    Experts have no biases, so that zeros come out: such tokens are left out here.

    Args:
        experts: of the layer.
        num_active: experts of a token; taken for granted on the meta device alone.
    """

    def __init__(self, experts: list[Expert], num_active: int) -> None:
        super().__init__(experts)
        self._num_active = num_active

    def forward(self, scaled_SD: Tensor) -> Tensor:  # type: ignore[override]
        """What each expert makes of its tokens, zeros for the others.

        Args:
            scaled_SD: all tokens of the batch as each expert reads them, S = E T, expert by expert.

        Returns:
            (S, D) in the same order.

        Cost: see `RoutedExperts.forward`; one more pass over the inputs.
        """
        experts: list[Any] = list(self.children())
        num_tokens = len(scaled_SD) // len(experts)
        is_sent_ET = scaled_SD.ne(0).any(-1).view(len(experts), num_tokens)
        if scaled_SD.is_meta:
            counts = even_counts(self._num_active * num_tokens, len(experts))
            sent_S = torch.arange(sum(counts), device=scaled_SD.device)
        else:
            sent_S = is_sent_ET.flatten().nonzero()[:, 0]
            counts = is_sent_ET.sum(1).tolist()
        outputs = []
        for expert, pairs_T in zip(experts, sent_S.split(counts), strict=True):
            expert.tokens_T = pairs_T % num_tokens
            outputs.append(expert(scaled_SD[pairs_T]))
        return torch.zeros_like(scaled_SD).index_copy(0, sent_S, torch.cat(outputs))


def token_counts(index_TK: Tensor, num_experts: int) -> list[int]:
    """How many tokens each expert is sent; waits for the device.

    Tensors on the meta device have no values: each is sent as many there.
    """
    if index_TK.is_meta:
        return even_counts(index_TK.numel(), num_experts)
    counts: list[int] = torch.bincount(index_TK.flatten(), minlength=num_experts).tolist()
    return counts


def even_counts(num_pairs: int, num_experts: int) -> list[int]:
    """Pairs of a token and an expert, dealt out so that no expert has two more than another."""
    edges = [at * num_pairs // num_experts for at in range(num_experts + 1)]
    return [stop - start for start, stop in pairwise(edges)]


@dataclass(frozen=True)
class ExpertLayer:
    """What is known of a linear layer of an expert."""

    expert: Expert
    kind: str
    """its name in the block with * for the expert's number; the same for all experts"""
    reads_input: bool
    """see `Expert.reads_input`"""


def expert_layers(block: nn.Module) -> dict[str, ExpertLayer]:
    """The linear layers of a block's experts, by their names relative to the block."""
    return {
        f"{path}.{number}.{name}": ExpertLayer(expert, f"{path}.*.{name}", expert.reads_input(name))
        for path, module in block.named_modules()
        if isinstance(module, RoutedExperts)
        for number, expert in module.named_children()
        if isinstance(expert, Expert)
        for name, _ in expert.named_children()
    }
