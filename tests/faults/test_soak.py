"""The soak: what it draws, what it makes of what it finds, and that it goes on where it was stopped itself."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from benchmarks.faults.run import DECK, Outcome, draw, headline, soak, table

N_CARDS = sum(DECK.values())


def outcome(n: int, *, newest: int, resumed_at: int, **found: list[str]) -> Outcome:
    empty: dict[str, list[str]] = {"other_losses": [], "damaged": [], "damaged_stable": []}
    return Outcome(n, "1 rank: at a random time", False, [-9], newest, n, resumed_at=resumed_at, **(empty | found))


def test_every_deck_holds_each_card_in_another_order_and_a_seed_draws_the_same_again() -> None:
    decks = [[draw(0, n) for n in range(first, first + N_CARDS)] for first in (0, N_CARDS)]
    for deck in decks:
        assert Counter((f.ranks, f.launched, f.kind) for f in deck) == Counter(DECK)
        assert sum(not f.is_stop for f in deck) == 50
    assert [f.kind for f in decks[0]] != [f.kind for f in decks[1]]
    assert [draw(0, n) for n in range(N_CARDS)] == decks[0] != [draw(1, n) for n in range(N_CARDS)]


def test_a_run_that_goes_on_elsewhere_with_other_losses_or_a_damaged_checkpoint_is_not_well() -> None:
    well, elsewhere = outcome(1, newest=6, resumed_at=6), outcome(2, newest=6, resumed_at=4)
    other = outcome(3, newest=6, resumed_at=6, other_losses=["train 5"])
    damaged = outcome(4, newest=6, resumed_at=6, damaged_stable=["step 6: missing"])
    assert [o.is_well for o in (well, elsewhere, other, damaged)] == [True, False, False, False]
    found = headline([well, elsewhere, other, damaged])
    assert (found["kills"], found["resumed"]) == (4, 3)
    assert (found["losses_identical"], found["damaged_stable_checkpoints"]) == (False, 1)
    row = table([well, elsewhere, other, damaged]).splitlines()[-1]  # steps done again: 1, 2, 3, 4
    assert row == "| 1 rank: at a random time | 4 | 3 | 2.5, 4 | 1 | 1 | 0 |"


def test_a_soak_that_was_stopped_goes_on_with_the_next_fault(standing_by: None, tmp_path: Path) -> None:
    seed = next(s for s in range(1000) if all(draw(s, n).ranks == 1 and not draw(s, n).is_stop and draw(s, n).operation
                                              for n in range(4)))
    first = soak(tmp_path, seed=seed, kills=1)
    both = soak(tmp_path, seed=seed, kills=2)
    assert [o.n for o in both[:len(first)]] == [o.n for o in first] and len({o.n for o in both}) == len(both) >= 2
    assert all(o.is_well for o in both), both
    assert [json.loads(line) for line in (tmp_path / "soak.jsonl").read_text().splitlines()] == [*map(asdict, both)]
