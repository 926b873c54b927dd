#!/usr/bin/env python3
"""Segment the coffee cup of scikit-image's photos with the model that ships, and say where the picture is."""

from pathlib import Path

from PIL import Image
from skimage import data

from blsam.cli import main
from blsam.memory import keep_memory

OUTPUT = Path("demo_output")

if __name__ == "__main__":
    keep_memory()
    OUTPUT.mkdir(exist_ok=True)
    photo = OUTPUT / "coffee.png"
    Image.fromarray(data.coffee()).save(photo)
    raise SystemExit(main(["segment", str(photo), "--box", "160,10,400,245", "-o", str(OUTPUT / "coffee_mask.png")]))
