"""Labelled pictures in every form that they are read from."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "red": (200, 50, 40), "green": (50, 180, 60)}


def picture(name: str, number: int, size: int | tuple[int, int] = 16) -> Image.Image:
    """A noisy picture of a class's colour."""
    height, width = (size, size) if isinstance(size, int) else size
    noise = np.random.default_rng([number, len(name)]).normal(0, 40, (height, width, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


def encoded(name: str, number: int, size: int | tuple[int, int] = 16) -> bytes:
    file = io.BytesIO()
    picture(name, number, size).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, counts: dict[str, int], names: tuple[str, ...] = ("blue", "red"), size: int = 16) -> Path:
    """ROOT/split/class/NNNN.png: so many pictures of each class in each split, no two alike."""
    for offset, (split, count) in enumerate(counts.items()):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i:04}.png").write_bytes(encoded(name, 1000 * offset + i, size))
    return root


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
