"""How many operations a step of each method queues, at the recipes' depth and views: the host's cost is bounded.

Widths and batch are small, bfloat16 autocast is on, and the kernels are forced but not run: their launches are counted.
The counts of the first version, for the same measure, stand beside the bounds.
"""

import contextlib
import ctypes

import pytest
import torch
from tiny import MODEL

from fastssl.kernels import _launch
from fastssl.kernels._path import forced
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.synthetic import draw_images
from fastssl.parse import parse_pretrain
from fastssl.prepare.tokenizer import TokenizerOptions, train_tokenizer
from fastssl.pretraining.trainer import Trainer
from fastssl.training.launches import LaunchCount, count_step

NARROW = {key: MODEL[key] for key in ("model.heads",)} | {"model.width": 48, "model.depth": 12}
WIDTHS = {
    "mae": {"mae.decoder_width": 32, "mae.decoder_heads": 2},
    "semmae": {"semmae.decoder_width": 32, "semmae.decoder_heads": 2},
    "dino": {"dino.out_dim": 64, "dino.head_hidden": 32, "dino.head_bottleneck": 16},
    "saae": {"saae.code_width": 32, "saae.head_hidden": 32},
    "cae": {"cae.width": 48, "cae.heads": 2, "cae.codes": 16},
    "sit": {"sit.out_dim": 16, "sit.head_hidden": 32},
    "sit_v1": {"sit_v1.out_dim": 16},
    "scfs": {
        "model.width": 8,
        "model.depth": 0,
        "model.heads": 0,
        "scfs.out_dim": 64,
        "scfs.head_hidden": 32,
        "scfs.head_bottleneck": 16,
        "scfs.stage_inner": 8,
        "scfs.stage_hidden": 16,
        "scfs.stage_out": 16,
    },
}
BOUNDS = {  # operations and kernels of one step: bound, and what it was at first
    "mae": (580, 1244),
    "semmae": (582, 1290),
    "dino": (606, 1841),
    "saae": (588, 1178),
    "cae": (806, 3359),
    "sit": (572, 1475),
    "sit_v1": (470, 3306),
    "scfs": (1134, 2427),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = draw_images(tmp_path_factory.mktemp("images"), train=8, val=4)
    convert(ConvertOptions(str(folder / "train"), str(folder / "train.beton"), parts=str(folder / "parts/train")))
    train_tokenizer(TokenizerOptions(str(folder / "train"), str(folder / "codebook.pt"), codes=16, cell=8, size=112))
    return folder


@pytest.fixture
def zeros(monkeypatch):
    """What kernels that do not run would have filled holds zeros: numbers that all else can go on with."""

    def clearing(make):
        def cleared(*args, **kwargs):
            made = make(*args, **kwargs)
            ctypes.memset(made.data_ptr(), 0, made.nbytes)
            return made

        return cleared

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, clearing(getattr(owner, name)))


def open_run(method, images, folder, **more):
    values = {"data.path": images / "train.beton", "run.dir": folder, "data.workers": 1, "data.batch_size": 2}
    values |= {"run.device": "cpu", "run.threads": 1, "run.precision": "bf16", **NARROW, **WIDTHS[method], **more}
    if method == "cae":
        values["cae.tokenizer"] = images / "codebook.pt"
    return Trainer(parse_pretrain([f"--method={method}", *(f"--{key}={value}" for key, value in values.items())])[0])


@pytest.mark.parametrize("method", BOUNDS)
def test_a_step_queues_no_more_than_it_must(method, images, tmp_path, zeros):
    trainer = open_run(method, images, tmp_path)
    counted = []
    with forced("triton"), _launch.record(keep=False), contextlib.closing(trainer.micro_batches()) as stream:
        for _ in range(2):  # the first step makes what later ones find
            counted.append(count_step(lambda: trainer.train_step(stream)))
    bound, _ = BOUNDS[method]
    print(method, counted[1].total())  # for docs/benchmarks/step.md
    assert counted[1].total() <= bound, (counted[1].total(), counted[1].most_common(40))


class Constants(LaunchCount):
    """What a pass queues, each with the numbers of the host that it is given."""

    def __init__(self):
        super().__init__()
        self.queued = []

    def note(self, name, arguments, options):
        def plain(value):
            if isinstance(value, torch.Tensor):
                return tuple(value.shape), value.dtype
            if isinstance(value, (list, tuple)):
                return [plain(one) for one in value]
            return value

        self.queued.append(
            (name, plain(list(arguments)), {key: plain(value) for key, value in (options or {}).items()})
        )


@pytest.mark.parametrize("method", BOUNDS)
def test_a_pass_holds_no_number_of_its_step(method, images, tmp_path, zeros):
    """What changes from one step to the next lies on the device, or a captured step would repeat the first one's."""
    trainer = open_run(method, images, tmp_path, **{"model.depth": 0 if method == "scfs" else 2, "data.batch_size": 2})
    one_pass, passes = trainer.one_pass, []

    def noted(batch):
        batch.epoch = torch.tensor(batch.epoch)  # as the graph has it
        with torch.autograd.set_multithreading_enabled(False), Constants() as noted:
            out = one_pass(batch)
        passes.append(noted.queued)
        return out

    trainer.one_pass = noted
    with forced("triton"), _launch.record(keep=False), contextlib.closing(trainer.micro_batches()) as stream:
        for _ in range(3):
            trainer.train_step(stream)
        trainer.step += 5 * trainer.pace.steps_per_epoch
        trainer.train_step(stream)
    assert len(passes[1]) > 50
    for later in passes[2:]:
        assert len(later) == len(passes[1])
        for here, there in zip(passes[1], later, strict=True):
            assert here == there
