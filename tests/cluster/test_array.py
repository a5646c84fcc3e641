"""The SLURM arrays of docs/cluster, two jobs at a time: killed, run again, run twice; no image is lost or doubled."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import save_checkpoint

from fastssl.cli import main
from fastssl.config import Model
from fastssl.evaluation.frozen import features
from fastssl.loaders import convert
from fastssl.loaders.sources import open_source

FILES = Path(__file__).parents[2] / "docs" / "cluster"
TOTAL = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """90 small JPEGs in three classes."""
    root = tmp_path_factory.mktemp("array") / "images"
    for k in range(90):
        path = root / f"class {k % 3}" / f"{k:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(path)
    return root


def commands(script: str, folder: Path, task: int, **values: object) -> list[list[str]]:
    """What a job of the array calls fastssl with, the script's variables set to other values."""
    text = (FILES / script).read_text()
    for name, value in values.items():
        text, count = re.subn(rf"(?m)^{name}=\S+", f"{name}={shlex.quote(str(value))}", text)
        assert count == 1
    program = folder / "fastssl"
    note = "python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    program.write_text(f'#!/bin/bash\n{note} "$@" >> {folder}/calls\n')
    program.chmod(0o755)
    (folder / "calls").write_text("")
    environment = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_CPUS_PER_TASK": "1"}
    path = f"{folder}:{os.environ['PATH']}"
    subprocess.run(["bash", "-eu", "-c", text], env={"PATH": path, **environment}, check=True)
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def start(command: list[str], before: Callable[[], None] = lambda: None) -> int:
    """A job: the command in a process of its own; its number."""
    child = os.fork()
    if not child:
        code = 70
        try:
            before()
            code = main(command)
        finally:
            os._exit(code)
    return child


def ends(*children: int) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def killed_at(name: str) -> Callable[[], None]:
    """The job dies, without a word, where its worker comes to this image."""

    def prepare() -> None:
        real = convert.encode

        def encode(data, image, options):
            if image == name:
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(60)  # ends with its parent
            return real(data, image, options)

        convert.encode = encode

    return prepare


def slowly() -> None:
    real = convert.encode
    convert.encode = lambda *arguments: (time.sleep(0.01), real(*arguments))[1]


def test_convert(images, tmp_path):
    out = tmp_path / "out"
    out.mkdir()

    def job(task: int) -> list[list[str]]:
        return commands("array_convert.sbatch", tmp_path, task, SHARDS=TOTAL, IMAGES=images, OUT=out / "train")

    whole = open_source(str(images))
    fourth = whole.files[90 * 3 // 4 + 10]  # of the last shard
    (first,), (last,) = job(0), job(3)
    assert ends(start(first), start(last, killed_at(fourth))) == [0, -signal.SIGKILL]
    assert not (out / "train-0003.beton").exists()
    assert [path.suffix for path in out.glob("train-0003*")] == [".partial"]
    before = (out / "train-0000.beton").stat().st_mtime_ns
    assert ends(start(*job(3)), start(*job(1), slowly), start(*job(0))) == [0, 0, 0]
    assert (out / "train-0000.beton").stat().st_mtime_ns == before  # it was there
    (third,) = job(2)
    assert ends(start(third, slowly), start(third, slowly)) == [0, 0]  # at the same time
    assert not list(out.glob("*.partial"))
    (out / "train.shards.json").unlink()  # as if the last job had been killed before it
    assert ends(start(*job(0))) == [0]
    assert len(open_source(str(out / "train.shards.json"))) == 90

    for k in range(TOTAL):
        path = tmp_path / f"{k}.beton"
        assert main(["convert", str(images), str(path), "--shard", f"{k}/{TOTAL}", "--max-resolution=500"]) == 0
        for end in ("", ".npz"):
            assert (out / f"train-000{k}.beton{end}").read_bytes() == Path(f"{path}{end}").read_bytes()
    shards = open_source(str(out / "train-*.beton"))
    assert [shards.name(i).split(" ", 1)[1] for i in range(len(shards))] == whole.files
    assert np.array_equal(shards.labels, whole.labels)


def test_embed(images, tmp_path):
    """Of the parts, the files of one job; a job that was killed has left nothing, and runs again."""
    save_checkpoint(tmp_path / "c.pt", Model("vit_tiny", 32, 8, 32, 1, 2))
    out, one = tmp_path / "out", tmp_path / "one"

    def job(task: int) -> list[list[str]]:
        values = {"PARTS": 2, "CHECKPOINT": tmp_path / "c.pt", "IMAGES": images, "OUT": out}
        calls = commands("array_embed.sbatch", tmp_path, task, **values)
        return [[*call, "--batch-size=20", "--workers=1"] for call in calls]

    script = (FILES / "array_embed.sbatch").read_text()
    assert '#   fastssl embed "$CHECKPOINT" "$IMAGES" "$OUT" --batch-size 256 --merge 64\n' in script
    assert job(0)[0][6:8] == ["--batch-size", "256"]  # merging needs the jobs' own options

    def killed_at_the_second_batch() -> None:
        real, left = features.represent, [1]

        def represent(*arguments):
            if not left.pop():
                os.kill(os.getpid(), signal.SIGKILL)
            left[:] = [0]
            return real(*arguments)

        features.represent = represent

    assert ends(start(*job(0)), start(*job(1), killed_at_the_second_batch)) == [0, -signal.SIGKILL]
    merge = [
        "embed",
        str(tmp_path / "c.pt"),
        str(images),
        str(out),
        "--batch-size=20",
        "--merge=2",
        "--map=0",
        "--sheet=0",
    ]
    assert main(merge) == 1
    assert not list(tmp_path.glob("out.1*")) + list(tmp_path.glob("*.part"))
    again = job(1)
    assert ends(start(*again), start(*again)) == [0, 0]
    parts = sorted(tmp_path.glob("out.*-of-2.*"))
    before = [path.stat().st_mtime_ns for path in parts]
    assert ends(start(*job(0))) == [0]
    assert [path.stat().st_mtime_ns for path in parts] == before  # they were there
    assert main(merge) == 0
    assert main([*merge[:3], str(one), "--batch-size=20", "--map=0", "--sheet=0"]) == 0
    for end in (".npy", ".csv"):
        assert Path(f"{out}{end}").read_bytes() == Path(f"{one}{end}").read_bytes()
    save_checkpoint(tmp_path / "c.pt", Model("vit_tiny", 32, 8, 32, 1, 2), seed=1)
    assert ends(start(*job(0))) == [0]
    assert [path.stat().st_mtime_ns > old for path, old in zip(parts, before, strict=True)] == [True] * 2 + [False] * 2
