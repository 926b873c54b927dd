#!/usr/bin/env python3
"""Segment the astronaut of scikit-image's photos with the model that ships, and say where the picture is."""

from pathlib import Path

from PIL import Image
from skimage import data

from blsam.cli import main

OUTPUT = Path("demo_output")

if __name__ == "__main__":
    OUTPUT.mkdir(exist_ok=True)
    photo = OUTPUT / "astronaut.png"
    Image.fromarray(data.astronaut()).save(photo)
    raise SystemExit(main(["segment", str(photo), "--box", "70,0,420,511", "-o", str(OUTPUT / "astronaut_mask.png")]))
