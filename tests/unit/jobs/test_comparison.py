"""The runs of a sweep beside each other: none is missed, figures are those of their summaries."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster import launch
from jobs import manage
from jobs.cli import submit
from jobs.reporting.comparison import compare_folder
from jobs.reporting.page import render_comparison
from jobs.reporting.tables import NARROWEST, runs_table
from sparsify.errors import InputError
from tests.unit.cluster.test_slurm import fake, job_in

__all__ = ["fake"]


def summary(**figures: Any) -> dict[str, Any]:
    """Of a run that pruned, recovered and quantised; `figures` are perplexities by name."""
    names = {"dense": 2.0, "wanda": 8.0, "recovered": 4.0, "recovered_int4": 4.5} | figures
    results = [
        {
            "name": name, "label": name, "perplexity": value, "kl": 0.1, "top1_agreement": 0.5,
            "log_gap_recovered": 0.5 if name.startswith("recovered") else None,
            "violations": None if name == "dense" else 0, "packed_bytes": 1000, "disk_bytes": 2000,
        }
        for name, value in names.items()
        if value is not None
    ]  # fmt: skip
    layers = [
        {"method": "wanda", "name": f"l{at}", "block": at, "relative_error": error}
        for at, error in enumerate((0.1, 0.2, 0.9))
    ]
    return {
        "schema": 1, "results": results, "layers": layers,
        "run": {"name": "x", "method": "wanda", "duration_s": 90.0,
                "command": "python -m jobs.prune prune.method=wanda run.seed=7 run.dir=x"},
        "recovery": {"num_tokens": 4096, "tokens_per_s": 1234.5},
    }  # fmt: skip


def put(folder: Path, value: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(value))


def plan(folder: Path, *runs: tuple[str, list[str]], command: str = "python -m jobs.prune") -> None:
    folder.mkdir(exist_ok=True)
    known = [{"folder": name, "words": words} for name, words in runs]
    (folder / "sweep.json").write_text(
        json.dumps({"schema": 1, "command": command, "runs": known})
    )  # fmt: skip


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs that are done, one that failed, one that never began, one of another command."""
    monkeypatch.delenv("TWOFOUR_SUBMITTED", raising=False)
    folder = tmp_path / "s"
    plan(
        folder,
        *((f"r{seed}", ["recipe=quick", "+prune.method=wanda", f"run.seed={seed}"])
          for seed in range(4)),
    )  # fmt: skip
    put(folder / "r0", summary())
    put(folder / "r1", summary(recovered=3.0, recovered_int4=None))

    def fail() -> None:
        with submit.remembered_here(folder / "r2", "prune", "python -m jobs.prune a=b", print):
            raise InputError("no such model")

    with pytest.raises(InputError):
        fail()
    put(folder / "other", summary())
    (folder / "notes").mkdir()
    return folder


def test_every_run_is_listed_with_its_state_and_figures(sweep: Path) -> None:
    found = compare_folder(sweep)
    assert [(run["run"], run["state"], run["exit_code"]) for run in found["runs"]] == [
        ("r0", "done", None), ("r1", "done", None), ("r2", "failed", 2),
        ("r3", "not started", None), ("other", "done", None),
    ]  # fmt: skip
    assert found["differs"] == ["recipe", "run.seed"]  # the other one has no recipe
    assert found["same"] == {"prune.method": "wanda"}
    assert found["runs"][4]["words"] == {"prune.method": "wanda", "run.seed": "7"}
    assert found["best"] == "r1"
    first, second, failed, *_ = found["runs"]
    assert {name: first[name] for name in (
        "dense", "one_shot", "recovered", "log_gap_recovered", "quantized", "quantized_as",
        "median_error", "violations", "num_tokens", "tokens_per_s", "packed_bytes", "duration_s",
    )} == {
        "dense": 2.0, "one_shot": 8.0, "recovered": 4.0, "log_gap_recovered": 0.5,
        "quantized": 4.5, "quantized_as": "int4", "median_error": 0.2, "violations": 0,
        "num_tokens": 4096, "tokens_per_s": 1234.5, "packed_bytes": 1000, "duration_s": 90.0,
    }  # fmt: skip
    assert (second["recovered"], second["quantized"]) == (3.0, None)
    assert failed["dense"] is None


def test_command_prints_a_table_and_writes_page_json_and_csv(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert manage.main(["compare", str(sweep)]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines()[:8])) <= 80
    for text in ("failed", "not started", "50.0 %", "INT4", "dense: perplexity 2.00"):
        assert text in said
    assert "r2: failed: exit code 2\n" in said
    assert json.loads((sweep / "compare.json").read_text()) == compare_folder(sweep)
    with (sweep / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["done", "done", "failed", "not started", "done"]
    assert [row["run.seed"] for row in rows] == ["0", "1", "2", "3", "7"]
    assert rows[0]["recovered"] == "4.0"
    page = (sweep / "compare.html").read_text()
    assert "2 runs not done" in page
    assert "Best of 5: " in page
    assert "<script" not in page


def test_places_of_the_bars(sweep: Path) -> None:
    """The bar of a run is its log gap: half of it is won back where the share is a half."""
    page = render_comparison(compare_folder(sweep))
    first = page.split('title="r0: done, perplexity 4.00"')[1]
    spans = re.findall(r'class="span (\w+)" style="left:([\d.]+)%;width:([\d.]+)%"', first)[:2]
    assert [tone for tone, _, _ in spans] == ["loss", "regained"]
    assert float(spans[0][2]) == pytest.approx(float(spans[1][2]), abs=0.02)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)>[red]"
    folder = tmp_path / "s"
    plan(folder, ("a", [f"model.path={bad}"]), ("b", ["model.path=b\nc"]), command=bad)
    found = compare_folder(folder)
    page = render_comparison(found)
    assert "<img" not in page
    assert "&lt;img" in page
    shown = runs_table(found, NARROWEST)
    assert shown.columns[0]._cells[0].plain == bad


@pytest.mark.parametrize(
    ("shown", "state"),
    [
        ("echo 'JobState=RUNNING NodeList=n1'", "running"),
        ("echo 'JobState=COMPLETED'", "done"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "unknown"),
    ],
)
def test_state_is_the_schedulers_word(tmp_path: Path, fake, shown: str, state: str) -> None:
    fake(scontrol=shown)
    launch.remember(
        job_in(tmp_path / "s" / "a", id="12_0", typed="python -m jobs.prune run.seed=1")
    )
    (run,) = compare_folder(tmp_path / "s")["runs"]
    assert (run["state"], run["words"]) == (state, {"run.seed": "1"})
    # Figures of what was there before are shown, and said to be so.
    put(tmp_path / "s" / "a", summary())
    (run,) = compare_folder(tmp_path / "s")["runs"]
    assert run["recovered"] == 4.0
    assert ("figures are of an earlier command" in run["detail"]) == (state == "running")


def test_damaged_or_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert manage.main(["compare", str(tmp_path / "none")]) == 2
    assert "no such folder; give that of a sweep" in capsys.readouterr().err
    assert manage.main(["compare", str(tmp_path)]) == 2
    assert "holds no runs" in capsys.readouterr().err
    folder = tmp_path / "s"
    put(folder / "a", summary())
    (folder / "b").mkdir()
    (folder / "b" / "summary.json").write_text("{")
    found = {run["run"]: run for run in compare_folder(folder)["runs"]}
    assert found["a"]["state"] == "done"
    assert found["b"]["state"] == "unknown"
    assert "damaged" in found["b"]["detail"]
    (folder / "sweep.json").write_text("[")
    with pytest.raises(InputError, match=r"sweep\.json: damaged"):
        compare_folder(folder)


def test_without_scores_the_best_is_that_of_the_least_error(tmp_path: Path) -> None:
    for name, errors in (("a", (0.2, 0.3)), ("b", (0.1, 0.2))):
        value = summary()
        value["results"] = []
        for layer, error in zip(value["layers"], errors, strict=False):
            layer["relative_error"] = error
        put(tmp_path / name, value)
    found = compare_folder(tmp_path)
    assert found["best"] == "b"
    page = render_comparison(found)
    assert "median error 0.200" in page
    assert 'id="errors"' in page
    assert 'id="perplexity"' not in page
