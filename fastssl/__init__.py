"""fastssl: self-supervised pretraining of vision models, fast and faithful to the papers."""

__version__ = "0.1.0"
