#!/usr/bin/env python3
"""Mean IoU of prompted masks on COCO-style annotations, by size, beside trivial baselines.

    python scripts/eval_coco.py --model blsam_vit_t --annotations instances_val2017.json --images val2017

Crowd annotations and those whose mask is empty are left out and counted. Sizes go by the annotation's own area.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from tqdm import tqdm

from blsam import SamPredictor, sam_model_registry
from blsam.checkpoint import write_atomically
from blsam.cli import find_checkpoint, parse_device
from blsam.config import CONFIGS
from blsam.evaluation.prompted import SIZES, Target, prompted_ious
from blsam.images import read_image


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, choices=sorted(CONFIGS))
    add("--checkpoint", type=Path, help="default: the one that ships")
    add("--annotations", type=Path, required=True, metavar="JSON")
    add("--images", type=Path, required=True, metavar="DIR")
    add("--keep-ratio", type=float, default=0.25)
    add("--image-size", type=int)
    add("--limit", type=int, help="the first N images")
    add("--seed", type=int, default=0)
    add("--device", type=parse_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, metavar="OUT")
    return parser.parse_args(argv)


def targets_of(coco: COCO, image_id: int, left_out: dict[str, int]) -> list[Target]:
    """The objects of an image that can be prompted for; the others are counted by reason."""
    targets = []
    for annotation in coco.imgToAnns[image_id]:
        x, y, w, h = annotation["bbox"]
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):  # pycocotools cannot read polygons of fewer than three corners
            annotation = {**annotation, "segmentation": [p for p in segmentation if len(p) >= 6]}
        if annotation.get("iscrowd", 0):
            left_out["crowd"] = left_out.get("crowd", 0) + 1
            continue
        mask = coco.annToMask(annotation).astype(bool) if annotation["segmentation"] else np.zeros(0, bool)
        if w <= 0 or h <= 0 or not mask.any():
            left_out["empty"] = left_out.get("empty", 0) + 1
            continue
        targets.append(Target(annotation["id"], mask, (x, y, x + w, y + h), annotation["area"]))
    return targets


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for path in (args.annotations, args.images):
        if not path.exists():
            raise FileNotFoundError(f"no {path}")
    checkpoint = find_checkpoint(args.model, args.checkpoint)
    sam = sam_model_registry[args.model](checkpoint, image_size=args.image_size, keep_ratio=args.keep_ratio)
    predictor = SamPredictor(sam.to(args.device))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(args.annotations)

    rows, left_out = [], {}
    for image_id in tqdm(sorted(coco.getImgIds())[: args.limit], unit="image", disable=not sys.stderr.isatty()):
        targets = targets_of(coco, image_id, left_out)
        if targets:
            predictor.set_image(read_image(args.images / coco.imgs[image_id]["file_name"]))
            rows += [(t.area, prompted_ious(predictor, t, args.seed)) for t in targets]

    figures = {}
    print(
        f"{args.model} at {sam.image_encoder.img_size}, keep ratio {args.keep_ratio:g}, {checkpoint.name}, float32, "
        f"seed {args.seed}; most confident of three masks unless single; {len(rows)} annotations, left out {left_out}"
    )
    print(f"{'mean IoU, percent':<18}" + "".join(f"{size:>9}" for size in SIZES))
    for name in rows[0][1]:
        means = [100 * np.mean([r[name] for area, r in rows if low <= area <= high]) for low, high in SIZES.values()]
        print(f"{name:<18}" + "".join(f"{mean:>9.1f}" for mean in means))
        figures[name] = dict(zip(SIZES, map(float, means)))
    if args.json:
        text = json.dumps({"model": args.model, "keep_ratio": args.keep_ratio, "seed": args.seed, **figures}, indent=1)
        write_atomically(args.json, lambda path: Path(path).write_text(text + "\n"))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FileNotFoundError, ValueError) as error:
        print(f"eval_coco: {error}", file=sys.stderr)
        sys.exit(2)
