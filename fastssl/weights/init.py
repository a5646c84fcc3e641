"""Weights that a new run starts from (`model.init`): ours, a library's, or a file of somebody else.

The backbone goes to every network of the method that is one. The method's other networks are taken from a file of the
same method where they fit; what is not taken stays as it was drawn, and every start says which is which.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastssl.config import Config
from fastssl.methods import METHODS
from fastssl.methods.method import Method
from fastssl.models import VITS
from fastssl.models.resnet import ResNet
from fastssl.models.timm_backbone import TimmBackbone
from fastssl.models.vit import ViT, resample_positions
from fastssl.training import checkpoint
from fastssl.training.checkpoint import CheckpointError
from fastssl.weights.backbone import LIBRARIES, check_finite, open_backbone
from fastssl.weights.official import unwrapped

State = dict[str, Tensor]
MARKS = {"saae": "mask_code", "sit_v1": "rotation_token"}  # without these, such a file is as well one of others
UNKNOWN_PARTS = {  # a piece of a key -> what it belongs to, that our ViT has not
    "reg_token": "registers",
    "register_tokens": "registers",
    "storage_tokens": "registers",
    "mlp.w12": "SwiGLU",
    "mlp.w3": "SwiGLU",
    "mlp.fc1_g": "SwiGLU",
    "norm_pre": "a norm before the first block",
    "q_norm": "norms of queries and keys",
    "rope": "rotary positions",
    "relative_position": "relative positions",
    "rel_pos": "relative positions",
    "dist_token": "a distillation token",
}
ASIDE = ("head.", "head_dist.", "fc.", "fc_norm.", "mask_token")  # no part of a backbone
LISTED = 6


@dataclass
class Source:
    """What a file or a library holds.

    Attributes:
        backbone: its state dict, by our names.
        method: of a file of the run's own method, the whole state dict; else empty.
        heads: attention heads, if that is known.
        foreign: a file that does not say which mean and deviation its images had.
    """

    backbone: State
    method: State = field(default_factory=dict)
    heads: int | None = None
    foreign: bool = False


def start_from(method: Method, config: Config) -> list[str]:
    """Fills a freshly drawn method from `config.model.init`.

    Returns:
        Lines that say what was taken and what stays as it was drawn.

    Raises:
        CheckpointError: no such file or model, or it does not fit the configured backbone; the method is as it was.
    """
    name = config.model.init
    source = _read(name, method, config)
    spine = method.backbone
    parts = [key for key, module in method.named_modules() if type(module) is type(spine)]
    notes: list[str] = []
    filled: State = {}
    for part in parts:
        own = {key.removeprefix(f"{part}."): v for key, v in source.method.items() if key.startswith(f"{part}.")}
        module = method.get_submodule(part)
        fitted, said = _fit(own or source.backbone, module, config, source.heads)
        filled |= {f"{part}.{key}": value for key, value in fitted.items()}
        notes += [line for line in said if line not in notes]
    rest = {key: value for key, value in method.state_dict().items() if key not in filled}
    taken = {key: source.method[key] for key, value in rest.items() if _fits(source.method.get(key), value)}
    filled |= taken
    check_finite(name, filled)
    method.load_state_dict(filled, strict=False)
    count = len(spine.state_dict())
    lines = [f"weights from {name}: the backbone ({count} tensors), for {' and '.join(parts)}"]
    if taken:
        lines.append(f"  also taken: {_groups(taken)}")
    lines += [f"  {note}" for note in notes]
    if source.foreign:
        lines.append("  mean and deviation of the images: taken to be ImageNet's, for the file does not say")
    if drawn := [key for key in rest if key not in taken]:
        lines.append(f"  drawn anew: {_groups(drawn)}")
    return lines


def _fits(value: Tensor | None, own: Tensor) -> bool:
    return value is not None and value.shape == own.shape


def _groups(keys: Any) -> str:
    """The networks that keys belong to: student.head (12 tensors), center (1)."""
    counts: dict[str, int] = {}
    for key in keys:
        pieces = key.split(".")
        name = ".".join(pieces[: 2 if pieces[0] in ("student", "teacher") else 1])
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({count} tensor{'s' if count > 1 else ''})" for name, count in counts.items())


# -- reading -----------------------------------------------------------------------------------------------------------


def _read(name: str, method: Method, config: Config) -> Source:
    library = name.partition(":")[0]
    if library in LIBRARIES and ":" in name:
        return _of_module(open_backbone(name).module)
    if (Path(name) / "config.json").is_file():  # a folder as on Hugging Face's hub
        return _of_module(open_backbone(f"timm:local-dir:{name}").module)
    content = checkpoint.load(name)
    if isinstance(content, dict) and "format" in content:
        saved = checkpoint.record(name, content)
        model = saved.config.get("model", {})
        heads = model.get("heads") or VITS.get(model.get("name", ""), {}).get("heads")
        same = saved.kind in ("pretrain", "import") and saved.config.get("method") == config.method
        return Source(saved.backbone(), saved.network if same else {}, heads)
    return _of_authors(name, content, method, config)


def _of_module(module: nn.Module) -> Source:
    heads = cast(Any, module.blocks[0]).attn.num_heads if isinstance(module, ViT) else None
    return Source(module.state_dict(), heads=heads)


def _of_authors(name: str, content: Any, method: Method, config: Config) -> Source:
    """A file in the layout of any method's authors, or of a library: the one by which most of the backbone's keys are
    there, and fewest others."""
    own = {key.removeprefix("net.") for key in method.backbone.state_dict()}
    best, most = Source({}), (0, 0)
    kinds = [config.method, *(key for key in METHODS if key != config.method)]
    for (_, state), kind in itertools.product(unwrapped(content), kinds):
        layout = METHODS[kind]
        try:
            ours = {key: v for key, v in layout.official(state).items() if isinstance(v, Tensor)}
        except (KeyError, TypeError, AttributeError, ValueError, IndexError):
            continue
        marked = MARKS.get(kind, "") in ours
        if kind == "sit_v1" and not marked:  # it would take a row of the position table for something else
            continue
        start = len(layout.backbone_prefix)
        backbone = {key[start:]: value for key, value in ours.items() if key.startswith(layout.backbone_prefix)}
        count = len(own & backbone.keys())
        found = (count + marked, count - len(backbone))
        if count and found > most:
            whole = kind == config.method and method.state_dict().keys() <= ours.keys()
            best, most = Source(backbone, ours if whole else {}, foreign=True), found
    if not best.backbone:
        keys = ", ".join(map(str, list(content)[:LISTED])) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{name} holds no backbone in a layout that is known here; what it holds: {keys}")
    return best


# -- fitting -----------------------------------------------------------------------------------------------------------


def _fit(state: State, module: nn.Module, config: Config, heads: int | None) -> tuple[State, list[str]]:
    """A backbone's tensors as the module takes them, and what was changed for that."""
    name = config.model.init
    named = any(key.startswith("net.") for key in state)
    if isinstance(module, TimmBackbone) and not named:
        state = {f"net.{key}": value for key, value in state.items()}
    elif not isinstance(module, TimmBackbone) and named:
        state = {key.removeprefix("net."): value for key, value in state.items()}
    own, notes = module.state_dict(), []
    outside: tuple[str, ...] = ASIDE
    if isinstance(module, TimmBackbone):
        classifiers = module.net.pretrained_cfg.get("classifier") or ()
        outside = tuple(f"net.{one}." for one in ([classifiers] if isinstance(classifiers, str) else classifiers))
    aside = sorted(key for key in state if key.startswith(outside) and key not in own)
    state = {key: value for key, value in state.items() if key not in aside}
    if aside:
        notes.append(f"left aside: {', '.join(aside[:LISTED])}{' ..' if len(aside) > LISTED else ''}")
    if isinstance(module, ViT):
        state = _fit_vit(state, module, config, heads, notes)
    odd = sorted(own.keys() ^ state.keys()) + [
        key for key in own if key in state and own[key].shape != state[key].shape
    ]
    if odd:
        kind = "ResNet" if isinstance(module, ResNet) else "model"
        raise CheckpointError(
            f"{name} does not fit the {kind} that model.name '{config.model.name}' stands for; what differs: "
            f"{', '.join(odd[:LISTED])}{f' and {len(odd) - LISTED} more' if len(odd) > LISTED else ''}"
        )
    return state, notes


def _fit_vit(state: State, module: ViT, config: Config, heads: int | None, notes: list[str]) -> State:
    name = config.model.init
    missing = {what for piece, what in UNKNOWN_PARTS.items() if any(piece in key for key in state)}
    inside, outside = (state.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if inside is not None and outside is not None and len(inside) == 2 * outside.shape[1]:
        missing.add("SwiGLU")
    if "pos_embed" not in state:
        missing.add("no position table")
    if "cls_token" not in state:
        missing.add("no class token")
    if missing:
        raise CheckpointError(
            f"{name} has {', '.join(sorted(missing))}, other than our ViT; methods dino and scfs take such a model "
            "under timm's own name, if it has one: --model.name timm:NAME --init timm:NAME"
        )
    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=-1)
    scaled = any(".ls1." in key for key in state)
    attention = cast(Any, module.blocks[0]).attn
    heads = heads or (attention.num_heads if width == module.width else max(width // 64, 1))
    theirs = {"width": width, "depth": depth, "heads": heads}
    asked = []
    if theirs != {"width": module.width, "depth": module.num_blocks, "heads": attention.num_heads}:
        free = not (config.model.width or config.model.depth or config.model.heads)
        known = next((key for key, shape in VITS.items() if shape == theirs and free), "")
        asked += [f"--model.name {known}"] if known else [f"--model.{key} {value}" for key, value in theirs.items()]
    if patch != module.patch_size:
        asked.append(f"--model.patch_size {patch}")
    if scaled and not config.model.layer_scale:
        asked.append("--model.layer_scale 1e-5")
    if asked:
        raise CheckpointError(f"{name} holds another ViT than the configured one; add {' '.join(asked)}")
    if not scaled and config.model.layer_scale:
        ones = {key: torch.ones_like(value) for key, value in module.state_dict().items() if key.endswith(".gamma")}
        state = {**state, **ones}
        notes.append("layer scale: 1, for the file has none")

    table = state["pos_embed"]
    if math.isqrt(table.shape[1]) ** 2 == table.shape[1]:  # none of its rows is for the class token
        table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    side = math.isqrt(table.shape[1] - 1)
    if side * side != table.shape[1] - 1:
        raise CheckpointError(
            f"{name} has a position table of {table.shape[1]} rows, which are no square and a class token"
        )
    if (side, side) != module.grid:
        table = resample_positions(table.float(), (side, side), module.grid, module.resample)
        notes.append(f"position table resampled from {side} x {side} to {module.grid[0]} x {module.grid[1]} patches")
    if config.model.positions != "learned" and not torch.allclose(table, module.pos_embed, atol=1e-3):
        notes.append(
            f"the position table is the file's and does not learn (model.positions is {config.model.positions})"
        )
    return {**state, "pos_embed": table}
