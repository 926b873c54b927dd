"""The picture in docs/calibration.md, from the rows of scripts/studies/study_calibration.py.

python -m scripts.studies.plot_calibration     # scripts/studies/results/calibration/*.jsonl -> docs/calibration.png
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from blsam.files import write_atomically
from blsam.options import Parser, check_output, exit_status

COLOURS = {0.1: "tab:red", 0.25: "tab:orange", 0.5: "tab:green"}  # by keep ratio


def read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: make it with scripts/studies/study_calibration.py")
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(axes: Axes, rows: list[dict[str, Any]], key: str, label: str) -> None:
    """What is lost of the cosine to the dense embedding over the number of photos or steps."""
    rows = sorted(rows, key=lambda row: row[key])
    places = [row[key] or 6 for row in rows]  # 0 steps has a place on a logarithmic axis too
    for keep, colour in COLOURS.items():
        axes.plot(places, [1 - row[f"cosine_{keep:g}"] for row in rows], "o-", color=colour, label=f"keep {keep:g}")
    for place, row in zip(places, rows):
        axes.annotate(
            f"{row['seconds'] / 60:.1f} min",
            (place, 1 - row["cosine_0.1"]),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    axes.set(xlabel=label, xscale="log", yscale="log")
    axes.margins(x=0.12, y=0.1)
    axes.set_xticks(places, [str(row[key]) for row in rows])
    axes.xaxis.set_minor_formatter(NullFormatter())
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(ScalarFormatter())
    axes.tick_params(which="both", labelsize=8)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("scripts/studies/results/calibration"))
    parser.add_argument("--output", type=Path, default=Path("docs/calibration.png"))
    args = parser.parse_args()
    check_output("--output", args.output, taken=args.results.glob("*.jsonl"))
    figure = Figure((8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw(left, read(args.results / "photos.jsonl"), "photos", "photos")
    draw(right, read(args.results / "steps.jsonl"), "steps", "steps of each fit (0: closed form alone)")
    left.set_ylabel("1 - cosine to the dense embedding")
    right.legend(frameon=False, fontsize=8)
    write_atomically(args.output, lambda path: figure.savefig(path, dpi=150, format="png"))
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("plot_calibration", main))
