import json
import sys

import torch

from fastssl.progress import progress_bar
from fastssl.training.log import Clock, MetricRing, RunLog


def test_ring_gives_back_every_step_and_empties():
    ring = MetricRing()
    for step in (1, 2, 3):
        ring.add(step, {"loss": torch.tensor(float(step)), "grad_norm": torch.tensor(0.5, dtype=torch.float64)})
    steps, own, mean = ring.drain()
    assert steps == [1, 2, 3]
    assert own == mean == [{"loss": float(s), "grad_norm": 0.5} for s in steps]
    assert ring.drain() == ([], [], [])


def test_clock_separates_waiting_and_leaves_out_what_is_not_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fastssl.training.log.time.perf_counter", lambda: now[0])
    clock = Clock()
    with clock.waiting():
        now[0] += 1
    now[0] += 3
    with clock.aside():
        now[0] += 50
    assert clock.read() == (4.0, 0.25)
    now[0] += 2
    assert clock.read() == (2.0, 0.0)


def test_resumed_log_drops_lines_beyond_the_checkpoint_and_a_cut_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (10, 20, 30)) + '{"step": 40, "lo')
    log = RunLog(tmp_path, step=20, total_steps=100)
    log.record({"step": 30, "epoch": 0.3, "loss": 2.0, "images_per_s": 5.0, "data_wait": 0.1})
    log.close()
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_time_left_is_that_of_training_at_the_pace_of_late(capsys):
    log = RunLog(None, step=0, total_steps=1000, images_per_step=10)
    for step, rate in ((10, 1.0), (20, 10.0), (30, 10.0)):  # the first steps warm up: 10 s, later ones 1 s
        log.record({"step": step, "loss": 2.0, "images_per_s": rate, "data_wait": 0.25})
    log.record({"step": 30, "knn_top1": 40.0})
    assert capsys.readouterr().err.splitlines() == [
        "step 10/1000  loss 2.0000  images/s 1  data wait 25%  left 2 h 45 min",
        "step 20/1000  loss 2.0000  images/s 10  data wait 25%  left 16 min",
        "step 30/1000  loss 2.0000  images/s 10  data wait 25%  left 16 min",
    ]


def test_a_log_file_gets_plain_lines_and_a_quick_command_none(capsys, monkeypatch):
    monkeypatch.setattr("fastssl.progress.FIRST", 0.0)
    monkeypatch.setattr("fastssl.progress.BETWEEN", 0.0)
    with progress_bar(20, "features") as bar:
        for _ in range(2):
            bar.update(10)
            bar.write("a warning", file=sys.stderr)
    monkeypatch.setattr("fastssl.progress.FIRST", 60.0)
    for _ in progress_bar(3, "k-NN", "rounds", iterable=range(3)):
        pass
    lines = capsys.readouterr().err
    first, *others = [line.split(",")[0] for line in lines.splitlines() if line != "a warning"]
    assert first == "features: 10 of 20 images"
    assert set(others) <= {"features: 10 of 20 images", "features: 20 of 20 images"}
    assert others[-1] == "features: 20 of 20 images"
    assert lines.count("a warning\n") == 2
    assert "\r" not in lines
