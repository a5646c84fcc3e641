"""Small things that many tests need: a recipe of every method, a checkpoint, images of a few classes."""

import numpy as np
import torch
from PIL import Image

from fastssl.config import Config
from fastssl.models import build_backbone
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint

MODEL = {
    "model.name": "vit_tiny",
    "model.image_size": 32,
    "model.patch_size": 8,
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
}
METHOD = {
    "dino": {
        "views.global1.size": 32,
        "views.global2.size": 32,
        "views.local.size": 16,
        "views.local.count": 2,
        "dino.out_dim": 64,
        "dino.head_hidden": 32,
        "dino.head_bottleneck": 16,
    },
    "saae": {
        **{f"views.{name}.{key}": 32 for name in ("crop1", "crop2", "reference") for key in ("size", "squash")},
        "saae.code_width": 32,
        "saae.head_hidden": 32,
        "saae.decoder_depth": 1,
        "saae.decoder_heads": 2,
    },
    "scfs": {
        **{f"model.{key}": value for key, value in {"name": "resnet18", "width": 8, "depth": 0, "heads": 0}.items()},
        "model.small_images": "true",
        "views.global1.size": 32,
        "views.global2.size": 32,
        "views.local.size": 16,
        "views.local.count": 2,
        "scfs.out_dim": 64,
        "scfs.head_hidden": 32,
        "scfs.head_bottleneck": 16,
        "scfs.stage_inner": 8,
        "scfs.stage_hidden": 16,
        "scfs.stage_out": 16,
    },
    "cae": {
        "model.positions": "sincos_rows",
        "views.main.size": 32,
        "views.tokenizer.size": 16,
        "cae.codes": 16,
        "cae.num_masked": 8,
        "cae.min_block": 2,
        "cae.width": 32,
        "cae.heads": 2,
        "cae.regressor_depth": 1,
        "cae.decoder_depth": 1,
    },
    "mae": {"views.main.size": 32, "mae.decoder_width": 32, "mae.decoder_depth": 1, "mae.decoder_heads": 2},
    "sit": {"views.view1.size": 32, "views.view2.size": 32, "sit.out_dim": 16, "sit.head_hidden": 32},
    "sit_v1": {"views.view1.size": 32, "views.view2.size": 32, "sit_v1.out_dim": 16, "sit_v1.gather_negatives": "true"},
    "semmae": {"views.main.size": 32, "semmae.decoder_width": 32, "semmae.decoder_depth": 1, "semmae.decoder_heads": 2},
}


def recipe(method: str) -> dict[str, object]:
    """The smallest one: 32-pixel images, two narrow blocks; configuration keys and values."""
    return {**MODEL, **METHOD[method]}


def save_checkpoint(path, model, change=lambda weights: None, seed=0):
    """A checkpoint of a run with random weights, at step 7; `change` may edit them. Its path."""
    torch.manual_seed(seed)
    weights = {f"teacher.{key}": value for key, value in build_backbone(model).state_dict().items()}
    change(weights)
    config = Config("dino", {}, {}, model=model).as_dict()
    checkpoint.write(path, Checkpoint("pretrain", config, weights, "teacher.", step=7))
    return str(path)


def finish_step(method, optimizer, values, clip=0.0, each=False):
    """What the loop does after the backward pass: clips, steps, moves the teacher, drops the gradients."""
    numbers = method.scheduled(values)
    optimizer.teacher_momentum = numbers.get("momentum", 1.0)
    method.after_backward(values)
    optimizer.clip(clip, each, [(group, torch.tensor(numbers[name])) for name, group in method.factors().items()])
    optimizer.step()
    optimizer.zero_grad()


def draw_classes(folder, images, seed, classes=3, sides=(20, 18)):
    """Classes that differ in the mean of one colour, not by far; a sub-folder for each. Its path."""
    generator = np.random.default_rng(seed)
    for i in range(images):
        label = i % classes
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        picture = generator.integers(0, 90, (*sides, 3), dtype=np.uint8)
        picture += generator.integers(0, 100, 3, dtype=np.uint8)
        picture[..., label % 3] += 60
        Image.fromarray(picture).save(folder / f"class{label}" / f"{i}.png")
    return str(folder)
