"""What does the closed-form search cost at real size, against ``torch.linalg.lstsq`` per pair?

    python benchmarks/bench_search.py

``stitchvm bench search --scale real`` with a choice of models and images, see :mod:`stitchvm_ext.bench.search`.
"""

from __future__ import annotations

import argparse

from stitchvm_ext.bench.harness import save
from stitchvm_ext.bench.search import Features, search
from stitchvm_ext.bench.shapes import BACKBONES, TOWERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=sorted(BACKBONES), default="sd3.5-medium")
    parser.add_argument("--tower", choices=sorted(TOWERS), default="vit-l-14-336")
    parser.add_argument("--images", type=int, default=64, help="of the whole grid; a quarter of them held out")
    parser.add_argument("--many", type=int, default=200, help="images of the single depth")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="search")
    args = parser.parse_args()

    backbone, tower = BACKBONES[args.backbone], TOWERS[args.tower]
    data = Features(backbone.width, tower.width, tower.side**2)
    result = search(data, backbone.blocks, args.images, args.many, args.rounds)
    result = {"backbone": args.backbone, "tower": args.tower, **result}
    print(f"wrote {save(args.name, result)}")


if __name__ == "__main__":
    main()
