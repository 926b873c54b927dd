#!/usr/bin/env python3
"""Compare a result of the evaluation scripts with one that is committed.

    python scripts/check_results.py out.json scripts/expected/coco_box.json [--tolerance 0.1]

Figures (percent) may differ by the tolerance; counts, rules and the checkpoint's hash may not. Exit status 0 or 1.
"""

import json
import sys
from pathlib import Path
from typing import Any

from blsam.options import Parser, exit_status

FIGURES = ("miou", "baseline", "AP")  # beginnings of names
COUNTS = ("images", "masks", "left_out", "disc_radius")
RULES = (
    "protocol",
    "rules",
    "prompt",
    "num_points",
    "seed",
    "boxes",
    "refine",
    "single_mask",
    "annotations",
    "photos",
)
MODEL = ("model", "sha256", "image_size", "keep_ratio", "predictor", "dtype")


def differences(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> list[str]:
    """What differs, a line each; keys of `expected` alone count."""
    lines = []
    for key, wanted in expected.items():
        value = found.get(key)
        if key.startswith(FIGURES) and None not in (value, wanted):
            if abs(value - wanted) > tolerance:
                lines.append(f"{key}: {value:.3f}, expected {wanted:.3f} within {tolerance:g}")
        elif key.startswith((*FIGURES, "count")) or key in COUNTS + RULES + MODEL:
            if value != wanted:
                lines.append(f"{key}: {value}, expected {wanted}")
    return lines


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("found", type=Path)
    parser.add_argument("expected", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="in percentage points (default 0.1)")
    args = parser.parse_args()
    found, expected = (json.loads(path.read_text()) for path in (args.found, args.expected))
    lines = differences(found, expected, args.tolerance)
    print("\n".join(lines) or f"{args.found} agrees with {args.expected}")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(exit_status("check_results", main))
