"""The length that a time budget gives a run, on pretended clocks; nothing is trained here."""

import math
import random

import pytest

from contrastive.callbacks.time_budget import Pace, Work
from contrastive.data.plan import NO_END


def train(budget_s, step_s, *, setup_s=0.0, work=(), decisions=200):
    """Pretend to train as the callback does; return the seconds at the end, and every length the run had.

    Args:
        step_s: Seconds of a step, from its number and the seconds spent so far.
        work: (every, seconds) of other work, which is also due at the end.
    """
    pace, spent, step, lengths = Pace(float(budget_s)), float(setup_s), 0, []
    while not lengths or step < lengths[-1]:
        step, spent = step + 1, spent + step_s(step + 1, spent)
        pace.note_step(step, spent)
        total = lengths[-1] if lengths else None
        if total is None or (step < total and step % max(1, total // decisions) == 0):
            decided = pace.decide(step, total)
            lengths += [decided] if decided != total else []
        for number, (every, seconds) in enumerate(work):
            if step % every == 0 or (lengths and step == lengths[-1]):
                spent += seconds
                pace.note_work(f"work {number}", every, seconds)
    return spent, lengths


def steady(seconds):
    return lambda step, spent: seconds


def changing(at_s, before, after):
    return lambda step, spent: before if spent < at_s else after


def noisy(seconds, spread, seed):
    draw = random.Random(seed)
    return lambda step, spent: seconds * draw.lognormvariate(0, spread)


@pytest.mark.parametrize("step_s", [0.02, 0.3, 5.0])
def test_a_steady_run_ends_in_time_and_keeps_its_first_length(step_s):
    spent, lengths = train(600, steady(step_s))
    assert 0.97 * 600 < spent <= 600
    assert len(lengths) == 1


@pytest.mark.parametrize("step_s", [0.1, 0.3, 2.0])
@pytest.mark.parametrize("after", [0.25, 0.5, 2, 4])
@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_change_of_the_load_is_answered(step_s, after, at):
    spent, _ = train(600, changing(at * 600, step_s, step_s * after))
    assert spent == pytest.approx(600, rel=0.1)


@pytest.mark.parametrize("slow_s", [30.0, 120.0])
def test_slow_first_steps_and_a_slow_start_count_and_are_not_projected(slow_s):
    spent, lengths = train(600, lambda step, spent: slow_s if step <= 2 else 0.1, setup_s=60)
    assert spent == pytest.approx(600, rel=0.03)
    assert len(lengths) == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("spread", "changes", "by"), [(0.1, 3, 1.1), (0.5, 10, 1.2)])
def test_fluctuating_steps_hardly_change_the_length(seed, spread, changes, by):
    spent, lengths = train(600, noisy(0.2, spread, seed))
    assert spent == pytest.approx(600, rel=0.05)
    assert len(lengths) <= changes
    assert max(lengths) < by * min(lengths)


@pytest.mark.parametrize(
    "work", [[(200, 20.0)], [(100, 5.0), (150, 1.0), (10, 0.1)], [(1900, 60.0)], [(10**6, 15.0)]]
)
def test_other_work_takes_its_time_from_the_budget(work):
    spent, _ = train(600, steady(0.2), work=work)
    assert spent == pytest.approx(600, rel=0.05)


def test_a_budget_that_is_spent_before_anything_is_measured_ends_the_run_at_once():
    assert train(10, steady(0.1), setup_s=50)[1] == [3]
    spent, lengths = train(10, steady(4.0))
    assert lengths == [5]
    assert spent == 20


def test_a_length_is_changed_early_enough_for_the_learning_rate_to_follow():
    pace = Pace(100.0)
    for step in range(1, 51):
        pace.note_step(step, float(step))
    assert pace.decide(50, None) == 99
    assert pace.decide(50, 99) == 99
    assert pace.decide(50, 96) == 96  # not worth a change: 1% of 100, 4% of 49 and a step are allowed
    assert pace.decide(50, 95) == 99
    pace.note_step(51, 98.9)
    assert pace.decide(51, 99) == 53
    pace.note_step(52, 99.5)
    assert pace.decide(52, 53) == 53
    assert pace.decide(52, None) == 54


def test_a_run_of_few_steps_keeps_its_last_one():
    pace = Pace(30.0)
    for step in range(1, 29):
        pace.note_step(step, float(step))
        assert pace.decide(step, 29) == 29  # 30 would take 30 seconds, of which 1% is not to be spent
    assert pace.decide(28, 40) == 30


@pytest.mark.parametrize(("expected", "actual"), [(0.4, 0.4), (0.5, 0.4), (1.0, 1.0)])
def test_a_cheaper_first_half_is_foreseen(expected, actual):
    pace, spent, step, lengths = Pace(600.0, expected), 0.0, 0, [0]
    while step < (lengths[-1] or 10**9):
        step += 1
        total = lengths[-1] or NO_END
        spent += 0.5 * (actual if 2 * (step - 1) < total else 1)
        pace.note_step(step, spent, total)
        decided = pace.decide(step, lengths[-1] or None)
        lengths += [decided] if decided not in (None, lengths[-1]) else []
    assert 0.95 * 600 < spent <= 600
    assert max(lengths) < 1.1 * lengths[1]
    assert min(lengths[1:]) > 0.88 * lengths[1]


def test_the_speed_is_that_of_the_last_quarter_of_the_time_left():
    pace = Pace(100.0)
    for step in range(1, 41):
        pace.note_step(step, float(step))
    assert pace.step_s == 1
    for step, spent in zip(range(41, 51), range(42, 62, 2), strict=True):
        pace.note_step(step, float(spent))
    assert pace.step_s == 2  # of the last 10 of the 40 seconds left
    assert pace.end_s(50, 60) == 80


def test_nothing_is_measured_before_its_time():
    pace = Pace(1000.0)
    assert math.isnan(pace.step_s)
    for step in range(1, 22):
        pace.note_step(step, float(step))
        assert pace.decide(step, None) is None
    pace.note_step(22, 22.0)  # 20 seconds, 2%, after the two steps that are left out
    assert pace.decide(22, None) == 990


def test_work_is_due_at_its_distance_and_at_the_end():
    work = Work(200, 3.0)
    assert [work.rest_s(401, total) for total in (402, 600, 601, 1000)] == [3, 3, 6, 9]
    assert work.rest_s(400, 600) == 6  # that of step 400 is not done yet
    assert Work(None, 3.0).rest_s(400, 1000) == 3
