"""The smallest recipe of every method: 32-pixel images, two narrow blocks (`from tiny import recipe`)."""

MODEL = {
    "model.name": "vit_tiny",
    "model.image_size": 32,
    "model.patch_size": 8,
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
}
METHOD = {
    "dino": {
        "views.global1.size": 32,
        "views.global2.size": 32,
        "views.local.size": 16,
        "views.local.count": 2,
        "dino.out_dim": 64,
        "dino.head_hidden": 32,
        "dino.head_bottleneck": 16,
    },
    "saae": {
        **{f"views.{name}.{key}": 32 for name in ("crop1", "crop2", "reference") for key in ("size", "squash")},
        "saae.code_width": 32,
        "saae.head_hidden": 32,
        "saae.decoder_depth": 1,
        "saae.decoder_heads": 2,
    },
    "scfs": {
        **{f"model.{key}": value for key, value in {"name": "resnet18", "width": 8, "depth": 0, "heads": 0}.items()},
        "model.small_images": "true",
        "views.global1.size": 32,
        "views.global2.size": 32,
        "views.local.size": 16,
        "views.local.count": 2,
        "scfs.out_dim": 64,
        "scfs.head_hidden": 32,
        "scfs.head_bottleneck": 16,
        "scfs.stage_inner": 8,
        "scfs.stage_hidden": 16,
        "scfs.stage_out": 16,
    },
    "cae": {
        "model.positions": "sincos_rows",
        "views.main.size": 32,
        "views.tokenizer.size": 16,
        "cae.codes": 16,
        "cae.num_masked": 8,
        "cae.min_block": 2,
        "cae.width": 32,
        "cae.heads": 2,
        "cae.regressor_depth": 1,
        "cae.decoder_depth": 1,
    },
    "mae": {"views.main.size": 32, "mae.decoder_width": 32, "mae.decoder_depth": 1, "mae.decoder_heads": 2},
    "sit": {"views.view1.size": 32, "views.view2.size": 32, "sit.out_dim": 16, "sit.head_hidden": 32},
    "sit_v1": {"views.view1.size": 32, "views.view2.size": 32, "sit_v1.out_dim": 16, "sit_v1.gather_negatives": "true"},
    "semmae": {"views.main.size": 32, "semmae.decoder_width": 32, "semmae.decoder_depth": 1, "semmae.decoder_heads": 2},
}


def recipe(method: str) -> dict[str, object]:
    """Configuration keys and values."""
    return {**MODEL, **METHOD[method]}
