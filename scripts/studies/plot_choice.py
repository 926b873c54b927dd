"""The picture of where the choice of tokens matters, from the rows of scripts/studies/study_choice.py.

python -m scripts.studies.plot_choice     # scripts/studies/results/choice/segmenter.jsonl -> docs/choice.png
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blsam.files import write_atomically
from blsam.options import Parser, check_output, exit_status
from scripts.studies.study_choice import CHOICES

COLOURS = ("tab:red", "tab:orange", "tab:green", "tab:blue")  # from no narrow blocks to the widest


def draw(axes: Axes, rows: list[dict[str, Any]], widths: list[int], keep: float) -> None:
    """Box mean IoU over that of random choice, a line a rule, with its interval; one colour a width."""
    rules = [name for name in CHOICES if name != "random"]
    random = []
    for i, width in enumerate(widths):
        of_width = {row["choice"]: row for row in rows if (row["width"], row["keep_ratio"]) == (width, keep)}
        if not of_width:
            continue
        means, lows, highs = zip(*(of_width[rule]["over_random"] for rule in rules))
        places = [y + 0.18 * (i - (len(widths) - 1) / 2) for y in range(len(rules))]
        reach = [[m - low for m, low in zip(means, lows)], [high - m for m, high in zip(means, highs)]]
        random.append(f"{of_width['random']['value']:.1f}")
        label = f"{width} wide" if width else "none"
        axes.errorbar(means, places, xerr=reach, fmt="o", color=COLOURS[i], ms=4, lw=1.2, label=label)
    axes.axvline(0, color="0.6", lw=0.8)
    axes.set_yticks(range(len(rules)), rules, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(f"keep {keep:g} (random: {', '.join(random)})", fontsize=8)
    axes.tick_params(labelsize=8)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("scripts/studies/results/choice/segmenter.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("docs/choice.png"))
    args = parser.parse_args()
    if not args.results.is_file():
        raise FileNotFoundError(f"no {args.results}: make it with scripts/studies/study_choice.py")
    check_output("--output", args.output, taken=[args.results])
    rows = [json.loads(line) for line in args.results.read_text().splitlines()]
    widths, keeps = (sorted({row[key] for row in rows}) for key in ("width", "keep_ratio"))
    figure = Figure((10, 3.4), layout="constrained")
    panels = figure.subplots(1, len(keeps), sharey=True, squeeze=False)[0]
    for axes, keep in zip(panels, keeps):
        draw(axes, rows, widths, keep)
    how: dict[str, Any] = {"frameon": False, "fontsize": 8, "title": "narrow blocks", "title_fontsize": 8}
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", **how)
    figure.supxlabel(f"box mean IoU over random choice (dense {rows[0]['dense']:.1f})", fontsize=9)
    write_atomically(args.output, lambda path: figure.savefig(path, dpi=150, format="png"))
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("plot_choice", main))
