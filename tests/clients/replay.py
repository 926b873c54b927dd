"""A program's calls replayed on `segment_anything` and on ours, and what must be alike in what it gets.

A program is a function of a `Side`: it makes the calls that the real program makes, on that side's classes and models,
and returns what it got. `Sides.compare` runs it on both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from blsam.config import CONFIGS
from scripts.benchmarks.benchmark_row import reference_encoder

PIXELS = 1e-3  # share of a mask's pixels that may differ
VALUES = 1e-4  # of scores; of anything with many values, in standard deviations
MANY = 100


@dataclass(frozen=True)
class Side:
    """What a program imports, with a checkpoint file and a name in the registry for it.

    api: SamPredictor, SamAutomaticMaskGenerator, sam_model_registry (arguments as in `segment_anything`).
    """

    name: str
    api: SimpleNamespace
    model_type: str
    checkpoint: Path

    def build(self) -> Any:
        """A model of one's own, to be changed at will."""
        return self.api.sam_model_registry[self.model_type](checkpoint=str(self.checkpoint))

    def predictor(self, image: np.ndarray | None = None) -> Any:
        """A predictor, with an image set if one is given."""
        predictor = self.api.SamPredictor(self.build())
        if image is not None:
            predictor.set_image(image)
        return predictor


@dataclass(frozen=True)
class Sides:
    """`segment_anything` and ours; exact: with the same weights, so that values must be equal, not forms alone."""

    stock: Side
    ours: Side
    exact: bool

    def compare(self, program: Callable[[Side], Any]) -> Any:
        """Run on both sides and compare; returns what ours gave."""
        expected = program(self.stock)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # ours says once what is odd about a prompt
            found = program(self.ours)
        differences = differing(found, expected, self.exact)
        assert not differences, "\n".join(differences)
        return found


def stock_sam(size: int, checkpoint: str | None = None) -> Sam:
    """`segment_anything`'s `Sam` of the small model's shape, as its own builders put it together."""
    grid = (size // 16, size // 16)
    sam = Sam(
        reference_encoder(CONFIGS["vit_t"], size),
        PromptEncoder(embed_dim=256, image_embedding_size=grid, input_image_size=(size, size), mask_in_chans=16),
        MaskDecoder(
            transformer_dim=256, transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
        ),
    ).eval()
    if checkpoint is not None:
        sam.load_state_dict(torch.load(checkpoint, weights_only=True))
    return sam


def differing(found: Any, expected: Any, exact: bool, place: str = "result") -> list[str]:
    """What is not as expected, a line each: types, shapes, dtypes, devices, contiguity, and (exact) values."""
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or list(found) != list(expected):
            return [f"{place}: {_keys(found)}, not {_keys(expected)}"]
        return [line for key in expected for line in differing(found[key], expected[key], exact, f"{place}[{key!r}]")]
    if isinstance(expected, list | tuple):
        if type(found) is not type(expected) or (exact and len(found) != len(expected)):
            return [
                f"{place}: {type(found).__name__} of {len(found)}, not {type(expected).__name__} of {len(expected)}"
            ]
        pairs = enumerate(zip(found, expected))  # what a routed model finds may be more or less: the form of the rest
        return [line for i, pair in pairs for line in differing(*pair, exact, f"{place}[{i}]")]
    if isinstance(expected, np.ndarray | torch.Tensor):
        return _differing_arrays(found, expected, exact, place)
    if type(found) is not type(expected):
        return [f"{place}: {type(found).__name__}, not {type(expected).__name__}"]
    if isinstance(expected, float):
        return [f"{place}: {found}, not {expected}"] if exact and abs(found - expected) > VALUES else []
    return [f"{place}: {found!r}, not {expected!r}"] if exact and found != expected else []


def _differing_arrays(found: Any, expected: Any, exact: bool, place: str) -> list[str]:
    forms = [_form(found), _form(expected)]
    if forms[0] != forms[1]:
        return [f"{place}: {forms[0]}, not {forms[1]}"]
    if _contiguous(expected) and not _contiguous(found):
        return [f"{place}: not contiguous, {found.strides if isinstance(found, np.ndarray) else found.stride()}"]
    if not exact or not np.prod(expected.shape):
        return []
    a, b = (_as_array(value) for value in (found, expected))
    if b.dtype == bool:
        share = (a != b).mean()
        return [f"{place}: {share:.2%} of the pixels differ"] if share > PIXELS else []
    a, b = a.astype(np.float64), b.astype(np.float64)
    gap = np.abs(a - b).max() / (b.std() if b.size > MANY else 1)
    return [] if gap <= VALUES else [f"{place}: differs by {gap:.1e}"]


def _form(value: Any) -> str:
    if not isinstance(value, np.ndarray | torch.Tensor):
        return type(value).__name__
    kind = "array" if isinstance(value, np.ndarray) else f"tensor on {value.device}"
    return f"{kind} {value.dtype} {list(value.shape)}"


def _contiguous(value: Any) -> bool:
    return bool(value.flags.c_contiguous) if isinstance(value, np.ndarray) else value.is_contiguous()


def _as_array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).cpu().numpy()
    return value


def _keys(value: Any) -> Any:
    return list(value) if isinstance(value, Mapping) else type(value).__name__
