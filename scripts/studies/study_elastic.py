"""One checkpoint at many keep ratios beside its dense model: mean IoU over measured seconds and over operations.

    python -m scripts.studies.study_elastic --annotations instances_val2017.json --annotation-images val2017 \
        --results scripts/studies/results/training/elastic.jsonl --picture docs/elastic.png

Objects are prompted with their box and with one point in the middle, protocol `paper`; encoders are timed in turn in
one run, plain and with torch.compile, as scripts/benchmarks/benchmark.py does it. A keep ratio outside --trained is
drawn hollow. --picture alone draws results that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from blsam import sam_model_registry
from blsam.data.annotations import Annotations
from blsam.evaluation.prompted import bootstrap, object_ious
from blsam.files import provenance, write_atomically, write_text
from blsam.options import ROUTED, Parser, add_option, check_output, exit_status, find_checkpoint, parse_ratios
from scripts.benchmarks.benchmark import compare, processor
from scripts.benchmarks.benchmark_row import Row

PROMPTS = {"box": "box", "center": "one point in the middle"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_option(parser, "--model", choices=ROUTED, default="blsam_vit_t")
    add_option(parser, "--checkpoint")
    add("--dense-checkpoint", type=Path, help="of its dense model; default: the one that ships")
    add("--annotations", type=Path, metavar="JSON")
    add("--annotation-images", type=Path, metavar="DIR")
    add("--keep-ratios", type=parse_ratios, default=[0.1, 0.15, 0.25, 0.35, 0.5, 1.0])
    add(
        "--trained",
        type=parse_ratios,
        default=[0.1, 0.5],
        metavar="LOW,HIGH",
        help="keep ratios that it was trained with",
    )
    add("--image-size", type=int, default=512)
    add("--rounds", type=int, default=15, help="timed passes of each encoder")
    add("--results", type=Path, required=True, metavar="JSONL")
    add("--picture", type=Path, metavar="PNG")
    args = parser.parse_args(argv)
    if (args.annotations is None) != (args.annotation_images is None):
        parser.error("--annotations and --annotation-images go together")
    if args.annotations is None and not args.results.is_file():
        parser.error(f"no {args.results}: --annotations and --annotation-images measure it")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    taken = (args.annotations, args.checkpoint, args.dense_checkpoint)
    check_output("--results", args.results, taken=taken)
    check_output("--picture", args.picture, taken=(*taken, args.results))
    if args.annotations is not None:
        rows = measure(args)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(args.results, text)
    rows = [json.loads(line) for line in args.results.read_text().splitlines()]
    print(table(rows))
    if args.picture is not None:
        write_atomically(args.picture, lambda path: draw(rows, args.trained).savefig(path, dpi=110))
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the dense model, then one for each keep ratio."""
    dense = args.model.removeprefix("blsam_")
    paths = {
        dense: find_checkpoint(dense, args.dense_checkpoint),
        args.model: find_checkpoint(args.model, args.checkpoint),
    }
    entries = [(dense, None), *((args.model, keep) for keep in args.keep_ratios)]
    timed = seconds(args, entries, paths)
    annotations = Annotations(args.annotations, args.annotation_images, "coco")
    sams = {name: sam_model_registry[name](path, image_size=args.image_size) for name, path in paths.items()}
    machine = {"processor": processor(), "cores": os.cpu_count()} | provenance()
    rows, baseline = [], None
    for name, keep in tqdm(entries, unit="keep ratio", disable=not sys.stderr.isatty()):
        ious, images = object_ious(sams[name], annotations, keep or 1.0, tuple(PROMPTS))
        baseline = baseline or ious
        row = {"model": name, "keep_ratio": keep, "image_size": args.image_size} | timed[name, keep]
        for prompt, values in ious.items():
            gap = values - baseline[prompt]
            row[prompt] = round(float(values.mean()), 2)
            row[f"{prompt}_minus_dense"] = round(float(gap.mean()), 2)
            row[f"{prompt}_minus_dense_interval_95"] = np.round(bootstrap(gap, images, 0), 2).tolist()
        rows.append(row | machine)
    return rows


def seconds(
    args: argparse.Namespace, entries: list[tuple[str, float | None]], paths: dict[str, Path]
) -> dict[tuple[str, float | None], dict[str, float]]:
    """Median seconds of an image in the encoder, plain and compiled, all in turn, and its operations in GMACs."""
    threads = torch.get_num_threads()
    rows = [
        Row(name, "float32", keep, args.image_size, 1, None, str(paths[name]), "cpu", threads, compiled)
        for name, keep in entries
        for compiled in (False, True)
    ]
    with tqdm(total=args.rounds * len(rows), unit="pass", disable=not sys.stderr.isatty()) as bar:
        results = compare(rows, args.rounds, False, bar)
    found: dict[tuple[str, float | None], dict[str, float]] = {}
    for row, result in zip(rows, results):
        of_entry = found.setdefault((row.model, row.keep_ratio), {"gmacs": round(row.gmacs, 2)})
        of_entry["compiled_s" if row.compile else "seconds"] = round(result["median_s"], 4)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    dense = rows[0]
    lines = [f"{'':<24}{'GMACs':>7}{'plain':>9}{'':>7}{'compiled':>10}{'':>7}  box (minus dense, 95 %)      center"]
    for row in rows:
        name = row["model"] + ("" if row["keep_ratio"] is None else f" keep {row['keep_ratio']:g}")
        line = f"{name:<24}{row['gmacs']:>7.1f}"
        for key in ("seconds", "compiled_s"):
            line += f"{row[key]:>{9 if key == 'seconds' else 10}.3f}{dense[key] / row[key]:>6.2f}x"
        for prompt in PROMPTS:
            low, high = row[f"{prompt}_minus_dense_interval_95"]
            line += f"  {row[prompt]:.2f} ({row[f'{prompt}_minus_dense']:+.2f}, {low:+.2f} to {high:+.2f})"
        lines.append(line)
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], trained: list[float]) -> Figure:
    """A row of panels for each kind of prompt: over milliseconds, over GMACs."""
    figure = Figure((9, 6.4), layout="constrained")
    panels = figure.subplots(len(PROMPTS), 2, sharey="row", sharex="col")
    for (prompt, name), (over_time, over_macs) in zip(PROMPTS.items(), panels):
        curve(over_time, rows, trained, prompt, "seconds", "C0", "plain")
        curve(over_time, rows, trained, prompt, "compiled_s", "C1", "torch.compile")
        curve(over_macs, rows, trained, prompt, "gmacs", "C0", None)
        over_time.set_ylabel(f"mean IoU, %\n{name}")
        for axis in (over_time, over_macs):
            axis.grid(alpha=0.3)
            axis.margins(0.08, 0.15)
    panels[-1][0].set_xlabel(f"seconds an image in the encoder, {rows[0]['image_size']} x {rows[0]['image_size']}")
    panels[-1][1].set_xlabel("GMACs of the encoder")
    panels[0][0].legend(fontsize=8, loc="lower right")
    return figure


def curve(
    axis: Axes, rows: list[dict[str, Any]], trained: list[float], prompt: str, x: str, colour: str, label: str | None
) -> None:
    """Keep ratios as dots on a line, hollow outside the trained range; the dense model as a star."""
    dense, routed = rows[0], rows[1:]
    inside = [row for row in routed if trained[0] <= row["keep_ratio"] <= trained[-1]]
    axis.plot([r[x] for r in inside], [r[prompt] for r in inside], "o-", color=colour, label=label)
    for row in routed:
        if row not in inside:
            axis.plot(row[x], row[prompt], "o", color=colour, mfc="none")
        above = 6 if colour == "C0" else -12  # two curves share a panel
        axis.annotate(f"{row['keep_ratio']:g}", (row[x], row[prompt]), xytext=(0, above), textcoords="offset points",
                      fontsize=7, ha="center")  # fmt: skip
    axis.plot(dense[x], dense[prompt], "*", ms=11, color=colour, label=f"{dense['model']}, dense" if label else None)


if __name__ == "__main__":
    sys.exit(exit_status("study_elastic", main))
