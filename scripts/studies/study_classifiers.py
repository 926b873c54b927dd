"""bLViT and seven methods of token reduction in miniature: one dense teacher, then equal steps for each, on CIFAR-10.

    python -m scripts.studies.study_classifiers --data cifar10_train.tar.xz --val-data cifar10_test.tar.xz \
        --output runs/classifiers --results scripts/studies/results/classifiers/rows.jsonl

`--table` chooses what is compared: main (methods and ablations, two seeds), and in miniature the paper's tables 3 (part
by part), 4 (weight of the distillation) and 5 (share that is pruned). Every run is a line of the results; runs that are
there are not made again, and one that was killed goes on where it was. `--report` prints the tables, with multiply-adds
and images a second of all models in turn; `--speeds` keeps what it measured, for plot_classifiers. What a method's keep
ratio does to its speed: scripts/benchmarks/benchmark_baselines.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.utils.data import DataLoader

from blsam.baselines import BASELINES, build_baseline
from blsam.build_classifier import build_classifier
from blsam.config import CLASSIFIERS, ClassifierConfig
from blsam.data.imagenet import EvaluationImages, EvaluationTransform, collate, open_images
from blsam.distributed import CPU
from blsam.evaluation.imagenet import count_correct
from blsam.files import provenance, write_json, write_text
from blsam.options import Parser, UsageError, check_output, exit_status
from blsam.training.calibrate import default_limit
from blsam.training.calibration import Calibration, Settings
from blsam.training.imagenet import train
from blsam.training.imagenet_settings import ClassifierSettings
from scripts.benchmarks.benchmark_baselines import BATCH, chosen_images, measured_in_turn

ROUTED, DENSE = CLASSIFIERS["blvit_mini_patch4_32"], CLASSIFIERS["vit_mini_patch4_32"]
IMAGES = 128  # of a step
ROUNDS = 7  # of the timing


@dataclass(frozen=True)
class Variant:
    """A run: fields of the model, or a baseline; share kept; weight of L_fd; where it starts ("teacher", "calibrated",
    "scratch"); trained False: it is measured as it starts."""

    model: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    keep: float = 0.25
    weight: float = 2.5
    start: str = "teacher"
    trained: bool = True

    @property
    def config(self) -> ClassifierConfig:
        return DENSE if self.baseline else replace(ROUTED, **self.model)


STUDENT, PLAIN = Variant(), Variant(weight=0)
EVIT, EVO = Variant(baseline="evit", keep=0.7), Variant(baseline="evo_vit", keep=0.5)
OTHERS = {  # near EViT's multiply-adds where the method can be set so; what lies beside its paper's default is ours
    "DynamicViT": Variant(baseline="dynamic_vit", keep=0.7),
    "ToMe": Variant(baseline="tome", keep=0.45),
    "ATS": Variant(baseline="ats", keep=1.0),
    "A-ViT": Variant(baseline="a_vit", keep=0.72),
    "AdaViT": Variant(baseline="ada_vit", keep=0.5),
}
BARE = {"e_block": False, "e_layers": (), "semi_cross": False, "score": "norm"}  # pruning alone, by a rule
LATE = {**BARE, "predictor_layers": (3, 6, 9)}
TABLES: dict[str, dict[str, Variant]] = {
    "main": {
        "bLViT": STUDENT,
        "bLViT, no distillation": PLAIN,
        "EViT": EVIT,
        "EViT, no distillation": replace(EVIT, weight=0),
        "Evo-ViT": EVO,
        "Evo-ViT, no distillation": replace(EVO, weight=0),
        **OTHERS,
        "bLViT, calibrated alone": Variant(start="calibrated", trained=False),
        "bLViT, calibrated start": Variant(start="calibrated"),
        "one fusion a block": Variant(model={"fuse": "block"}),
        "keys from prime tokens alone": Variant(model={"semi_cross": False}),
        "no E-block": Variant(model={"e_block": False}),
        "random routing": Variant(model={"score": "random"}),
        "routing by token norm": Variant(model={"score": "norm"}),
        "gamma 0": Variant(model={"gamma": False}),
        "keep 0.1": Variant(keep=0.1),
        "keep 0.5": Variant(keep=0.5),
    },
    "3": {
        "prune 50 %": Variant(model=LATE, keep=0.5, weight=0, start="scratch"),
        "early prune 75 %": Variant(model=BARE, weight=0, start="scratch"),
        "+ E-block": Variant(model={"semi_cross": False, "score": "norm"}, weight=0, start="scratch"),
        "+ predictor and semi-cross": Variant(weight=0, start="scratch"),
        "+ pre-trained start": PLAIN,
        "+ distillation": STUDENT,
    },
    "4": {f"weight {weight:g}": Variant(weight=weight) for weight in (0, 0.5, 1, 2.5, 5, 10)},
    "5": {f"pruned {1 - keep:.0%}": Variant(keep=keep) for keep in (0.5, 0.4, 0.3, 0.2, 0.1)},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="labelled images to learn from")
    add("--val-data", type=Path, required=True, help="and those to measure on")
    add("--table", choices=tuple(TABLES), nargs="+", default=list(TABLES))
    add("--output", type=Path, required=True, metavar="DIR", help="run folders")
    add("--results", type=Path, required=True, metavar="JSONL")
    add("--teacher-epochs", type=float, default=20.0)
    add("--steps", type=int, default=500, help=f"of every run, of {IMAGES} images")
    add("--seeds", type=int, nargs="+", default=(0, 1), help="of table main; the others take the first")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--report", action="store_true", help="print what there is and measure speed; train nothing")
    add("--speeds", type=Path, metavar="JSON", help="with --report: write the measured speeds there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_output("--speeds", args.speeds, taken=(args.results,), suffixes=(".json",))
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.is_file() else []
    length = {"steps": args.steps, "teacher_epochs": args.teacher_epochs, "precision": args.precision}
    if other := [row for row in rows if {name: row[name] for name in length} != length]:
        was = ", ".join(f"{name} {other[0][name]}" for name in length)
        raise UsageError(f"{args.results} holds runs of another length ({was}); give those options, or another file")
    if args.report:
        report(args, rows)
        return 0
    for name in args.table:
        for seed in args.seeds if name == "main" else args.seeds[:1]:
            for variant in TABLES[name].values():
                if not variant.trained and seed != args.seeds[0]:  # one calibration
                    continue
                if not any((row["variant"], row["seed"]) == (key_of(variant), seed) for row in rows):
                    rows.append(one_run(args, variant, seed) | length)
                    write_text(args.results, "".join(json.dumps(row) + "\n" for row in rows))
    return 0


# --- runs ------------------------------------------------------------------------------------------------------------


def key_of(variant: Variant) -> str:
    """What a run is told apart by: tables share those that are the same."""
    changed = {name: value for name, value in vars(variant).items() if value != getattr(STUDENT, name)}
    return json.dumps(changed, sort_keys=True)


def folder_of(args: argparse.Namespace, variant: Variant, seed: int) -> Path:
    """Of a run."""
    return args.output / (re.sub(r"[^a-z0-9._]+", "-", f"run {key_of(variant)} {seed}").strip("-"))


def common(args: argparse.Namespace, output: Path, seed: int) -> ClassifierSettings:
    """What all runs have: light augmentation, since they are short."""
    return ClassifierSettings(
        model=DENSE,
        data=(args.data,),
        val_data=(args.val_data,),
        output=output,
        augment="light",
        mixup=0.0,
        cutmix=0.0,
        drop_path=0.0,
        batch_size=IMAGES,
        workers=1,
        seed=seed,
        precision=args.precision,
        validate_every=10**6,  # at the end alone
        save_every=100,
        log_every=10,
        resume=(output / "checkpoints").is_dir(),
    )


def run(settings: ClassifierSettings, steps: int) -> dict[str, Any]:
    """Train, or go on; the last validation, and its seconds."""
    start = time.perf_counter()
    train(settings)
    lines = [json.loads(line) for line in (settings.output / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "val_top1" in line][-1]
    if found["step"] < steps:
        raise UsageError(f"{settings.output} was interrupted; the same command goes on with it")
    curve = [[line["step"], round(line["loss"], 4)] for line in lines if "loss" in line][:: max(1, len(lines) // 20)]
    minutes = max((line["minutes"] for line in lines if "minutes" in line), default=0.0)
    print(f"{settings.output.name}: {found['val_top1']:.2f}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    row = {"top1": found["val_top1"], "top5": found["val_top5"], "minutes": minutes, "curve": curve}
    return row | ({"gmacs": found["val_gmacs"]} if "val_gmacs" in found else {})


def teacher_of(args: argparse.Namespace) -> Path:
    """The dense teacher, trained once."""
    output = args.output / "teacher"
    path = output / "model.safetensors"
    if not (output / "row.json").is_file():
        steps = math.ceil(args.teacher_epochs * len(open_images((args.data,), "train")) / IMAGES)
        row = run(replace(common(args, output, 0), lr=2e-3, steps=steps, ema=0.999, warmup_epochs=1.0), steps)
        write_text(output / "row.json", json.dumps(row))
    return path


def calibrated_of(args: argparse.Namespace) -> Path:
    """The big.LITTLE model calibrated on images of the training set, without their labels."""
    path, folder = args.output / "calibrated.pt", args.output / "calibration"
    if not path.is_file():
        torch.manual_seed(0)
        images, transform = open_images((args.data,), "train"), EvaluationTransform(ROUTED.image_size)
        count = default_limit(ROUTED)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
        model = build_classifier(ROUTED, teacher_of(args))
        inputs = [transform(images.read(i)) for i in chosen]
        start = time.perf_counter()
        Calibration(model, lambda i: (inputs[i], model.img_size), count, Settings(), folder).run()
        print(f"calibration: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        torch.save(model.state_dict(), path)
    return path


def one_run(args: argparse.Namespace, variant: Variant, seed: int) -> dict[str, Any]:
    """A line of the results."""
    teacher = teacher_of(args)
    row: dict[str, Any] = {"variant": key_of(variant), "seed": seed}
    if not variant.trained:
        return row | measured_as_it_is(args, variant)
    settings = replace(
        common(args, folder_of(args, variant, seed), seed),
        model=variant.config,
        baseline=variant.baseline,
        keep_ratio=(variant.keep,),
        distill_weight=variant.weight,
        teacher=DENSE.name if variant.weight else None,
        teacher_checkpoint=teacher if variant.weight else None,
        init={"teacher": teacher, "calibrated": None, "scratch": None}[variant.start],
        lr=2e-3 if variant.start == "scratch" else 1e-3,
        steps=args.steps,
        warmup_epochs=0.2,
        ema=0.99,
    )
    if variant.start == "calibrated":
        settings = replace(settings, init=calibrated_of(args))
    if variant.start == "scratch" and variant.weight:
        raise UsageError("a run from scratch has no teacher")
    return row | run(settings, args.steps)


def measured_as_it_is(args: argparse.Namespace, variant: Variant) -> dict[str, Any]:
    """The calibrated model, without a step."""
    model = build_classifier(variant.config, calibrated_of(args), keep_ratio=variant.keep)
    data = EvaluationImages(open_images((args.val_data,), "val"), EvaluationTransform(DENSE.image_size))
    found = count_correct(model, DataLoader(data, BATCH, collate_fn=collate), CPU)
    return {"top1": found.top1, "top5": found.top5, "minutes": 0.0, "curve": []}


# --- report ----------------------------------------------------------------------------------------------------------


def report(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """The tables as Markdown."""
    teacher = json.loads((args.output / "teacher" / "row.json").read_text())
    variants = {key_of(v): v for table in TABLES.values() for v in table.values()}
    models = {key: trained(args, v) for key, v in variants.items()} | {"dense": build_classifier(DENSE)}
    found = measured_in_turn(models, chosen_images(DENSE, args.val_data), ROUNDS)
    for row in rows:  # over all test images, where they decide
        if "gmacs" in row:
            found[row["variant"]]["mmacs"] = mean(r["gmacs"] for r in rows if r["variant"] == row["variant"]) * 1e3
    if args.speeds is not None:
        write_json(args.speeds, provenance() | {"teacher": teacher["top1"], "speeds": found})
    for name, table in TABLES.items():
        print(f"\n### {name}\n\n| | top-1 | seeds | MMACs | batch 1 | batch {BATCH} |\n|---|---|---|---|---|---|")
        if name == "main":
            print(f"| dense teacher | {teacher['top1']:.2f} | | {cost(found['dense'])} |")
        for label, variant in table.items():
            top1 = [row["top1"] for row in rows if row["variant"] == key_of(variant)]
            cell = f"{mean(top1):.2f}" if top1 else "-"
            cell += f" (± {(max(top1) - min(top1)) / 2:.2f})" if len(top1) > 1 else ""
            print(f"| {label} | {cell} | {len(top1)} | {cost(found[key_of(variant)])} |")


def cost(found: dict[str, float]) -> str:
    """Cells of a table: 10^6 multiply-adds and images a second."""
    return f"{found['mmacs']:.1f} | {found['batch 1']:.0f} | {found[f'batch {BATCH}']:.0f}"


def trained(args: argparse.Namespace, variant: Variant) -> torch.nn.Module:
    """A model of the kind. Random weights are as good as others where an image decides nothing; else those of its first
    run."""
    torch.manual_seed(0)
    if not variant.baseline:
        return build_classifier(variant.config, keep_ratio=variant.keep)
    path = folder_of(args, variant, args.seeds[0]) / "model.safetensors"
    weights = path if BASELINES[variant.baseline].by_image and path.is_file() else None
    return build_baseline(variant.baseline, DENSE, weights, keep_ratio=variant.keep)


if __name__ == "__main__":
    sys.exit(exit_status("study_classifiers", main))
