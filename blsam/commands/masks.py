"""Everything in photos, folders of them and tars, with the options of SAM's amg.py.

    blsam masks photo.jpg -o masks                       # masks/photos/photo.json, masks/coco.json
    blsam masks PHOTOS more.tar --format png -o masks    # a folder of PNGs and a table for each photo
    torchrun --nproc-per-node 2 -m blsam masks PHOTOS -o masks

The same command goes on with a run that was killed. A damaged photo is counted and left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import SURE, THRESHOLDS
from ..files import sha256
from ..options import (
    UsageError,
    add_model_options,
    builder_options,
    check_folder,
    computed_in,
    find_checkpoint,
)
from ..precision import DTYPES

FORMATS = ("coco", "rle", "png")
SAID = 5  # damaged photos that are named
SETTINGS: dict[str, tuple[type, str]] = {  # of SAM's generator, by its argument, with its default
    "points_per_side": (int, "points of the grid along a side; 32"),
    "points_per_batch": (int, "points decoded at a time; 64"),
    "pred_iou_thresh": (float, "least predicted IoU; 0.88"),
    "stability_score_thresh": (float, "least stability; 0.95"),
    "stability_score_offset": (float, "by how much the threshold is moved for it; 1"),
    "box_nms_thresh": (float, "overlap of boxes from which a mask is a duplicate; 0.7"),
    "crop_n_layers": (int, "layers of crops that are looked at too; 0"),
    "crop_nms_thresh": (float, "as --box-nms-thresh, between crops; 0.7"),
    "crop_overlap_ratio": (float, "of neighbouring crops; 512 / 1500"),
    "crop_n_points_downscale_factor": (int, "by which the grid is coarser in each layer; 1"),
    "min_mask_region_area": (int, "pixels below which regions and holes are removed; 0"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("photos", type=Path, nargs="+", metavar="PATH", help="photo, folder or tar")
    add_model_options(parser)
    add_settings(parser, {name: f", {value:g} of {', '.join(THRESHOLDS)}" for name, value in SURE.items()})
    add("--format", choices=FORMATS, default="coco", help="coco: one json over all, beside one for each photo")
    add("--no-exif", action="store_true", help="take the pixels as stored, not turned as EXIF says")
    add("-o", "--output", type=Path, required=True, metavar="DIR")


def add_settings(parser: argparse.ArgumentParser, besides: Mapping[str, str] | None = None) -> None:
    """The options of SAM's generator, by SAM's names; besides: what else is to be said of a default."""
    group = parser.add_argument_group("masks", "as in SAM's amg.py")
    for name, (kind, words) in SETTINGS.items():
        words += (besides or {}).get(name, "")
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__[0].upper(), help=words)
    parser.add_argument(
        "--decoder-dtype", choices=DTYPES, default="float32", help="what the mask decoder multiplies in"
    )


def run(args: argparse.Namespace) -> None:
    """`blsam masks`."""
    make_masks(args, THRESHOLDS.get(args.model, {}))


def make_masks(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Masks of every photo, and a line on what was done; defaults: those that are not SAM's."""
    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    own = {name: value for name, value in defaults.items() if name not in given}
    options = given | own
    for name, value in options.items():
        least = 1 if name in ("points_per_side", "points_per_batch", "crop_n_points_downscale_factor") else 0
        if not value >= least:
            raise UsageError(f"--{name.replace('_', '-')} is at least {least}, is {value}")
    checkpoint = find_checkpoint(args.model, args.checkpoint)
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"--output {args.output} is a file; name a folder")
    check_folder("--output", args.output)

    from ..automatic_mask_generator import SamAutomaticMaskGenerator
    from ..build_sam import sam_model_registry
    from ..distributed import processes
    from ..mask_files import find_photos, mask_photos

    photos = find_photos(args.photos, args.format)
    sam = sam_model_registry[args.model](checkpoint, **builder_options(args))
    generator = SamAutomaticMaskGenerator(sam, output_mode="coco_rle", decoder_dtype=args.decoder_dtype, **options)
    settings: dict[str, Any] = {
        "model": args.model,
        "checkpoint_sha256": sha256(checkpoint),
        "image_size": sam.image_encoder.img_size,
        "keep_ratio": args.keep_ratio if sam.image_encoder.config.routed else None,
        **computed_in(args),
        "decoder_dtype": str(generator.decoder_dtype).removeprefix("torch."),
        "format": args.format,
        "upright": not args.no_exif,
        "options": options,
        "blsam": __version__,
    }
    with processes(args.device) as world:
        done = mask_photos(
            photos, generator.generate, args.output, args.format, settings, upright=not args.no_exif, world=world
        )
    if not world.is_main:
        return
    for line in done.damaged[:SAID]:
        print(f"blsam masks: left out: {line}", file=sys.stderr)
    if len(done.damaged) > SAID:
        print(f"blsam masks: and {len(done.damaged) - SAID} more", file=sys.stderr)
    if len(done.damaged) == len(photos):
        raise UsageError("none of the photos can be read")
    kept = f", {done.kept} were there" if done.kept else ""
    lost = f", {len(done.damaged)} could not be read" if done.damaged else ""
    print(f"{args.output}: {done.masks} masks of {done.made} photos{kept}{lost}")
    if own:
        taken = " and ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in own.items())
        print(f"{args.model} is less sure of its masks than SAM: {taken} were taken")
