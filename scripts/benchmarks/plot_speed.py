"""The two pictures in docs/speed.md, from the benchmark's rows.

python -m scripts.benchmarks.plot_speed       # scripts/benchmarks/results/speed/*.jsonl -> docs/speed_*.png
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from blsam.files import write_atomically
from blsam.options import Parser, exit_status

COLOURS = {"segment_anything:vit_b": "tab:gray", "vit_b": "tab:blue", "blsam_vit_b": "tab:orange"}
STYLES = {"float32": "o-", "bfloat16": "s--"}


def read(path: Path) -> list[dict[str, Any]]:
    """The timed rows of a benchmark file."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: the command is at the head of scripts/benchmarks/results/speed/README.md")
    return [row for row in map(json.loads, path.read_text().splitlines()) if "median_s" in row]


def over_keep_ratio(rows: list[dict[str, Any]]) -> Figure:
    """Time of the routed encoder over the keep ratio, and what its operations alone would predict."""
    figure = Figure((6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for dtype, style in STYLES.items():
        exact = next(r for r in rows if r["model"] == "vit_b" and r["dtype"] == dtype)
        routed = sorted((r for r in rows if r["keep_ratio"] and r["dtype"] == dtype), key=lambda r: r["keep_ratio"])
        keep, colour = [r["keep_ratio"] for r in routed], COLOURS["blsam_vit_b"]
        axes.plot(keep, [r["median_s"] for r in routed], style, color=colour, label=f"blsam_vit_b, {dtype}")
        theory = [exact["median_s"] * r["gmacs"] / exact["gmacs"] for r in routed]
        axes.plot(keep, theory, ":", color=colour, label="as the operations predict" if dtype == "float32" else None)
        axes.axhline(exact["median_s"], color=COLOURS["vit_b"], ls=style[1:], lw=1, label=f"exact vit_b, {dtype}")
    axes.set(xlabel="keep ratio", ylabel="seconds an image, 1024 x 1024", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    return figure


def over_pixels(rows: list[dict[str, Any]]) -> Figure:
    """Time of three encoders over the side of the image, with the line of the exact model's operations."""
    figure = Figure((6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for model, colour in COLOURS.items():
        for dtype, style in STYLES.items():
            of_model = sorted(
                (r for r in rows if (r["model"], r["dtype"]) == (model, dtype)), key=lambda r: r["image_size"]
            )
            if of_model:
                sides, seconds = [r["image_size"] for r in of_model], [r["median_s"] for r in of_model]
                axes.plot(sides, seconds, style, color=colour, label=f"{model}, {dtype}")
            for r in of_model:
                if r.get("from_parts"):
                    axes.annotate(
                        "from its parts", (r["image_size"], r["median_s"]), fontsize=8, ha="right", va="bottom"
                    )
    exact = sorted(
        (r for r in rows if (r["model"], r["dtype"]) == ("vit_b", "float32")), key=lambda r: r["image_size"]
    )
    base = next(r for r in exact if r["image_size"] == 1024)
    theory = [base["median_s"] * r["gmacs"] / base["gmacs"] for r in exact]
    axes.plot([r["image_size"] for r in exact], theory, "k:", label="as the operations of vit_b grow")
    axes.set(xscale="log", yscale="log", xlabel="side of the image, pixels", ylabel="seconds an image")
    axes.set_xticks([r["image_size"] for r in exact], [str(r["image_size"]) for r in exact])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("scripts/benchmarks/results/speed"), metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"), metavar="DIR")
    args = parser.parse_args()
    pictures = {"keep": (over_keep_ratio, "keep.jsonl"), "size": (over_pixels, "size.jsonl")}
    for name, (draw, file) in pictures.items():
        figure, path = draw(read(args.results / file)), args.output / f"speed_{name}.png"
        write_atomically(path, lambda temporary, figure=figure: figure.savefig(temporary, dpi=120))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("plot_speed", main))
