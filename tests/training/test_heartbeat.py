"""A run that stands still is ended with a line on who does; one that works, waits or is debugged is not."""

import json
import multiprocessing
import os
import signal
import threading
import time
from hashlib import pbkdf2_hmac
from pathlib import Path

import pytest
from killed import hang
from tiny import recipe
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing.spawn import ProcessContext

from fastssl.loaders.synthetic import draw_images
from fastssl.parse import parse_pretrain
from fastssl.training import checkpoint, heartbeat
from fastssl.training.heartbeat import HUNG, Beat, Heartbeat, judge
from fastssl.training.timing import place

HANG = 5.0


def config(folder, steps=16):
    values = {"data.path": draw_images(folder / "images", train=32, val=4) / "train", "data.batch_size": 2}
    values |= {**recipe("mae"), "data.workers": 1, "model.depth": 1, "monitor.pictures": 0, "run.device": "cpu"}
    values |= {"schedule.epochs": 8, "schedule.warmup_epochs": 1, "run.threads": 1, "run.steps": steps}
    values |= {"run.dir": folder / "run", "run.save_every": 0.2, "run.log_every": 1, "run.hang_s": HANG}
    return parse_pretrain(["--method=mae", *(f"--{key}={value}" for key, value in values.items())])[0]


@pytest.fixture
def handlers():
    """torchrun's agent leaves its own behind."""
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(kind) for kind in kinds]
    yield
    for kind, handler in zip(kinds, before, strict=True):
        signal.signal(kind, handler)


def test_three_processes_are_restarted_when_one_is_stopped_or_its_loader_hangs(tmp_path, monkeypatch, handlers):
    """Three lives under torchrun's agent: a process is stopped, a loader hangs, and rank 0 evaluates for long."""
    join = ProcessContext._join_procs_with_timeout  # it gives SIGTERM 30 seconds before SIGKILL
    monkeypatch.setattr(ProcessContext, "_join_procs_with_timeout", lambda self, _: join(self, 2))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["fastssl.pretraining.trainer", "killed"])
    logs = DefaultLogsSpecs(log_dir=str(tmp_path / "logs"), redirects=Std.ALL)
    launch = LaunchConfig(
        *(1, 1, 3), rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="hang", max_restarts=2,
        monitor_interval=0.1, start_method="forkserver", logs_specs=logs,
    )  # fmt: skip
    elastic_launch(launch, hang)(config(tmp_path), ["stopped", "loader", "evaluation"])
    assert json.loads((tmp_path / "run/summary.json").read_text())["step"] == 16
    assert checkpoint.read(tmp_path / "run/last.pt").step == 16
    starts = [json.loads(line)["step"] for line in (tmp_path / "run/starts.jsonl").read_text().splitlines()]
    assert len(starts) == 3
    assert starts == sorted(set(starts))  # every life went on from the one before
    lives = [sorted(tmp_path.glob(f"logs/*/*{life}/*/stderr.log")) for life in range(3)]
    said = ["".join(path.read_text() for path in paths) for paths in lives]
    stopped, loader, evaluation = ([line for line in text.splitlines() if "error: rank" in line] for text in said)
    assert len(stopped) == len(loader) == 1
    assert "rank 1 (process " in stopped[0]
    assert ") has not answered for " in stopped[0]
    assert "; the others wait: 0, 2 at step 3 in 'backward'" in stopped[0]
    assert "rank 2 (process " in loader[0]
    assert f" s, at step {starts[1] + 3} in 'data' (loop.py:" in loader[0]
    assert loader[0].endswith(f"the job ends with code {HUNG}")
    assert said[1].count("the main thread stands here") == 1
    assert "time.sleep(1000)" in said[1]
    assert evaluation == []


def test_one_process_that_stands_still_shows_where_and_ends(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=_alone, args=(config(tmp_path), tmp_path))
    process.start()
    process.join(120)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == HUNG, said
    assert "time.sleep(1000)" in said
    assert "error: rank 0 (process " in said


def _alone(given, folder):
    os.dup2(os.open(Path(folder) / "said", os.O_CREAT | os.O_WRONLY), 2)
    hang(given, ["loader"])


@pytest.mark.parametrize(
    ("work", "writes", "still"),
    [
        (lambda: time.sleep(0.6), False, [0, 1, 2, 3, 4]),
        (lambda: time.sleep(0.6), True, [0, 0, 0, 0, 0]),  # a checkpoint is being written: the disk takes bytes
        (lambda: pbkdf2_hmac("sha1", b"", b"", 1_500_000), False, [0, 0, 0, 1, 2]),  # as who waits for a GPU
    ],
)
def test_writing_is_movement_and_computing_in_one_place_is_for_a_while(monkeypatch, work, writes, still):
    monkeypatch.setattr(place, "written", 0)
    monkeypatch.setattr(heartbeat, "COMPUTES", 1e-6)  # in the short time of this test
    main, heart = threading.Thread(target=work), Heartbeat(1.0)
    main.start()
    heart.main, found = main.ident, []
    time.sleep(0.1)
    for _ in still:
        time.sleep(0.02)
        place.written += writes
        found.append(heart._look(1.0).still)
    main.join()
    assert found == still


AT = {"step": 7, "moves": 5, "section": "backward", "waits": True, "frame": "a.py:1, f", "host": "n", "pid": 1}


@pytest.mark.parametrize(
    ("changes", "silent", "rank", "words"),
    [
        ({}, {}, 0, "rank 0 (process 1 on n) has stood still for 12 s, at step 7 in"),  # all in one exchange: the first
        ({3: {"still": 0.4}}, {}, None, ""),  # one moves: it is waited for
        ({3: {"waits": False}}, {}, 3, "the others wait: 0, 1, 2, 4 at step 7 in 'backward' (a.py:1, f)"),
        ({3: {"moves": 4}}, {}, 3, "rank 3"),  # all wait, and it came last
        ({3: {"debugged": True, "waits": False}}, {}, None, ""),
        ({3: {"still": 0.4}}, {3: 9.9}, 3, "rank 3 (process 1 on n) has not answered"),
        ({3: {"still": 0.4}}, {3: 7.0}, None, ""),  # nothing is heard of it, but not for long enough
        ({3: {"left": True, "waits": False, "step": 6}}, {3: 50.0}, 3, "has been gone for 61 s, at step 6"),
        ({3: {"left": True, "waits": False}, 1: {"waits": False}}, {3: 50.0}, 1, "rank 1 (process 1 on n) has stood"),
        ({3: None}, {3: 11.0}, 3, "rank 3 (process ? on ?) has not answered for 11 s, at step 0 in 'start' (not"),
    ],
)
def test_who_is_named(changes, silent, rank, words):
    beats = [Beat(**{"still": 11.0, **AT, **(changes.get(k) or {})}) for k in range(5)]
    heard = [None if k in changes and changes[k] is None else beat for k, beat in enumerate(beats)]
    found = judge(heard, [silent.get(k, 0.5) for k in range(5)], 10.0)
    assert (found and found[0]) == rank
    assert words in (found[1] if found else "")
