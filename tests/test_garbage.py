"""Between steps, garbage is collected only on request; after a run, as usual."""

import gc

import pytest

from ddpm import run
from ddpm.system.processes import garbage_kept
from ddpm.system.signals import Preempted


@pytest.fixture
def collections():
    """The generations of all collections since the start of the test."""
    seen = []

    def note(phase, info):
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def make_garbage():
    for _ in range(5000):
        loop = []
        loop.append(loop)


def test_between_two_calls_that_are_due_nothing_is_collected(collections):
    with garbage_kept() as tidy:
        make_garbage()
        assert collections  # as usual, before the first call
        tidy(False)
        del collections[:]
        make_garbage()
        tidy(False)
        assert collections == []
        tidy(True)
        assert collections == [2]
    make_garbage()
    assert len(collections) > 1


@pytest.mark.parametrize("automatic", [True, False])
def test_afterwards_python_collects_as_it_did_before_also_where_the_block_fails(automatic):
    def block():
        with garbage_kept() as tidy:
            tidy(False)
            assert (gc.get_freeze_count() > 0) == automatic
            raise ZeroDivisionError

    try:
        if not automatic:
            gc.disable()
        with pytest.raises(ZeroDivisionError):
            block()
        assert (gc.isenabled(), gc.get_freeze_count()) == (automatic, 0)
    finally:
        gc.enable()


def test_a_run_that_ends_or_is_told_to_stop_leaves_the_collector_as_it_was(tiny, tmp_path):
    settings = [*tiny, "training.steps=2", f"outputs={tmp_path}"]
    with pytest.raises(Preempted):
        run([*settings, "runtime.max_hours=1e-9"])
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)
    run(settings)
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)
