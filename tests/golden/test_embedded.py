"""A golden run: what each method does to the embedded model, against figures on record.

`pytest --update-golden` writes the figures anew; a missing or different file is a failure.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sparsify.calibration.hidden_states import Memory
from sparsify.comm import Comm
from sparsify.data.rows import token_rows
from sparsify.evaluation.perplexity import evaluate_rows
from sparsify.methods import PruneParams, available_methods, get_method
from sparsify.models.load import load_pair
from sparsify.pattern import Pattern
from sparsify.pruning.prune import prune_model

RECORD = Path(__file__).with_name("embedded.json")
TEXT = Path(__file__).with_name("text.py.txt")


def figures(method: str) -> dict:
    """Perplexities and layer errors of pruning with fixed text, independent of the machine."""
    dense, tokenizer = load_pair("embedded")
    model, _ = load_pair("embedded")
    rows = token_rows([TEXT.read_text(encoding="utf-8")], tokenizer, 128)
    result = prune_model(
        model, rows[::2], get_method(method), Pattern.parse("2:4"), PruneParams(),
        comm=Comm.single(), memory=Memory(4),
    )  # fmt: skip
    scores = evaluate_rows(model, rows[1::2], 8, dense)
    return {
        "num_rows": len(rows),
        "perplexity": scores.perplexity,
        "kl": scores.kl,
        "dense_perplexity": evaluate_rows(dense, rows[1::2], 8).perplexity,
        "relative_errors": {layer.name: layer.relative_error for layer in result.layers},
    }


def close(found: object, expected: object, rel_tol: float) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            close(found[key], expected[key], rel_tol) for key in expected
        )
    return math.isclose(found, expected, rel_tol=rel_tol)


def test_every_method_gives_the_figures_on_record(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(1)
    found = {name: figures(name) for name in sorted(available_methods())}
    if request.config.getoption("--update-golden"):
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(RECORD.read_text(encoding="utf-8"))
    assert found.keys() == expected.keys()
    for name in expected:
        # Another BLAS rounds differently, which can flip near ties in a mask. Measured: sums in
        # float64 in place of float32 moved the KL of admm by 1.6 %; a processor with AVX-512 moved
        # that of sparsegpt_teacher by 1.6 %, and the error of one layer, the writer of the last
        # block after twofour, by 3.9 %. A wrong update or damping moves errors by tenths.
        layers, wanted = found[name].pop("relative_errors"), expected[name].pop("relative_errors")
        assert close(found[name], expected[name], rel_tol=0.03), name
        assert close(layers, wanted, rel_tol=0.08), name
