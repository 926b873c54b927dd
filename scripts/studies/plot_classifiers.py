"""Top-1 of the miniature over multiply-adds and over measured time, as a picture.

    python -m scripts.studies.plot_classifiers     # scripts/studies/results/classifiers -> docs/classifiers.png

Takes the runs of study_classifiers and what its --report --speeds measured.
"""

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blsam.files import write_atomically
from blsam.options import Parser, check_output, exit_status
from scripts.benchmarks.benchmark_baselines import BATCH
from scripts.studies.study_classifiers import TABLES, key_of

SHOWN = {  # colour and marker; of ours in red
    "bLViT": ("tab:red", "o"),
    "bLViT, calibrated alone": ("tab:red", "*"),
    "no E-block": ("tab:red", "X"),
    "EViT": ("tab:blue", "s"),
    "Evo-ViT": ("tab:cyan", "D"),
    "DynamicViT": ("tab:green", "^"),
    "ToMe": ("tab:purple", "v"),
    "ATS": ("tab:orange", "P"),
    "A-ViT": ("tab:brown", "<"),
    "AdaViT": ("tab:olive", ">"),
}
NAMES = {"no E-block": "bLViT, no E-block"}
ACROSS = (
    "million multiply-adds of an image",
    f"milliseconds of an image in a batch of {BATCH}",
    "milliseconds of a single image",
)


def points(rows: list[dict[str, Any]], speeds: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """Top-1 in percent, 10^6 multiply-adds, milliseconds of an image in a batch and of a single one, of all that was
    trained."""
    found = {"dense": (speeds["teacher"], *_cost(speeds["speeds"]["dense"]))}
    for label, variant in TABLES["main"].items():
        top1 = [row["top1"] for row in rows if row["variant"] == key_of(variant)]
        if label in SHOWN and top1:
            found[label] = (mean(top1), *_cost(speeds["speeds"][key_of(variant)]))
    return found


def _cost(one: dict[str, float]) -> tuple[float, ...]:
    return one["mmacs"], 1e3 / one[f"batch {BATCH}"], 1e3 / one["batch 1"]


def draw(axes: Axes, found: dict[str, tuple[float, ...]], column: int, label: str) -> None:
    top1, across = found["dense"][0], found["dense"][column]
    axes.axhline(top1, color="0.85", zorder=0)
    axes.axvline(across, color="0.85", zorder=0)
    for name, row in found.items():
        colour, marker = SHOWN.get(name, ("black", "o"))
        axes.plot(row[column], row[0], marker, color=colour, markersize=8, label=NAMES.get(name, name))
    axes.set_xlabel(label)
    axes.margins(0.08)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("scripts/studies/results/classifiers"))
    parser.add_argument("--output", type=Path, default=Path("docs/classifiers.png"))
    args = parser.parse_args()
    check_output("--output", args.output, taken=args.results.glob("*.json*"))
    rows = [json.loads(line) for line in (args.results / "rows.jsonl").read_text().splitlines()]
    found = points(rows, json.loads((args.results / "speeds.json").read_text()))
    figure = Figure((12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for column, axes in enumerate(panels):
        draw(axes, found, column + 1, ACROSS[column])
    panels[0].set_ylabel("top-1 of CIFAR-10 in miniature, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    write_atomically(args.output, lambda path: figure.savefig(path, dpi=150, format="png"))
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("plot_classifiers", main))
