"""What can be measured: every model of the registry, and those of others that have SAM's interface."""

from __future__ import annotations

import argparse
import importlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import segment_anything
import torch

from ..build_sam import sam_model_registry
from ..config import MODELS
from ..files import sha256
from ..options import UsageError, builder_options, computed_in, find_checkpoint, one_line
from ..predictor import SamPredictor


@dataclass(frozen=True)
class Subject:
    """A predictor with SAM's interface, and what identifies it in a table and in a run's settings."""

    predictor: Any
    identity: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.predictor.model.device

    def describe(self) -> str:
        """One line."""
        facts = dict(self.identity)
        digest = facts.pop("sha256")
        weights = facts.pop("checkpoint") or "random weights"
        parts = [facts.pop("model"), weights + (f" (sha256 {digest[:8]})" if digest else "")]
        return ", ".join(
            parts + [f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if value is not None]
        )


def load_subject(args: argparse.Namespace) -> Subject:
    """The predictor that the options ask for; UsageError, FileNotFoundError or CheckpointError in one line."""
    if args.random_weights and args.checkpoint is not None:
        raise UsageError("give --checkpoint or --random-weights, not both")
    torch.manual_seed(args.seed)  # random weights, new E-blocks of a warm start
    predictor, checkpoint = _of_others(args) if ":" in args.model else _ours(args)
    encoder = predictor.model.image_encoder
    ours = ":" not in args.model
    identity = {
        "model": args.model,
        "checkpoint": checkpoint.name if checkpoint else None,
        "sha256": sha256(checkpoint) if checkpoint else None,
        "image_size": encoder.img_size,
        "keep_ratio": encoder.keep_ratio if ours and MODELS[args.model].reduces else None,
        **computed_in(args),
        "predictor": args.predictor if ours else None,
        "device": predictor.model.device.type,
    }
    return Subject(predictor, identity)


def _ours(args: argparse.Namespace) -> tuple[Any, Path | None]:
    if args.model not in MODELS:
        raise UsageError(f"no model {args.model!r}: it is one of {', '.join(MODELS)}, or PACKAGE:NAME")
    checkpoint = None if args.random_weights else find_checkpoint(args.model, args.checkpoint)
    sam = sam_model_registry[args.model](checkpoint, **builder_options(args))
    kind = SamPredictor if args.predictor == "blsam" else segment_anything.SamPredictor
    return kind(sam), checkpoint


def _of_others(args: argparse.Namespace) -> tuple[Any, Path | None]:
    """PACKAGE:NAME, where PACKAGE has SAM's `sam_model_registry` (or a builder called NAME) and `SamPredictor`."""
    package, name = args.model.split(":", 1)
    given = (args.keep_ratio, args.image_size, args.predictor, args.dtype, args.runtime)
    if given != (None, None, "blsam", "float32", "torch"):
        raise UsageError(
            "--keep-ratio, --image-size, --predictor, --dtype and --runtime are for models of this project"
        )
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"no package {package!r} here ({error})") from None
    registry = getattr(module, "sam_model_registry", {})
    build = registry.get(name) or getattr(module, name, None)
    if build is None or not hasattr(module, "SamPredictor"):
        raise UsageError(
            f"{package} has no model {name!r}"
            if hasattr(module, "SamPredictor")
            else f"{package} has no SamPredictor: it does not have SAM's interface"
        )
    if args.checkpoint is None and not args.random_weights:
        raise UsageError(f"{args.model} needs --checkpoint")
    if args.checkpoint is not None and not args.checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint at {args.checkpoint}")
    try:
        model = build(checkpoint=str(args.checkpoint) if args.checkpoint else None)
        return module.SamPredictor(model.to(args.device).eval()), args.checkpoint
    except (RuntimeError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        what = args.checkpoint or "without a checkpoint"
        raise UsageError(f"{args.model} does not load {what} ({one_line(error)})") from None
