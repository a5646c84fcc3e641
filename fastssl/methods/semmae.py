"""SemMAE: semantic-guided masking for masked autoencoders (Li et al. 2022, arXiv 2206.10207).

MAE with another mask. Every patch belongs to a part of what the image shows. Early in training three quarters of each
part are hidden, which can be painted from the rest of the same part; towards the end whole parts are hidden, which asks
for what goes with what. The number of hidden patches per image is always MAE's.

The parts come with the data, as maps over the whole image that are cropped and flipped with it: `fastssl parts` learns
and writes them (the paper's first stage).

Letters: B images, N patches, K visible, M masked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fastssl.batch import Batch
from fastssl.config import Config, NonNegativeInt, PositiveFloat
from fastssl.loaders.masks import Mask, SemanticMask, semantic_schedule
from fastssl.methods import mae
from fastssl.pictures import Sheet, tint
from fastssl.step import Step, Values

Views = mae.Views

MAX_PARTS = 64  # more parts than part maps have; parts that an image does not show change nothing


@dataclass
class Settings(mae.Settings):
    """SemMAE's own numbers; all but the last two are MAE's."""

    section: ClassVar[str] = "semmae"

    gamma: PositiveFloat = 2.0
    """Power of the curriculum: in epoch e, counted from 1, the share of whole-part masking is (e / epochs) ^ gamma."""
    curriculum_epochs: NonNegativeInt = 0
    """Epochs over which the curriculum runs. 0: the run's. The authors' code has 800, however long the run."""


class SemMAE(mae.MAE):
    """MAE's encoder, decoder and loss under a mask that follows the parts.

    Args:
        config: a configuration whose views and settings are this file's `Views` and `Settings`.
    """

    Views = Views
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.settings: Settings = config.settings
        self.curriculum_epochs = self.settings.curriculum_epochs or config.schedule.epochs

    @staticmethod
    def part_grid(config: Config) -> dict[str, int]:
        """One label per patch."""
        return {"main": config.views.main.size // config.model.patch_size}

    def forward(self, batch: Batch, values: Values) -> Step:
        step = super().forward(batch, values)
        step.metrics["whole_parts"] = torch.zeros_like(step.loss.detach()) + self.number("whole_parts", values)
        return step

    def scheduled(self, values: Values) -> dict[str, float]:
        """The share of whole parts among what is masked."""
        return {"whole_parts": self.whole_parts(values)}

    def whole_parts(self, values: Values) -> float:
        """The share of whole-part masking in the present epoch: the paper's alpha."""
        return semantic_schedule(values.epoch, self.curriculum_epochs, self.settings.gamma)

    @staticmethod
    def masks(config: Config) -> list[Mask]:
        """Visible and masked patches, by parts."""
        s, patches = config.settings, mae.check_patches(config)
        epochs = s.curriculum_epochs or config.schedule.epochs
        return [SemanticMask("main", patches, s.mask_ratio, MAX_PARTS, epochs, s.gamma)]

    def pictures(self, batch: Batch, values: Values) -> dict[str, Sheet]:
        """As MAE's, with the parts tinted beside the crop."""
        sheet = super().pictures(batch, values)["reconstruction"]
        labels, columns = batch.parts["main"][:, 0], sheet.pictures
        parts = tint(columns[:, 0], labels, int(labels.max()) + 1)
        with_parts = torch.cat([columns[:, :1], parts[:, None], columns[:, 1:]], dim=1)
        titles = ["image", "its parts, a colour each", *sheet.titles[1:]]
        return {"reconstruction": replace(sheet, pictures=with_parts, titles=titles)}
