"""fastssl: self-supervised pretraining of vision models, fast and faithful to the papers.

`pretrain`, `evaluate`, `embed` and `load` are the commands of these names as functions (`fastssl.api`).
"""

from fastssl.api import embed, evaluate, load, pretrain

__version__ = "0.1.0"
__all__ = ["__version__", "embed", "evaluate", "load", "pretrain"]
