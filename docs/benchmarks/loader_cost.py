"""What an image costs the default loader, and how often it needs Python's lock; several source trees in turn.

usage: python docs/benchmarks/loader_cost.py DATA CASE THREADS [ROUNDS [TREE ...]]

CASE: dino, dino-uint8 or single (see `fastssl bench loader`). TREE: folders to import fastssl from (default: this one);
after a warm-up each reads one epoch per round, so that a slow minute hits all alike. Printed for each: median (lowest,
highest) CPU and wall milliseconds per image; Python and C calls per image, of all threads, by the profiler, over an
epoch; how often the lock went from one thread to another, per batch (the interpreter's own count; CPython 3.11); and
the share of their time in which the decoding threads ran or waited for nothing but a core (Linux's own count), between
the first and the last of 30 batches: near 100 %, more cores would make as much more.
"""

import ctypes
import os
import statistics
import subprocess
import sys
import threading
import time

BATCH = 64


def work(data, case, threads):
    """Reads commands from stdin: time, calls or lock; an epoch each."""
    import numpy as np
    import torch

    from fastssl.augment import augment
    from fastssl.loaders.bench import CASES, _Part
    from fastssl.loaders.engine import make_loader
    from fastssl.loaders.sources import open_source

    torch.set_num_threads(1)
    views, floats = CASES[case][:2]
    counts = {}

    def count(frame, event, argument):
        if event in ("call", "c_call"):
            me = threading.get_ident()
            counts[me] = counts.get(me, 0) + 1

    def epoch(number):
        images = 0
        for batch in loader.epoch(number):
            images += len(augment(batch) if floats else batch)
        return images

    def runnable():
        with make_loader("ffcv", many, views, batch_size=BATCH, seed=0, workers=int(threads)) as loader:
            stream = loader.epoch(0)
            next(stream)
            before, begin = decoding(), time.perf_counter()
            for _ in range(28):
                next(stream)
            spent, end = decoding(), time.perf_counter()
            return sum(spent[task] - before[task] for task in spent) / len(spent) / (end - begin)

    source = open_source(data)
    many = _Part(source, np.resize(np.arange(len(source)), 30 * BATCH))
    with make_loader("ffcv", source, views, batch_size=BATCH, seed=0, workers=int(threads)) as loader:
        for number, command in enumerate(map(str.strip, sys.stdin)):
            if command == "calls":
                threading.setprofile(count)
                sys.setprofile(count)
                images = epoch(number)
                sys.setprofile(None)
                threading.setprofile(None)
                print(sum(counts.values()) / images, flush=True)
            elif command == "lock":
                before = switches()
                images = epoch(number)
                print((switches() - before) / (images / BATCH), flush=True)
            elif command == "runnable":
                print(100 * runnable(), flush=True)
            else:
                wall, cpu = time.perf_counter(), time.process_time()
                images = epoch(number)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                print(1e3 * cpu / images, 1e3 * wall / images, flush=True)


def decoding():
    """Seconds that each decoding thread has run or waited for a core so far."""
    spent = {}
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as name, open(f"/proc/self/task/{task}/schedstat") as numbers:
            if name.read().strip() == "fastssl-decode":
                spent[task] = sum(map(int, numbers.read().split()[:2])) / 1e9
    return spent


def switches():
    """How often the lock has changed hands; found in the interpreter's state beside the switch interval."""
    words = (ctypes.c_ulong * 400).in_dll(ctypes.pythonapi, "_PyRuntime")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.004321)
    found = [k for k in range(400) if words[k] == 4321]
    sys.setswitchinterval(interval)
    return words[found[0] + 3] if len(found) == 1 else float("nan")


def main(data, case, threads, rounds="5", *trees):
    trees = trees or (os.getcwd(),)
    jobs = [
        subprocess.Popen(
            [sys.executable, __file__, "--work", data, case, threads],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": tree},
        )
        for tree in trees
    ]  # fmt: skip

    def ask(command):
        answers = []
        for job in jobs:
            print(command, file=job.stdin, flush=True)
            answers.append([float(number) for number in job.stdout.readline().split()])
        return answers

    ask("time")
    times = [ask("time") for _ in range(int(rounds))]
    lock, runnable, calls = ask("lock"), ask("runnable"), ask("calls")
    for k, tree in enumerate(trees):
        cpu, wall = (
            f"{statistics.median(numbers):.2f} ({min(numbers):.2f}-{max(numbers):.2f})"
            for numbers in zip(*(answers[k] for answers in times), strict=True)
        )
        print(f"{case}, {threads} threads, {tree}: CPU {cpu} ms, wall {wall} ms, {calls[k][0]:.1f} calls per image; "
              f"the lock changes hands {lock[k][0]:.1f} times per batch of {BATCH}; decoding threads run or wait for a "
              f"core {runnable[k][0]:.1f} % of their time")  # fmt: skip
        jobs[k].stdin.close()
        jobs[k].wait()


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
