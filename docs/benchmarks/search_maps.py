"""Where do SCFS's search maps land? On images with part maps (0 is the scene) the object's place is known.

python docs/benchmarks/search_maps.py CHECKPOINT DATA.beton
"""

import sys

import torch
from torch.nn.functional import adaptive_avg_pool2d

from fastssl.augment import augment
from fastssl.config import Data
from fastssl.loaders.engine import open_loader
from fastssl.loaders.sources import open_source
from fastssl.methods import view_list
from fastssl.methods.scfs import crops, search
from fastssl.training import checkpoint
from fastssl.weights.backbone import open_method


@torch.no_grad()
def main(path: str, data: str) -> None:
    config, method = open_method(checkpoint.read(path, "pretrain"))
    grids = {"global1": 16, "local": 8}
    loader = open_loader(open_source(data), view_list(config.views), Data(batch_size=64), seed=5, rank=0, world=1,
                         threads=1, pin_memory=False, part_grid=grids)  # fmt: skip
    rows = {}
    for batch in map(augment, loader.epoch(0)):
        large, small = crops(batch)
        student, teacher = method.student([small]), method.teacher([large[:1]])
        place = (batch.parts["global1"][:, 0] > 0).float()  # [B, 16, 16]
        inside = (batch.parts["local"] > 0).float().mean((2, 3)).transpose(0, 1)  # [M, B]
        for tap, (local, seen) in enumerate(zip(student.stages[0], teacher.stages[0], strict=True)):
            for shown, found in zip(inside, search(local.map, seen.map[0]), strict=True):
                cells = adaptive_avg_pool2d(place[:, None], found.shape[-1])[:, 0].flatten(1)
                area, top = cells.mean(1), cells.gather(1, found.flatten(1).argmax(1)[:, None])[:, 0]
                weight = (found - found.amin((1, 2), keepdim=True)).flatten(1)
                mass = (weight / weight.sum(1, keepdim=True).clamp_min(1e-9) * cells).sum(1)
                for kind, chosen in (("object", shown > 0.6), ("scene", shown < 0.05)):
                    chosen = chosen & (area > 0.05) & (area < 0.6)
                    rows.setdefault((tap, kind), []).append(torch.stack([mass, area, top], 1)[chosen])
    for (tap, kind), found in sorted(rows.items()):
        mass, area, top = torch.cat(found).mean(0).tolist()
        count = len(torch.cat(found))
        print(f"tap {tap}, crops of the {kind} ({count}): share of the map on the object {mass:.3f} "
              f"(of the area {area:.3f}), highest cell on it {top:.3f}")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
