"""A folder of images as N .beton files and a manifest, each file a task of Ray Data:

    python ray_convert.py /data/imagenet/train s3://bucket/train 256

The folder, which may lie in a store too, is listed once, here. Each task reads its own images and writes one file, that
of `fastssl convert --shard I/N`. A task whose worker or node dies is run again by Ray. The same line again makes the
files that are not there yet.
"""

import sys

import ray

from fastssl.loaders import store
from fastssl.loaders.convert import ConvertOptions, Shard, convert_shard, shards_of
from fastssl.loaders.manifest import MakeOptions, make
from fastssl.loaders.sources import open_source

HOW = ConvertOptions(max_resolution=500, max_bad=10)  # as in `fastssl convert --help`; max_bad: in each file


def path(out: str, shard: Shard) -> str:
    return f"{out}-{shard.index:05d}.beton"


def write(row: dict, images: str, out: str) -> dict:
    """One file, in a task of its own."""
    shard: Shard = row["shard"]
    readers = 16 if store.is_url(images) else 0
    done = convert_shard(
        shard, lambda name: store.read_bytes(store.join(images, name)), path(out, shard), readers=readers
    )
    return {"file": done.path, "images": done.images, "bad": [f"{name} {why}" for name, why in done.bad]}


def main(images: str, out: str, total: int, how: ConvertOptions = HOW) -> None:
    source, manifest = open_source(images), f"{out}.json"
    shards = shards_of(source.files, source.labels, source.classes, total, how)
    missing = [{"shard": shard} for shard in shards if not store.exists(path(out, shard))]
    if missing:
        tasks = ray.data.from_items(missing, override_num_blocks=len(missing))
        for done in tasks.map(write, fn_args=(images, out), num_cpus=1).iter_rows():
            print(f"{done['file']}: {done['images']} images", *done["bad"], sep="\n  ", flush=True)
    if missing or not store.exists(manifest):
        make(MakeOptions(manifest, [path(out, shard) for shard in shards], overwrite=True))
    print(manifest)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
