"""How long a checkpoint stops training: the copy that the next step waits for, and what the writing thread costs steps.

    python docs/benchmarks/checkpoint.py FOLDER [--methods mae dino] [--model vit_base] [--steps 4] [--rounds 3]

Random weights and drawn images; FOLDER is on the disk that is measured. For each method: bytes of a checkpoint; seconds
that a save stops the loop when it waits for the file, and when a thread writes it, with the seconds that this thread of
the loop computes (medians; the first save, which takes the memory, is left out); seconds per step with and without the
thread (--steps 0: not measured).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from fastssl.loaders.synthetic import draw_images
from fastssl.parse import parse_pretrain
from fastssl.pretraining.trainer import Trainer


def measure(method: str, model: str, steps: int, rounds: int, folder: Path) -> str:
    """One method's numbers, as a line."""
    values = {"data.path": draw_images(folder / "images", train=16, val=4) / "train", "data.batch_size": 1}
    values |= {"data.workers": 1, "model.name": model, "run.dir": folder / method, "schedule.epochs": 100}
    values |= {"monitor.pictures": 0, "run.hang_s": 0}
    run = Trainer(parse_pretrain([f"--method={method}", *(f"--{key}={value}" for key, value in values.items())])[0])
    assert run.folder is not None
    assert run.path is not None
    run.folder.mkdir(parents=True, exist_ok=True)
    stream = run.micro_batches()

    def step() -> float:
        begin = time.perf_counter()
        run.train_step(stream)
        float(run.ring.rows[-1]["loss"])  # waits for the device
        return time.perf_counter() - begin

    def save(wait: bool) -> tuple[float, float]:
        begin, computed = time.perf_counter(), time.thread_time()
        run.save_last(again=True, wait=wait)
        return time.perf_counter() - begin, time.thread_time() - computed

    step()  # the optimizer's state
    save(wait=True)
    waited, copied, alone, meanwhile = [], [], [], []
    for _ in range(rounds):
        waited.append(save(wait=True))
        alone += [step() for _ in range(steps)]
        copied.append(save(wait=False))
        meanwhile += [step() for _ in range(steps) if not run.saver.idle()]
        run.saver.wait()
    stream.close()
    (wait, _), (copy, computed) = (map(statistics.median, zip(*times, strict=True)) for times in (waited, copied))
    line = (
        f"{method} {model}: {run.path.stat().st_size / 1e9:.2f} GB per checkpoint; the loop waits {wait:.2f} s for the "
        f"file, {copy:.2f} s for the copy (computing {computed:.2f} s): {100 * copy / 60:.1f} % of a run with one per "
        "minute"
    )
    if meanwhile:
        line += f"; a step takes {statistics.median(alone):.2f} s, {statistics.median(meanwhile):.2f} s meanwhile"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=["mae", "dino"])
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for method in given.methods:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            print(measure(method, given.model, given.steps, given.rounds, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
