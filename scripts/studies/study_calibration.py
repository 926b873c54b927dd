"""What calibration is worth, and what of it: one JSON line a variant, measured on photos that it has not seen.

    python -m scripts.studies.study_calibration routing  --checkpoint vit_t.safetensors --images PHOTOS \
        --test-images OTHERS --annotations instances_val2017.json --annotation-images val2017 --output routing.jsonl
    python -m scripts.studies.study_calibration photos   ... --output photos.jsonl     (4, 16, 64, 256 of them)
    python -m scripts.studies.study_calibration steps    ... --output steps.jsonl      (0 is the closed form alone)
    python -m scripts.studies.study_calibration heads    ... --output heads.jsonl      (narrow ones over the image)
    python -m scripts.studies.study_calibration cells    ... --output cells.jsonl      (of tokens, as keys of all heads)
    python -m scripts.studies.study_calibration kinds    ... --kind streets=DIR --kind faces=DIR --output kinds.jsonl

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
from tqdm import tqdm

from blsam.build_sam import build_sam
from blsam.config import CONFIGS, EncoderConfig
from blsam.data.annotations import Annotations
from blsam.evaluation.prompted import bootstrap, object_ious
from blsam.files import sha256
from blsam.modeling.sam import Sam
from blsam.modeling.windows import real_tokens
from blsam.options import ROUTED, Parser, add_option, check_output, exit_status
from blsam.training.calibrate import calibrate, choose_photos, prepare
from blsam.training.calibration import KEEP_RATIOS, Settings
from blsam.training.losses import cosine_loss

PHOTOS, STEPS, HEADS, CELLS = (4, 16, 64, 256), (0, 25, 100), (2, 3), (1, 2, 4)
TEST_PHOTOS = 32


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("study", choices=("routing", "photos", "steps", "heads", "cells", "kinds"))
    add_option(parser, "--model", choices=ROUTED, default="blsam_vit_t")
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
    """Cosines to a dense model's embeddings, photo by photo."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.dense = build_sam(CONFIGS[args.model].dense, args.checkpoint)
        self.weights = sha256(args.checkpoint)
        self.inputs = [prepare(self.dense, path) for path in choose_photos(args.test_images, TEST_PHOTOS, args.seed)]
        with torch.no_grad():
            self.expected = [self.dense.image_encoder(x[None]) for x, _ in self.inputs]
        self.annotations = None
        if args.annotations is not None:
            self.annotations = Annotations(args.annotations, args.annotation_images, "coco")

    @torch.no_grad()
    def cosines(self, sam: Sam, keep_ratio: float) -> np.ndarray:
        """Of every test photo, a mean over its real tokens: [n]."""
        found, side = [], sam.prompt_encoder.image_embedding_size[0]
        for (x, size), expected in zip(self.inputs, self.expected):
            ours = sam.image_encoder(x[None], true_sizes=[size], keep_ratio=keep_ratio)
            real = real_tokens(side, side, torch.tensor([size]), sam.image_encoder.img_size // side)
            found.append(1 - cosine_loss(ours, expected, real).item())
        return np.array(found)


def fitted(
    args: argparse.Namespace, config: EncoderConfig, photos: list[Path], settings: Settings
) -> tuple[Sam, dict[str, Any]]:
    """A calibrated model and what its calibration took."""
    path = args.output.with_suffix(".safetensors")
    report = calibrate(config, args.checkpoint, photos, path, settings=settings)
    sam = build_sam(config, path)
    path.unlink()
    return sam, {key: report[key] for key in ("photos", "steps", "seconds")}


def routings(args: argparse.Namespace, meter: Meter, sam: Sam, took: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """E-branches x routing x keep ratio; each paired with random routing of the same E-branches, and with dense."""
    zero = build_sam(sam.image_encoder.config, args.checkpoint)
    zero.image_encoder.predictors.load_state_dict(sam.image_encoder.predictors.state_dict())
    dense = _boxes(meter.dense, meter.annotations, 1.0) if meter.annotations else None
    for name, model in (("zero", zero), ("fitted", sam)):
        for keep in KEEP_RATIOS:
            baseline: dict[str, np.ndarray] = {}
            for score in ("random", "norm", "predictor"):
                encoder = model.image_encoder
                encoder.config = replace(encoder.config, score=score)
                values = {"cosine": meter.cosines(model, keep)}
                images = {"cosine": np.arange(len(meter.inputs))}
                row = {"e_branches": name, "routing": score, "keep_ratio": keep, **took}
                if dense is not None:
                    values["box_miou"], images["box_miou"] = _boxes(model, meter.annotations, keep)
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
        row["box_miou_0.25"] = float(_boxes(sam, meter.annotations, 0.25)[0].mean())
    return row


def _boxes(sam: Sam, annotations: Annotations, keep_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    ious, images = object_ious(sam, annotations, keep_ratio)
    return ious["box"], images


def variants(args: argparse.Namespace) -> list[Any]:
    fixed = {"photos": PHOTOS, "steps": STEPS, "heads": HEADS, "cells": CELLS, "routing": ("all",)}
    return args.kind if args.study == "kinds" else list(fixed[args.study])


def study(args: argparse.Namespace, meter: Meter, value: Any) -> Iterator[dict[str, Any]]:
    """The rows of one variant."""
    settings, folder, count = Settings(seed=args.seed), args.images, args.limit
    config = CONFIGS[args.model]
    if args.study == "photos":
        count = value
    elif args.study == "steps":
        settings = replace(settings, steps=value)
    elif args.study == "heads":
        config = replace(config, e_global_heads=value, e_pool=1)
    elif args.study == "cells":
        config = replace(config, e_global_heads=config.e_heads, e_pool=value)
    elif args.study == "kinds":
        folder = value[1]
    sam, took = fitted(args, config, choose_photos(folder, count, args.seed), settings)
    if args.study == "routing":
        yield from routings(args, meter, sam, took)
    else:
        yield measured(meter, sam, took)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for path in (args.output, args.output.with_suffix(".safetensors")):  # the latter while a variant is measured
        check_output("--output", path, taken=(args.checkpoint, args.annotations))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = args.output.read_text().splitlines() if args.output.is_file() else []
    done = {json.loads(line)["of"] for line in lines}
    meter = Meter(args)
    with args.output.open("a") as file:
        for value in tqdm(variants(args), unit="variant", disable=not sys.stderr.isatty()):
            name = value[0] if args.study == "kinds" else value
            of = ", ".join(map(str, (args.study, name, args.model, meter.weights[:8], args.limit, args.seed)))
            if of in done:
                continue
            rows = [
                {"of": of, "kind" if args.study == "kinds" else "asked": name} | r for r in study(args, meter, value)
            ]
            rounded = [{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
            text = "".join(json.dumps(row) + "\n" for row in rounded)
            file.write(text)  # a variant's rows together, so that none is half there
            file.flush()
            print(text, end="", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("study_calibration", main))
