"""The table of families: what it says of one that is done, and of those that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import bench
from jobs.benchmarks import families
from jobs.benchmarks.sides.family import STAGES
from sparsify.errors import InputError


def test_families_are_taken_through_every_stage(tmp_path: Path) -> None:
    page, record = tmp_path / "f.md", tmp_path / "f.json"
    words = ["families", "--families", "gpt_neox", "mixtral", "gpt2", "modernbert-decoder"]
    words += ["--output", str(page), "--record", str(record), "--workdir", str(tmp_path / "w")]
    assert bench.main(words) == 0
    assert not [path for path in (tmp_path / "w").iterdir() if path.is_dir()], "models are removed"
    found = json.loads(record.read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps({**found, "command": ""})
    neox, mixtral, gpt2, bert = found["figures"].values()
    assert families.is_done(neox) and families.is_done(mixtral)
    for row in (neox, mixtral):
        assert all(row[stage]["num_violations"] == 0 for stage in STAGES)
        assert row["quantize"]["difference"] == 0.0
        first, *_, last = row["recover"]["losses"]
        assert last < first
    assert neox["export"]["difference"] == 0.0
    # transformers sums fused experts in another order: 0 or 1e-6, by the processor.
    assert mixtral["export"]["difference"] < 1e-5
    # Embedding, head and norms are dense, and a Mixtral's routers; most of it are its experts.
    assert 0 < neox["prune"]["zero_share"] < mixtral["prune"]["zero_share"] < 0.5
    assert (neox["num_other_names"], gpt2["num_other_names"]) == (1, 0)  # embed_out
    assert neox["export"]["has_same_names"] and mixtral["export"]["has_same_names"]
    assert set(mixtral["dense"]) == {"block_sparse_moe.gate"}
    assert mixtral["held_whole"] == {"why": None}
    assert "Conv1D" in gpt2["prune"]["refused"] and "recover" not in gpt2
    # Without a recovery, what was pruned is quantised and exported.
    assert "logits are not" in bert["recover"]["refused"]
    assert bert["quantize"]["num_violations"] == bert["export"]["num_violations"] == 0
    text = page.read_text(encoding="utf-8")
    assert "4 families of transformers, of which 2 pass every stage" in text
    assert "| gpt2 | refused | – | – | – |" in text
    assert text == families.markdown(found["figures"], found["command"])
    assert [target["is_met"] for target in found["targets"]] == [False, True]


def test_a_family_that_is_not_known_is_refused(tmp_path: Path) -> None:
    options = bench.parser().parse_args(["families", "--families", "llama", "lama"])
    with pytest.raises(InputError, match="--families lama: use some of afmoe"):
        families.run(options)
