"""bLViT, EViT and Evo-ViT in miniature: one dense teacher, then equal steps for every variant, on CIFAR-10.

    python -m scripts.studies.study_classifiers --data cifar10_train.tar.xz --val-data cifar10_test.tar.xz \
        --output runs/classifiers --results scripts/studies/results/classifiers/rows.jsonl

`--table` chooses what is compared: main (methods and ablations, two seeds), and in miniature the paper's tables 3 (part
by part), 4 (weight of the distillation) and 5 (share that is pruned). Every run is a line of the results; runs that are
there are not made again, and one that was killed goes on where it was. `--report` prints the tables, with multiply-adds
and images a second of all models in turn.
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
from statistics import mean, median
from typing import Any

import torch
from torch.utils.data import DataLoader

from blsam.baselines import build_baseline
from blsam.build_classifier import build_classifier
from blsam.config import CLASSIFIERS, ClassifierConfig
from blsam.data.imagenet import EvaluationImages, EvaluationTransform, collate, open_images
from blsam.distributed import CPU
from blsam.evaluation.imagenet import count_correct, counted_macs, images_a_second
from blsam.files import write_text
from blsam.options import Parser, UsageError, exit_status
from blsam.training.calibrate import default_limit, default_settings
from blsam.training.calibration import Calibration
from blsam.training.imagenet import train
from blsam.training.imagenet_settings import ClassifierSettings

ROUTED, DENSE = CLASSIFIERS["blvit_mini_patch4_32"], CLASSIFIERS["vit_mini_patch4_32"]
IMAGES = 128  # of a step
BATCH, ROUNDS = 64, 7  # of the timing


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
    "AdaViT": Variant(baseline="ada_vit", keep=0.8),
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
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
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
        Calibration(model, lambda i: (inputs[i], model.img_size), count, default_settings(ROUTED), folder).run()
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
    teacher = json.loads((args.output / "teacher" / "row.json").read_text()) if args.output.is_dir() else None
    variants = {key_of(v): v for table in TABLES.values() for v in table.values()}
    models = {key: fresh(v) for key, v in variants.items()} | {"dense": build_classifier(DENSE)}
    x = torch.randn(BATCH, 3, DENSE.image_size, DENSE.image_size, generator=torch.Generator().manual_seed(0))
    macs = {key: counted_macs(model, x[:1]) / 1e6 for key, model in models.items()}
    speeds: dict[str, list[float]] = {key: [] for key in models}
    for _ in range(ROUNDS):  # in turn
        for key, model in models.items():
            speeds[key].append(images_a_second(model, x, 0.2))
    for name, table in TABLES.items():
        print(f"\n### {name}\n\n| | top-1 | seeds | MMACs | images a second |\n|---|---|---|---|---|")
        if teacher is not None and name == "main":
            print(f"| dense teacher | {teacher['top1']:.2f} | | {macs['dense']:.1f} | {median(speeds['dense']):.0f} |")
        for label, variant in table.items():
            key = key_of(variant)
            found = [row["top1"] for row in rows if row["variant"] == key]
            cell = f"{mean(found):.2f}" + (f" (± {(max(found) - min(found)) / 2:.2f})" if len(found) > 1 else "")
            print(
                f"| {label} | {cell if found else '-'} | {len(found)} | {macs[key]:.1f} | {median(speeds[key]):.0f} |"
            )


def fresh(variant: Variant) -> torch.nn.Module:
    """A model of the kind, with random weights: what it costs does not depend on them."""
    torch.manual_seed(0)
    if variant.baseline:
        return build_baseline(variant.baseline, DENSE, keep_ratio=variant.keep)
    return build_classifier(variant.config, keep_ratio=variant.keep)


if __name__ == "__main__":
    sys.exit(exit_status("study_classifiers", main))
