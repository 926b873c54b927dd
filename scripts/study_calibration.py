#!/usr/bin/env python3
"""What calibration is worth, and what of it: one JSON line a variant, measured on photos that it has not seen.

    python scripts/study_calibration.py routing  --checkpoint vit_t.safetensors --images PHOTOS --test-images OTHERS \
        --annotations instances_val2017.json --annotation-images val2017 --output routing.jsonl
    python scripts/study_calibration.py photos   ... --output photos.jsonl     (4, 16, 64, 256 of them)
    python scripts/study_calibration.py steps    ... --output steps.jsonl      (0 is the closed form alone)
    python scripts/study_calibration.py kinds    ... --kind streets=DIR --kind faces=DIR --output kinds.jsonl

routing: zero and fitted E-branches, each routed at random, by token norm and by the fitted predictors. --test-images: 32
of them, seeded; the cosine to the dense embedding is a mean over their real tokens. Box mean IoU as
scripts/eval_coco.py measures it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from blsam import SamPredictor, sam_model_registry
from blsam.checkpoint import CheckpointError
from blsam.config import CONFIGS
from blsam.data.annotations import Annotations
from blsam.evaluation.prompted import bootstrap
from blsam.images import read_image
from blsam.modeling.sam import Sam
from blsam.modeling.windows import real_tokens
from blsam.training.calibrate import box_ious, calibrate, choose_photos
from blsam.training.calibration import KEEP_RATIOS, Settings

PHOTOS, STEPS = (4, 16, 64, 256), (0, 25, 100, 200)
TEST_PHOTOS = 32


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", choices=("routing", "photos", "steps", "kinds"))
    add("--model", default="blsam_vit_t", choices=[name for name, config in CONFIGS.items() if config.routed])
    add("--checkpoint", type=Path, required=True, help="of the dense model")
    add("--images", type=Path, metavar="DIR", help="photos to calibrate on (not for kinds)")
    add("--test-images", type=Path, required=True, metavar="DIR", help="photos for the cosines")
    add("--annotations", type=Path, metavar="JSON")
    add("--annotation-images", type=Path, metavar="DIR")
    add("--kind", type=_kind, action="append", default=[], metavar="NAME=DIR", help="photos of one kind")
    add("--limit", type=int, default=64, help="photos, where they are not what is studied")
    add("--seed", type=int, default=0)
    add("--output", type=Path, required=True, metavar="JSONL", help="variants that it holds are not measured again")
    args = parser.parse_args(argv)
    if (args.annotations is None) != (args.annotation_images is None):
        parser.error("--annotations and --annotation-images go together")
    if (args.study == "kinds") != bool(args.kind) or (args.study == "kinds") == (args.images is not None):
        parser.error("the study kinds takes --kind, the others take --images")
    return args


def _kind(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder:
        raise argparse.ArgumentTypeError(f"a kind is NAME=DIR, got {text!r}")
    return name, Path(folder)


class Meter:
    """Cosines and box IoU of encoders against a dense model, photo by photo."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.dense = sam_model_registry[args.model.removeprefix("blsam_")](args.checkpoint)
        self.photos = choose_photos(args.test_images, TEST_PHOTOS, args.seed)
        self.annotations = None
        if args.annotations is not None:
            self.annotations = Annotations(args.annotations, args.annotation_images, "coco")

    def cosines(self, sam: Sam, keep_ratio: float) -> np.ndarray:
        """Of every test photo: [n]."""
        return np.array([self._cosine(sam, path, keep_ratio) for path in self.photos])

    @torch.no_grad()
    def _cosine(self, sam: Sam, path: Path, keep_ratio: float) -> float:
        predictor = SamPredictor(sam)
        image = predictor.transform.apply_image(read_image(path))
        x = sam.preprocess(torch.as_tensor(image).permute(2, 0, 1))[None]
        sizes, side = [image.shape[:2]], sam.image_encoder.img_size // 16
        ours = sam.image_encoder(x, true_sizes=sizes, keep_ratio=keep_ratio)
        real = real_tokens(side, side, torch.tensor(sizes))
        return F.cosine_similarity(ours, self.dense.image_encoder(x), dim=1)[real].mean().item()

    def box_ious(self, sam: Sam, keep_ratio: float) -> tuple[np.ndarray, np.ndarray]:
        """IoU in percent of every object, and the photo that each lies on."""
        return box_ious(sam, self.annotations, keep_ratio)


def fitted(args: argparse.Namespace, photos: list[Path], settings: Settings) -> tuple[Sam, dict[str, Any]]:
    """A calibrated model and what its calibration took."""
    path = args.output.with_suffix(".safetensors")
    report = calibrate(args.model, args.checkpoint, photos, path, settings=settings)
    sam = sam_model_registry[args.model](path)
    path.unlink()
    return sam, {key: report[key] for key in ("photos", "seconds", "peak_gb")}


def routings(args: argparse.Namespace, meter: Meter) -> Iterator[dict[str, Any]]:
    """E-branches x routing x keep ratio; each paired with random routing of the same E-branches, and with dense."""
    sam, took = fitted(args, choose_photos(args.images, args.limit, args.seed), Settings(seed=args.seed))
    zero = sam_model_registry[args.model](args.checkpoint)
    zero.image_encoder.predictors.load_state_dict(sam.image_encoder.predictors.state_dict())
    dense = meter.box_ious(meter.dense, 1.0) if meter.annotations else None
    for name, model in (("zero", zero), ("fitted", sam)):
        for keep in KEEP_RATIOS:
            baseline: dict[str, np.ndarray] = {}
            for score in ("random", "norm", "predictor"):
                encoder = model.image_encoder
                encoder.config = replace(encoder.config, score=score)
                values = {"cosine": meter.cosines(model, keep)}
                images = {"cosine": np.arange(len(meter.photos))}
                row = {"e_branches": name, "routing": score, "keep_ratio": keep, **took}
                if dense is not None:
                    values["box_miou"], images["box_miou"] = meter.box_ious(model, keep)
                    row["over_dense"] = float((values["box_miou"] - dense[0]).mean())
                    row["over_dense_interval_95"] = bootstrap(values["box_miou"] - dense[0], dense[1], 0)
                for key, value in values.items():
                    row[key] = float(value.mean())
                    if score != "random":
                        row[f"{key}_over_random"] = float((value - baseline[key]).mean())
                        row[f"{key}_over_random_interval_95"] = bootstrap(value - baseline[key], images[key], 0)
                baseline = baseline or values
                yield row


def measured(meter: Meter, sam: Sam, took: dict[str, Any]) -> dict[str, Any]:
    row = dict(took) | {f"cosine_{keep:g}": float(meter.cosines(sam, keep).mean()) for keep in KEEP_RATIOS}
    if meter.annotations is not None:
        row["box_miou_0.25"] = float(meter.box_ious(sam, 0.25)[0].mean())
    return row


def growth(args: argparse.Namespace, meter: Meter, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Calibrations with more and more photos, or more and more steps."""
    for number in PHOTOS if args.study == "photos" else STEPS:
        if any(row[args.study] == number for row in done):
            continue
        photos, settings = choose_photos(args.images, args.limit, args.seed), Settings(seed=args.seed)
        if args.study == "photos":
            photos = choose_photos(args.images, number, args.seed)
        else:
            settings = replace(settings, steps=number, stage_steps=2 * number)
        sam, took = fitted(args, photos, settings)
        yield {"steps": settings.steps} | measured(meter, sam, took)


def kinds(args: argparse.Namespace, meter: Meter, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Calibrations on photos of one kind alone."""
    for name, folder in args.kind:
        if any(row["kind"] == name for row in done):
            continue
        sam, took = fitted(args, choose_photos(folder, args.limit, args.seed), Settings(seed=args.seed))
        yield {"kind": name} | measured(meter, sam, took)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.is_file() else []
    meter = Meter(args)
    if args.study == "routing":
        rows = routings(args, meter)
    else:
        rows = (kinds if args.study == "kinds" else growth)(args, meter, done)
    with args.output.open("a") as file:
        for row in tqdm(rows, unit="variant", disable=not sys.stderr.isatty()):
            line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
            print(line, file=file, flush=True)
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FileNotFoundError, CheckpointError, ValueError) as error:
        print(f"study_calibration: {error}", file=sys.stderr)
        sys.exit(2)
