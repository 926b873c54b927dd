"""Tables for people."""

from __future__ import annotations

from typing import Any

from ..data.fields import reasons
from .prompted import SIZES

ROWS = {
    "miou": "mean IoU",
    "baseline_ellipse": "inscribed ellipse",
    "baseline_filled_box": "filled box",
    "baseline_disc": "best fixed disc",
}


def table(figures: dict[str, Any], prompt: str) -> str:
    """The figures of `PromptedIoU`, in percent, by size; baselines that suit the prompt."""
    lines = [f"{'percent':<18}" + "".join(f"{size:>14}" for size in SIZES)]
    beside = {"box": ("baseline_ellipse", "baseline_filled_box"), "point": ("baseline_disc",)}[prompt]
    for name in ("miou", "interval", *beside, "count"):
        cells = []
        for size in SIZES:
            suffix = "" if size == "all" else f"_{size}"
            value = figures["interval_95" + suffix] if name == "interval" else figures.get(name + suffix)
            if value is None:
                cells.append("-")
            elif name == "interval":
                cells.append(f"{value[0]:.1f} to {value[1]:.1f}")
            else:
                cells.append(str(value) if name == "count" else f"{value:.1f}")
        label = {"interval": "95 % interval", "count": "objects"}.get(name) or ROWS[name]
        lines.append(f"{label:<18}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def everything_table(figures: dict[str, Any]) -> str:
    """The figures of `FoundObjects`."""
    counts = f"{figures['images']} images, {figures['photos_without']} without a mask"
    masks = f"masks a photo: median {figures['masks_median']:.0f}, mean {figures['masks_mean']:.1f}"
    lines = [f"{counts}; {masks}; {left_out_line(figures['left_out'])}"]
    lines.append(f"{'percent':<18}" + "".join(f"{size:>14}" for size in SIZES))
    for name, label in (("found", "objects found"), ("best_iou", "best mask's IoU"), ("count", "objects")):
        values = [figures[name + ("" if size == "all" else f"_{size}")] for size in SIZES]
        cells = ["-" if v is None else str(v) if name == "count" else f"{v:.1f}" for v in values]
        lines.append(f"{label:<18}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def left_out_line(left_out: dict[str, int]) -> str:
    """What was left out and why, in one line."""
    return f"left out: {reasons(left_out) or 'nothing'}"


def speed(lines: list[dict[str, Any]]) -> dict[str, float | None]:
    """Images a second of the encoder, of prompts and masks (of everything-mode as a whole), of the rest (reading, clicks,
    RLE), and of all.

    Images that had nothing to predict do not count.
    """
    parts = ("encoder", "decoder", "masks", "rest")
    lines = [line for line in lines if line["rows"] or "masks" in line["seconds"]]
    seconds = {part: sum(line["seconds"].get(part, 0.0) for line in lines) for part in parts}
    seconds["all"] = sum(seconds.values())
    return {part: round(len(lines) / value, 3) if value else None for part, value in seconds.items()}
