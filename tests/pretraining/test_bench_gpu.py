"""`fastssl bench gpu`: every part on a CPU, what is kept of a run that is cut short, and the page."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch

from fastssl.cli import main
from fastssl.config import Run
from fastssl.pretraining import bench_gpu
from fastssl.pretraining.bench_gpu import PARTS, RECIPES, Job, Results, Runner, contenders
from fastssl.pretraining.bench_gpu_page import failed_tests, page

WORKER = "import sys\nprint('ready', flush=True)\nfor line in sys.stdin:\n    {}\n    print('done', flush=True)\n"
ROW = {
    "recipe": "mae", "contender": "eager", "loader": False, "images_per_s": 3200.0, "milliseconds": 80.0, "mfu": 0.3,
    "memory": 14e9, "launches": 900, "host": 40.0, "parts": {"forward": 30.0, "backward": 50.0},
}  # fmt: skip


def python(key, code, *turns, **more):
    return Job(key, [sys.executable, "-c", code], turns, **more)


@pytest.fixture
def runner(tmp_path):
    return Runner(Results(tmp_path / "results.jsonl"), "steps", tmp_path / "steps.log")


def ends(runner):
    """How each job ended, by key."""
    return {key.removeprefix("job "): record["how"] for key, record in runner.results.of("steps").items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a whole small run on the CPU."""
    folder, tests = tmp_path_factory.mktemp("gpu") / "out", tmp_path_factory.mktemp("tests")
    (tests / "kernels").mkdir()
    (tests / "kernels/test_check.py").write_text("def test_nothing():\n    pass\n")
    given = [f"--bench.out={folder}", "--bench.device=cpu", "--bench.ops=gather_tokens", f"--bench.tests={tests}"]
    assert main(["bench", "gpu", *given]) == 0
    return folder, given


@pytest.mark.slow
def test_every_part_has_results(small):
    folder, _ = small
    known = Results(folder / "results.jsonl").read()
    assert {key for key in known if known[key].get("how") == "done" and key[1] == "end"} == {(p, "end") for p in PARTS}
    assert known["facts", "facts"]["torch"] == torch.__version__
    assert "gather_tokens" in known["facts", "facts"]["ops"]
    assert any(record.get("outcome") == "passed" for (part, _), record in known.items() if part == "tests")
    assert sum(record.get("outcome") == "passed" for (part, _), record in known.items() if part == "proofs") == 2
    kernel = known["kernels", "gather_tokens | mae | forward | kernel"]
    assert kernel["ms"] > 0
    assert kernel["device_ms"] is None
    step = known["steps", "tiny | eager | step"]
    assert step["images_per_s"] == pytest.approx(8 / step["milliseconds"] * 1000)
    assert {"mfu", "memory", "launches", "host", "operations"} <= step.keys()
    assert known["steps", "tiny | eager | loader"]["loader"]
    assert known["loader", "single | 2"]["images_per_s"] > 0
    assert {f"{part}.log" for part in PARTS} <= {path.name for path in folder.iterdir()}
    assert "testsuite" in (folder / "tests.xml").read_text()
    assert (folder / "failed-tests.txt").read_text() == ""
    text = (folder / "README.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        *("## Failures, and what was not reached", "## Training steps", "## Kernels", "## Proofs", "## Tests"),
        *("## Loader", "## Parts"),
    ]
    assert json.loads((folder / "results.json").read_text()) == list(known.values())


@pytest.mark.slow
def test_what_is_done_is_not_done_again(small, monkeypatch, capsys):
    folder, given = small
    before = (folder / "results.jsonl").read_text()
    monkeypatch.setattr(bench_gpu.subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    assert main(["bench", "gpu", *given]) == 0
    assert (folder / "results.jsonl").read_text() == before
    assert capsys.readouterr().err.count("done before") == len(PARTS)


@pytest.mark.slow
def test_a_part_is_done_again_where_that_is_asked_for(small, tmp_path, monkeypatch):
    folder, given = small
    (tmp_path / "results.jsonl").write_bytes((folder / "results.jsonl").read_bytes())
    started = []
    monkeypatch.setattr(Runner, "run", lambda self, jobs, at_once, deadline: not started.extend(jobs))
    more = [f"--bench.out={tmp_path}", "--bench.parts=proofs", "--bench.again"]
    assert main(["bench", "gpu", *given, *more]) == 0
    assert [job.key for job in started] == ["gather_tokens"]
    known = Results(tmp_path / "results.jsonl")
    assert list(known.of("proofs")) == ["end"]
    assert known.of("kernels") == Results(folder / "results.jsonl").of("kernels")


def test_a_killed_command_keeps_what_it_has_and_leaves_no_process(tmp_path):
    code = (
        "import sys\nfrom fastssl.pretraining import bench_gpu as b\n"
        "hang = 'import time; time.sleep(300)'\n"
        "b._Bench._facts = lambda self: {'ops': ['a']}\n"
        "b._Bench._phases = lambda self, part: iter([([b.Job('quick', [sys.executable, '-c', '']),\n"
        "                                              b.Job('hangs', [sys.executable, '-c', hang])], 2)])\n"
        f"b.bench(b.GpuBenchOptions(out={str(tmp_path)!r}, device='cpu', parts='proofs'))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    results = Results(tmp_path / "results.jsonl")
    until = time.monotonic() + 30
    while results.of("proofs").get("job quick", {}).get("how") != "done" and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=10)
    assert {key: record["how"] for key, record in results.of("proofs").items()} == {"job quick": "done", "end": "late"}
    assert "| proofs | late |" in (tmp_path / "README.md").read_text()


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add("proofs", "a", outcome="passed")
    with results.path.open("a") as file:
        file.write('{"part": "proofs", "key": "b", "outc')
    results.mend()
    results.add("proofs", "c", outcome="passed")
    results.add("proofs", "a", outcome="failed")
    assert {key: record["outcome"] for key, record in results.of("proofs").items()} == {"a": "failed", "c": "passed"}


def test_turns_are_taken_one_after_the_other(runner, tmp_path):
    trace = tmp_path / "trace"
    say = f"open({str(trace)!r}, 'a').write(sys.argv[-1] + line)"
    jobs = [Job(name, [*python(name, WORKER.format(say)).command, name], ("step", "loader")) for name in ("a", "b")]
    assert runner.run(jobs, 2, time.monotonic() + 60)
    lines = trace.read_text().split()
    assert sorted(lines[:2]) == ["astep", "bstep"]
    assert sorted(lines[2:]) == ["aloader", "bloader"]
    assert ends(runner) == {"a step": "done", "b step": "done", "a loader": "done", "b loader": "done"}
    assert runner.run(jobs, 2, time.monotonic() + 60)
    assert trace.read_text().split() == lines


def test_a_crash_or_a_hang_ends_no_other_job(runner, monkeypatch):
    monkeypatch.setattr(bench_gpu, "TURN", 1.0)
    jobs = [
        python("crashes early", "import os; os._exit(3)", "step"),
        python("crashes late", WORKER.format("sys.exit(4)"), "step", "loader"),
        python("says why", "print('error no memory', flush=True); raise SystemExit(1)", "step"),
        python("hangs", WORKER.format("import time; time.sleep(100)"), "step"),
        python("works", WORKER.format("pass"), "step"),
    ]
    assert not runner.run(jobs, 5, time.monotonic() + 60)
    assert ends(runner) == {
        "crashes early step": "failed",
        "crashes late step": "failed",
        "crashes late loader": "failed",
        "says why step": "failed",
        "hangs step": "late",
        "works step": "done",
    }
    known = runner.results.of("steps")
    assert known["job says why step"]["error"] == "no memory"
    assert known["job crashes early step"]["error"] == "the process ended with exit code 3; see steps.log"
    assert "took more than" in known["job hangs step"]["error"]


def test_the_time_of_a_part_is_bounded_and_the_next_start_goes_on(runner):
    sleeper, quick = python("sleeps", "import time; time.sleep(100)"), python("quick", "")
    begin = time.monotonic()
    assert not runner.run([sleeper, quick], 1, begin + 1)
    assert time.monotonic() - begin < 5
    assert ends(runner) == {"sleeps": "late", "quick": "late"}
    assert runner.run([python("sleeps", ""), quick], 1, time.monotonic() + 60)
    assert ends(runner) == {"sleeps": "done", "quick": "done"}


def test_failures_come_first_on_the_page():
    records = [
        {"part": "facts", "key": "facts", "gpu": "NVIDIA H200", "driver": "580", "torch": "2.11", "commit": "abc"},
        {"part": "tests", "key": "tests/a.py::one", "outcome": "failed", "seconds": 1.0, "words": "1 is not 2"},
        {"part": "tests", "key": "tests/a.py::two", "outcome": "passed", "seconds": 2.0},
        {"part": "proofs", "key": "op | case | float32", "op": "op", "outcome": "failed", "words": "off by 1"},
        {"part": "steps", "key": "mae | eager | step", **ROW},
        {"part": "steps", "key": "mae | eager | loader", **ROW, "loader": True, "images_per_s": 1600.0},
        {"part": "steps", "key": "job dino eager step", "how": "failed", "error": "no memory"},
        {"part": "steps", "key": "end", "how": "late", "seconds": 200.0},
        *(
            {
                "part": "kernels", "key": f"op | {name}", "op": "op", "case": "B=64", "dtype": "bfloat16", "name": name,
                "pass": "forward", "ms": ms, "device_ms": device, "fraction": 0.5, "peak_mb": 3.0, "speedup": ms / 0.2,
                "device_speedup": device and device / 0.1,
            }
            for name, ms, device in (("kernel", 0.2, 0.1), ("eager", 0.4, 0.3), ("torch.compile", 0.3, None))
        ),
    ]  # fmt: skip
    text = page(records, 16)
    assert text.startswith("# NVIDIA H200\n\ngpu NVIDIA H200, driver 580, torch 2.11, commit abc;")
    failures = text.split("## ")[1].splitlines()
    assert failures[2:5] == [
        "- tests: `tests/a.py::one`: 1 is not 2",
        "- proofs: `op | case | float32`: off by 1",
        "- steps: `dino eager step`: no memory",
    ]
    assert "| MAE ViT-B/16, 256 | 2,151 | 3,642 | 6,400 | 3,200 | 1,600 | 50% |" in text
    assert (
        "| op (a proof failed) | B=64, bfloat16 | f | 0.2 | 0.1 | 50% | 3 | eager 2.00, 3.00; torch.compile 1.50, - |"
        in text
    )
    assert "| steps | late | 200 | `steps.log` |" in text
    assert failed_tests(records) == ["tests/a.py::one"]


def test_recipes_and_contenders_are_what_the_configuration_knows():
    assert all(os.path.exists(bench_gpu.recipe_file(recipe)) for recipe in RECIPES.values())
    known = {f"run.{one.name}" for one in fields(Run)}
    ways = contenders()
    assert next(iter(ways)) == "eager"
    assert all(set(way) <= known for way in ways.values())
    assert ways["compile"]["run.compile"] == "true"
    assert ("graph" in ways) == ("run.graph" in known)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "gpu"]) == 2
    error = capsys.readouterr().err
    assert "no CUDA device here; --bench.device cpu runs a small version" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--bench.parts=tests,step", "bench.parts is 'step'; it must be of tests, proofs, kernels, steps, loader"),
        ("--bench.recipes=vit", "bench.recipes is 'vit'; it must be of dino, mae"),
        ("--bench.outs=x", "unknown key 'bench.outs'; did you mean 'bench.out'?"),
        ("--bench.minutes=0", "bench.minutes is 0.0; it must be positive"),
    ],
)
def test_messages(argument, words, capsys):
    assert main(["bench", "gpu", argument]) == 2
    assert words in capsys.readouterr().err
