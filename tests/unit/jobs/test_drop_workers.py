"""The workers of stage drop: two choose the layers that one chooses, by the same figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.plain import PlainCluster
from cluster.spec import ClusterSpec
from conf.options.data import DataConfig
from conf.options.drop import DropConfig
from conf.options.run import RunConfig
from conf.schema import Config
from jobs.workers.drop import drop_on_worker
from sparsify.files import embedded_path

_TEXT = Path(__file__).parents[2] / "golden" / "text.py.txt"


def dropped(folder: Path, num_workers: int, rule: str) -> dict[str, Any]:
    """Figures of dropping two layers by some workers, on 11 rows, which two cannot share evenly."""
    lines = _TEXT.read_text(encoding="utf-8").splitlines(keepends=True)
    text = folder / "text.txt"
    text.write_text(
        "<|endoftext|>".join("".join(lines[at : at + 20]) for at in range(0, len(lines), 20)),
        encoding="utf-8",
    )
    config = Config(
        stages=["drop"],
        run=RunConfig(),
        data=DataConfig(calibration=str(text), sequence_length=32),
        drop=DropConfig(rule=rule, num_layers=2, num_rows=11, batch_size=2),
    )
    scratch = folder / f"scratch-{num_workers}"
    scratch.mkdir()
    payload = {
        "config": config, "source": embedded_path(), "dense": embedded_path(),
        "folder": folder / f"model-{num_workers}", "scratch": scratch,
    }  # fmt: skip
    spec = ClusterSpec(num_workers=num_workers, executor="plain")
    with PlainCluster(spec, lambda event: None) as cluster:
        found: dict[str, Any] = cluster.run_workers("drop", drop_on_worker, payload, folder)
    return found


def numbers(value: Any) -> list[float]:
    """Every number in plain values, in order."""
    if isinstance(value, dict):
        return [number for one in value.values() for number in numbers(one)]
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize(("rule", "figure"), [("angular", "distances"), ("greedy", "rounds")])
def test_two_workers_choose_as_one_does(rule: str, figure: str, tmp_path: Path) -> None:
    one, two = (dropped(tmp_path, num_workers, rule) for num_workers in (1, 2))
    assert len(one["dropped_layers"]) == 2
    assert one["num_rows"] == 11
    assert len(numbers(one[figure])) >= 7
    # Sums of float64 in another order: the figures differ in the last digits at most.
    assert numbers(two.pop(figure)) == pytest.approx(numbers(one.pop(figure)), rel=1e-6)
    assert two == one
    files = [tmp_path / f"model-{number}" / "model.safetensors" for number in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()
