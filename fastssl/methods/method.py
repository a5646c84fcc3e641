"""What the trainer, evaluation and the picture page ask of every method."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from fastssl.batch import Batch
from fastssl.config import Config
from fastssl.loaders.masks import Mask
from fastssl.methods.names import Names
from fastssl.pictures import Sheet
from fastssl.step import Step, Values


class Method(nn.Module):
    """One paper: its views, its numbers, its networks and its loss.

    Attributes:
        Views, Settings: dataclasses; the view groups and the method's own numbers.
        defaults: the paper's recipe, as dotted configuration keys.
        backbone_prefix: where the backbone stands in the state dict.
        layout: how the keys of the authors' files and of the state dict are named after each other.
        spare: what the keys of `official` begin with that a configuration may have no use for.
        peak_twice: of `schedule.warmup_cosine`, as the authors' learning rate warms up.
        batch_terms: what in the loss is of a whole micro-batch, beside batch norm: it depends on how a step is split.
        undecayed: endings of the names of tensors that do not decay, beside biases and all of one dimension.
    """

    Views: ClassVar[type]
    Settings: ClassVar[type]
    defaults: ClassVar[dict[str, object]]
    backbone_prefix: str
    layout: ClassVar[Names]
    spare: ClassVar[tuple[str, ...]] = ()
    peak_twice: ClassVar[bool] = True
    batch_terms: ClassVar[tuple[str, ...]] = ()
    undecayed: ClassVar[tuple[str, ...]] = ()

    @property
    def backbone(self) -> nn.Module:
        """What evaluation and export take."""
        return self.get_submodule(self.backbone_prefix.removesuffix("."))

    @property
    def chance_loss(self) -> float | None:
        """The loss when every image gets the same output; None where there is no such value."""
        return None

    def forward(self, batch: Batch, values: Values) -> Step:
        """The normalised views of one micro-batch -> loss and metrics."""
        raise NotImplementedError

    def after_backward(self, values: Values) -> None:
        """Called on the gradients, before clipping and the optimizer's step."""

    def scheduled(self, values: Values) -> dict[str, float]:
        """The numbers that change from step to step. In training `values.numbers` holds them on the device.

        `momentum`, if there, is that of `averages`.
        """
        return {}

    def number(self, name: str, values: Values) -> Tensor | float:
        """One of `scheduled`: on the device if it is there."""
        return values.numbers[name] if name in values.numbers else self.scheduled(values)[name]

    def averages(self) -> list[tuple[nn.Module, nn.Module]]:
        """(teacher, student): after each step of the optimizer, teacher <- momentum x teacher + (1 - momentum) x
        student, over parameters (buffers stay each module's own)."""
        return []

    def factors(self) -> dict[str, list[nn.Parameter]]:
        """Parameters whose gradients are multiplied by a number of `scheduled`, by its name. 0: they stay."""
        return {}

    def pictures(self, batch: Batch, values: Values) -> dict[str, Sheet]:
        """What the method sees and does, for people; called in eval mode without gradients.

        Returns:
            By file name, a row per image of the batch.
        """
        return {}

    @staticmethod
    def part_grid(config: Config) -> dict[str, int] | None:
        """Side of the part-label grid wanted per view group (`Batch.parts`); None where the method needs no parts."""
        return None

    @staticmethod
    def masks(config: Config) -> list[Mask]:
        """The masks wanted with each batch (`Batch.masks`).

        Raises:
            ConfigError: the configuration allows no mask.
        """
        return []

    @classmethod
    def official(cls, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
        """The authors' checkpoint file, loaded -> our state dict: all of it for a training file, the keys of
        `backbone_prefix` alone for a file of the bare backbone."""
        return cls.layout.ours(checkpoint)

    @classmethod
    def to_official(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Our state dict -> what the authors' code would load: the inverse of `official` for a full training file."""
        return cls.layout.theirs(state)
