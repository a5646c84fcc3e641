"""Backbones for the libraries that people use next (timm, torchvision, Hugging Face), methods in their authors' layout.

Our ViT carries timm's names and our ResNet torchvision's, so nothing is renamed; what these cannot express is refused.
"""

from __future__ import annotations

import importlib.util
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
from fastssl.models.resnet import ResNet
from fastssl.models.timm_backbone import PREFIX, TimmBackbone
from fastssl.models.vit import ViT
from fastssl.training import checkpoint
from fastssl.training.checkpoint import CheckpointError, replace_file
from fastssl.weights.backbone import Backbone, open_backbone, open_method
from fastssl.weights.card import model_card

ONNX_LIMIT = 2_000_000_000  # bytes
ONNX_ERROR = 1e-4  # of the largest feature


@dataclass
class ExportOptions:
    """What is exported, and for whom."""

    checkpoint: str = ""
    """Checkpoint of a run or an import, e.g. runs/dino/last.pt."""
    out: str = ""
    """File to write (.pth or .safetensors), or the folder for hf."""
    to: Literal["timm", "torchvision", "hf", "onnx", "official"] = "timm"
    """timm: a state dict for timm.create_model. torchvision: one for torchvision.models.resnet*. hf: a folder as on
    Hugging Face's hub (model.safetensors, config.json, a model card), which timm opens as local-dir:FOLDER, or from the
    hub. onnx: a file that takes images and gives features, compared with PyTorch's (.onnx).
    official: all networks of the method as its authors' code saves them (.pth)."""

    def __post_init__(self) -> None:
        for key in ("checkpoint", "out"):
            if not getattr(self, key):
                raise ConfigError(
                    f"{key} is empty; fastssl export CHECKPOINT OUT --to timm|torchvision|hf|onnx|official"
                )
        if self.to == "onnx" and Path(self.out).suffix != ".onnx":
            raise ConfigError(f"out is '{self.out}'; it must end in .onnx")
        if self.to not in ("hf", "onnx") and Path(self.out).suffix not in (".pth", ".safetensors"):
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
    """Write a backbone for timm, torchvision, Hugging Face or ONNX, or a whole method for its authors' code.

    Raises:
        CheckpointError: the library has no such architecture, the file has not all networks of the method, a library is
            missing, or the disk refused.
    """
    if options.to == "official":
        return _export_official(options)
    backbone = open_backbone(options.checkpoint)
    path = Path(options.out)
    if options.to == "torchvision":
        return _export_torchvision(options.checkpoint, backbone, path)
    theirs = as_timm(options.checkpoint, backbone)
    state = {key: value.contiguous() for key, value in theirs.state.items()}
    if options.to == "onnx":
        return _export_onnx(options.checkpoint, backbone, theirs, path)
    cfg = _image_settings(backbone)
    call = ", ".join([f"{theirs.name!r}", *(f"{key}={value!r}" for key, value in theirs.arguments.items())])
    call += f", pretrained_cfg_overlay={cfg!r}"
    if options.to == "hf":
        code = f"import timm\nmodel = timm.create_model('local-dir:{path}', pretrained=True)"
        _write_hf(path, theirs, backbone, cfg, state, model_card(options.checkpoint, backbone, theirs.name, path.name))
    else:
        _write(path, state)
        code = f"import timm\n{_reading(path)}\nmodel = timm.create_model({call})\nmodel.load_state_dict(weights)"
    return Exported(str(path), theirs.name, len(state), code)


@dataclass(frozen=True)
class Theirs:
    """A backbone as timm has it.

    Attributes:
        name: of the architecture.
        arguments: of timm.create_model, which make exactly this one, without a head.
        state: its state dict.
        layers: its first convolution and its classifier, by timm's names in a configuration.
    """

    name: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]
    layers: dict[str, Any]


def as_timm(source: str, backbone: Backbone) -> Theirs:
    """The backbone as timm has it.

    Raises:
        CheckpointError: timm has no such architecture.
    """
    module = backbone.module
    if isinstance(module, TimmBackbone):
        cfg = module.net.pretrained_cfg
        name = cfg.get("architecture") or backbone.model.name.removeprefix(PREFIX).partition(".")[0]
        layers = {key: cfg.get(key) for key in ("first_conv", "classifier")}
        return Theirs(name, {"num_classes": 0, **module.options}, module.net.state_dict(), layers)
    if isinstance(module, ViT):
        name, arguments = timm_architecture(backbone.model, module)
        return Theirs(name, arguments, module.state_dict(), {"first_conv": "patch_embed.proj", "classifier": "head"})
    _check_plain(source, backbone.model)
    layers = {"first_conv": "conv1", "classifier": "fc"}
    return Theirs(backbone.model.name, {"num_classes": 0}, module.state_dict(), layers)


def _check_plain(source: str, model: Model) -> None:
    if model.small_images or model.width not in (0, 64):
        raise CheckpointError(
            f"{source} has a stem or widths that the libraries' {model.name} has not (model.small_images, model.width)"
        )


def _export_torchvision(source: str, backbone: Backbone, path: Path) -> Exported:
    if not isinstance(backbone.module, ResNet):
        kind = "a ViT" if isinstance(backbone.module, ViT) else "a model of timm"
        raise CheckpointError(f"{source} is {kind}; export it --to timm, hf or onnx")
    _check_plain(source, backbone.model)
    state, name = backbone.module.state_dict(), backbone.model.name
    _write(path, state)
    code = (
        f"import torch, torchvision\n{_reading(path)}\nmodel = torchvision.models.{name}()\n"
        "model.fc = torch.nn.Identity()\nmodel.load_state_dict(weights)"
    )
    return Exported(str(path), name, len(state), code)


def _export_onnx(source: str, backbone: Backbone, theirs: Theirs, path: Path) -> Exported:
    """Writes the graph of timm's network with these weights, for any number of images, and runs it once."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"--to onnx needs {' and '.join(missing)}, not installed here: pip install 'fastssl-vision[onnx]'"
        )
    if sum(value.nbytes for value in theirs.state.values()) > ONNX_LIMIT:
        raise CheckpointError(f"{source} is larger than the 2 GB that one ONNX file holds")
    import onnxruntime
    import timm

    network = timm.create_model(theirs.name, **theirs.arguments).eval()
    network.load_state_dict(theirs.state)
    side = backbone.image_size
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))

    def write(part: Path) -> None:
        torch.onnx.export(
            network, (images[:2],), str(part), dynamo=True, input_names=["images"], output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, verbose=False,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(str(part), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        with torch.no_grad():
            expected = backbone.module(images)
        if found.shape != expected.shape or (found - expected).abs().max() > ONNX_ERROR * expected.abs().max():
            raise CheckpointError(f"{source}: the ONNX file gives other features than PyTorch; it is not kept")

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        replace_file(path, write)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error}); free some space") from None
    code = (
        f"import onnxruntime\nmodel = onnxruntime.InferenceSession({str(path)!r})\n"
        f"features = model.run(None, {{'images': images}})[0]  # float32 [B, 3, {side}, {side}], ImageNet-normalised"
    )
    return Exported(str(path), f"{theirs.name}, equal to PyTorch's features", len(theirs.state), code)


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


def _image_settings(backbone: Backbone) -> dict[str, Any]:
    """How images are prepared for the backbone, in timm's words: its own names of architectures have other values."""
    judged = backbone.config.get("judged", {"crop_pct": 0.875, "interpolation": "bicubic"})
    return {**judged, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def _write_hf(
    folder: Path, theirs: Theirs, backbone: Backbone, images: dict[str, Any], state: dict[str, Tensor], card: str
) -> None:
    """The layout of timm's models on Hugging Face's hub; weights last, so that a folder with weights is whole."""
    settings = {
        "architecture": theirs.name,
        "num_classes": 0,
        "num_features": backbone.module.width,
        "model_args": {key: value for key, value in theirs.arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, backbone.image_size, backbone.image_size],
            "fixed_input_size": "img_size" in theirs.arguments or isinstance(backbone.module, ViT),
            "crop_mode": "center",
            **images,
            "num_classes": 0,
            **theirs.layers,
        },
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "config.json", lambda part: Path(part).write_text(json.dumps(settings, indent=2) + "\n"))
        replace_file(folder / "README.md", lambda part: Path(part).write_text(card))
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written ({error})") from None
    _write(folder / "model.safetensors", state)


def _reading(path: Path) -> str:
    if path.suffix == ".safetensors":
        return f"from safetensors.torch import load_file\nweights = load_file({str(path)!r})"
    return f"import torch\nweights = torch.load({str(path)!r}, weights_only=True)"
