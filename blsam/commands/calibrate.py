"""A big.LITTLE model from a dense checkpoint and a few photos, without training: a bLSAM from SAM's, a bLViT classifier
from DeiT's.

    blsam calibrate --model blsam_vit_b --checkpoint sam_vit_b_01ec64.pth --images PHOTOS -o blsam_vit_b.safetensors
    blsam calibrate --model blvit_base_tiny_patch16_224 --checkpoint deit_base.pth --images PHOTOS -o blvit.safetensors

A run that was killed goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoint import SUFFIXES, checked_path
from ..config import CLASSIFIERS, CONFIGS
from ..data.annotations import Annotations
from ..evaluation.report import left_out_line
from ..files import write_json
from ..options import ROUTED, UsageError, add_option, check_output
from ..training.calibrate import calibrate, choose_photos, default_limit, table
from ..training.calibration import STEPS, Settings

CLASSIFIERS_ROUTED = tuple(name for name, config in CLASSIFIERS.items() if config.routed)
MOST_STEPS = 1000  # of a fit, however many minutes there are


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, defaults = parser.add_argument, Settings()
    add_option(parser, "--model", choices=(*ROUTED, *CLASSIFIERS_ROUTED), default=None, required=True)
    add_option(parser, "--checkpoint", required=True, help="of the dense model: SAM's, or a plain ViT's")
    add("--images", type=Path, required=True, metavar="DIR", help="photos, unlabelled")
    add("--annotations", type=Path, metavar="JSON", help="COCO's format: box mean IoU before and after")
    add("--annotation-images", type=Path, metavar="DIR")
    add_option(parser, "--image-size")
    add_option(parser, "--keep-ratio", default=defaults.keep_ratio)
    add(
        "--limit",
        type=int,
        metavar="N",
        help="photos; default 64 for blsam_vit_t and _fine, 16 for other segmenters, 334 for classifiers at 224",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=int,
        help=f"of each fit; {STEPS}, of large photos fewer; of each stage twice as many, of large photos as many",
    )
    length.add_argument("--minutes", type=float, metavar="M", help="wall time for the whole, cutting all fits evenly")
    add("--seed", type=int, default=defaults.seed)
    add_option(parser, "--device")
    add_option(parser, "--dtype", default=defaults.dtype, help="of the fits; auto: bfloat16 where that is faster")
    add("--json", type=Path, metavar="OUT", help="the report")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="checkpoint, .safetensors or .pth")


def run(args: argparse.Namespace) -> None:
    """Calibrate, print the report as a table, write the checkpoint and the report."""
    if (args.annotations is None) != (args.annotation_images is None):
        raise UsageError("--annotations and --annotation-images go together")
    for name, value, least in (("--steps", args.steps, 0), ("--limit", args.limit, 2)):
        if value is not None and value < least:
            raise UsageError(f"{name} is at least {least}")
    if not 0 < args.keep_ratio < 1 or (args.minutes is not None and not args.minutes > 0):
        raise UsageError("--keep-ratio lies between 0 and 1, --minutes above 0")
    checked_path(args.checkpoint)
    config = CONFIGS.get(args.model) or CLASSIFIERS[args.model]
    if args.annotations is not None and args.model in CLASSIFIERS:
        raise UsageError("--annotations are of masks; a classifier is calibrated without")
    photos = choose_photos(args.images, default_limit(config) if args.limit is None else args.limit, args.seed)
    read = (args.checkpoint, args.annotations, *photos)
    check_output("--output", args.output, taken=read, what="a checkpoint", suffixes=SUFFIXES)
    check_output("--json", args.json, taken=(*read, args.output), suffixes=(".json",))
    annotations = None
    if args.annotations is not None:
        annotations = Annotations(args.annotations, args.annotation_images, "coco")
    settings = Settings(
        steps=MOST_STEPS if args.minutes is not None else args.steps,
        minutes=args.minutes,
        keep_ratio=args.keep_ratio,
        seed=args.seed,
        dtype=args.dtype,
    )
    report = calibrate(
        config,
        args.checkpoint,
        photos,
        args.output,
        image_size=args.image_size,
        settings=settings,
        annotations=annotations,
        device=args.device,
    )
    print(table(report))
    if annotations is not None and any(annotations.left_out.values()):
        print(left_out_line(annotations.left_out))
    print(
        f"{args.output}: {report['photos']} photos, {report['seconds'] / 60:.1f} minutes, peak {report['peak_gb']:.1f} GB"
    )
    if args.json:
        write_json(args.json, report)
