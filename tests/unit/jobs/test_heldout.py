"""Held-out scores on the way: domains of a mix, the same figures on any number of workers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from conf.options.data import DataConfig
from conf.options.distill import DistillConfig
from conf.schema import Config
from jobs.training.heldout import FIGURES, Heldout, as_metrics, domains, write_heldout
from sparsify.data.store import TokenStore
from sparsify.models.load import load_tokenizer


def sources(folder: Path) -> list[Path]:
    """Two texts of many documents, of different words."""
    paths = []
    for name, word in (("cats", "the cat sat"), ("dogs", "a dog ran far")):
        path = folder / f"{name}.txt"
        documents = (f"{word} {i} times and again " * (i % 7 + 3) for i in range(300))
        path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
        paths.append(path)
    return paths


def make(folder: Path, model: Path) -> TokenStore:
    cats, dogs = sources(folder)
    data = DataConfig(mix=[f"0.7 {cats}", f"0.3 {dogs}"], sequence_length=16, heldout_share=0.2)
    config = Config(data=data, distill=DistillConfig(heldout_tokens=16 * 8, batch_size=16))
    write_heldout(config, load_tokenizer(model), folder / "heldout")
    return TokenStore.open(folder / "heldout")


def test_every_source_of_a_mix_is_a_domain(tmp_path: Path) -> None:
    cats, dogs = sources(tmp_path)
    data = DataConfig(mix=[f"0.7 {cats}", f"0.3 {dogs}"])
    assert list(domains(data)) == ["cats.txt", "dogs.txt"]
    assert domains(data)["dogs.txt"].calibration == str(dogs)
    assert list(domains(DataConfig(mix=data.mix, heldout=str(cats)))) == ["heldout"]
    assert list(domains(DataConfig(calibration=str(cats)))) == ["heldout"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scores_are_means_over_each_domain_on_any_number_of_workers(
    tmp_path: Path, tiny_model_dir: Path, world_size: int
) -> None:
    store = make(tmp_path, tiny_model_dir)
    assert [source.num_rows for source in store.sources] == [8, 8]

    def forward(rows, weights, counts) -> dict[str, torch.Tensor]:
        assert (weights.kl, weights.ce, counts.kl) == (1.0, 1.0, 1.0)
        total = rows.ids_NT[rows.is_taught_NT].sum().double()
        return {figure: total * (i + 1) for i, figure in enumerate(FIGURES)}

    parts: list[torch.Tensor] = []
    for rank in range(world_size):

        def keep(values: torch.Tensor) -> torch.Tensor:
            parts.append(values)
            return values

        Heldout(store, rank, world_size, 3, "cpu").score(forward, keep)
    for index, name in enumerate(("cats.txt", "dogs.txt")):
        rows = store.rows(range(8 * index, 8 * index + 8))
        sums = torch.stack(parts[index::2]).sum(0)
        expected = rows.ids_NT[rows.is_taught_NT].double().sum()
        assert sums[0] == expected, name
        assert sums[3] == rows.is_taught_NT.sum()
    if world_size == 1:  # without a teacher
        values = {"ce": torch.tensor(6.0)}
        scored = Heldout(store, 0, 1, 100, "cpu", has_teacher=False).score(
            lambda rows, weights, counts: values if weights.kl == 0 else {}, lambda sums: sums
        )
        num_ce = int(store.rows(range(8)).has_next_NT.sum())
        assert scored["cats.txt"] == {"kl": None, "ce": 6.0 / num_ce, "agreement": None}
        assert sorted(as_metrics(scored, "distill")) == [f"distill/heldout_ce/{n}" for n in scored]
    if world_size == 1:
        found = Heldout(store, 0, 1, 3, "cpu").score(forward, lambda values: values)
        rows = store.rows(range(8))
        expected = rows.ids_NT[rows.is_taught_NT].double().sum() / rows.is_taught_NT.sum()
        assert math.isclose(found["cats.txt"]["kl"], expected)
        assert "distill/heldout_kl/cats.txt" in as_metrics(found, "distill")
