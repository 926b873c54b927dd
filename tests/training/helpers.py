"""Runs: where they start, and what they logged."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from blsam import sam_model_registry
from tests.helpers import ROOT, randomize

TEACHER, STUDENT = (ROOT / "checkpoints" / f"{name}.safetensors" for name in ("vit_t", "blsam_vit_t"))


def rows(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def column(folder: Path, name: str) -> torch.Tensor:
    """One value of every line that has it."""
    return torch.tensor([row[name] for row in rows(folder) if name in row])


def random_vit_b(path):
    """A checkpoint in SAM's format."""
    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]()
    randomize(sam.image_encoder, 0.01)
    torch.save(sam.state_dict(), path)
    return path
