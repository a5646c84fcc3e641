"""Pretraining under Ray Train: `python ray_train.py 32`, for 32 GPUs; `--cpu` tries it without any.

Ray starts the processes, starts them again when one dies, and joins them; the run goes on from its folder, which has to
lie on a disk that all nodes see. The same line again goes on with a run that was stopped.
"""

import sys

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

OPTIONS = {
    "config": "imagenet/dino_vit_small",
    "data": {"path": "/scratch/train-*.beton", "batch_size": 32},
    "run": {"dir": "/project/runs/dino", "images_per_step": 1024},
}


def train(options: dict) -> None:
    """What every process runs."""
    import fastssl

    fastssl.pretrain(**options)


def main(workers: int, gpu: bool, options: dict, storage: str, failures: int = 20) -> None:
    TorchTrainer(
        train,
        train_loop_config=options,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(storage_path=storage, failure_config=FailureConfig(max_failures=failures)),
    ).fit()


if __name__ == "__main__":
    main(int(sys.argv[1]), "--cpu" not in sys.argv, OPTIONS, "/project/ray")
