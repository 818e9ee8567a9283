"""The choice of a way for many tokens: with ways and a clock of our own, no GPU needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.errors import InputError
from sparsify.kernels.cuda.card import shown
from sparsify.kernels.cuda.choice import TOKENS, Choices, choose, measure_ways
from sparsify.kernels.cuda.layout import Prepared
from sparsify.kernels.cuda.ways import Problem, Way

PROBLEM = Problem("int4", 64, 256, 128, False, "bfloat16")
VERSIONS = {"torch": "2.13.0", "triton": "3.7.1"}

# Seconds: decode is fast for few, expand for many, dense between; cusparselt wins at 4096.
TIMES = {
    32: {"decode": 1.0, "expand": 5.0, "dense": 2.0, "cusparselt": 3.0},
    256: {"decode": 4.0, "expand": 3.0, "dense": 2.0, "cusparselt": 1.9},
    4096: {"decode": 64.0, "expand": 10.0, "dense": 9.0, "cusparselt": 5.0},
}


def test_without_a_copy_the_faster_packed_way_is_taken_and_what_is_slower_than_dense_is_said() -> (
    None
):
    found = choose(TIMES, may_copy=False)
    assert found.ways == {32: "decode", 256: "expand", 4096: "expand"} and found.copy is None
    assert found.slower_than_dense == {256: 1.5, 4096: pytest.approx(10 / 9)}


def test_with_a_copy_nothing_is_slower_than_dense() -> None:
    found = choose(TIMES, may_copy=True)
    assert found.ways == {32: "decode", 256: "cusparselt", 4096: "cusparselt"}
    assert found.copy == "cusparselt" and not found.slower_than_dense
    # A little slower than dense anywhere, and the copy is the dense one.
    slower = {**TIMES, 256: {**TIMES[256], "cusparselt": 2.1}}
    found = choose(slower, may_copy=True)
    assert found.copy == "dense" and found.ways == {32: "decode", 256: "dense", 4096: "dense"}


def test_no_copy_is_held_that_nobody_uses() -> None:
    times = {number: {"decode": 1.0, "expand": 2.0, "dense": 1.5} for number in (32, 4096)}
    assert choose(times, may_copy=True).copy is None


def test_a_way_that_rounds_inputs_is_taken_only_if_asked_for() -> None:
    times = {32: {"decode": 2.0, "expand": 3.0, "dense": 2.5, "torchao": 1.0}}
    assert choose(times, may_copy=True).ways == {32: "decode"}
    assert choose(times, may_copy=True, may_round=True).ways == {32: "torchao"}


def test_numbers_between_count_as_the_next_larger() -> None:
    choices = Choices(None, "card", VERSIONS)
    assert choices.way(PROBLEM, 16) == "decode"  # nothing measured yet
    assert choices.way(PROBLEM, 64) == "decode" and choices.way(PROBLEM, 65) == "expand"
    choices.get(PROBLEM, lambda: TIMES)
    ways = [choices.way(PROBLEM, tokens) for tokens in (1, 16, 17, 32, 33, 256, 257, 9999)]
    assert ways == ["decode"] * 4 + ["expand"] * 4
    choices.found[PROBLEM.name] = choose({**TIMES, 32: {**TIMES[32], "expand": 0.5}}, False)
    assert choices.way(PROBLEM, 16) == "decode"  # the promise of few tokens needs no choice
    assert choices.way(PROBLEM, 17) == "expand"


def test_each_way_is_measured_with_its_copy_and_only_where_it_is_there() -> None:
    calls: list[tuple[str, int, int]] = []

    def way(name: str, has_copy: bool, is_here: bool = True) -> Way:
        def run(problem: Problem, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            calls.append((name, len(x), len(rest[2])))
            return x

        copy = (lambda problem, prepared: [torch.zeros(1)]) if has_copy else None
        return Way(run, copy, lambda problem: is_here)

    clock = iter(range(100))

    def seconds(call: Callable[[], object]) -> float:
        call()
        return float(next(clock))

    ways = {"decode": way("decode", False), "dense": way("dense", True),
            "cusparselt": way("cusparselt", True, is_here=False)}  # fmt: skip
    prepared = Prepared(torch.zeros(1), torch.zeros(1), None, None)
    times = measure_ways(
        PROBLEM, prepared, seconds, lambda n: torch.zeros(n, 256), ways, tokens=(32, 64)
    )
    assert times == {32: {"decode": 0.0, "dense": 2.0}, 64: {"decode": 1.0, "dense": 3.0}}
    assert calls == [("decode", 32, 0), ("decode", 64, 0), ("dense", 32, 1), ("dense", 64, 1)]


def never() -> dict[int, dict[str, float]]:
    raise AssertionError("measured again")


def test_choices_are_kept_by_card_and_software(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    first = Choices(folder, "NVIDIA H100 80GB HBM3", VERSIONS)
    chosen = first.get(PROBLEM, lambda: TIMES)
    assert first.file.name == "choices-nvidia-h100-80gb-hbm3.json"
    again = Choices(folder, "NVIDIA H100 80GB HBM3", VERSIONS)
    assert again.get(PROBLEM, never) == chosen
    # The same times under another rule: nothing has to be measured.
    assert Choices(folder, first.card, VERSIONS, may_copy=True).get(PROBLEM, never).copy
    for card, versions in (("NVIDIA A100", VERSIONS), (first.card, {"torch": "2.14.0"})):
        assert not Choices(folder, card, versions).found
    with pytest.raises(AssertionError, match="measured again"):
        again.get(Problem("int4", 64, 512, 128, False, "bfloat16"), never)


def test_choices_are_shown() -> None:
    choices = Choices(None, "card", VERSIONS)
    choices.get(PROBLEM, lambda: TIMES)
    name = "64x256-int4-g128-bfloat16"
    assert choices.rows()[:2] == [
        (name, 32, "decode", 1.0, 2.0), (name, 256, "expand", 3.0, 2 / 3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"card": "card"}',
     json.dumps({"card": "card", "versions": VERSIONS, "times_s": {"x": {"32": {"decode": 1}}}}),
     json.dumps({"card": "card", "versions": VERSIONS,
                 "times_s": {"x": {"32": {"dense": 1, "magic": 1}}}})],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "choices-card.json").write_text(content)
    with pytest.raises(InputError, match=r"choices-card.json: damaged .*; delete the file"):
        Choices(tmp_path, "card", VERSIONS)


def test_a_folder_that_cannot_be_made_is_said_once_and_times_stay_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choices = Choices(tmp_path / "file" / "below", "card", VERSIONS)
    with pytest.warns(RuntimeWarning, match=r"cannot be written \(Not a directory\); ways are"):
        chosen = choices.get(PROBLEM, lambda: TIMES)
    assert choices.get(PROBLEM, never) == chosen
    choices.get(Problem("int8", 64, 256, 0, False, "bfloat16"), lambda: TIMES)  # no second warning


def test_what_was_measured_is_shown(tmp_path: Path) -> None:
    assert shown(tmp_path) == f"nothing has been measured: {tmp_path} has no choices-CARD.json"
    Choices(tmp_path, "NVIDIA H100", VERSIONS).get(PROBLEM, lambda: TIMES)
    without = {32: {"decode": 2e-6, "expand": 3e-6}}
    Choices(tmp_path, "NVIDIA L4", {"torch": "2.11"}).get(PROBLEM, lambda: without)
    name = "64x256-int4-g128-bfloat16"
    lines = shown(tmp_path).splitlines()
    assert lines[0] == "NVIDIA H100 (torch 2.13.0, triton 3.7.1)" and len(lines) == 6
    assert lines[1].split() == [name, "32", "tokens", "decode", "1000000.0", "us,", "2.00", "times",
                                "as", "fast", "as", "dense"]  # fmt: skip
    assert lines[4] == "NVIDIA L4 (torch 2.11)"
    assert lines[5].split() == [name, "32", "tokens", "decode", "2.0", "us"]
    (tmp_path / "choices-bad.json").write_text('{"card": "bad"}')
    with pytest.raises(InputError, match=r"choices-bad.json: damaged \(KeyError\); delete it"):
        shown(tmp_path)


def test_a_way_that_fails_is_left_out_with_a_word_unless_it_is_one_that_every_card_has() -> None:
    def run(problem: Problem, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return x

    def fail(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    def measured(ways: dict[str, Way]) -> dict[int, dict[str, float]]:
        prepared = Prepared(torch.zeros(1), torch.zeros(1), None, None)
        return measure_ways(
            PROBLEM, prepared, lambda call: 1.0 + (call() is None),
            lambda n: torch.zeros(n, 256), ways, tokens=(32,),
        )  # fmt: skip

    with pytest.warns(RuntimeWarning, match=r"dense is not .* \(CUDA out of memory. Tried\)$"):
        times = measured({"decode": Way(run), "dense": Way(run, fail)})
    assert times == {32: {"decode": 1.0}} and not choose(times, may_copy=True).slower_than_dense
    with pytest.raises(torch.OutOfMemoryError):
        measured({"decode": Way(fail)})


def test_the_default_numbers_of_tokens_are_measured() -> None:
    assert TOKENS[0] > 16 and list(TOKENS) == sorted(TOKENS) and TOKENS[-1] == 4096
