"""The learning rate: expected values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cprec.errors import ConfigError
from cprec.schedule import NEEDS_POSITIVE_FLOOR, SHAPES, Anneal, Schedule


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
