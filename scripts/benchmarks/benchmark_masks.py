"""From a click to a mask, and "everything" on one photo: time by part, and memory, against segment_anything's code.

    python -m scripts.benchmarks.benchmark_masks                   # scikit-image's coffee cup, the dense model that ships
    python -m scripts.benchmarks.benchmark_masks --photo street.jpg --image-size 1024 --rounds 5

Both generators get the same model and the same thresholds, take turns, and must find the same masks, but for rounding;
with --decoder-dtype bfloat16 it is said how many of them.
Thresholds are lower than SAM's defaults, because the small model is less sure than SAM; --pred-iou-thresh sets how much
passes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import segment_anything
import torch
from pycocotools import mask as rle_tools

from blsam import SamAutomaticMaskGenerator, SamPredictor, automatic_mask_generator, sam_model_registry
from blsam.images import read_image
from blsam.options import Parser, add_option, exit_status, find_checkpoint
from blsam.precision import DTYPES
from scripts.benchmarks.benchmark_row import memory_now, memory_peak

GENERATORS = ("segment_anything", "blsam")
SAME, ALIKE = 0.98, 0.9  # IoU of two masks that are the same but for rounding, and that show the same thing


def load(args: argparse.Namespace) -> tuple[Any, np.ndarray]:
    if args.photo:
        image = read_image(args.photo)
    else:
        from skimage import data

        image = data.coffee()
    return sam_model_registry[args.model](
        find_checkpoint(args.model, args.checkpoint), image_size=args.image_size
    ), image


class Reference(SamPredictor):
    """`segment_anything`'s predictor after an encoder that both share."""

    predict_torch = segment_anything.SamPredictor.predict_torch


@contextmanager
def timed(seconds: dict[str, float], owner: Any, name: str, part: str):
    """Book the time of a method under a part."""
    method, own = getattr(owner, name), vars(owner).get(name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **kwargs)
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start
        return result

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def everything(args: argparse.Namespace, which: str) -> None:
    """A process that makes all masks of the photo for every line on standard input."""
    sam, image = load(args)
    options = {"pred_iou_thresh": args.pred_iou_thresh, "stability_score_thresh": args.stability_score_thresh}
    if which == "blsam":
        options["decoder_dtype"] = args.decoder_dtype
        generator: Any = SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **options)
    else:
        generator = segment_anything.SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **options)
        generator.predictor = Reference(sam)
    owner, name = (automatic_mask_generator, "confident") if which == "blsam" else (sam.mask_decoder, "forward")
    base = memory_now(False, reset=True)
    for _ in sys.stdin:
        seconds: dict[str, float] = {}
        with (
            timed(seconds, generator.predictor, "set_image", "encoder"),
            timed(seconds, owner, name, "decoder"),
            timed(seconds, sam, "postprocess_masks", "scaling up"),
        ):
            start = time.perf_counter()
            masks = generator.generate(image)
        seconds["all"] = time.perf_counter() - start
        seconds["filters, run-lengths, NMS"] = 2 * seconds["all"] - sum(seconds.values())
        report = {"seconds": seconds, "peak_gb": memory_peak(False) - base, "masks": len(masks)}
        report["found"] = [mask["segmentation"] for mask in masks]
        print(json.dumps(report), flush=True)


@torch.no_grad()
def click(args: argparse.Namespace) -> None:
    """Decoder and upscaling of one click, three masks, in turn."""
    sam, image = load(args)
    predictors = {"segment_anything": Reference(sam), "blsam": SamPredictor(sam)}
    for predictor in predictors.values():
        predictor.set_image(image)
    height, width = image.shape[:2]
    points = np.random.default_rng(0).uniform((0, 0), (width, height), (25, 2))
    seconds: dict[str, list[float]] = {which: [] for which in predictors}
    for point in points:
        for which, predictor in predictors.items():
            start = time.perf_counter()
            predictor.predict(point[None], np.array([1]))
            seconds[which].append(time.perf_counter() - start)
    for which, found in seconds.items():
        low, median, high = np.quantile(found[5:], (0.25, 0.5, 0.75)) * 1e3
        print(f"one click, {which}, {width} x {height}: {median:.1f} ms (quartiles {low:.1f} to {high:.1f})")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--photo", type=Path)
    add_option(parser, "--model", default="vit_t")
    add_option(parser, "--checkpoint")
    add_option(parser, "--image-size")
    add("--pred-iou-thresh", type=float, default=0.2)
    add("--stability-score-thresh", type=float, default=0.2)
    add("--decoder-dtype", choices=DTYPES, default="float32", help="of blsam's generator")
    add("--rounds", type=int, default=3)
    add("--process", choices=GENERATORS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.process:
        everything(args, args.process)
        return 0
    click(args)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {
        which: subprocess.Popen([sys.executable, "-m", __spec__.name, *sys.argv[1:], "--process", which], **pipes)
        for which in GENERATORS
    }
    reports: dict[str, list[dict[str, Any]]] = {which: [] for which in GENERATORS}
    for _ in range(args.rounds + 1):
        for which, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                raise ValueError(f"the generator of {which} failed: see above")
            reports[which].append(json.loads(line))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    for which, found in reports.items():
        parts = {part: statistics.median(r["seconds"].get(part, 0) for r in found[1:]) for part in found[0]["seconds"]}
        text = ", ".join(f"{part} {value:.2f} s" for part, value in parts.items())
        print(f"everything, {which:<17}{text}; {found[-1]['masks']} masks, peak {found[-1]['peak_gb']:.2f} GB")
    medians = {which: statistics.median(r["seconds"]["all"] for r in found[1:]) for which, found in reports.items()}
    print(f"{medians['segment_anything'] / medians['blsam']:.2f}x")
    ours, theirs = (reports[which][-1]["found"] for which in ("blsam", "segment_anything"))
    if not ours or not theirs:
        print(f"{len(ours)} masks and {len(theirs)}")
        return 1
    ious = rle_tools.iou(ours, theirs, [0] * len(theirs))
    found, theirs_found = ious.max(1), ious.max(0)
    print(f"{(found >= ALIKE).sum()} of {len(ours)} masks and {(theirs_found >= ALIKE).sum()} of {len(theirs)} have a like "
          f"at IoU {ALIKE}; {found.min():.4f} and {theirs_found.min():.4f} at least")  # fmt: skip
    same = len(ours) == len(theirs) == len(set(ious.argmax(1).tolist())) and found.min() >= SAME
    return 0 if same or args.decoder_dtype != "float32" else 1


if __name__ == "__main__":
    sys.exit(exit_status("benchmark_masks", main))
