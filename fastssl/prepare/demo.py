"""The whole walk in one command, on images drawn here: draw → convert → verify → pretrain → evaluate."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastssl.config import Checked, NonNegativeInt, PositiveInt
from fastssl.evaluation.frozen.knn import HEADLINE_K, KNNOptions, evaluate_knn
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.synthetic import draw_images
from fastssl.loaders.verify import VerifyOptions, verify
from fastssl.parse import parse_pretrain
from fastssl.pretraining.trainer import pretrain


@dataclass
class DemoOptions(Checked):
    """What the demo writes and how large it is."""

    dir: str = "demo"
    """Folder for the images, the .beton files and the run. A second start continues what is there."""
    train: PositiveInt = 3200
    """Training images to draw."""
    val: PositiveInt = 800
    """Validation images to draw."""
    steps: NonNegativeInt = 0
    """Stop pretraining after so many optimizer steps. 0: the recipe's length."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""


@dataclass
class DemoResult:
    """k-NN top-1 accuracies in percent, and the seconds that the demo took."""

    knn_random: float
    knn_pixels: float
    knn_pretrained: float
    seconds: float
    summary: str

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
        rows = [
            ("raw pixels (32 x 32)", self.knn_pixels),
            ("random weights", self.knn_random),
            ("pretrained without labels", self.knn_pretrained),
        ]
        lines = [f"k-NN top-1 on the validation images ({HEADLINE_K} neighbours, 8 classes, chance 12.5 %)", ""]
        lines += [f"  {name:<28}{value:6.1f} %" for name, value in rows]
        return "\n".join([*lines, "", f"{self.seconds:.0f} s in all; all numbers: {self.summary}"])


def demo(options: DemoOptions) -> DemoResult:
    """Runs the demo; every stage is the same function that the command of its name calls."""
    begin = time.perf_counter()
    folder = Path(options.dir)
    betons = {split: folder / f"{split}.beton" for split in ("train", "val")}
    if not all(path.exists() for path in betons.values()):
        print(f"1. drawing {options.train} + {options.val} images into {folder / 'images'}", flush=True)
        images = draw_images(folder / "images", train=options.train, val=options.val)
        print("2. converting them to .beton and verifying the files", flush=True)
        for split, path in betons.items():
            parts = str(images / "parts" / split)
            print(convert(ConvertOptions(str(images / split), str(path), parts=parts, overwrite=True)).table())
            print(verify(VerifyOptions(str(path))).table(), flush=True)
    else:
        print(f"1, 2. using the images and .beton files in {folder}", flush=True)

    print("3. pretraining", flush=True)
    run = folder / "run"
    overrides = {
        "config": files("fastssl") / "configs/quickstart.yaml",
        "data.path": betons["train"],
        "data.val": betons["val"],
        "run.dir": run,
        "run.steps": options.steps,
        "run.device": options.device,
    }
    config, _ = parse_pretrain([f"--{key}={value}" for key, value in overrides.items()])
    summary = pretrain(config)

    print("4. evaluating", flush=True)
    measured = evaluate_knn(
        KNNOptions(
            str(run / "last.pt"), str(betons["train"]), str(betons["val"]), device=options.device, baselines=True
        )
    )
    accuracy = {
        "knn_random": measured.baselines["random"],
        "knn_pixels": measured.baselines["pixels"],
        "knn_pretrained": measured.top1,
    }
    result = DemoResult(**accuracy, seconds=round(time.perf_counter() - begin, 1), summary=str(run / "summary.json"))
    numbers = {**summary, **accuracy, "seconds": result.seconds}
    (run / "summary.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return result
