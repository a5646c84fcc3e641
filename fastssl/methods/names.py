"""The authors' checkpoint files as our state dicts, and back: one table of names per method.

A table pairs what their keys begin with and what ours begin with. The first pair that fits a key counts, in either
direction; `*` stands for one piece of a key, such as a block's number. Their keys are written with the part of the file
that they stand in: `teacher.backbone.norm.weight` is `checkpoint["teacher"]["backbone.norm.weight"]`.

What a table cannot say, such as one tensor there that is two here, stands in a class of its own below `Names`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastssl.config import ConfigError
from fastssl.models.vit import sincos_positions

Pairs = Iterable[tuple[str, str]]


class Names:
    """A two-way table of key beginnings.

    Args:
        pairs: (theirs, ours); the more special pair first.
        bare: what to put before the keys of a file that has none of the table's parts: a bare backbone, or a state dict
            that is not inside a part.
        older: pairs for files with other names of the same things; read first, never written.
        wrapped: parts whose keys the authors save with `module.` in front. It is optional when a file is read.
    """

    def __init__(self, pairs: Pairs, bare: str, older: Pairs = (), wrapped: Iterable[str] = ()) -> None:
        pairs, older = list(pairs), list(older)
        self._to_ours = [_pattern(theirs, ours) for theirs, ours in [*older, *pairs]]
        self._to_theirs = [_pattern(ours, theirs) for theirs, ours in pairs]
        self._parts = {theirs.partition(".")[0] for theirs, _ in pairs}
        self._bare, self._wrapped = bare, set(wrapped)

    def ours(self, file: dict[str, Any]) -> dict[str, Tensor]:
        """The authors' checkpoint file, loaded -> our state dict; what stands outside the table's parts is left out.

        Raises:
            KeyError: a key that no pair fits.
        """
        parts = [(f"{part}.", keys) for part, keys in file.items() if part in self._parts] or [(self._bare, file)]
        return {
            _renamed(f"{part}{key.removeprefix('module.')}", self._to_ours): value
            for part, keys in parts
            for key, value in keys.items()
        }

    def theirs(self, state: dict[str, Tensor]) -> dict[str, Any]:
        """Our state dict -> the weights of the authors' checkpoint file, by part.

        Raises:
            KeyError: a key that no pair fits.
        """
        file: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            part, _, name = _renamed(key, self._to_theirs).partition(".")
            file.setdefault(part, {})[f"module.{name}" if part in self._wrapped else name] = value
        return file


def _pattern(old: str, new: str) -> tuple[re.Pattern[str], str]:
    return re.compile(re.escape(old).replace(r"\*", r"([^.]+)")), new.replace("*", r"\1")


def _renamed(key: str, patterns: list[tuple[re.Pattern[str], str]]) -> str:
    for old, new in patterns:
        if found := old.match(key):
            return found.expand(new) + key[found.end() :]
    raise KeyError(key)


_BOTH = ("student", "teacher")

MAE = Names(
    [("model.mask_token", "decoder.mask_token"), ("model.decoder_", "decoder."), ("model.", "encoder.")],
    bare="model.",
)
"""MAE and SemMAE. A file of the encoder alone gives only `encoder.` keys."""

SIT = Names(
    [
        *((f"{name}.head.mlp.", f"{name}.head.") for name in _BOTH),
        *((f"{name}.head_recons.", f"{name}.decoder.") for name in _BOTH),
        *((f"{name}.", f"{name}.") for name in _BOTH),
    ],
    bare="teacher.backbone.",
    wrapped=_BOTH,
)


class _Centred(Names):
    """Centers are [1, K] in the authors' files and [K] here."""

    def ours(self, file: dict[str, Any]) -> dict[str, Tensor]:
        state = super().ours(file)
        return {key: value.flatten() if key.startswith("center") else value for key, value in state.items()}

    def theirs(self, state: dict[str, Tensor]) -> dict[str, Any]:
        return super().theirs({key: value[None] if key.startswith("center") else value for key, value in state.items()})


DINO = _Centred(
    [("student.", "student."), ("teacher.", "teacher."), ("dino_loss.center", "center")],
    bare="teacher.backbone.",
    wrapped=("student",),
)

_TAPS = (2, 3, 4)  # the authors' networks are ResNets with these taps
SCFS = _Centred(
    [
        *((f"{name}.backbone.model.", f"{name}.backbone.") for name in _BOTH),
        *((f"{name}.layer{tap}_head.", f"{name}.stage_heads.{tap}.") for name in _BOTH for tap in _TAPS),
        *((f"{name}.", f"{name}.") for name in _BOTH),
        *((f"dino_loss_l{tap}_fn.center", f"center_{tap}") for tap in _TAPS),
        ("dino_loss_fn.center", "center"),
    ],
    bare="teacher.backbone.model.",
    older=[
        (f"{name}.head.last_layer.parametrizations.weight.original{i}", f"{name}.head.last_layer.weight_{letter}")
        for name in _BOTH
        for i, letter in enumerate("gv")
    ],
    wrapped=_BOTH,
)


class _NoTeachersHead(Names):
    """Of the authors' teacher, which their code never runs, the backbone alone is read. What is written as `teacher` is
    our teacher's backbone, if there is one, else the student's; its head is the student's."""

    def ours(self, file: dict[str, Any]) -> dict[str, Tensor]:
        if "teacher" in file:
            teacher = {k: v for k, v in file["teacher"].items() if k.startswith(("backbone.", "module.backbone."))}
            file = {**file, "teacher": teacher}
        return super().ours(file)

    def theirs(self, state: dict[str, Tensor]) -> dict[str, Any]:
        file = super().theirs(state)
        return {"student": file["student"], "teacher": file["student"] | file.get("teacher", {})}


SAAE = _NoTeachersHead(
    [
        ("student.backbone.", "encoder."),
        ("student.head.mask_feat", "mask_code"),
        ("student.head.mlp.", "projector."),
        ("student.head.decoder_pos_embed_", "decoder.pos_embed"),
        ("student.head._blocks_.", "decoder.blocks."),
        ("student.head._norm_.", "decoder.norm."),
        ("student.head.slp.", "decoder.linear."),
        ("student.head._norm1_.", "decoder.last_norm."),
        ("student.head.unconv.", "decoder.unconv."),
        ("teacher.backbone.", "teacher."),
    ],
    bare="student.backbone.",
    wrapped=_BOTH,
)


class _OnePositionTable(Names):
    """Their position table has a row for the rotation token in front of ours."""

    def ours(self, file: dict[str, Any]) -> dict[str, Tensor]:
        state = super().ours(file)
        if (table := state.get("encoder.pos_embed")) is not None:
            state |= {"rotation_position": table[:, :1], "encoder.pos_embed": table[:, 1:]}
        return state

    def theirs(self, state: dict[str, Tensor]) -> dict[str, Any]:
        table = torch.cat([state["rotation_position"], state["encoder.pos_embed"]], dim=1)
        rest = {key: value for key, value in state.items() if key != "rotation_position"}
        return super().theirs(rest | {"encoder.pos_embed": table})


SIT_V1 = _OnePositionTable(
    [
        ("model.rot_token", "rotation_token"),
        ("model.contrastive_token", "encoder.cls_token"),
        ("model.rot_w", "uncertainty.rotation"),
        ("model.contrastive_w", "uncertainty.contrastive"),
        ("model.recons_w", "uncertainty.reconstruction"),
        ("model.rot_head.", "rotation_head."),
        ("model.contrastive_head.", "contrastive_head."),
        ("model.convTrans.", "decoder.convTrans."),
        ("model.", "encoder."),
    ],
    bare="model.",
)


class _CAE(Names):
    """Keys have no bias in the authors' attention, and queries and values have one each; here one bias holds the three
    of them, zeros for the keys. `alignment_encoder`, a copy of the encoder, is written and not read."""

    def ours(self, file: dict[str, Any]) -> dict[str, Tensor]:
        """As `Names.ours`, also for a file of the bare encoder.

        Raises:
            ConfigError: the attention's inner width is not that of the tokens, which no model here has.
        """
        theirs = {key.removeprefix("module."): value for key, value in file.get("model", file).items()}
        if not any(key.startswith("encoder.") for key in theirs):
            theirs = {f"encoder.{key}": value for key, value in theirs.items()}
        for key, value in theirs.items():
            if key.endswith((".attn.qkv.weight", ".cross_attn.q.weight")) and len(value) % value.shape[1]:
                raise ConfigError(
                    f"{key} is {list(value.shape)}; an attention narrower than its tokens is not supported"
                )
        copies = ("alignment_encoder.", "teacher.")
        state = super().ours({key: value for key, value in theirs.items() if not key.startswith(copies)})
        for key in [key for key in state if key.endswith(".attn.q_bias")]:
            q, v = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
            state[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
        if "mask_token" in state and "pos_embed" not in state:  # files of the older code
            side = math.isqrt(state["encoder.pos_embed"].shape[1] - 1)
            state["pos_embed"] = sincos_positions(state["mask_token"].shape[-1], side, side, rows_first=True)
        return state

    def theirs(self, state: dict[str, Tensor]) -> dict[str, Any]:
        state = dict(state)
        for key in [key for key in state if key.endswith(".attn.qkv.bias")]:
            q, _, v = state.pop(key).chunk(3)
            state |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
        model = super().theirs(state)["model"]
        copies = {f"alignment_{key}": value for key, value in model.items() if key.startswith("encoder.")}
        return {"model": {**model, **copies}}


_BLOCK = [("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("", "")]
_CROSS_BLOCK = [
    ("gamma_1_cross", "gamma1"),
    ("gamma_2_cross", "gamma2"),
    ("norm1_q.", "norm_q."),
    ("norm1_k.", "norm_k."),
    ("norm1_v.", "norm_v."),
    ("norm2_cross.", "norm2."),
    ("cross_attn.q_bias", "query.bias"),
    ("cross_attn.v_bias", "value.bias"),
    ("cross_attn.q.", "query."),
    ("cross_attn.k.", "key."),
    ("cross_attn.v.", "value."),
    ("cross_attn.proj.", "proj."),
    ("mlp_cross.", "mlp."),
]


def _inside(theirs: str, ours: str, names: Pairs) -> list[tuple[str, str]]:
    """Pairs for what the names call in each block of a stack."""
    return [(f"model.{theirs}.*.{their}", f"{ours}.*.{our}") for their, our in names]


CAE = _CAE(
    [
        ("model.encoder_to_regresser_norm.", "project.1."),
        ("model.encoder_to_regresser.", "project.0."),
        ("model.rd_pos_embed", "pos_embed"),
        ("model.regresser.norm.", "regressor.norm."),
        *_inside("regresser.regressor_blocks", "regressor.blocks", _CROSS_BLOCK),
        *_inside("decoder.decoder_blocks", "decoder.blocks", _BLOCK),
        *_inside("encoder.blocks", "encoder.blocks", _BLOCK),
        ("model.", ""),
    ],
    bare="model.",
    older=[  # the code that made the released models
        ("model.encoder_to_decoder_norm.", "project.1."),
        ("model.encoder_to_decoder.", "project.0."),
        ("model.pretext_neck.norm.", "regressor.norm."),
        ("model.pretext_neck.norm2.", "decoder.norm."),
        ("model.pretext_neck.head.", "decoder.head."),
        *_inside("pretext_neck.regressor_blocks", "regressor.blocks", _CROSS_BLOCK),
        *_inside("pretext_neck.decoder_blocks", "decoder.blocks", _BLOCK),
    ],
)
"""The authors' current code (`regresser.`), and the one before it (`pretext_neck.`). A key that is unknown keeps its
name."""
