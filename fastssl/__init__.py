"""fastssl: self-supervised pretraining of vision models, fast and faithful to the papers.

`pretrain`, `evaluate`, `embed` and `load` are the commands of these names as functions (`fastssl.api`).
"""

import sys
from types import ModuleType
from typing import Any

from fastssl.api import embed, evaluate, load, pretrain

__version__ = "0.1.0"
__all__ = ["__version__", "embed", "evaluate", "load", "pretrain"]


class _Folder(ModuleType):
    """The folder fastssl.pretrain, which answers calls as the function of its name does."""

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        return sys.modules["fastssl.api"].pretrain(*arguments, **options)


class _Package(ModuleType):
    """This package. Whoever imports from the folder `pretrain` puts it in the place of the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "pretrain" and type(value) is ModuleType:
            value.__class__ = _Folder
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
