"""The model card of an exported backbone: how it was made, how to use it, what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from fastssl import __version__
from fastssl.methods import METHODS
from fastssl.weights.backbone import Backbone

LEFT_OUT = ("seconds", "step", "train_images", "val_images", "width", "neighbours", "hidden")  # of the results
PLACES = ("data.path", "data.val", "cae.tokenizer", "model.init")  # of which a card names the last piece alone


def model_card(checkpoint: str, backbone: Backbone, architecture: str, name: str) -> str:
    """README.md of a folder on Hugging Face's hub, in its Markdown with a YAML head.

    Args:
        checkpoint: where the backbone came from; evaluations.jsonl beside it has the numbers.
        architecture: timm's name.
        name: of the folder.
    """
    config = backbone.config
    method = config.get("method", "")
    tags = ["image-feature-extraction", "timm", "self-supervised", *([method] if method else [])]
    head = yaml.safe_dump({"library_name": "timm", "pipeline_tag": "image-feature-extraction", "tags": tags})
    rows = {"architecture": f"{architecture}, images of {backbone.image_size} pixels"}
    if method in METHODS:
        about = (sys.modules[METHODS[method].__module__].__doc__ or "").strip().splitlines()[0]
        rows = {"method": about, **rows}
    if path := config.get("data", {}).get("path"):
        rows["data"] = Path(path).name
    if start := config.get("model", {}).get("init"):
        rows["started from"] = _last(start)
    if backbone.step:
        rows["training"] = f"{backbone.step} steps, of {config.get('schedule', {}).get('epochs', '?')} epochs in all"
    rows["made with"] = f"fastssl {__version__}"
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
    parts = [
        f"---\n{head}---\n\n# {name}\n\nAn image backbone, pretrained without labels.\n\n{table}",
        "## Use\n\n```python\nimport timm\n\n"
        f'model = timm.create_model("local-dir:{name}", pretrained=True)  # or "hf-hub:OWNER/{name}"\n'
        "features = model(images)  # float [B, 3, H, W], ImageNet-normalised\n```",
    ]
    if numbers := _numbers(Path(checkpoint).parent / "evaluations.jsonl", backbone.step):
        parts.append(f"## Numbers\n\n{numbers}")
    if method:
        recipe = yaml.safe_dump(_portable(config), sort_keys=False)
        parts.append(f"## Recipe\n\nAll settings of the run:\n\n```yaml\n{recipe}```")
    return "\n\n".join(parts) + "\n"


def _last(place: str) -> str:
    """A path's last piece; a library's name as it is."""
    return place if place.startswith(("timm:", "torchvision:")) else Path(place).name


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without this machine's folders."""
    found = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for place in PLACES:
        section, _, key = place.partition(".")
        if found.get(section, {}).get(key):
            found[section][key] = _last(found[section][key])
    found.get("run", {}).pop("dir", None)
    return found


def _numbers(path: Path, step: int) -> str:
    """What was measured of this step, as a table; empty if nothing was."""
    try:
        lines = [json.loads(text) for text in path.read_text().splitlines()]
    except (OSError, ValueError):
        return ""
    rows = []
    for line in (line for line in lines if isinstance(line, dict) and line.get("step") == step):
        results = {key: value for key, value in line.get("results", {}).items() if isinstance(value, int | float)}
        said = ", ".join(f"{key} {value:.4g}" for key, value in results.items() if key not in LEFT_OUT)
        rows.append(f"| {line.get('protocol')} | {_last(str(line.get('val') or line.get('data') or ''))} | {said} |")
    return "\n".join(["| protocol | images | results |", "|---|---|---|", *dict.fromkeys(rows)]) if rows else ""
