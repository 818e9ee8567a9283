"""How long a piece of work still takes: by its own progress, whatever came before it."""

from __future__ import annotations

from jobs.runs.display import Estimate


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_tokenising_start_up_and_the_first_step_are_no_part_of_a_recoverys_speed() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    assert estimate.left_s(0, 1, "sources tokenised") is None
    clock.now_s = 40.0
    assert estimate.left_s(1, 1, "sources tokenised") is None
    clock.now_s = 90.0  # workers started, models loaded, one step done with all that it builds
    assert estimate.left_s(1, 100, "steps") is None
    clock.now_s = 92.0
    assert estimate.left_s(2, 100, "steps") == 2.0 * 98
    clock.now_s = 96.0
    assert estimate.left_s(5, 100, "steps") == 1.5 * 95


def test_steps_of_an_earlier_start_took_no_time_in_this_one() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    estimate.left_s(501, 1000, "steps")
    clock.now_s = 3.0
    assert estimate.left_s(502, 1000, "steps") == 3.0 * 498
    clock.now_s = 10.0
    assert estimate.left_s(401, 1000, "steps") is None, "rolled back: measured anew"
    clock.now_s = 11.0
    assert estimate.left_s(402, 1000, "steps") == 598.0
    clock.now_s = 12.0
    assert estimate.left_s(1000, 1000, "steps") is None
