#!/usr/bin/env python3
"""What distillation and the start are worth: equal steps with and without L_fd, from zero and from calibrated E-blocks.

    python scripts/study_distillation.py --teacher-checkpoint vit_t.safetensors --init blsam_vit_t.safetensors \
        --data PHOTOS --results scripts/results/training/distillation.jsonl --picture docs/distillation.png

Every run (variant x seed) is one line of the results, with what validation measured on the way; runs that are there
already are not made again, so other settings want another file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from blsam.checkpoint import write_atomically
from blsam.evaluation.commands import run_script
from blsam.training.loop import train
from blsam.training.settings import TrainSettings

# name -> (starts from the calibrated model, weight of L_fd)
VARIANTS = {
    "calibrated, L_sup + 2.5 L_fd": (True, 2.5),
    "calibrated, L_sup alone": (True, 0.0),
    "zero, L_sup + 2.5 L_fd": (False, 2.5),
    "zero, L_sup alone": (False, 0.0),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="blsam_vit_t")
    add("--teacher", default="vit_t")
    add("--teacher-checkpoint", type=Path, required=True)
    add("--init", type=Path, required=True, help="the calibrated model")
    add("--data", type=Path, nargs="+", required=True)
    add("--image-size", type=int, default=256)
    add("--steps", type=int, default=150)
    add("--seeds", type=int, nargs="+", default=(0, 1))
    add("--results", type=Path, required=True)
    add("--picture", type=Path)
    args = parser.parse_args(argv)
    if args.steps < 3:
        parser.error("--steps must be at least 3: each run is validated three times")
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.is_file() else []
    for seed in args.seeds:
        for name in VARIANTS:
            if not any((row["variant"], row["seed"]) == (name, seed) for row in rows):
                rows.append(one_run(args, name, seed))
                text = "".join(json.dumps(row) + "\n" for row in rows)
                write_atomically(args.results, lambda path, text=text: Path(path).write_text(text))
    report(rows)
    if args.picture is not None:
        draw(rows).savefig(args.picture, dpi=100)
    return 0


def one_run(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Train a variant; its settings and what validation saw."""
    calibrated, weight = VARIANTS[name]
    print(f"{name}, seed {seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            model=args.model,
            data=tuple(args.data),
            output=Path(folder) / "run",
            init=args.init if calibrated else None,
            teacher=args.teacher,
            teacher_checkpoint=args.teacher_checkpoint,
            image_size=args.image_size,
            distill_weight=weight,
            mask_loss="balanced",
            steps=args.steps,
            validate_every=args.steps // 3,
            holdout=0.025,
            seed=seed,
        )
        start = time.perf_counter()
        train(settings)
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (settings.output / "metrics.jsonl").read_text().splitlines()]
    curve = [line for line in lines if "val_cosine" in line]
    if curve[-1]["step"] < args.steps:
        raise ValueError(f"{name}, seed {seed}, was interrupted; the same command goes on with it")
    return {"variant": name, "seed": seed, "image_size": args.image_size, "seconds": round(seconds), "curve": curve}


def report(rows: list[dict]) -> None:
    """Final figures of every variant: mean over the seeds, and their spread."""
    for name in VARIANTS:
        last = [row["curve"][-1] for row in rows if row["variant"] == name]
        text = []
        for key in ("val_cosine", "val_box", "val_click", "prime_jaccard"):
            values = [one[key] for one in last]
            text.append(f"{key.removeprefix('val_')} {np.mean(values):.4f} (spread {np.ptp(values):.4f})")
        print(f"{name:<30} " + ", ".join(text))


def draw(rows: list[dict]) -> Figure:
    """Lost cosine and box IoU over the steps, a line for each run."""
    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(VARIANTS):
        for row in (row for row in rows if row["variant"] == name):
            steps = [point["step"] for point in row["curve"]]
            label = name if row["seed"] == min(r["seed"] for r in rows) else None
            style = {"color": f"C{number}", "marker": ".", "label": label}
            left.plot(steps, [1 - point["val_cosine"] for point in row["curve"]], **style)
            right.plot(steps, [100 * point["val_box"] for point in row["curve"]], **style)
    left.set(xlabel="step", ylabel="1 - cosine to the teacher", yscale="log")
    right.set(xlabel="step", ylabel="box mean IoU, held-out photos, %")
    right.legend(fontsize=8, loc="lower right")
    left.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], labels=["0.02", "0.05", "0.1", "0.2", "0.5"])
    left.minorticks_off()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run_script("study_distillation", main)
