#!/usr/bin/env python3
"""Segment the coffee cup of scikit-image's photos with the model that ships, and say where the picture is."""

from pathlib import Path

from PIL import Image
from skimage import data

from blsam.__main__ import start

OUTPUT = Path("demo_output")

if __name__ == "__main__":
    OUTPUT.mkdir(exist_ok=True)
    photo = OUTPUT / "coffee.png"
    Image.fromarray(data.coffee()).save(photo)
    raise SystemExit(start(["segment", str(photo), "--box", "160,10,400,245", "-o", str(OUTPUT / "coffee_mask.png")]))
