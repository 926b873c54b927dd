"""What each part of a trained bLSAM is worth: equal steps without distillation, without routing that is learnt, ...

    python -m scripts.studies.study_training --teacher-checkpoint vit_t.safetensors --init CALIBRATED --data PHOTOS \
        --annotations instances_val2017.json --annotation-images val2017 \
        --results scripts/studies/results/training/controls.jsonl --picture docs/training.png

--init: what `blsam calibrate` made of the teacher. Every run (variant x seed) is one line of the results: what validation
on held-out photos measured on the way, and the IoU of the annotated objects in the end, photo by photo, so that runs can
be compared in pairs. Runs that are there already are not made again, so other settings want another file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from blsam.build_sam import build_sam
from blsam.config import CONFIGS
from blsam.data.annotations import Annotations
from blsam.evaluation.prompted import bootstrap, object_ious
from blsam.files import write_atomically, write_text
from blsam.options import ROUTED, Parser, add_option, check_output, exit_status
from blsam.training.loop import train
from blsam.training.settings import TrainSettings

PROMPTS = ("box", "center")


@dataclass(frozen=True)
class Variant:
    """Whether it starts from the calibrated model or from the teacher's weights; weight of L_fd; fields of the model."""

    calibrated: bool = True
    distill_weight: float = 2.5
    model: dict[str, Any] = field(default_factory=dict)


STUDENT = "student"
VARIANTS = {
    STUDENT: Variant(),
    "no distillation": Variant(distill_weight=0),
    "zero start": Variant(calibrated=False),
    "zero start without distillation": Variant(calibrated=False, distill_weight=0),
    "random routing": Variant(model={"score": "random"}),
    "routing by token norm": Variant(model={"score": "norm"}),
    "keys from prime tokens only": Variant(model={"semi_cross": False}),
    "no E-block": Variant(calibrated=False, model={"e_block": False}),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_option(parser, "--model", choices=ROUTED, default="blsam_vit_t")
    add("--teacher-checkpoint", type=Path, required=True, help="of the dense model")
    add("--init", type=Path, required=True, help="the calibrated model")
    add("--data", type=Path, nargs="+", required=True)
    add("--annotations", type=Path, metavar="JSON", required=True, help="COCO's format, of photos to measure on")
    add("--annotation-images", type=Path, metavar="DIR", required=True)
    add("--variants", type=lambda text: text.split(","), default=list(VARIANTS), help="default: all")
    add("--image-size", type=int, default=256)
    add("--steps", type=int, default=150)
    add("--holdout", type=float, default=0.025, metavar="F", help="share of the photos that validation takes")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--seeds", type=int, nargs="+", default=(0, 1))
    add("--results", type=Path, required=True, metavar="JSONL")
    add("--picture", type=Path, metavar="PNG")
    args = parser.parse_args(argv)
    if args.steps < 3:
        parser.error("--steps must be at least 3: each run is validated three times")
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"no variant {sorted(unknown)[0]!r}: they are {'; '.join(VARIANTS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    taken = (args.annotations, args.init, args.teacher_checkpoint)
    check_output("--results", args.results, taken=taken)
    check_output("--picture", args.picture, taken=(*taken, args.results))
    annotations = Annotations(args.annotations, args.annotation_images, "coco")
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.is_file() else []
    for seed in args.seeds:
        for name in args.variants:
            if not any((row["variant"], row["seed"]) == (name, seed) for row in rows):
                rows.append(one_run(args, annotations, name, seed))
                text = "".join(json.dumps(row) + "\n" for row in rows)
                write_text(args.results, text)
    report(rows)
    if args.picture is not None:
        write_atomically(args.picture, lambda path: draw(rows).savefig(path, dpi=100))
    return 0


def one_run(args: argparse.Namespace, annotations: Annotations, name: str, seed: int) -> dict[str, Any]:
    """Train a variant; what validation saw on the way and the annotated objects in the end."""
    variant, preset = VARIANTS[name], CONFIGS[args.model]
    config = replace(preset, **variant.model)
    print(f"{name}, seed {seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            model=config,
            data=tuple(args.data),
            output=Path(folder) / "run",
            init=args.init if variant.calibrated else None,
            teacher=preset.dense.name,
            teacher_checkpoint=args.teacher_checkpoint,
            image_size=args.image_size,
            distill_weight=variant.distill_weight,
            mask_loss="balanced",
            precision=args.precision,
            steps=args.steps,
            validate_every=args.steps // 3,
            holdout=args.holdout,
            seed=seed,
        )
        start = time.perf_counter()
        path = train(settings)
        seconds = time.perf_counter() - start
        metrics = settings.output / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        curve = [line for line in lines if "val_cosine" in line]
        if not curve:
            raise ValueError("no photo was held out for validation: a larger --holdout")
        if curve[-1]["step"] < args.steps:
            raise ValueError(f"{name}, seed {seed}, was interrupted; the same command goes on with it")
        ious, images = object_ious(build_sam(config, path), annotations, 0.25, PROMPTS)
    _, photo, objects = np.unique(images, return_inverse=True, return_counts=True)
    photos = {prompt: (np.bincount(photo, values) / objects).round(3).tolist() for prompt, values in ious.items()}
    row = {"variant": name, "seed": seed, "image_size": args.image_size, "seconds": round(seconds), "curve": curve}
    return row | {"objects": objects.tolist(), "photos": photos}  # of each photo: how many, mean IoU in percent


# --- what the runs say -----------------------------------------------------------------------------------------------


def object_values(rows: list[dict[str, Any]], name: str, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a variant, a mean over its seeds: for each object the mean IoU of its photo, and the photo's number."""
    of_variant = [row for row in rows if row["variant"] == name]
    objects = of_variant[0]["objects"]
    values = np.mean([row["photos"][prompt] for row in of_variant], axis=0)
    return np.repeat(values, objects), np.repeat(np.arange(len(objects)), objects)


def report(rows: list[dict[str, Any]]) -> None:
    """Of every variant: validation's last figures, mean and spread over the seeds; objects, and the student's lead."""
    for name in [name for name in VARIANTS if any(row["variant"] == name for row in rows)]:
        last = [row["curve"][-1] for row in rows if row["variant"] == name]
        text = []
        for key in ("val_cosine", "val_box", "val_click", "prime_jaccard"):
            of_key = [one[key] for one in last]
            text.append(f"{key.removeprefix('val_')} {np.mean(of_key):.4f} (spread {np.ptp(of_key):.4f})")
        for prompt in PROMPTS:
            values, images = object_values(rows, name, prompt)
            text.append(f"{prompt} mIoU {values.mean():.2f}")
            if name != STUDENT and any(row["variant"] == STUDENT for row in rows):
                lead = object_values(rows, STUDENT, prompt)[0] - values
                low, high = bootstrap(lead, images, 0)
                text[-1] += f" (student {lead.mean():+.2f}, {low:+.2f} to {high:+.2f})"
        print(f"{name:<28} " + ", ".join(text))


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Lost cosine and box IoU over the steps, a line for each run."""
    figure = Figure((9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(VARIANTS):
        for i, row in enumerate(row for row in rows if row["variant"] == name):
            steps = [point["step"] for point in row["curve"]]
            style = {"color": f"C{number}", "marker": ".", "lw": 1, "label": None if i else name}
            left.plot(steps, [1 - point["val_cosine"] for point in row["curve"]], **style)
            right.plot(steps, [100 * point["val_box"] for point in row["curve"]], **style)
    left.set(xlabel="step", ylabel="1 - cosine to the teacher", yscale="log")
    right.set(xlabel="step", ylabel="box mean IoU, held-out photos, %")
    left.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], labels=["0.02", "0.05", "0.1", "0.2", "0.5"])
    left.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside right center", frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    sys.exit(exit_status("study_training", main))
