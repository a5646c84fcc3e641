"""From files on disk to batches. The files of this folder, in the order in which they are used:

datasets.py           sets known by name (CIFAR, ImageNet, ...) as images to convert; synthetic.py draws such a set
convert.py            a folder or such a set -> .beton, by beton_writer.py, in the processes of pool.py
verify.py             reads every sample of a .beton and lists what is bad
beton.py              the format: FFCV's file, and beside it a file with names and checksums
decode.py             the one way to open an image: bytes -> upright RGB; jpeg.py checks a file's structure
sources.py            a .beton, its shards or a folder, as encoded samples numbered from 0
index.py              the order of the samples: a function of seed and epoch
draw.py               boxes, flips, colour numbers: functions of seed, epoch, sample and view, by philox.py;
                      draw_compiled.py has the same for a whole batch at once
masks.py              what a method hides, drawn likewise, by masks_compiled.py
loader.py             what all engines share: batches, threads (ahead.py), bad samples, part labels
engine.py             which engine works here, and its loader: one of the next three
ffcv_loader.py        compiled code: window_decoder.py (on _window.c) decodes, resample.py cuts; batch_pool.py (on
                      _pool.c) does both for whole batches
dali_loader.py        NVIDIA's DALI
reference_loader.py   PIL, slow and exact: what tests compare the others with
views.py              evaluation: every image once, its centre or all of it, by the same compiled code
bench.py              img/s and CPU time of engines and stages, beside the loaders of others (peers.py)
"""
