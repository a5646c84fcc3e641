"""A backbone with a linear layer on top: the network that fine-tuning trains, and its files.

Letters: B images, N patches, D width, C classes, S side of the images in pixels.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastssl.config import OLD_RESAMPLE, ConfigError, Model
from fastssl.models import AnyBackbone, build_backbone
from fastssl.models.relative_positions import add_relative_positions, attention_bias
from fastssl.models.vit import ViT
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint, CheckpointError
from fastssl.weights.official import unwrapped

HEAD_STD = 2e-5  # of the new linear layer: the first loss is ln C


class Classifier(nn.Module):
    """A backbone and a linear layer with small first weights (normal, standard deviation 2e-5, bias 0).

    A ViT's last norm comes after the mean of the patch tokens (pool "mean"), or before the class token is taken
    ("class"). The keys below `backbone.` stay those of the backbone.

    Args:
        backbone: trained further in place.
        classes: C.
        pool: "mean" or "class"; a ResNet has its own mean.
        size: side of the images, in pixels.
        relative_positions: give a ViT's blocks a bias per relative position (`fastssl.models.relative_positions`).
    """

    index: Tensor | None  # int64 [1 + N, 1 + N]

    def __init__(
        self, backbone: AnyBackbone, classes: int, pool: str, size: int, relative_positions: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = pool
        index = None
        if isinstance(backbone, ViT):
            if relative_positions:
                side = size // backbone.patch_size
                index = add_relative_positions(backbone, side, side)
        elif pool == "class" or relative_positions:
            raise ConfigError("pool=class and relative_positions change a ViT; the checkpoint holds none")
        self.register_buffer("index", index, persistent=False)
        self.head = nn.Linear(backbone.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> what the linear layer sees, [B, D]."""
        if not isinstance(self.backbone, ViT):
            return self.backbone(images)
        x = self.backbone.embed(images)  # [B, 1+N, D]
        for block in self.backbone.blocks:
            x = block(x) if self.index is None else block(x, attn_mask=attention_bias(block, self.index))
        if self.pool == "mean":
            return self.backbone.norm(x[:, 1:].mean(dim=1))
        return self.backbone.norm(x)[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> scores [B, C]."""
        return self.head(self.features(images))


def open_finetuned(path: str) -> tuple[dict[str, Classifier], int, int, list[str], int]:
    """A fine-tuned network from a last.pt of ours, or from a file of MAE's or SemMAE's authors.

    Returns:
        The networks ("weights", and "moving average" if there is one), the side of their images in pixels, the epochs
        done, class names (empty where the file has none), and optimizer steps (0 where it does not say).

    Raises:
        CheckpointError: no such file, not of a fine-tuned network, or of another architecture.
    """
    content = checkpoint.load(path)
    if isinstance(content, dict) and "format" in content:
        return _ours(checkpoint.record(path, content, "finetune"))
    needed = {"cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight"}
    state = next((state for _, state in unwrapped(content) if needed <= set(state)), None)
    if state is None:
        raise CheckpointError(f"{path} holds no fine-tuned ViT (expected MAE's keys, with head.weight)")
    network, size = _as_ours(state, path)
    epoch = content.get("epoch", -1)
    return {"weights": network}, size, int(epoch) + 1, [], 0


def _ours(saved: Checkpoint) -> tuple[dict[str, Classifier], int, int, list[str], int]:
    extra = saved.extra
    how, states = extra["options"], {"weights": saved.network}
    if extra["ema"]:
        states["moving average"] = extra["ema"]
    networks = {}
    for name, state in states.items():
        backbone = build_backbone(saved.section(Model, "model", resample=OLD_RESAMPLE), 0.0)
        networks[name] = Classifier(backbone, extra["num_classes"], how["pool"], how["size"], how["relative_positions"])
        networks[name].load_state_dict(state)
    return networks, how["size"], len(extra["history"]), extra["classes"], saved.step


def _as_ours(state: dict[str, Tensor], path: str) -> tuple[Classifier, int]:
    """The classifier of MAE's code (`fc_norm`: mean of the patch tokens; `norm`: class token) as ours, and its side."""
    width, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=0)
    size = round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch
    backbone = ViT(width=width, depth=depth, heads=width // 64, patch_size=patch, image_size=size)
    network = Classifier(backbone, len(state["head.weight"]), "mean" if "fc_norm.weight" in state else "class", size)
    renamed = {
        key if key.startswith("head.") else f"backbone.{key.replace('fc_norm.', 'norm.')}": value
        for key, value in state.items()
    }
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} holds another network than MAE's ViT ({reason[:160]})") from None
    return network, size
