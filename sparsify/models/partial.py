"""Forwards of a model without some of its layers or sublayers, its weights as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.data.rows import TokenRows
from sparsify.models.calls import hidden_of, run_model
from sparsify.models.structure import find_blocks
from sparsify.models.sublayers import silent


class PartialModel:
    """A causal language model that can pass over blocks.

    Every block that is left gets what it gets in the whole model beside the hidden states (masks of
    its kind of attention), as it does in a checkpoint whose configuration names the kinds of the
    layers that are left.

    Args:
        model: with all its weights, in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = find_blocks(model)[1]
        self._rest: tuple[None, ...] | None = None
        """what comes after the hidden states in a block's answer; None: it answers a tensor"""

    @torch.no_grad()
    def inputs(
        self, rows: TokenRows, without: Collection[int] = (), quiet: Collection[nn.Module] = ()
    ) -> tuple[list[Tensor], Tensor]:
        """What each block gets, (B, T, D), and the logits (B, T, V); see `logits`."""
        found: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        def learn(_: nn.Module, __: Any, output: Any) -> None:
            hidden_of(output)
            self._rest = (None,) * (len(output) - 1) if isinstance(output, tuple) else None

        hooks = [b.register_forward_pre_hook(see, with_kwargs=True) for b in self.blocks]
        hooks += [self.blocks[0].register_forward_hook(learn)] * (not without)
        try:
            with self._passing(without, 0, None), silent(quiet):
                logits: Tensor = run_model(self.model, rows).logits
        finally:
            for hook in hooks:
                hook.remove()
        return found, logits

    @torch.no_grad()
    def logits(
        self, rows: TokenRows, without: Collection[int], quiet: Collection[nn.Module] = (),
        start: int = 0, hidden_BTD: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, V) logits. `inputs` of no blocks left out comes before this.

        Args:
            rows: the tokens.
            without: blocks that are passed over.
            quiet: modules that give zeros.
            start: block to begin with, whose input is `hidden_BTD`.
            hidden_BTD: hidden states there.
        """
        with self._passing(without, start, hidden_BTD), silent(quiet):
            logits: Tensor = run_model(self.model, rows).logits
        return logits

    @contextmanager
    def _passing(
        self, without: Collection[int], start: int, hidden_BTD: Tensor | None
    ) -> Iterator[None]:
        """Blocks before `start`, and those to leave out, hand on what they get; the last one before
        `start` gives `hidden_BTD`."""

        def stand_in(at: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                if at == start - 1 and hidden_BTD is not None:
                    hidden = hidden_BTD
                return hidden if self._rest is None else (hidden, *self._rest)

            return forward

        passed = [at for at in range(len(self.blocks)) if at < start or at in without]
        try:
            for at in passed:
                object.__setattr__(self.blocks[at], "forward", stand_in(at))
            yield
        finally:
            for at in passed:
                self.blocks[at].__dict__.pop("forward", None)
