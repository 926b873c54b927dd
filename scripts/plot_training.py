#!/usr/bin/env python3
"""The curves of one training run, or of several that followed one another: losses, and what validation measured.

python scripts/plot_training.py runs/mine/metrics.jsonl
python scripts/plot_training.py checkpoints/metrics/fine_*.jsonl -o docs/vit_t_fine_training.png
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blsam.files import write_atomically
from blsam.options import Parser, check_output, exit_status

LOSSES = {"sup": "masks", "fd": "distillation", "answers": "the teacher's answers"}
MEASURED = {
    "val_box": "box mean IoU",
    "val_click": "one click, mean IoU",
    "val_cosine": "cosine to the teacher",
    "val_error": "error to the teacher, of its variance",
    "val_score_error": "predicted IoU, how far off",
}


def read(path: Path, start: float) -> list[dict[str, Any]]:
    """The rows of a run, with `at`: minutes since the first run began, `start` of them before this one.

    Validation rows have no time of their own: that of the row logged before.
    """
    rows, at = [], start
    for line in path.read_text().splitlines():
        row = json.loads(line)
        at = start + row["minutes"] if "minutes" in row else at
        rows.append(row | {"at": at})
    return rows


def draw(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Losses on the left, validation on the right, over minutes; a line where a run begins."""
    figure = Figure((9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for rows in runs.values():
        for axis, keys in zip(panels, (LOSSES, MEASURED)):
            lines(axis, rows, keys)
    for axis, label in zip(panels, ("loss", "photos held out")):
        for name, rows in runs.items():
            axis.axvline(rows[0]["at"], color="0.8", lw=1, zorder=0)
            axis.annotate(name, (rows[0]["at"], 1), xycoords=("data", "axes fraction"), xytext=(2, -2),
                          textcoords="offset points", fontsize=7, rotation=90, va="top", color="0.4")  # fmt: skip
        axis.set(xlabel="minutes", ylabel=label)
        handles, labels = axis.get_legend_handles_labels()
        unique = dict(zip(labels, handles))
        axis.legend(unique.values(), unique.keys(), fontsize=8, frameon=False)
    panels[0].set_yscale("log")
    return figure


def lines(axis: Axes, rows: list[dict[str, Any]], keys: dict[str, str]) -> None:
    for number, (key, label) in enumerate(keys.items()):
        points = [(row["at"], row[key]) for row in rows if key in row]
        if points:
            axis.plot(*zip(*points), "." if len(points) == 1 else ".-", ms=3, lw=1, color=f"C{number}", label=label)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "metrics", type=Path, nargs="+", metavar="METRICS", help="metrics.jsonl of runs, in their order"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/training.png"), metavar="PNG")
    args = parser.parse_args()
    check_output("--output", args.output, taken=args.metrics)
    runs, start = {}, 0.0
    for path in args.metrics:
        rows = read(path, start)
        if not rows:
            raise ValueError(f"{path} holds no rows yet")
        start = rows[-1]["at"]
        runs[path.parent.name if path.stem == "metrics" else path.stem] = rows
    write_atomically(args.output, partial(draw(runs).savefig, dpi=100))
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("plot_training", main))
