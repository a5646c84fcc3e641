"""Backbones for the libraries that people use next (timm, torchvision, Hugging Face), methods in their authors' layout.

Our ViT carries timm's names and our ResNet torchvision's, so nothing is renamed; what these cannot express is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from timm.layers import Attention
from torch import Tensor

from fastssl.batch import IMAGENET_MEAN, IMAGENET_STD
from fastssl.config import ConfigError, Model
from fastssl.models import VITS
from fastssl.models.vit import ViT
from fastssl.training import checkpoint
from fastssl.training.checkpoint import CheckpointError, replace_file
from fastssl.weights.backbone import open_backbone, open_method


@dataclass
class ExportOptions:
    """What is exported, and for whom."""

    checkpoint: str = ""
    """Checkpoint of a run or an import, e.g. runs/dino/last.pt."""
    out: str = ""
    """File to write (.pth or .safetensors), or the folder for hf."""
    to: Literal["timm", "torchvision", "hf", "official"] = "timm"
    """timm: a state dict for timm.create_model. torchvision: one for torchvision.models.resnet*. hf: a folder as on
    Hugging Face's hub (model.safetensors, config.json), which timm opens as local-dir:FOLDER, or from the hub.
    official: all networks of the method as its authors' code saves them (.pth)."""

    def __post_init__(self) -> None:
        for key in ("checkpoint", "out"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty; fastssl export CHECKPOINT OUT --to timm|torchvision|hf|official")
        if self.to != "hf" and Path(self.out).suffix not in (".pth", ".safetensors"):
            raise ConfigError(f"out is '{self.out}'; it must end in .pth or .safetensors")
        if self.to == "official" and Path(self.out).suffix != ".pth":
            raise ConfigError(
                f"out is '{self.out}'; it must end in .pth, for the authors' files hold more than tensors"
            )


@dataclass(frozen=True)
class Exported:
    """What was written, and the Python lines that open it.

    Attributes:
        path: the file or folder.
        model: the library's name of the architecture.
        tensors: how many were written.
        code: Python that gives the model with these weights.
    """

    path: str
    model: str
    tensors: int
    code: str

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
        return f"{self.path}: {self.model}, {self.tensors} tensors; open it with\n\n{self.code}"


def export(options: ExportOptions) -> Exported:
    """Write a backbone for timm, torchvision or Hugging Face, or a whole method for its authors' code.

    Raises:
        CheckpointError: the library has no such architecture, the file has not all networks of the method, or the disk
            refused.
    """
    if options.to == "official":
        return _export_official(options)
    backbone = open_backbone(options.checkpoint)
    state = {key: value.contiguous() for key, value in backbone.module.state_dict().items()}
    module = backbone.module
    vit = isinstance(module, ViT)
    if vit == (options.to == "torchvision"):
        kind = "a ViT" if vit else "a ResNet"
        raise CheckpointError(
            f"{options.checkpoint} is {kind}; export it --to {'timm or hf' if vit else 'torchvision'}"
        )
    path = Path(options.out)
    if isinstance(module, ViT):
        name, arguments = timm_architecture(backbone.model, module)
        call = ", ".join([f"{name!r}", *(f"{key}={value!r}" for key, value in arguments.items())])
        if options.to == "hf":
            _write_hf(path, name, arguments, state)
            code = f"import timm\nmodel = timm.create_model('local-dir:{path}', pretrained=True)"
        else:
            _write(path, state)
            code = f"import timm\n{_reading(path)}\nmodel = timm.create_model({call})\nmodel.load_state_dict(weights)"
    else:
        model = backbone.model
        if model.small_images or model.width not in (0, 64):
            raise CheckpointError(
                f"{options.checkpoint} has a stem or widths that torchvision's {model.name} has not "
                "(model.small_images, model.width)"
            )
        name = model.name
        _write(path, state)
        code = (
            f"import torch, torchvision\n{_reading(path)}\nmodel = torchvision.models.{name}()\n"
            "model.fc = torch.nn.Identity()\nmodel.load_state_dict(weights)"
        )
    return Exported(str(path), name, len(state), code)


def _export_official(options: ExportOptions) -> Exported:
    config, method = open_method(checkpoint.read(options.checkpoint, "pretrain", "import"))
    theirs = method.to_official(method.state_dict())
    path = Path(options.out)
    _write(path, theirs)
    tensors = sum(len(part) if isinstance(part, dict) else 1 for part in theirs.values())
    code = f"import torch\ncheckpoint = torch.load({str(path)!r}, weights_only=True)"
    return Exported(str(path), f"{config.method} as its authors save it", tensors, code)


def timm_architecture(model: Model, module: ViT) -> tuple[str, dict[str, Any]]:
    """timm's name for a ViT, and the arguments of timm.create_model that make it exactly this one, without a head."""
    family = model.name if model.name != "vit_huge" else "vit_base"  # timm's vit_huge has patches of 14
    plain = VITS[family]
    heads = cast(Attention, module.blocks[0].attn).num_heads
    actual = {"width": module.width, "depth": module.num_blocks, "heads": heads}
    arguments: dict[str, Any] = {"num_classes": 0}
    for ours, theirs in (("width", "embed_dim"), ("depth", "depth"), ("heads", "num_heads")):
        if actual[ours] != plain[ours]:
            arguments[theirs] = actual[ours]
    if module.patch_size != 16:
        arguments["patch_size"] = module.patch_size
    if model.image_size != 224:
        arguments["img_size"] = model.image_size
    if model.layer_scale:
        arguments["init_values"] = model.layer_scale
    return f"{family}_patch16_224", arguments


def _write(path: Path, state: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.suffix == ".safetensors":
            replace_file(path, lambda part: save_file(state, part))
        else:
            replace_file(path, lambda part: torch.save(state, part))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written ({error}); free some space") from None


def _write_hf(folder: Path, name: str, arguments: dict[str, Any], state: dict[str, Tensor]) -> None:
    """The layout of timm's models on Hugging Face's hub; weights last, so that a folder with weights is whole."""
    size = arguments.get("img_size", 224)
    settings = {
        "architecture": name,
        "num_classes": 0,
        "num_features": state["norm.weight"].numel(),
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "config.json", lambda part: Path(part).write_text(json.dumps(settings, indent=2) + "\n"))
    _write(folder / "model.safetensors", state)


def _reading(path: Path) -> str:
    if path.suffix == ".safetensors":
        return f"from safetensors.torch import load_file\nweights = load_file({str(path)!r})"
    return f"import torch\nweights = torch.load({str(path)!r}, weights_only=True)"
