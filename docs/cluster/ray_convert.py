"""A folder of images as N .beton files and a manifest, each file a task of Ray Data:

    python ray_convert.py /data/imagenet/train s3://bucket/train 256

The folder, which may lie in a store too, is listed once, here. Each task reads its own images and writes one file, that
of `fastssl convert --shard I/N`. A task whose worker or node dies is run again by Ray. The same line again makes the
files that are not there yet, or are of other images, and the manifest.
"""

import sys
from functools import partial

import ray

from fastssl.loaders import store
from fastssl.loaders.convert import ConvertOptions, Shard, convert_shard, held, shards_of
from fastssl.loaders.manifest import MakeOptions, make
from fastssl.loaders.sources import open_source

HOW = ConvertOptions(max_resolution=500, max_bad=10)  # as in `fastssl convert --help`; max_bad: in each file


def path(out: str, shard: Shard) -> str:
    return f"{out}-{shard.index:05d}.beton"


def read(images: str, listed: dict[str, store.StoreFile], name: str) -> bytes:
    return listed[name].read_all() if listed else store.read_bytes(store.join(images, name))


def write(row: dict, images: str, out: str) -> dict:
    """One file, in a task of its own."""
    readers = 16 if store.is_url(images) else 0
    done = convert_shard(row["shard"], row["read"], path(out, row["shard"]), readers=readers)
    return {"file": done.path, "images": done.images, "bad": [f"{name} {why}" for name, why in done.bad]}


def main(images: str, out: str, total: int, how: ConvertOptions = HOW) -> None:
    source, manifest = open_source(images), f"{out}.json"
    shards = shards_of(source.files, source.labels, source.classes, total, how)
    made = store.together(lambda shard: held(path(out, shard), shard) is not None, shards)
    missing = []
    for shard in [shard for shard, is_made in zip(shards, made, strict=True) if not is_made]:
        first = len(source.files) * shard.index // total
        there = enumerate(shard.names, first) if source.in_store else ()  # listed: need not be asked for
        listed = {name: source.block(i).file for i, name in there}
        missing.append({"shard": shard, "read": partial(read, images, listed)})
    if missing:
        tasks = ray.data.from_items(missing, override_num_blocks=len(missing))
        for done in tasks.map(write, fn_args=(images, out), num_cpus=1).iter_rows():
            print(f"{done['file']}: {done['images']} images", *done["bad"], sep="\n  ", flush=True)
    make(MakeOptions(manifest, [path(out, shard) for shard in shards], overwrite=True))
    print(manifest)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
