"""Frozen tokenizers: they name each cell of an image with one of K visual codes, which CAE predicts.

`DalleEncoder` is the encoder of DALL-E's discrete VAE (Ramesh et al. 2021, arXiv 2102.12092) for OpenAI's published
weights; `PatchCodebook` is a small stand-in that `fastssl tokenizer` makes by k-means. `load_tokenizer` opens files of
both, and executes nothing in them.

Letters: B images, H and W sides in pixels, N cells of the image, M cells asked for, K codes, n width of the encoder.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.config import ConfigError
from fastssl.kernels.masked_attention_gather import gather_tokens
from fastssl.models.vit import cut_patches

PUBLISHED = "https://cdn.openai.com/dall-e/encoder.pkl"
LOGITS = 2**25  # logits that exist at once: 128 MiB

# The classes that OpenAI's pickled module names. None of them is ever made: `_Inert` stands for each.
PICKLED = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
)


class Tokenizer(nn.Module):
    """What a method asks of a tokenizer. It is always frozen.

    Attributes:
        codes: how many there are (K).
        cell: side of a cell, in pixels.
    """

    codes: int
    cell: int

    def forward(self, pixels: Tensor, cells: Tensor | None = None) -> Tensor:
        """Codes of an image's cells.

        Args:
            pixels: float [B, 3, H, W] from 0 to 1, H and W multiples of `cell`.
            cells: int64 [B, M], which cells (row-major ids 0..N-1). None: all.

        Returns:
            int64 [B, M] or [B, N], from 0 to K - 1.
        """
        with torch.inference_mode(), torch.autocast(pixels.device.type, enabled=False):
            codes = self.encode(pixels, cells)
        return codes.clone()  # an ordinary tensor: those of inference mode cannot take part in a backward pass

    def encode(self, pixels: Tensor, cells: Tensor | None) -> Tensor:
        """`forward`, without its guards."""
        raise NotImplementedError

    def place(self, device: torch.device) -> Tokenizer:
        """Moves to where it shall compute, in the arithmetic and memory layout that are fastest there."""
        return self.to(device)

    def paint(self, codes: Tensor) -> Tensor | None:
        """Codes [B, rows, columns] as pixels [B, 3, rows x cell, columns x cell]; None if it cannot paint."""
        return None


# -- DALL-E's encoder ------------------------------------------------------------------------------------------------


class DalleEncoder(Tokenizer):
    """The encoder of DALL-E's discrete VAE: convolutions down to one eighth of the side, then K logits per cell.

    The largest logit is the code (no Gumbel noise). The state dict has OpenAI's keys. On CUDA all products take
    float16, and logits are float32, as in OpenAI's code but for the last layer's weights (there float32); on the CPU
    everything is float32. So labels made on a GPU and on a CPU may differ where two codes are nearly equal.

    Args:
        width: channels of the first group (n); each later group has twice as many.
        codes: K.
        groups: groups of residual blocks; the side is halved between them.
        blocks: residual blocks per group.
    """

    def __init__(self, width: int = 256, codes: int = 8192, groups: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.codes = codes
        self.cell = 2 ** (groups - 1)
        gain = 1 / (groups * blocks) ** 2
        self.groups = [f"group_{g}" for g in range(1, groups + 1)]
        layers: dict[str, nn.Module] = {"input": Convolution(3, width, 7)}
        inputs = width
        for g, name in enumerate(self.groups):
            outputs = width * 2**g
            made = {}
            for b in range(1, blocks + 1):
                made[f"block_{b}"] = ResidualBlock(inputs, outputs, gain)
                inputs = outputs
            layers[name] = nn.ModuleDict(made)
        layers["output"] = nn.ModuleDict({"conv": Convolution(inputs, codes, 1)})
        self.blocks = nn.ModuleDict(layers)
        self.requires_grad_(False)

    def place(self, device: torch.device) -> DalleEncoder:
        """channels_last; float16 on CUDA."""
        half = torch.float16 if device.type == "cuda" else None
        return self.to(device, half).to(memory_format=torch.channels_last)

    def encode(self, pixels: Tensor, cells: Tensor | None) -> Tensor:
        x = map_pixels(pixels).to(cast(Convolution, self.blocks["input"]).w.dtype, memory_format=torch.channels_last)
        rows = self.features(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, 8 n], a view
        if cells is not None:
            rows = gather_tokens(rows, cells)
        # The last convolution, 1 x 1, and the argmax: a piece at a time, for the asked cells alone.
        last = cast(Convolution, self.get_submodule("blocks.output.conv"))
        weight = last.w.flatten(1)
        pieces = rows.flatten(0, 1).split(max(1, LOGITS // self.codes))
        return torch.cat([_logits(piece, weight, last.b).argmax(dim=1) for piece in pieces]).unflatten(
            0, rows.shape[:2]
        )

    def features(self, x: Tensor) -> Tensor:
        """Mapped pixels [B, 3, H, W] -> what the last convolution takes, [B, 8 n, H / 8, W / 8]."""
        x = self.blocks["input"](x)
        for name in self.groups:
            if name != self.groups[0]:
                x = F.max_pool2d(x, 2)
            for block in self.blocks[name].children():
                x = block(x)
        return F.relu_(x)


class ResidualBlock(nn.Module):
    """id(x) + gain x res(x), where res is four times ReLU and convolution; overwrites its input."""

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        hidden = outputs // 4
        self.id_path = Convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.res_path = nn.ModuleDict(
            {
                "conv_1": Convolution(inputs, hidden, 3),
                "conv_2": Convolution(hidden, hidden, 3),
                "conv_3": Convolution(hidden, hidden, 3),
                "conv_4": Convolution(hidden, outputs, 1),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h, w]."""
        y = F.relu(x)
        for name in ("conv_1", "conv_2", "conv_3"):
            y = F.relu_(self.res_path[name](y))
        return self.id_path(x).add_(self.res_path["conv_4"](y), alpha=self.gain)


class Convolution(nn.Module):
    """A convolution that keeps the side (zero padding); its parameters have OpenAI's names, w and b."""

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(outputs, inputs, side, side) / (inputs * side**2) ** 0.5)
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


def map_pixels(pixels: Tensor) -> Tensor:
    """Pixels from 0 to 1 -> 0.1 to 0.9, where DALL-E's VAE expects them."""
    return pixels * 0.8 + 0.1


def _logits(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """float32 logits [T, K] of rows [T, D]; float16 factors are not rounded again."""
    if rows.dtype == torch.float16:
        return torch.mm(rows, weight.t(), out_dtype=torch.float32).add_(bias)
    return F.linear(rows, weight, bias)


# -- the stand-in ----------------------------------------------------------------------------------------------------


class PatchCodebook(Tokenizer):
    """A stand-in for a learned tokenizer: the nearest of K k-means centres of an image's small patches.

    A patch is compared by its mean colour and its normalised structure (`describe`).

    Args:
        centres: float [K, F], in the space of `describe`.
        patches: float [K, 3, s, s], the mean pixels of each code's patches, from 0 to 1.
    """

    centres: Tensor
    patches: Tensor

    def __init__(self, centres: Tensor, patches: Tensor) -> None:
        super().__init__()
        self.codes, self.cell = len(patches), patches.shape[-1]
        self.register_buffer("centres", centres)
        self.register_buffer("patches", patches)

    def encode(self, pixels: Tensor, cells: Tensor | None) -> Tensor:
        patches = cut_patches(pixels.float(), self.cell)  # [B, N, 3 s s]
        if cells is not None:
            patches = gather_tokens(patches, cells)
        return nearest(describe(patches.flatten(0, 1)), self.centres).unflatten(0, patches.shape[:2])

    def paint(self, codes: Tensor) -> Tensor:
        x = self.patches[codes]  # [B, rows, columns, 3, s, s]
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def describe(patches: Tensor) -> Tensor:
    """Pixels of patches [T, 3 s s], from 0 to 1 -> what k-means compares, [T, 3 s s + 3].

    Colour and structure count about the same, while in the pixels' own distance nearly all is colour: the mean colour,
    enlarged, stands beside the pixels less their mean colour, brought to about unit length (less for flat patches,
    whose structure is noise).
    """
    pixels = patches.unflatten(1, (3, -1))  # [T, 3, s s]
    colour = pixels.mean(dim=2, keepdim=True)
    centred = (pixels - colour).flatten(1)
    spread = centred.square().mean(dim=1, keepdim=True).sqrt()
    return torch.cat([centred / (spread + 0.1) / patches.shape[1] ** 0.5, 1.5 * colour.flatten(1)], dim=1)


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Index of the centre [K, F] nearest to each point [T, F]: int64 [T]."""
    half = centres.square().sum(dim=1) / 2
    pieces = points.split(max(1, LOGITS // len(centres)))
    return torch.cat([F.linear(piece, centres, -half).argmax(dim=1) for piece in pieces])


# -- files -----------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path, sha256: str = "") -> Tokenizer:
    """Opens a tokenizer's file; nothing in the file is executed.

    Args:
        path: OpenAI's pickled encoder, its state dict (PyTorch or safetensors file), or a file of `fastssl tokenizer`.
        sha256: what the file's SHA-256 must be, in hexadecimal. Empty: it is not checked.

    Raises:
        ConfigError: no such file, another SHA-256, or not a tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"tokenizer {path}: no such file; DALL-E's encoder (215 MB) is at {PUBLISHED}, "
            "or make a stand-in with: fastssl tokenizer DATA OUT.pt"
        )
    if sha256:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
        if digest.hexdigest() != sha256.lower():
            raise ConfigError(f"tokenizer {path}: its SHA-256 is {digest.hexdigest()}, not {sha256.lower()}")
    content = _read(path)
    try:
        if isinstance(content, dict) and content.get("kind") == "tokenizer":  # a checkpoint record
            return PatchCodebook(content["network"]["centres"], content["network"]["patches"])
        return _dalle_encoder(content)
    except (KeyError, AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"tokenizer {path}: not the weights of DALL-E's encoder ({reason})") from None


class _Inert:
    """Stands for every class that a pickled encoder names: it takes the attributes, has no methods and does nothing."""


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"tokenizer {path} cannot be read ({str(error)[:120]})") from None
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in PICKLED]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on damaged or foreign files
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise ConfigError(
                f"tokenizer {path} is refused: it asks for {foreign[1]}, and opening it would run that; "
                f"nothing was executed (the published encoder is at {PUBLISHED})"
            ) from None
        raise ConfigError(
            f"tokenizer {path} cannot be read ({type(error).__name__}): it must be a pickled encoder or a state dict, "
            "in PyTorch's zip format, or a .safetensors file"
        ) from None


def _dalle_encoder(content: Any) -> DalleEncoder:
    """The encoder from a pickled module's inert tree, or from a state dict; sizes follow from the shapes."""
    state = _weights(content) if isinstance(content, _Inert) else content
    for key in ("state_dict", "model"):
        state = state.get(key, state)
    first = next((key for key in state if key.endswith("blocks.input.w")), None)
    if first is None:
        raise KeyError("no blocks.input.w in it")
    prefix = first.removesuffix("blocks.input.w")
    state = {key.removeprefix(prefix): value.float() for key, value in state.items() if key.startswith(prefix)}
    groups = max(int(key.split(".")[1].removeprefix("group_")) for key in state if key.startswith("blocks.group_"))
    blocks = max(int(key.split(".")[2].removeprefix("block_")) for key in state if key.startswith("blocks.group_1."))
    with torch.device("meta"):
        encoder = DalleEncoder(len(state["blocks.input.w"]), len(state["blocks.output.conv.w"]), groups, blocks)
    encoder.load_state_dict(state, assign=True)
    return encoder.requires_grad_(False)


def _weights(module: _Inert, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """The parameters in an inert tree of modules, under their state-dict names."""
    if depth > 16:
        raise ValueError("modules are nested too deeply")
    parts = vars(module)
    found = {f"{prefix}{name}": value.detach() for name, value in parts.get("_parameters", {}).items()}
    for name, child in parts.get("_modules", {}).items():
        found |= _weights(child, f"{prefix}{name}.", depth + 1)
    return found
