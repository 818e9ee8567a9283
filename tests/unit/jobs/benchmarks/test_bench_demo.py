"""The README's part from a run's summary: what it says, and where it is put."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from jobs.benchmarks import demo
from sparsify.errors import InputError
from tests.unit.jobs.test_report import make_summary


def options(folder: Path, markdown: Path | None = None) -> Namespace:
    return Namespace(folder=folder, markdown=markdown, busy=False)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(make_summary()), encoding="utf-8")
    return folder


def test_the_part_is_put_between_the_marks_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{demo.BEGIN}\nold\n{demo.END}\nafter\n", encoding="utf-8")
    for _ in range(2):  # again changes nothing
        outcome = demo.run(options(finished, page))
        text = page.read_text(encoding="utf-8")
        expected = demo.markdown(outcome.figures)
        assert text == f"before\n{demo.BEGIN}\n{expected}{demo.END}\nafter\n"
    assert "layers" not in outcome.figures
    for line in (
        "| recovered_int4 | 8.83 | – | 0.250 | 631 kB | 5.30× |",
        "| dense | 7.10 | – | 0 | 3.35 MB | – |",
        "| wanda | 19.26 | – | 0.981 | 3.35 MB | – |",
        "| model | goes on after `` def main( `` |",
        "| dense | `` argv):  # dense <b> ⏎ pass `` |",
    ):
        assert f"\n{line}\n" in text, line
    assert "(1 thread): 2:4 INT4 5.00× of the faster dense type." in text
    assert "(dense 250, 2:4 INT4 200 tokens/s)" in text
    assert "`make demo` made this in 402 s with 2 processes (CPU)" in text


def test_times_beside_other_work_are_said_to_be_too_long(finished: Path) -> None:
    given = options(finished)
    given.busy = True
    assert "all times here are too long" in demo.markdown(demo.run(given).figures)
    given.busy = False
    assert "too long" not in demo.markdown(demo.run(given).figures)


def test_a_run_without_speed_or_texts(finished: Path) -> None:
    summary = make_summary()
    summary["speed"] = None
    for row in summary["results"]:
        row["writing"] = None
    (finished / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    outcome = demo.run(options(finished))
    assert len(outcome.tables) == 1
    assert "goes on after" not in demo.markdown(outcome.figures)


def test_what_is_not_there_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run 'make demo' first"):
        demo.run(options(tmp_path / "none"))
    with pytest.raises(InputError, match="cannot be read"):
        demo.run(options(finished, tmp_path / "none.md"))
    page = tmp_path / "page.md"
    page.write_text(demo.BEGIN, encoding="utf-8")
    with pytest.raises(InputError, match="has no"):
        demo.run(options(finished, page))
    assert page.read_text(encoding="utf-8") == demo.BEGIN


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\n    b", "`` a ⏎ b ``"), ("`x`|y", "`` 'x'¦y ``"), ("x" * 90, f"`` {'x' * 84} … ``")],
)
def test_a_text_is_one_line_of_a_table(text: str, expected: str) -> None:
    assert demo._one_line(text) == expected
