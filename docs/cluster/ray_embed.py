"""Features of image files with Ray Data, a model per actor, as Parquet files with the columns path, features and fault:

    python ray_embed.py runs/dino/last.pt s3://bucket/images s3://bucket/features 64

64 is the number of actors, each with a GPU; `--cpu` gives them none. An image that cannot be decoded keeps its row,
with NaN for features and the reason in `fault`. A batch whose actor dies is computed again by Ray.
"""

import sys

import ray

from fastssl.loaders.decode import SUFFIXES

BATCH = 256


class Embedder:
    """Opens the model once; then a call per batch."""

    def __init__(self, checkpoint: str, device: str) -> None:
        from fastssl.weights.backbone import open_backbone

        self.backbone = open_backbone(checkpoint, device)

    def __call__(self, batch: dict) -> dict:
        from fastssl.evaluation.frozen.embed import embed_batch

        bad: list[tuple[int, str]] = []
        features = embed_batch(self.backbone, list(batch["bytes"]), bad=bad)
        faults = dict(bad)
        return {"path": batch["path"], "features": features, "fault": [faults.get(i, "") for i in range(len(features))]}


def main(checkpoint: str, images: str, out: str, actors: int, gpu: bool = True) -> None:
    endings = [suffix[1:] for suffix in sorted(SUFFIXES)]
    rows = ray.data.read_binary_files(images, include_paths=True, file_extensions=endings)
    rows.map_batches(
        Embedder,
        fn_constructor_args=(checkpoint, "cuda" if gpu else "cpu"),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=1 if gpu else 0,
    ).write_parquet(out, mode="overwrite")


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), "--cpu" not in sys.argv)
