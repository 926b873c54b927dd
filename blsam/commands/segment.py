"""A mask from clicks or a box on one photo: the overlay as a picture, the mask alone and its json if asked for.

blsam segment photo.jpg --point 320,240
blsam segment photo.jpg --box 160,10,400,245 --mask mask.png --json mask.json
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_bytes, write_json
from ..options import PICTURES, UsageError, add_model_options, builder_options, check_output, find_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", type=Path)
    add("--point", type=parse_point, action="append", metavar="X,Y[,0|1]", help="click; 1 object, 0 background")
    add("--box", type=parse_box, metavar="X1,Y1,X2,Y2", help="pixels of the image, as the points")
    add_model_options(parser)
    add("-o", "--output", type=Path, metavar="OUT.png", help="overlay; default IMAGE_mask.png")
    add("--mask", type=Path, metavar="OUT.png", help="the mask alone, 0 and 255")
    add("--json", type=Path, metavar="OUT.json")
    add("--no-exif", action="store_true", help="take the pixels as stored, not turned as EXIF says")
    add("--max-megapixels", type=float, metavar="N", help="larger photos are refused; default 178.95, as in Pillow")


def parse_point(text: str) -> tuple[float, float, int]:
    """X,Y or X,Y,LABEL."""
    parts = text.split(",")
    try:
        x, y = float(parts[0]), float(parts[1])
        label = int(parts[2]) if len(parts) > 2 else 1
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"a point is X,Y or X,Y,LABEL, got {text!r}") from None
    if len(parts) > 3 or label not in (0, 1) or not math.isfinite(x) or not math.isfinite(y):
        raise argparse.ArgumentTypeError(f"a point is X,Y or X,Y,LABEL with label 0 or 1, got {text!r}")
    return x, y, label


def parse_box(text: str) -> tuple[float, float, float, float]:
    """X1,Y1,X2,Y2."""
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a box is X1,Y1,X2,Y2, got {text!r}") from None
    return x1, y1, x2, y2


def run(args: argparse.Namespace) -> None:
    """One prompt on one photo: overlay, mask and json."""
    if not args.point and args.box is None:
        raise UsageError("nothing to segment: give --point X,Y or --box X1,Y1,X2,Y2")
    output = args.output or Path(f"{args.image.stem}_mask.png")
    checkpoint = find_checkpoint(args.model, args.checkpoint)
    read = (args.image, checkpoint)
    check_output("--output", output, taken=read, what="a picture", suffixes=PICTURES)
    check_output("--mask", args.mask, taken=(*read, output), what="a mask of 0 and 255", suffixes=(".png",))
    check_output("--json", args.json, taken=(*read, output, args.mask), suffixes=(".json",))

    from ..build_sam import sam_model_registry
    from ..distributed import Stopwatch
    from ..images import decode_image
    from ..predictor import SamPredictor, check_prompts, points_outside

    image, notes = decode_image(args.image, upright=not args.no_exif, max_megapixels=args.max_megapixels)
    for note in notes:
        print(f"blsam: {args.image}: {note}", file=sys.stderr)
    points = np.array([p[:2] for p in args.point], float) if args.point else None
    labels = np.array([p[2] for p in args.point]) if args.point else None
    box = np.array(args.box) if args.box else None
    check_prompts(points, labels, box, None, image.shape[:2])
    for x, y in points_outside(points, image.shape[:2]):
        raise UsageError(f"point {x:g},{y:g} lies outside the image of {image.shape[1]} x {image.shape[0]} pixels")

    sam = sam_model_registry[args.model](checkpoint, **builder_options(args))
    predictor = SamPredictor(sam)
    watch = Stopwatch(sam.device)
    with watch("encoder"):
        predictor.set_image(image)
    with watch("decoder"):
        masks, scores, _ = predictor.predict(points, labels, box)
    write(args, output, image, masks, scores, {part: round(value, 4) for part, value in watch.seconds.items()})


def write(
    args: argparse.Namespace,
    output: Path,
    image: np.ndarray,
    masks: np.ndarray,
    scores: np.ndarray,
    seconds: dict[str, float],
) -> None:
    """The files, and a line that says what is in them; masks bool [M, H, W], scores [M]."""
    from ..records import mask_record
    from ..visualize import draw_mask

    records: list[dict[str, Any]] = [mask_record(mask, score) for mask, score in zip(masks, scores)]
    best, *others = (records[i] for i in np.argsort(-scores, kind="stable"))
    mask = masks[scores.argmax()]
    write_picture(output, draw_mask(image, mask, args.point or [], args.box))
    if args.mask is not None:
        write_picture(args.mask, mask.astype(np.uint8) * 255)
    if args.json is not None:
        write_json(args.json, {**best, "seconds": seconds, "candidates": others})
    print(
        f"{output}: score {best['score']:.3f}, {best['area']} pixels, encoder {seconds['encoder']:.2f} s, "
        f"decoder {seconds['decoder']:.2f} s"
    )


def write_picture(path: Path, pixels: np.ndarray) -> None:
    from ..images import encode_image

    write_bytes(path, encode_image(pixels, "PNG" if path.suffix.lower() == ".png" else "JPEG"))
