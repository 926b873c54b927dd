"""Tokens of many photos on disk, so that calibration's memory does not grow with their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch


class Streams:
    """What all photos hold at one place of the network, on disk: one file [photos, *T, C] float32 for each name.

    places: T, (H, W) of a grid or (n,) of a sequence; `tokens`: of a photo.
    """

    def __init__(self, folder: Path, photos: int, places: tuple[int, ...], dim: int, device: torch.device) -> None:
        self.folder, self.places, self.device = folder, tuple(places), device
        self.shape, self.tokens = (photos, *self.places, dim), math.prod(self.places)

    def write(self, name: str, make: Callable[[int], torch.Tensor], channels: int | None = None) -> None:
        """Fill `name` with make(i) for every photo i."""
        shape = (*self.shape[:-1], channels or self.shape[-1])
        file = np.lib.format.open_memmap(self._path(name), "w+", np.float32, shape)
        for i in range(shape[0]):
            file[i] = make(i).view(shape[1:]).float().cpu().numpy()
        file.flush()

    def read(self, name: str, i: int | np.ndarray) -> torch.Tensor:
        """Photo i, or several: [1 or n, *T, C]."""
        file = np.load(self._path(name), mmap_mode="r")
        return torch.from_numpy(np.array(file[i]).reshape(-1, *file.shape[1:])).to(self.device)

    def rows(self, name: str, places: np.ndarray) -> torch.Tensor:
        """Tokens anywhere, by their place among all tokens of all photos: [n, C]."""
        file = np.load(self._path(name), mmap_mode="r")
        return torch.from_numpy(file.reshape(-1, file.shape[-1])[places]).to(self.device)

    def keep_only(self, names: Sequence[str]) -> None:
        """Delete the files of other names."""
        for path in self.folder.glob("*.npy"):
            if path.stem not in names:
                path.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"
