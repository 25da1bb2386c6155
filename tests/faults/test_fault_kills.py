"""SIGKILL at chosen instants, requests to stop: the same command goes on, and only the last steps are done again."""

from __future__ import annotations

import signal
from collections.abc import Callable

from killable import STEPS, Run

from benchmarks.faults.checks import resumed_at
from benchmarks.faults.lives import KILLED, Moment
from cprec.errors import EXIT_REQUEUE

INSTANTS = [  # in this order, most in a save of their own; 8 and 16 are kept for good
    Moment("write", "/config.yaml.partial"),         # before the run folder has a config
    Moment("mkdir", "/step_00000002"),               # nothing is saved yet
    Moment("write", "/step_00000004/"),              # a rank's file is cut short
    Moment("fsync", "/step_00000006/"),              # it is written, but not yet on the disk
    Moment("write", "/step_00000008/state.json"),    # state.json itself is cut short
    Moment("rename", "/step_00000010/state.json"),   # it is whole, but has not its name
    Moment("unlink", "/step_00000010/"),             # what is left of that save is about to be removed
    Moment("rename", "/state.json.pruned"),          # a checkpoint is about to be pruned
    Moment("unlink", "/step_00000014/", count=2),    # a part of it is left
    Moment("write", "/metrics.jsonl", count=3),      # a line of metrics.jsonl is cut
    Moment("write", "/tensorboard/", count=2),
]


def test_a_run_killed_at_each_instant_of_saving_and_pruning_in_turn_ends_as_if_it_had_never_been(
        new_run: Callable[..., Run]) -> None:
    run = new_run()
    for instant in INSTANTS:
        before = run.findings().newest
        said = run.ends(KILLED, moment=instant)
        assert resumed_at(said) in (before, None), instant  # None: it died before it came so far
        assert run.unharmed().newest >= before, instant
    run.goes_on_to_the_end()


def test_a_rank_that_loses_the_other_one_ends_too_and_both_go_on_from_the_last_complete_checkpoint(
        new_run: Callable[..., Run]) -> None:
    run = new_run(ranks=2)
    for rank, instant in ((1, Moment("write", "/step_00000004/")), (0, Moment("rename", "/state.json"))):
        before = run.findings().newest
        life = run.start(moment=instant, dying_rank=rank)
        codes = life.end()
        assert codes[rank] == KILLED and codes[1 - rank] not in (0, None), life.said()
        assert run.unharmed().newest >= before
    life = run.started()
    life.kill()  # both at once, in a step or wherever they are
    assert life.end() == [KILLED, KILLED]
    assert run.unharmed().logged > 0
    run.goes_on_to_the_end()


def test_a_signal_to_one_rank_of_two_makes_both_save_and_no_step_is_done_twice(new_run: Callable[..., Run]) -> None:
    run = new_run(ranks=2)
    for number, rank, saving in ((signal.SIGUSR1, 1, 4), (signal.SIGTERM, 0, 12)):  # while that step is being saved
        instant = Moment("write", f"/step_{saving:08d}/", signal=number)
        said = run.ends(EXIT_REQUEUE, EXIT_REQUEUE, moment=instant, dying_rank=rank)
        found = run.unharmed()
        assert saving < found.newest == found.logged < STEPS
        assert f"saved step {found.newest} of" in said
    run.goes_on_to_the_end()
