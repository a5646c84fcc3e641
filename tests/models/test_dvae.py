"""Tokenizers: OpenAI's layout against its formula, files opened without executing them, the stand-in's codebook."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from fastssl.config import ConfigError
from fastssl.models import dvae
from fastssl.models.dvae import DalleEncoder, PatchCodebook, describe, load_tokenizer, map_pixels, nearest

CPU = torch.device("cpu")

# Writes a whole pickled module with the class paths, attributes and names of OpenAI's file, and what it computes.
WRITER = """
import sys, types
from collections import OrderedDict
import torch
from torch import nn

class Conv2d(nn.Module):
    def __init__(self, n_in, n_out, kw, device):
        super().__init__()
        self.n_in, self.n_out, self.kw, self.use_float16 = n_in, n_out, kw, True
        self.device, self.requires_grad = device, False
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / (n_in * kw**2) ** 0.5, requires_grad=False)
        self.b = nn.Parameter(torch.randn(n_out) / 10, requires_grad=False)
    def forward(self, x):
        return nn.functional.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)

class EncoderBlock(nn.Module):
    def __init__(self, n_in, n_out, n_layers, device):
        super().__init__()
        self.n_in, self.n_out, self.n_layers, self.n_hid = n_in, n_out, n_layers, n_out // 4
        self.post_gain, self.device = 1 / n_layers**2, device
        self.id_path = Conv2d(n_in, n_out, 1, device) if n_in != n_out else nn.Identity()
        hid = self.n_hid
        sizes = [(n_in, hid, 3), (hid, hid, 3), (hid, hid, 3), (hid, n_out, 1)]
        parts = []
        for i, size in enumerate(sizes, 1):
            parts += [(f"relu_{i}", nn.ReLU()), (f"conv_{i}", Conv2d(*size, device))]
        self.res_path = nn.Sequential(OrderedDict(parts))
    def forward(self, x):
        return self.id_path(x) + self.post_gain * self.res_path(x)

class Encoder(nn.Module):
    def __init__(self, n, codes, device):
        super().__init__()
        self.n_hid, self.vocab_size, self.device, self.use_mixed_precision = n, codes, device, True
        def group(n_in, n_out, pool):
            sizes = [(n_in, n_out), (n_out, n_out)]
            parts = [(f"block_{i}", EncoderBlock(*size, 8, device)) for i, size in enumerate(sizes, 1)]
            return nn.Sequential(OrderedDict(parts + ([("pool", nn.MaxPool2d(kernel_size=2))] if pool else [])))
        self.blocks = nn.Sequential(OrderedDict([
            ("input", Conv2d(3, n, 7, device)),
            ("group_1", group(n, n, True)),
            ("group_2", group(n, 2 * n, True)),
            ("group_3", group(2 * n, 4 * n, True)),
            ("group_4", group(4 * n, 8 * n, False)),
            ("output", nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", Conv2d(8 * n, codes, 1, device))]))),
        ]))
    def forward(self, x):
        return self.blocks(x)

places = {Conv2d: "dall_e.utils", EncoderBlock: "dall_e.encoder", Encoder: "dall_e.encoder"}
sys.modules["dall_e"] = types.ModuleType("dall_e")
for kind, place in places.items():
    module = sys.modules.setdefault(place, types.ModuleType(place))
    kind.__module__ = place
    setattr(module, kind.__name__, kind)
torch.manual_seed(0)
encoder = Encoder(4, 32, torch.device("cpu"))
for block in encoder.modules():  # residual branches loud enough to be heard
    if isinstance(block, EncoderBlock):
        block.res_path.conv_4.w.data *= 64
pixels = torch.rand(2, 3, 6, 4).repeat_interleave(8, -1).repeat_interleave(8, -2)
encoder.blocks.output.conv.b.data -= encoder(0.1 + 0.8 * pixels).mean((0, 2, 3))  # so that many codes win
known = {"pixels": pixels, "logits": encoder(0.1 + 0.8 * pixels), "state": encoder.state_dict()}
torch.save(encoder, sys.argv[1] + "/encoder.pkl")
torch.save(known, sys.argv[1] + "/known.pt")
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with encoder.pkl, laid out as OpenAI's, and known.pt: pixels, logits and state of that module."""
    folder = tmp_path_factory.mktemp("published")
    subprocess.run([sys.executable, "-c", textwrap.dedent(WRITER), str(folder)], check=True)
    return folder


@pytest.mark.parametrize("kind", ["pickled module", "state dict", "wrapped", "prefixed", "safetensors"])
def test_every_form_of_the_published_weights_gives_the_published_codes(published, tmp_path, kind):
    known = torch.load(published / "known.pt")
    path = tmp_path / "weights.pth"
    if kind == "pickled module":
        path = published / "encoder.pkl"
    elif kind == "state dict":
        torch.save(known["state"], path)
    elif kind == "wrapped":
        torch.save({"state_dict": known["state"], "meta": "x"}, path)
    elif kind == "prefixed":
        torch.save({f"encoder.{key}": value for key, value in known["state"].items()} | {"other": torch.ones(1)}, path)
    else:
        from safetensors.torch import save_file

        path = tmp_path / "weights.safetensors"
        save_file({key: value.contiguous() for key, value in known["state"].items()}, path)
    tokenizer = load_tokenizer(path).place(CPU)
    assert "dall_e" not in sys.modules
    assert (tokenizer.codes, tokenizer.cell) == (32, 8)
    assert tokenizer.state_dict().keys() == known["state"].keys()
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    expected = known["logits"].argmax(1).flatten(1)
    assert len(expected.unique()) > 5
    assert torch.equal(tokenizer(known["pixels"]), expected)
    cells = torch.tensor([[23, 0, 7], [5, 6, 1]])
    assert torch.equal(tokenizer(known["pixels"], cells), expected.gather(1, cells))


def test_size_of_the_published_encoder():
    with torch.device("meta"):
        encoder = DalleEncoder()
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert len(encoder.state_dict()) == 74
    assert (encoder.codes, encoder.cell) == (8192, 8)
    keys = set(encoder.state_dict())
    assert {"blocks.input.w", "blocks.group_4.block_1.id_path.b", "blocks.output.conv.w"} <= keys
    assert "blocks.group_1.block_1.id_path.w" not in keys


def test_the_encoder_against_its_formula_in_float64():
    torch.manual_seed(0)
    encoder = DalleEncoder(8, 16)
    state = {key: value.double() for key, value in encoder.state_dict().items()}

    def conv(name, x):
        w = state[f"blocks.{name}.w"]
        return F.conv2d(x, w, state[f"blocks.{name}.b"], padding=(w.shape[-1] - 1) // 2)

    pixels = torch.rand(2, 3, 32, 32)
    x = conv("input", 0.8 * pixels.double() + 0.1)
    for g in range(1, 5):
        for b in (1, 2):
            name = f"group_{g}.block_{b}"
            y = x
            for c in range(1, 5):
                y = conv(f"{name}.res_path.conv_{c}", torch.where(y > 0, y, 0))
            x = (conv(f"{name}.id_path", x) if f"blocks.{name}.id_path.w" in state else x) + y / 64
        if g < 4:
            x = F.max_pool2d(x, 2)
    ours = encoder.place(CPU).features(map_pixels(pixels).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(ours.double(), x.clamp_min(0), rtol=1e-4, atol=1e-5)
    logits = conv("output.conv", x.clamp_min(0))
    assert torch.equal(encoder(pixels), logits.argmax(1).flatten(1))


def test_the_last_layer_in_pieces_is_the_same(monkeypatch):
    torch.manual_seed(0)
    encoder, pixels = DalleEncoder(8, 16).place(CPU), torch.rand(2, 3, 32, 32)
    whole = encoder(pixels)
    monkeypatch.setattr(dvae, "LOGITS", 16 * 5)
    assert torch.equal(encoder(pixels), whole)


def test_a_changed_cell_changes_codes_near_it_only():
    """Position of a cell: changed pixels change features around their own cell, and none far away."""
    torch.manual_seed(0)
    encoder = DalleEncoder(4, 16, groups=3, blocks=1).place(CPU)
    pixels = torch.rand(1, 3, 160, 160)
    other = pixels.clone()
    other[:, :, 44:48, 120:124] = 0  # cell (11, 30) of 40 x 40
    a, b = (encoder.features(map_pixels(x)) for x in (pixels, other))
    row, column = (a - b).abs().sum((0, 1)).nonzero().unbind(1)
    assert 0 < (row - 11).abs().max() < 6
    assert 0 < (column - 30).abs().max() < 6
    assert row.double().mean().item() == pytest.approx(11, abs=0.7)
    assert column.double().mean().item() == pytest.approx(30, abs=0.7)


def test_pixels_are_mapped_as_dall_e_expects():
    assert map_pixels(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.1, 0.9])


def test_a_step_with_codes_can_go_backward():
    codes = DalleEncoder(4, 8).place(CPU)(torch.rand(1, 3, 16, 16))
    assert codes.dtype == torch.int64
    assert not codes.is_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes, codes.clone())


def test_autocast_does_not_reach_the_tokenizer():
    torch.manual_seed(0)
    encoder, pixels = DalleEncoder(16, 512).place(CPU), torch.rand(4, 3, 64, 64)
    plain = encoder(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(pixels), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_half_precision_agrees_on_nearly_all_codes():
    torch.manual_seed(0)
    encoder, pixels = DalleEncoder(64, 1024), torch.rand(4, 3, 112, 112)
    exact = encoder.place(CPU)(pixels)
    device = torch.device("cuda")
    codes = encoder.place(device)(pixels.to(device)).cpu()
    assert (codes == exact).float().mean() > 0.95


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("form", ["whole", "inside", "plain pickle"])
def test_a_hostile_file_is_refused_and_not_executed(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    if form == "plain pickle":
        (tmp_path / "encoder.pkl").write_bytes(pickle.dumps(Hostile(), protocol=2))
    else:
        torch.save(Hostile() if form == "whole" else {"blocks.input.w": Hostile()}, "encoder.pkl")
    with pytest.raises(ConfigError) as error:
        load_tokenizer("encoder.pkl")
    assert "refused: it asks for posix.mkdir" in str(error.value) or "cannot be read" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_a_pickled_module_of_another_kind_is_refused(tmp_path):
    torch.save(torch.nn.Conv2d(3, 4, 1), tmp_path / "other.pkl")
    with pytest.raises(ConfigError, match=r"refused: it asks for torch.nn.modules.conv.Conv2d"):
        load_tokenizer(tmp_path / "other.pkl")


def test_messages(tmp_path, published):
    with pytest.raises(ConfigError, match=r"no such file; DALL-E's encoder .*cdn\.openai\.com/dall-e/encoder\.pkl"):
        load_tokenizer(tmp_path / "none.pkl")
    path = published / "encoder.pkl"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    load_tokenizer(path, digest.upper())
    with pytest.raises(ConfigError, match=f"its SHA-256 is {digest}, not 00"):
        load_tokenizer(path, "00")
    (tmp_path / "text.pkl").write_text("not found")
    (tmp_path / "text.safetensors").write_text("not found")
    for name in ("text.pkl", "text.safetensors"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_tokenizer(tmp_path / name)
    state = torch.load(published / "known.pt")["state"]
    broken = {
        "a": {"x": torch.ones(1)},
        "b": {key: value for key, value in state.items() if "conv_2" not in key},
        "c": {**state, "blocks.input.b": torch.ones(9)},
        "d": [1, 2],
        "e": {**state, "blocks.input.w": "text"},
    }
    for name, content in broken.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ConfigError, match="not the weights of DALL-E's encoder") as error:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(error.value)


# -- the stand-in ----------------------------------------------------------------------------------------------------


def test_nearest_against_a_loop(monkeypatch):
    torch.manual_seed(0)
    points, centres = torch.randn(40, 5), torch.randn(7, 5)
    expected = [min(range(7), key=lambda k: (p - centres[k]).square().sum().item()) for p in points]
    assert nearest(points, centres).tolist() == expected
    monkeypatch.setattr(dvae, "LOGITS", 7 * 3)
    assert nearest(points, centres).tolist() == expected


def test_codebook_finds_its_own_patches_and_paints_them():
    torch.manual_seed(0)
    patches = torch.rand(6, 3, 4, 4)
    codebook = PatchCodebook(describe(patches.flatten(1)), patches)
    codes = torch.tensor([[[0, 5, 2], [3, 3, 1]]])
    pixels = codebook.paint(codes)
    assert pixels.shape == (1, 3, 8, 12)
    assert torch.equal(pixels[0, :, 4:8, 8:12], patches[1])
    assert torch.equal(codebook(pixels), codes.flatten(1))
    assert torch.equal(codebook(pixels, torch.tensor([[5, 1]])), torch.tensor([[1, 5]]))
    assert DalleEncoder(4, 8).paint(codes) is None


def test_description_of_a_patch_by_hand():
    patch = torch.tensor([[0.0, 0.5, 1.0, 0.5, 0.2, 0.2]])  # red 0 and 0.5, green 1 and 0.5, blue 0.2 twice
    size = ((4 * 0.25**2 / 6) ** 0.5 + 0.1) * 6**0.5
    structure = [-0.25 / size, 0.25 / size, 0.25 / size, -0.25 / size, 0, 0]
    assert describe(patch)[0].tolist() == pytest.approx([*structure, 1.5 * 0.25, 1.5 * 0.75, 1.5 * 0.2])
