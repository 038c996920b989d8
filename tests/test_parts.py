"""Parts of a benchmark run in processes of their own: what one has found stays, whatever becomes of it."""

import multiprocessing
import os
import signal
import time

from benchmarks.parts import Running, run_parts


def fails(tiny, device):
    yield [1]
    raise MemoryError("no memory\nat all")


def grows(tiny, device):
    yield from ([1], [1, tiny])


def is_killed(tiny, device):
    yield [1]
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(tiny, device):
    yield [1]
    time.sleep(600)


def test_a_part_that_fails_leaves_the_others_and_what_it_had():
    parts, found = {"fails": fails, "grows": grows, "killed": is_killed}, {}
    run_parts(parts, ("fails", "killed"), "cpu", found.__setitem__, seconds=300)
    assert list(found) == ["fails", "killed", "grows"]
    assert all(result.pop("seconds") > 0 for result in found.values())
    assert found == {
        "fails": {"result": [1], "not_run": "MemoryError: no memory"},
        "killed": {"result": [1], "cut": "its process was killed, as for its memory"},
        "grows": {"result": [1, True]},
    }


def test_a_part_that_takes_too_long_is_stopped():
    running = Running(hangs, "cpu")
    running.begin()
    assert running.pipe.poll(100)
    found = running.finish(time.monotonic())
    assert (found["result"], found["cut"]) == ([1], "it took too long")
    assert not running.process.is_alive()


def test_a_part_does_nothing_before_it_is_told_to():
    running = Running(grows, "cpu")
    assert not running.pipe.poll(1)
    running.stop()
    assert not running.process.is_alive()


def test_no_part_is_begun_near_the_end():
    found, others = {}, multiprocessing.active_children()  # of tests before this one
    run_parts({"grows": grows, "hangs": hangs}, (), "cpu", found.__setitem__, seconds=60)
    assert found == dict.fromkeys(("grows", "hangs"), {"not_run": "no time was left"})
    assert set(multiprocessing.active_children()) <= set(others)
