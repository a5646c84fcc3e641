import os
import signal
import subprocess
import sys
import time

import pytest

from fastssl.loaders.pool import WorkerDied, ordered


def slow_first(task: int) -> int:
    time.sleep(0.2 if task == 0 else 0)
    return task * 10


def kill_at_seven(task: int) -> int:
    if task == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def fail_at_three(task: int) -> int:
    if task == 3:
        raise ZeroDivisionError("three")
    return task


def start(value: int) -> None:
    global started
    started = value


def what_was_started(_: int) -> int:
    return started


def test_results_come_in_order():
    assert list(ordered(slow_first, range(50), 3)) == [10 * k for k in range(50)]


def test_workers_are_started_with_their_arguments():
    assert list(ordered(what_was_started, range(3), 2, start, (5,))) == [5, 5, 5]


def test_a_killed_worker_ends_the_work():
    with pytest.raises(WorkerDied, match=r"a worker process died .* try fewer workers"):
        list(ordered(kill_at_seven, range(100), 2))


def test_an_exception_in_a_worker_is_raised():
    with pytest.raises(ZeroDivisionError, match="three"):
        list(ordered(fail_at_three, range(100), 2))


def test_tasks_are_taken_a_few_at_a_time():
    taken = []
    results = ordered(abs, (taken.append(k) or k for k in range(1000)), 2)
    next(results)
    assert len(taken) < 20
    results.close()


SCRIPT = """
import os, sys, time
from fastssl.loaders.pool import ordered
def task(k):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(60)
list(ordered(task, range(10), 2))
"""


def test_workers_end_with_a_killed_parent():
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 100
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
