import json

import torch

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
