"""One program on one side, in a process of its own: `python -m tests.clients.installed.run samgeo blsam_vit_t ...`.

The side is put in place before the program is imported: "segment_anything", or the name of a model of ours, by
`blsam.install()`. All names of SAM's models then build one small model, since its weights are there, on either side.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import blsam
from tests.clients.replay import stock_sam

STOCK = "segment_anything"
IMAGE_SIZE = 512  # of programs that do not say IMAGE_SIZE themselves: what the weights were trained at


def use(builder: Callable[..., Any]) -> None:
    """Let every name of a model build this one, in what programs import from."""
    package = import_module(STOCK)
    for name in ("default", "vit_h", "vit_l", "vit_b"):
        package.sam_model_registry[name] = builder
        for module in (package, sys.modules[f"{STOCK}.build_sam"]):
            setattr(module, "build_sam" if name == "default" else f"build_sam_{name}", builder)


def main(program: str, side: str, photo: str, checkpoint: str, folder: str) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    module = import_module(f"tests.clients.installed.{program}")
    size = getattr(module, "IMAGE_SIZE", IMAGE_SIZE)
    if side == STOCK:
        use(partial(stock_sam, size))
    else:
        blsam.install()
        use(partial(blsam.sam_model_registry[side], image_size=size))
    found = module.run(np.array(Image.open(photo)), checkpoint, Path(folder))
    np.savez(Path(folder) / "found.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
