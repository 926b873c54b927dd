"""From a click to a mask, and "everything" on photos: time by part, and memory, against segment_anything's code.

    python -m scripts.benchmarks.benchmark_masks                   # scikit-image's coffee cup, the dense model that ships
    python -m scripts.benchmarks.benchmark_masks --photos street.jpg --image-size 1024 --rounds 5
    python -m scripts.benchmarks.benchmark_masks --photos val2017/*1.jpg --rounds 1 --decoder-dtype bfloat16

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
from tqdm import tqdm

from blsam import SamAutomaticMaskGenerator, SamPredictor, automatic_mask_generator, sam_model_registry
from blsam.images import read_image
from blsam.options import Parser, add_option, exit_status, find_checkpoint
from blsam.precision import DTYPES
from scripts.benchmarks.benchmark_row import memory_now, memory_peak

GENERATORS = ("segment_anything", "blsam")
CUP = "coffee"
SAME, ALIKE = 0.98, 0.9  # IoU of two masks that are the same but for rounding, and that show the same thing


def load(args: argparse.Namespace) -> Any:
    return sam_model_registry[args.model](find_checkpoint(args.model, args.checkpoint), image_size=args.image_size)


def read(photo: str) -> np.ndarray:
    """A file, or for CUP scikit-image's cup."""
    if photo != CUP:
        return read_image(photo)
    from skimage import data

    return data.coffee()


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
    """A process that makes all masks of each photo that is named on standard input."""
    sam = load(args)
    names = ("points_per_side", "pred_iou_thresh", "stability_score_thresh")
    options = {name: getattr(args, name) for name in names}
    if which == "blsam":
        options["decoder_dtype"] = args.decoder_dtype
        generator: Any = SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **options)
    else:
        generator = segment_anything.SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **options)
        generator.predictor = Reference(sam)
    owner, name = (automatic_mask_generator, "confident") if which == "blsam" else (sam.mask_decoder, "forward")
    base = memory_now(False, reset=True)
    for line in sys.stdin:
        image, seconds = read(line.rstrip("\n")), dict[str, float]()
        with (
            timed(seconds, generator.predictor, "set_image", "encoder"),
            timed(seconds, owner, name, "decoder"),
            timed(seconds, sam, "postprocess_masks", "scaling up"),
        ):
            start = time.perf_counter()
            masks = generator.generate(image)
        seconds["all"] = time.perf_counter() - start
        seconds["filters, run-lengths, NMS"] = 2 * seconds["all"] - sum(seconds.values())
        found = [mask["segmentation"] for mask in masks]
        print(json.dumps({"seconds": seconds, "peak_gb": memory_peak(False) - base, "found": found}), flush=True)


@torch.no_grad()
def click(args: argparse.Namespace) -> None:
    """Decoder and upscaling of one click, three masks, in turn."""
    sam, image = load(args), read(args.photos[0])
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
    add("--photos", nargs="+", default=[CUP], metavar="FILE", help="default: scikit-image's cup of coffee")
    add_option(parser, "--model", default="vit_t")
    add_option(parser, "--checkpoint")
    add_option(parser, "--image-size")
    add("--points-per-side", type=int, default=32)
    add("--pred-iou-thresh", type=float, default=0.2)
    add("--stability-score-thresh", type=float, default=0.2)
    add("--decoder-dtype", choices=DTYPES, default="float32", help="of blsam's generator")
    add("--rounds", type=int, default=3, help="for each photo")
    add("--process", choices=GENERATORS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for photo in args.photos:
        if photo != CUP and not Path(photo).is_file():
            parser.error(f"no file {photo}")
    if min(args.rounds, args.points_per_side) < 1:
        parser.error("--rounds and --points-per-side are at least 1")
    return args


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
    for which, worker in workers.items():
        ask(which, worker, args.photos[0])  # once to warm up
    rows = []
    for photo in tqdm(args.photos, unit="photo", disable=None):
        reports: dict[str, list[dict[str, Any]]] = {which: [] for which in GENERATORS}
        for _ in range(args.rounds):
            for which, worker in workers.items():
                reports[which].append(ask(which, worker, photo))
        rows.append(compare(photo, reports))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    summarise(rows)
    if not any(row["masks"]["blsam"] for row in rows):
        raise ValueError("no masks at all: lower --pred-iou-thresh")
    return 0 if args.decoder_dtype != "float32" or all(row["same"] for row in rows) else 1


def ask(which: str, worker: subprocess.Popen, photo: str) -> dict[str, Any]:
    """What a generator's process reports of a photo: seconds by part, peak memory, masks found (run-lengths)."""
    worker.stdin.write(f"{photo}\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise ValueError(f"the generator of {which} failed: see above")
    return json.loads(line)


def compare(photo: str, reports: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Both generators on one photo: medians of seconds by part, and their masks; prints a line."""
    row: dict[str, Any] = {"peak_gb": {}, "seconds": {}, "masks": {}}
    for which, found in reports.items():
        row["seconds"][which] = by_part([report["seconds"] for report in found])
        row["peak_gb"][which], row["masks"][which] = found[-1]["peak_gb"], len(found[-1]["found"])
    ours, theirs = (reports[which][-1]["found"] for which in ("blsam", "segment_anything"))
    ious = np.asarray(rle_tools.iou(ours, theirs, [0] * len(theirs))).reshape(len(ours), len(theirs))
    row["likes"] = ious.max(1, initial=0), ious.max(0, initial=0)  # of ours among theirs, of theirs among ours
    one_to_one = ious.size and len(ours) == len(theirs) == len(set(ious.argmax(1).tolist()))
    row["same"] = bool(one_to_one and (row["likes"][0] >= SAME).all() or not ours and not theirs)
    row["gain"] = row["seconds"]["segment_anything"]["all"] / row["seconds"]["blsam"]["all"]
    both = ", ".join(
        f"{which} {row['seconds'][which]['all']:.2f} s {row['masks'][which]} masks" for which in GENERATORS
    )
    tqdm.write(f"{Path(photo).name}: {both}; {row['gain']:.2f}x; {'the same' if row['same'] else 'not all the same'}")
    return row


def by_part(seconds: list[dict[str, float]]) -> dict[str, float]:
    """Medians, nothing where there was no such part (no mask, nothing scaled up)."""
    parts = dict.fromkeys(part for one in seconds for part in one)
    return {part: statistics.median(one.get(part, 0) for one in seconds) for part in parts}


def summarise(rows: list[dict[str, Any]]) -> None:
    """Over photos: medians of seconds by part, the largest peak, and how many masks have a like."""
    for which in GENERATORS:
        medians = by_part([row["seconds"][which] for row in rows])
        text = ", ".join(f"{part} {value:.2f} s" for part, value in medians.items())
        peak, masks = max(row["peak_gb"][which] for row in rows), sum(row["masks"][which] for row in rows)
        print(f"everything, {which:<17}{text}; {masks} masks, peak {peak:.2f} GB")
    gains = sorted(row["gain"] for row in rows)
    print(f"{statistics.median(gains):.2f}x ({gains[0]:.2f} to {gains[-1]:.2f})")
    for whose, likes in zip(("blsam", "segment_anything"), zip(*(row["likes"] for row in rows))):
        ious = np.concatenate(likes)
        if len(ious):
            print(f"{(ious >= ALIKE).sum()} of {len(ious)} masks of {whose} have a like at IoU {ALIKE}, "
                  f"{(ious >= SAME).sum()} at {SAME}; {ious.min():.4f} at least")  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_status("benchmark_masks", main))
