"""Writes layers.json from the paper's table, spelt out layer by layer and apart from blsam/config.py.

Each layer is four letters: window or Global, Full or Routed, E-block or -, predictor behind it (P) or -.
"""

import json
from pathlib import Path


def rows(depth, global_layers, full, e_layers, predictors):
    return [
        ("G" if i in global_layers else "w")
        + ("F" if i < full else "R")
        + ("E" if i in e_layers else "-")
        + ("P" if i in predictors else "-")
        for i in range(depth)
    ]


B, L, H = (2, 5, 8, 11), (5, 11, 17, 23), (7, 15, 23, 31)
GOLDEN = {
    "vit_h": rows(32, H, 32, (), ()),
    "vit_l": rows(24, L, 24, (), ()),
    "vit_b": rows(12, B, 12, (), ()),
    "vit_t": rows(12, B, 12, (), ()),
    "vit_t_fine": rows(12, B, 12, (), ()),
    "blsam_vit_h": rows(32, H, 9, (9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), (8, 16, 24)),
    "blsam_vit_l": rows(24, L, 6, range(6, 24), (5, 11, 17)),
    "blsam_vit_b": rows(12, B, 1, range(1, 12), (0, 3, 6, 9)),
    "blsam_vit_t": rows(12, B, 1, range(1, 12), (0, 3, 6, 9)),
    "blsam_vit_t_fine": rows(12, B, 1, range(1, 12), (0, 3, 6, 9)),
}

if __name__ == "__main__":
    path = Path(__file__).with_name("layers.json")
    path.write_text(json.dumps({k: " ".join(v) for k, v in GOLDEN.items()}, indent=1) + "\n")
