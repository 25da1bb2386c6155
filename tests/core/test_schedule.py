"""The learning rate: expected values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cprec.errors import ConfigError
from cprec.schedule import NEEDS_POSITIVE_FLOOR, SHAPES, Anneal, Return, Schedule, cycles, decay

lengths = {"peak": st.floats(1e-6, 1), "warmup": st.integers(0, 20), "floor": st.floats(0.001, 1)}


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """A schedule of any kind, of 30 to some hundred steps."""
    peak, warmup, floor = (draw(s) for s in lengths.values())
    total, shape = draw(st.integers(30, 300)), draw(st.sampled_from(sorted(SHAPES)))
    kind = draw(st.sampled_from(["constant", "wsa", "decay", "cycles", "rewarmed"]))
    if kind == "decay":
        return decay(peak, warmup, total, shape, floor)
    if kind == "cycles":
        return cycles(peak, warmup, [total, 2 * total, 4 * total], draw(st.integers(1, total - warmup)), shape, floor)
    constant = Schedule(peak, warmup, total)
    if kind == "constant":
        return constant
    steps = draw(st.integers(1, total - warmup))
    annealed = constant.branch(total - steps, steps, shape, floor)
    if kind == "wsa":
        return annealed
    left = draw(st.integers(total - steps + 1, total))
    back = Return(annealed.past_at(left)[0].anneal, left, draw(st.integers(0, 30)), draw(st.booleans()))
    return Schedule(peak, warmup, left + 60, returns=(back,))


def test_the_three_phases_have_the_rates_worked_out_by_hand() -> None:
    s = Schedule(0.8, warmup_steps=4, total_steps=14, anneal=Anneal(start=10, steps=4, shape="linear", floor=0.2))
    expected = {
        0: 0.2,    # 0.8 * 1/4
        2: 0.6,    # 0.8 * 3/4
        3: 0.8,    # the last step of the warm-up is at the peak
        9: 0.8,    # stable
        10: 0.8,   # the first step of the annealing still has the stable rate
        12: 0.48,  # halfway: 0.8 * (1 - 0.8 * 0.5)
        14: 0.16,  # 0.8 * 0.2, reached and kept
        99: 0.16,
    }
    assert {step: pytest.approx(s.lr(step)) for step in expected} == expected
    assert [s.phase(n) for n in (0, 3, 4, 9, 10, 13)] == ["warmup", "warmup", "stable", "stable", "anneal", "anneal"]
    assert s.corners() == [0, 4, 10, 13]


@pytest.mark.parametrize(("shape", "x", "floor", "expected"), [
    ("linear", 0.25, 0.0, 0.75),
    ("cosine", 0.5, 0.0, 0.5),
    ("cosine", 1 / 3, 0.2, 0.8),       # 0.2 + 0.8 * (1 + cos 60 deg) / 2
    ("sqrt", 0.25, 0.0, 0.5),          # 1 - sqrt(1/4)
    ("exponential", 0.5, 0.25, 0.5),   # sqrt(1/4)
    ("inverse", 0.5, 0.25, 0.4),       # 1 / (1 + 3/2)
])
def test_a_shape_has_the_value_worked_out_by_hand(shape: str, x: float, floor: float, expected: float) -> None:
    assert SHAPES[shape](x, floor) == pytest.approx(expected)


@pytest.mark.parametrize("shape", SHAPES)
@given(floor=st.floats(0.001, 1), a=st.floats(0, 1), b=st.floats(0, 1))
def test_every_shape_is_1_at_0_its_floor_at_1_and_never_rises(shape: str, floor: float, a: float, b: float) -> None:
    f = SHAPES[shape]
    assert f(0.0, floor) == pytest.approx(1)
    assert f(1.0, floor) == pytest.approx(floor)
    low, high = sorted((a, b))
    assert f(low, floor) >= f(high, floor) - 1e-12


@given(peak=st.floats(1e-6, 1), warmup=st.integers(0, 50), start=st.integers(0, 100), steps=st.integers(1, 50),
       shape=st.sampled_from(sorted(SHAPES)))
def test_branch_lr_equals_trunk_before_the_fork_and_at_its_first_step(
        peak: float, warmup: int, start: int, steps: int, shape: str) -> None:
    trunk = Schedule(peak, warmup, 200)
    branch = trunk.branch(start, steps, shape, 0.1)
    assert all(branch.lr(n) == trunk.lr(n) for n in range(start))
    assert branch.lr(start) == pytest.approx(trunk.lr(start))
    assert branch.total_steps == start + steps


@pytest.mark.parametrize("shape", sorted(NEEDS_POSITIVE_FLOOR))
def test_a_shape_that_cannot_reach_zero_says_so(shape: str) -> None:
    with pytest.raises(ConfigError, match="give a positive one"):
        Anneal(0, 10, shape, 0.0)


def test_an_unknown_shape_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        Anneal(0, 10, "cosin", 0.1)


@given(schedules())
def test_no_schedule_is_ever_above_its_peak_or_below_its_floor_after_the_warm_up(s: Schedule) -> None:
    floors = [a.floor for a in ([s.anneal] if s.anneal else []) + [r.anneal for r in s.returns]]
    low = 0.0 if any(r.from_zero for r in s.returns) else min(floors, default=1.0)
    for step in range(s.total_steps + 5):
        rate = s.lr(step) / s.peak_lr
        assert 0 < rate <= 1 + 1e-12
        assert step < s.warmup_steps or rate >= low - 1e-12


@given(schedules())
def test_every_phase_has_its_name_and_its_rates(s: Schedule) -> None:
    starts = {r.anneal.start for r in s.returns} | ({s.anneal.start} if s.anneal else set())
    for step in range(s.total_steps):
        phase, rate = s.phase(step), s.lr(step)
        if phase == "warmup":
            assert rate == pytest.approx(s.peak_lr * (step + 1) / s.warmup_steps)
        elif phase == "stable":
            assert rate == s.peak_lr
        elif phase in ("anneal", "decay") and step not in starts:
            assert rate <= s.lr(step - 1) + 1e-12
        elif phase == "rewarm" and s.phase(step - 1) == phase:
            assert rate >= s.lr(step - 1)


@given(schedules())
def test_the_rate_jumps_only_where_an_annealing_is_left_at_once_or_from_zero(s: Schedule) -> None:
    """A step changes the rate by no more than the steepest step of its phase's own formula does."""
    leaps = {r.end for r in s.returns if r.rewarm_steps == 0 or r.from_zero}
    for step in set(range(1, s.total_steps)) - leaps:
        before, now = s.lr(step - 1) / s.peak_lr, s.lr(step) / s.peak_lr
        anneals = [*(r.anneal for r in s.returns), *([s.anneal] if s.anneal else [])]
        steepest = max([1 / s.warmup_steps if s.warmup_steps else 0.0,
                        *(SHAPES[a.shape](0.0, a.floor) - SHAPES[a.shape](1 / a.steps, a.floor) for a in anneals),
                        *(SHAPES[a.shape](x / a.steps, a.floor) - SHAPES[a.shape]((x + 1) / a.steps, a.floor)
                          for a in anneals for x in range(a.steps)),
                        *(1 / r.rewarm_steps for r in s.returns if r.rewarm_steps)])
        assert abs(now - before) <= steepest + 1e-9, (step, before, now)


@given(schedules())
def test_corners_are_where_the_phase_changes(s: Schedule) -> None:
    changes = {n for n in range(1, s.total_steps) if s.phase(n) != s.phase(n - 1)}
    assert {0, s.total_steps - 1} | changes <= {*s.corners()}
    assert s.corners() == sorted({*s.corners()})


def test_cosine_and_linear_fall_from_the_warm_up_on_as_worked_out_by_hand() -> None:
    s = decay(0.8, 2, 10, "cosine", 0.0)
    assert [s.lr(n) for n in (0, 1, 2, 6, 10)] == pytest.approx([0.4, 0.8, 0.8, 0.4, 0.0])  # halfway: cos 90 deg = 0
    assert [s.phase(n) for n in (0, 1, 2, 9)] == ["warmup", "warmup", "decay", "decay"]
    s = decay(0.8, 0, 8, "linear", 0.5)
    assert [s.lr(n) for n in (0, 4, 7)] == pytest.approx([0.8, 0.6, 0.45])  # 0.8 * (1 - 0.5 * 7/8)


def test_wsd_s_anneals_each_cycle_and_goes_on_at_once_at_the_full_rate() -> None:
    s = cycles(1.0, 1, [4, 8, 12], 2, "linear", 0.0)
    assert [s.lr(n) for n in range(13)] == pytest.approx([1, 1, 1, 0.5, 1, 1, 1, 0.5, 1, 1, 1, 0.5, 0])
    assert [s.phase(n) for n in (0, 1, 2, 3, 4, 6, 10)] == [
        "warmup", "stable", "anneal", "anneal", "stable", "anneal", "anneal"]


@pytest.mark.parametrize(("from_zero", "expected"), [
    (False, [1.0, 0.75, 0.625, 0.75, 0.875, 1.0, 1.0]),  # left at 0.5: up by (1 - 0.5) / 4 each
    (True, [1.0, 0.75, 0.25, 0.5, 0.75, 1.0, 1.0]),
])
def test_the_way_back_from_an_annealing_has_the_rates_worked_out_by_hand(
        from_zero: bool, expected: list[float]) -> None:
    back = Return(Anneal(10, 4, "linear", 0.0), end=12, rewarm_steps=4, from_zero=from_zero)
    s = Schedule(1.0, 0, 40, returns=(back,))
    assert [s.lr(n) for n in range(10, 17)] == pytest.approx(expected)
    assert s.lr(15) == s.lr(16) == 1.0
    assert [s.phase(n) for n in (9, 10, 12, 15, 16)] == ["stable", "anneal", "rewarm", "rewarm", "stable"]


@given(schedules(), st.integers(1, 40), st.data())
def test_a_branch_of_any_stable_step_agrees_with_its_trunk_up_to_the_fork(
        trunk: Schedule, steps: int, data: st.DataObject) -> None:
    stable = [n for n in range(trunk.total_steps) if trunk.phase(n) == "stable"]
    if not stable:
        return
    fork = data.draw(st.sampled_from(stable))
    branch = trunk.branch(fork, steps, "sqrt", 0.1)
    assert all((branch.lr(n), branch.phase(n)) == (trunk.lr(n), trunk.phase(n)) for n in range(fork))
    assert branch.lr(fork) == trunk.lr(fork) == trunk.peak_lr


@given(schedules(), st.data())
def test_what_a_checkpoint_has_behind_it_gives_back_every_rate_before_it(trunk: Schedule, data: st.DataObject) -> None:
    step = data.draw(st.sampled_from([n for n in range(1, trunk.total_steps + 1) if trunk.phase(n) != "rewarm"]))
    after = Schedule(trunk.peak_lr, trunk.warmup_steps, step + 10, returns=trunk.past_at(step))
    assert [after.lr(n) for n in range(step)] == [trunk.lr(n) for n in range(step)]
    assert step < trunk.warmup_steps or after.lr(step) == trunk.peak_lr
