"""The launch files of docs/cluster: torchrun and fastssl understand the commands in them, and the same line goes on."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from tiny import recipe
from torch.distributed.run import get_args_parser

from fastssl.loaders.synthetic import draw_images
from fastssl.parse import parse_pretrain

FILES = Path(__file__).parents[2] / "docs" / "cluster"


def understood(command: list[str]):
    """(torchrun's options, the configuration) of a command line, as the two read it."""
    assert command[0] == "torchrun"
    options = get_args_parser().parse_args(command[1:])
    assert options.module
    assert (options.training_script, options.training_script_args[0]) == ("fastssl", "pretrain")
    return options, parse_pretrain(options.training_script_args[1:])[0]


def run(script: str, folder: Path, **environment: str) -> list[list[str]]:
    """Runs a script with programs that only note how they were called: these calls, in order."""
    for name, then in {"srun": 'shift; exec "$@"', "torchrun": "", "scontrol": "echo node1"}.items():
        program = folder / name
        note = f"python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' {name} \"$@\" >> {folder}/calls"
        program.write_text(f"#!/bin/bash\n{note}\n{then}\n")
        program.chmod(0o755)
    (folder / "calls").write_text("")
    path = f"{folder}:{os.environ['PATH']}"
    subprocess.run(["bash", "-eu", "-c", script], env={"PATH": path, "HOME": "/home/me", **environment}, check=True)
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("finished", [None, False, True])
@pytest.mark.parametrize("restarts", [0, 20])
def test_slurm(finished, restarts, tmp_path):
    """An unfinished run is queued again, twenty times at most."""
    text = (FILES / "slurm.sbatch").read_text().replace("RUN=/project/runs/dino", f"RUN={tmp_path}/run")
    (tmp_path / "run").mkdir()
    if finished is not None:
        (tmp_path / "run" / "summary.json").write_text(json.dumps({"step": 1, "finished": finished}, indent=1))
    count = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    calls = run(text, tmp_path, SLURM_JOB_NODELIST="node[1-4]", SLURM_NNODES="4", SLURM_JOB_ID="7", **count)
    options, config = understood(next(call for call in calls if call[0] == "torchrun"))
    assert options.nnodes == "4"
    assert (options.rdzv_endpoint, options.rdzv_id) == ("node1:29500", f"7-{restarts}")
    assert config.run.dir == f"{tmp_path}/run"
    assert (["scontrol", "requeue", "7"] in calls) == (not finished and restarts < 20)


def test_the_tables_on_paper_follow_from_their_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(FILES.parent / "benchmarks"))
    text = (FILES.parent / "scale.md").read_text()
    for name, table in importlib.import_module("scale").tables().items():
        assert table in text, f"{name}: python docs/benchmarks/scale.py prints another table"


def test_kubernetes():
    job = yaml.safe_load((FILES / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    elastic, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    _, config = understood(container["command"] + container["args"])
    processes = [
        nodes * int(job["spec"]["nprocPerNode"]) for nodes in range(elastic["minReplicas"], worker["replicas"])
    ]
    assert any(config.run.images_per_step % count == 0 for count in processes)


def test_skypilot(tmp_path):
    task = yaml.safe_load((FILES / "skypilot.yaml").read_text())
    assert task["resources"].keys() == {"accelerators", "use_spot", "job_recovery"}
    names = {"NUM_NODES": "4", "NUM_GPUS_PER_NODE": "8", "NODE_RANK": "1", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
    (call,) = run(task["run"], tmp_path, **{f"SKYPILOT_{name}": value for name, value in names.items()})
    options, config = understood(call)
    assert (options.master_addr, options.node_rank, options.nproc_per_node) == ("10.0.0.1", 1, "8")
    assert config.run.dir.startswith("/runs")
    assert "/runs" in task["file_mounts"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_train(tmp_path, monkeypatch):
    """Two processes under Ray Train, stopped after a step, and the same line again, which goes on."""
    ray = pytest.importorskip("ray", reason="the package ray is not installed")
    pytest.importorskip("pyarrow", reason="the package pyarrow, which Ray Train needs, is not installed")
    monkeypatch.setenv("PYTHONPATH", str(FILES))
    monkeypatch.syspath_prepend(str(FILES))
    images = draw_images(tmp_path / "images", train=16, val=0)
    options = {
        "method": "mae",
        "data": {"path": str(images / "train"), "batch_size": 4, "workers": 1},
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "images_per_step": 8, "log_every": 1},
        "monitor": {"pictures": 0},
        "schedule": {"epochs": 2, "warmup_epochs": 0},
        **recipe("mae"),
    }
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    try:
        main = importlib.import_module("ray_train").main
        for steps, storage in ((1, "ray1"), (0, "ray2")):
            main(2, False, {**options, "run.steps": steps}, str(tmp_path / storage), failures=0)
    finally:
        ray.shutdown()
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["processes"]) for start in starts] == [(0, 2), (1, 2)]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]
