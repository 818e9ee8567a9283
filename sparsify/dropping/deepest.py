"""The deepest layers but the last: no run of the model, and more healing than others need.

The "simple" strategy of Gromov et al. 2024 (arXiv 2403.17887, section 4.4): layers L-n to L-1 of
their count from 1, so that the last one stays.
"""

from __future__ import annotations

from sparsify.dropping._base import Choice, Rule, Task, Unit


def choose(task: Task) -> Choice:
    """Layers L-1-n to L-2, counted from 0, of a model of L layers."""
    first = task.num_layers - 1 - task.num_dropped
    return Choice(tuple(Unit(layer) for layer in range(first, task.num_layers - 1)))


RULE = Rule("deepest", "the deepest but the last; the model is not run", choose, needs_rows=False)
