"""Whole training steps with the kernels forced (interpreted where there is no GPU) equal those of the plain path.

A test of each op by itself cannot see what stands between them: a tensor that the backward pass reads after the method
has moved it, an option that only training passes, a random draw that one path makes and the other does not.
"""

import contextlib

import pytest
import torch
from tiny import recipe

from fastssl.kernels._path import forced
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.synthetic import draw_images
from fastssl.methods import METHODS
from fastssl.parse import parse_pretrain
from fastssl.prepare.tokenizer import TokenizerOptions, train_tokenizer
from fastssl.pretraining.trainer import Trainer

STEPS = 2
SPLIT = {"sit": (2, 1), "saae": (4, 1), "scfs": (4, 1)}  # images, micro-batches: the interpreter takes long


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = draw_images(tmp_path_factory.mktemp("images"), train=32, val=8)
    convert(ConvertOptions(str(folder / "train"), str(folder / "train.beton"), parts=str(folder / "parts/train")))
    train_tokenizer(TokenizerOptions(str(folder / "train"), str(folder / "codebook.pt"), codes=16, cell=4, size=16))
    return folder


def steps(rank, path, method, images, folder, batch_size, accumulate):
    """Losses, gradient norms and the weights after some steps on one of several processes."""
    values = {"data.path": f"{images}/train.beton", "run.dir": folder, "data.workers": 1, "run.device": "cpu"}
    values |= {"data.batch_size": batch_size, "run.accumulate": accumulate, "run.threads": 1, "schedule.epochs": 4}
    # SGD: AdamW would make a step of the learning rate of a gradient that is nothing but rounding. SCFS's first
    # gradients have a norm of 2,000: with the others' rate its second step would show how it magnifies rounding.
    values |= {
        "optim.name": "sgd",
        "optim.lr_batch": 0,
        "optim.lr": 1e-5 if method == "scfs" else 0.01,
        "schedule.warmup_epochs": 0,
    }
    values |= {**recipe(method), "model.drop_path": 0.2}
    if method == "cae":
        values["cae.tokenizer"] = f"{images}/codebook.pt"
    if torch.cuda.is_available():
        values["run.device"] = "cuda"
    trainer = Trainer(parse_pretrain([f"--method={method}", *(f"--{key}={v}" for key, v in values.items())])[0])
    with forced(path), contextlib.closing(trainer.micro_batches()) as stream:
        for _ in range(STEPS):
            trainer.train_step(stream)
    _, rows, _ = trainer.ring.drain()
    return rows, {key: value.double().cpu() for key, value in trainer.method.state_dict().items()}


def assert_same(found, expected):
    """Equal but for the rounding of float32 sums in another order, which a second step carries on."""
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-6)
    for key, value in expected[1].items():
        torch.testing.assert_close(
            found[1][key], value, rtol=1e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("method", METHODS)
def test_training_steps_equal_the_plain_path(method, images, tmp_path):
    how = (method, str(images), str(tmp_path), *SPLIT.get(method, (2, 2)))
    assert_same(steps(0, "triton", *how), steps(0, "reference", *how))


def test_two_processes_equal_the_plain_path(images, tmp_path, on_processes):
    how = ("dino", str(images), str(tmp_path), 2, 1)
    expected = on_processes(2, steps, "reference", *how)
    for found, wanted in zip(on_processes(2, steps, "triton", *how), expected, strict=True):
        assert_same(found, wanted)
