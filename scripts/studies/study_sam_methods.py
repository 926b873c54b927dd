"""EViT, Evo-ViT and SparseSAM's rule in SAM's encoder beside bLSAM: the same weights, photos, steps and loss.

    python -m scripts.studies.study_sam_methods --calibrated CALIBRATED --data PHOTOS --runs runs/sam_methods \
        --annotations instances_val2017.json --annotation-images val2017 \
        --results scripts/studies/results/sam_methods/rows.jsonl
    python -m scripts.studies.study_sam_methods ... --times scripts/studies/results/sam_methods/times.jsonl --rounds 15

Every row is a model at a keep ratio with weights as they are ("none": no training), or trained `--steps` with the recipe
of the bLSAM that ships: from the dense model's weights (bLSAM's: from CALIBRATED), L_sup + 2.5 L_fd against the dense
model, at the row's keep ratio. Box and one random point, protocol `paper`, photo by photo, so that rows are compared in
pairs; the cosine to the dense embedding on the first 32 photos. Rows that are there are not made again, so other
settings want another file. --times measures instead: seconds of the encoder, in turn; on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from blsam.baselines.sam.macs import config_macs
from blsam.build_sam import build_sam
from blsam.config import MODELS
from blsam.data.annotations import Annotations
from blsam.evaluation.prompted import bootstrap, object_ious
from blsam.files import provenance, sha256, write_text
from blsam.modeling.sam import Sam
from blsam.modeling.windows import real_tokens
from blsam.options import Parser, check_output, exit_status, find_checkpoint
from blsam.training.calibrate import prepare
from blsam.training.loop import train
from blsam.training.losses import cosine_loss
from blsam.training.settings import TrainSettings
from scripts.benchmarks.benchmark import compare, processor
from scripts.benchmarks.benchmark_row import Row

PROMPTS = ("box", "random")
COMPARED = 32  # photos, for the cosine
SIZE = 512
DTYPES = ("float32", "bfloat16")
TIMED = ("model", "keep_ratio", "dtype", "threads", "rounds", "gmacs", "median_s", "quartiles_s")


@dataclass(frozen=True)
class Entry:
    """A row: weights "none" (as the dense model's), "calibrated", "shipped", or "trained" in this study."""

    model: str
    keep_ratio: float | None
    weights: str = "none"

    @property
    def name(self) -> str:
        return self.model + ("" if self.keep_ratio is None else f" {self.keep_ratio:g}")

    @property
    def key(self) -> tuple[Any, ...]:
        return self.model, self.keep_ratio, self.weights


DENSE = Entry("vit_t", None)
RIVALS = [Entry("evit_vit_t", 0.7), Entry("evo_vit_t", 0.5)]
RIVALS += [Entry(f"{name}_vit_t", keep) for keep in (0.25, 0.5, 0.1) for name in ("sparse", "strided")]
OURS = [Entry("blsam_vit_t", keep, "calibrated") for keep in (0.25, 0.5, 0.1)]
TRAINED = [
    Entry("evit_vit_t", 0.7, "trained"),
    Entry("evo_vit_t", 0.5, "trained"),
    Entry("blsam_vit_t", 0.25, "trained"),
    Entry("vit_t", None, "trained"),
    Entry("strided_vit_t", 0.25, "trained"),
    Entry("sparse_vit_t", 0.25, "trained"),
]
ENTRIES = [DENSE, *OURS, *RIVALS, *TRAINED, Entry("blsam_vit_t", 0.25, "shipped")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="of the dense model; default: the vit_t that ships")
    add("--calibrated", type=Path, required=True, help="the bLSAM that `blsam calibrate` makes of it")
    add("--data", type=Path, nargs="+", help="photos with masks to train on")
    add("--steps", type=int, default=60, help="of four photos")
    add("--runs", type=Path, required=True, metavar="DIR", help="what was trained, and is not trained again")
    add("--annotations", type=Path, metavar="JSON", required=True)
    add("--annotation-images", type=Path, metavar="DIR", required=True)
    add("--only", type=lambda text: text.split(","), help="weights: none, calibrated, shipped, trained; default: all")
    add("--results", type=Path, required=True, metavar="JSONL")
    add("--times", type=Path, metavar="JSONL", help="measure seconds instead of quality")
    add("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    args.checkpoint = find_checkpoint("vit_t", args.checkpoint)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_output("--results", args.results, taken=(args.annotations, args.calibrated, args.checkpoint))
    check_output("--times", args.times, taken=(args.results,))
    if args.times is not None:
        time_all(args)
    else:
        measure_all(args)
    print(table(read(args.results), read(args.times or args.results.with_name("times.jsonl"))))
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# --- quality ---------------------------------------------------------------------------------------------------------


def measure_all(args: argparse.Namespace) -> None:
    """The rows that the results do not hold yet."""
    annotations = Annotations(args.annotations, args.annotation_images, "coco")
    rows = read(args.results)
    done = {(row["model"], row["keep_ratio"], row["weights"]) for row in rows}
    wanted = [e for e in ENTRIES if e.key not in done and (args.only is None or e.weights in args.only)]
    for entry in tqdm(wanted, unit="row", disable=not sys.stderr.isatty()):
        rows.append(measure(args, annotations, entry))
        write_text(args.results, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{entry.name}, {entry.weights}: {summary(rows[-1], rows[0])}", flush=True)


def measure(args: argparse.Namespace, annotations: Annotations, entry: Entry) -> dict[str, Any]:
    """One row: mean IoU of each photo in percent, and the cosine."""
    weights, keep = weights_of(args, entry), entry.keep_ratio or 1.0
    sam = build_sam(MODELS[entry.model], weights, image_size=SIZE)
    ious, images = object_ious(sam, annotations, keep, PROMPTS)
    _, photo, objects = np.unique(images, return_inverse=True, return_counts=True)
    photos = {prompt: (np.bincount(photo, values) / objects).round(3).tolist() for prompt, values in ious.items()}
    row = {"model": entry.model, "keep_ratio": entry.keep_ratio, "weights": entry.weights}
    row["gmacs"] = round(config_macs(MODELS[entry.model], SIZE, keep) / 1e9, 3)
    row["cosine"] = cosine(args, annotations, sam, keep)
    row |= {"steps": args.steps} if entry.weights == "trained" else {}
    return row | {"sha256": sha256(weights)[:16], "objects": objects.tolist(), "photos": photos} | provenance()


@torch.no_grad()
def cosine(args: argparse.Namespace, annotations: Annotations, sam: Sam, keep: float) -> float:
    """To the dense embedding, a mean over real tokens and photos."""
    dense, found, side = build_sam(MODELS["vit_t"], args.checkpoint, image_size=SIZE), [], SIZE // 16
    for photo in annotations.photos[:COMPARED]:
        x, size = prepare(dense, photo.path)
        pair = sam.image_encoder(x[None], [size], keep), dense.image_encoder(x[None])
        found.append(1 - cosine_loss(*pair, real_tokens(side, side, torch.tensor([size]))).item())
    return round(float(np.mean(found)), 5)


def weights_of(args: argparse.Namespace, entry: Entry) -> Path:
    """The checkpoint of a row, trained if it is not there."""
    if entry.weights == "calibrated":
        return args.calibrated
    if entry.weights == "shipped":
        return find_checkpoint(entry.model, None)
    if entry.weights == "none":
        return args.checkpoint
    folder = args.runs / f"{entry.model}-{entry.keep_ratio or 1:g}-{args.steps}"
    path = folder.with_name(folder.name + ".safetensors")  # the ratio has a point
    if path.is_file():
        return path
    if args.data is None:
        raise ValueError(f"{path} is not there: --data says what to train on")
    settings = TrainSettings(
        model=MODELS[entry.model],
        data=tuple(args.data),
        output=folder,
        init=args.calibrated if MODELS[entry.model].routed else None,
        teacher="vit_t",
        teacher_checkpoint=args.checkpoint,
        image_size=SIZE,
        keep_ratio=(entry.keep_ratio or 1.0,),
        mask_loss="balanced",
        clicks=2,
        lr=1e-4,
        precision="bf16",
        steps=args.steps,
        holdout=0.01,
        log_every=10,
        workers=0,
        resume=folder.is_dir(),
    )
    shutil.copy(train(settings), path)
    return path


# --- time ------------------------------------------------------------------------------------------------------------


def time_all(args: argparse.Namespace) -> None:
    """Median seconds of an image in the encoder, in turn, one row for each model, keep ratio and type."""
    checkpoints = {"blsam_vit_t": find_checkpoint("blsam_vit_t", None)}
    rows = [
        Row(model, dtype, keep, SIZE, 1, None, str(checkpoints.get(model, args.checkpoint)), "cpu",
            torch.get_num_threads(), compile=False)
        for model, keep in {(entry.model, entry.keep_ratio): None for entry in ENTRIES}
        for dtype in DTYPES
    ]  # fmt: skip
    with tqdm(total=args.rounds * len(rows), unit="pass", disable=not sys.stderr.isatty()) as bar:
        results = compare(rows, args.rounds, False, bar)
    machine = {"processor": processor(), "cores": os.cpu_count()} | provenance()
    lines = [json.dumps({key: result[key] for key in TIMED} | machine) + "\n" for result in results]
    write_text(args.times, "".join(lines))


# --- what the rows say -----------------------------------------------------------------------------------------------


def values_of(row: dict[str, Any], prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """For each object the mean IoU of its photo, and the photo's number."""
    return np.repeat(row["photos"][prompt], row["objects"]), np.repeat(np.arange(len(row["objects"])), row["objects"])


def minus(row: dict[str, Any], other: dict[str, Any], prompt: str) -> str:
    """The difference of two rows in their means, with its interval over photos."""
    (values, images), (theirs, _) = values_of(row, prompt), values_of(other, prompt)
    low, high = bootstrap(values - theirs, images, 0)
    return f"{(values - theirs).mean():+.2f} ({low:+.2f} to {high:+.2f})"


def summary(row: dict[str, Any], dense: dict[str, Any]) -> str:
    means = [f"{prompt} {values_of(row, prompt)[0].mean():.2f} {minus(row, dense, prompt)}" for prompt in PROMPTS]
    return ", ".join([f"{row['gmacs']:.2f} GMACs", f"cosine {row['cosine']:.3f}", *means])


def table(rows: list[dict[str, Any]], times: list[dict[str, Any]]) -> str:
    """A line for each row: operations, time, quality, minus the dense model, and minus bLSAM with weights of the kind."""
    seconds = {(row["model"], row["keep_ratio"], row["dtype"]): row["median_s"] for row in times}
    of = {(row["model"], row["keep_ratio"], row["weights"]): row for row in rows}
    dense, lines = of.get(DENSE.key), []
    if dense is None:
        return "no row of the dense model yet"
    heads = ["model, keep ratio", "weights", "GMACs", "ms, float32 / bfloat16", "cosine", "box", "minus dense"]
    heads += ["minus bLSAM at 0.25", "point", "minus dense"]
    lines += [in_a_row(heads), "|" + len(heads) * "---|"]
    for entry in ENTRIES:
        row = of.get(entry.key)
        if row is None:
            continue
        ours = of.get(("blsam_vit_t", 0.25, "trained" if entry.weights == "trained" else "calibrated"))
        both = [seconds.get((entry.model, entry.keep_ratio, dtype)) for dtype in DTYPES]
        time = " / ".join(f"{1000 * one:.0f}" for one in both if one is not None)
        cells = [entry.name, entry.weights, f"{row['gmacs']:.2f}", time]
        box, point = (f"{values_of(row, prompt)[0].mean():.2f}" for prompt in PROMPTS)
        against = "" if ours is None or row is ours else minus(row, ours, "box")
        cells += [f"{row['cosine']:.3f}", box, minus(row, dense, "box"), against, point, minus(row, dense, "random")]
        lines.append(in_a_row(cells))
    return "\n".join(lines)


def in_a_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(exit_status("study_sam_methods", main))
