"""Parsing, choosing and checking patterns, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import InputError, PatternViolationError
from sparsify.masks.select import (
    find_violation,
    keep_mask_from_scores,
    require_pattern,
)
from sparsify.pattern import Pattern, check_divides
from tests.conftest import count_violations

TWO_FOUR = Pattern(2, 4, 0.5)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", Pattern(2, 4, 0.5)),
        ("4:8", Pattern(4, 8, 0.5)),
        ("1:2", Pattern(1, 2, 0.5)),
        ("1:4", Pattern(1, 4, 0.75)),
        ("unstructured:0.5", Pattern(0, 0, 0.5)),
        ("unstructured:.25", Pattern(0, 0, 0.25)),
    ],
)
def test_parse(text: str, pattern: Pattern) -> None:
    assert Pattern.parse(text) == pattern
    assert Pattern.parse(str(pattern)) == pattern
    assert pattern.is_structured == (":" in text and not text.startswith("unstructured"))


@pytest.mark.parametrize(
    "text",
    ["", "2", "4:2", "4:4", "0:4", "2:0", "-2:4", "2:4:8", "two:four", "1:1000", "unstructured",
     "unstructured:", "unstructured:0", "unstructured:1", "unstructured:1.5", "unstructured:nan",
     "unstructured:-0.5", "2:4 6"],
)  # fmt: skip
def test_parse_refuses(text: str) -> None:
    with pytest.raises(InputError, match="pattern") as caught:
        Pattern.parse(text)
    assert "\n" not in str(caught.value)


def test_parse_explains_the_number_that_yaml_makes_of_2_4() -> None:
    with pytest.raises(InputError, match=r"124 instead of text.*quotes"):
        Pattern.parse(124)  # type: ignore[arg-type]


@given(sparsity=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True))
def test_unstructured_text_round_trips(sparsity: float) -> None:
    pattern = Pattern(0, 0, sparsity)
    assert Pattern.parse(str(pattern)) == pattern


@given(
    sparsity=st.floats(0.01, 0.99),
    widths=st.lists(st.integers(1, 300), min_size=1, max_size=10),
)
def test_quotas_of_consecutive_blocks_fit_and_add_up(sparsity: float, widths: list[int]) -> None:
    pattern, start = Pattern(0, 0, sparsity), 0
    for width in widths:
        quota = pattern.num_kept(start + width) - pattern.num_kept(start)
        assert 0 <= quota <= width
        start += width
    assert abs(pattern.num_kept(start) - (1 - sparsity) * start) <= 0.5 + 1e-9


def test_check_divides_names_the_layer() -> None:
    check_divides("a.b", 8, TWO_FOUR)
    check_divides("a.b", 7, Pattern.parse("unstructured:0.5"))
    with pytest.raises(InputError, match=r"a\.b: 10 input columns .* groups of 4"):
        check_divides("a.b", 10, TWO_FOUR)


def masks_by_loop(scores: list[list[float]], pattern: Pattern) -> list[list[bool]]:
    """Sort each group by (score down, column up) and keep the first ones."""
    result = []
    for row in scores:
        keep = [False] * len(row)
        width = pattern.m or len(row)
        for start in range(0, len(row), width):
            order = sorted(range(start, start + width), key=lambda j: (-row[j], j))
            for column in order[: pattern.num_kept(width)]:
                keep[column] = True
        result.append(keep)
    return result


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(["2:4", "4:8", "1:2", "1:4", "3:4", "8:16", "unstructured:0.4"]),
    num_rows=st.integers(0, 4),
    data=st.data(),
)
def test_keep_mask_equals_the_loop_with_ties(
    pattern: str, num_rows: int, data: st.DataObject
) -> None:
    parsed = Pattern.parse(pattern)
    # Few distinct values, so that most groups have ties.
    values = st.lists(st.integers(0, 3).map(float), min_size=32, max_size=32)
    scores = [data.draw(values) for _ in range(num_rows)]
    mask = keep_mask_from_scores(torch.tensor(scores).reshape(num_rows, 32), parsed)
    assert mask.dtype == torch.bool
    assert mask.tolist() == masks_by_loop(scores, parsed)


def test_keep_mask_refuses_a_short_group() -> None:
    with pytest.raises(InputError, match="10 input columns"):
        keep_mask_from_scores(torch.zeros(2, 10), TWO_FOUR)


@pytest.mark.parametrize("text", ["2:4", "unstructured:0.5"])
def test_violations_are_found_where_they_are(text: str) -> None:
    pattern = Pattern.parse(text)
    weight = torch.zeros(5, 16, dtype=torch.bfloat16)
    for start in range(0, 16, 4):
        weight[:, start : start + 2] = 1e-30
    assert find_violation(weight, pattern) is None and count_violations(weight, pattern) == 0
    require_pattern([("fine", weight)], pattern)
    weight[3, 11] = float("nan")
    weight[4, 2] = -1.0
    place = (3, 8) if pattern.is_structured else (3, 0)
    assert find_violation(weight, pattern) == place
    assert count_violations(weight, pattern) == 2
    found = "8 to 11 hold 3" if pattern.is_structured else "0 to 15 hold 9"
    with pytest.raises(PatternViolationError, match=f"bad: row 3, columns {found} nonzero"):
        require_pattern([("fine", torch.zeros(1, 16)), ("bad", weight)], pattern)


def test_fewer_nonzeros_than_allowed_are_no_violation() -> None:
    assert count_violations(torch.zeros(3, 8), TWO_FOUR) == 0


def test_rows_of_an_unstructured_layer_may_share_its_nonzeros_unevenly() -> None:
    half = Pattern.parse("unstructured:0.5")
    weight = torch.zeros(4, 8)
    weight[0], weight[1] = 1.0, 1.0
    assert find_violation(weight, half) is None
    weight[3, 5] = 1.0
    assert find_violation(weight, half) == (0, 0)
    # Where a share of a row rounds down, that of the layer counts.
    assert Pattern.parse("unstructured:0.9").most_kept(4, 4) == 2
    assert half.most_kept(4, 5) == 4 * 3 and TWO_FOUR.most_kept(4, 8) == 16
