r"""Measure an image classifier: top-1 and top-5 on labelled images, multiply-adds, images a second.

    blsam evaluate-imagenet --model blvit_base_tiny_patch16_224 --checkpoint blvit.safetensors --data IMAGENET
    blsam evaluate-imagenet --model timm:mobilevit_s --checkpoint mobilevit_s.safetensors --data IMAGENET --crop-ratio 0.9
    blsam evaluate-imagenet --model timm:deit_base_patch16_224                            # the cost alone

--data is what `blsam train-imagenet` takes: its val (validation, test) images are measured. Labels are the places of
the classes' names in order, as ImageNet's are; a file of `blsam train-imagenet` knows its own. Our models see images
normalised by ImageNet's mean and deviation, as DeiT's weights want them (timm's augreg weights want others).
Multiply-adds are counted in passes of single images: linear layers, convolutions, attention products. Of a method that
computes more of some images than of others they are the mean over all images of --data, without --data over noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..baselines import BASELINES
from ..baselines.base import Baseline
from ..config import CLASSIFIERS
from ..files import provenance, sha256, write_json
from ..modeling.classifier import BLVisionTransformer
from ..options import UsageError, add_option, check_output, computed_in, parse_crop

SPEED_BATCHES = (1, 64)
COUNTED = 8  # images whose multiply-adds are counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", required=True, metavar="NAME", help=f"{', '.join(CLASSIFIERS)}; or timm:NAME, of timm's models")
    add("--checkpoint", type=Path, metavar="FILE")
    add("--random-weights", action="store_true", help="measure --data without a checkpoint")
    add("--image-size", type=int, metavar="S", help="side of the input in pixels; default: the model's")
    add("--baseline", choices=sorted(BASELINES), help="a method that computes fewer tokens of a plain --model")
    add_option(group, "--keep-ratio", default=None, help="share of tokens; default 0.25, of a --baseline its paper's")
    add_option(group, "--dtype", default="float32")
    add_option(group, "--device")
    add = parser.add_argument_group("measurement").add_argument
    add("--data", type=Path, nargs="+", metavar="PATH", help="labelled images; without: the cost alone")
    add("--crop-ratio", type=parse_crop, metavar="R", help="share of an image's short side that is seen; default:"
        " what a file of train-imagenet says, otherwise 0.875, for ours of at most 32 pixels 1")  # fmt: skip
    add("--batch-size", type=int, default=64, metavar="N", help="for top-1 and top-5; default 64")
    add("--workers", type=int, default=2, metavar="N", help="that read; default 2")
    add("--seconds", type=float, default=2.0, metavar="S", help="of timing at each batch size; 0: none")
    add("--json", type=Path, metavar="FILE", help="write the figures, and what is needed to make them again")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    if args.data and args.checkpoint is None and not args.random_weights:
        raise UsageError("give --checkpoint, or --random-weights for figures by chance")
    if args.batch_size < 1 or args.workers < 0 or not 0 <= args.seconds < float("inf"):
        raise UsageError("--batch-size is at least 1, --workers and --seconds are not negative")
    if args.image_size is not None and args.image_size < 1:
        raise UsageError(f"--image-size is above 0, got {args.image_size}")
    check_output("--json", args.json, taken=(args.checkpoint, *(args.data or ())), suffixes=(".json",))
    from ..distributed import processes

    with processes(args.device) as world:
        figures = measure(args, world)
        if not world.is_main:
            return
    print(table(figures))
    if args.json is not None:
        write_json(args.json, figures | provenance())


def measure(args: argparse.Namespace, world: Any) -> dict[str, Any]:
    """The figures of a model; those of --data over all processes, those of speed of this one."""
    import torch

    from ..evaluation.classifiers import labelled, load_classifier
    from ..evaluation.imagenet import accuracy, counted_macs, images_a_second, some_images

    measured = load_classifier(
        args.model,
        args.checkpoint,
        image_size=args.image_size,
        crop_ratio=args.crop_ratio,
        keep_ratio=args.keep_ratio,
        baseline=args.baseline,
        dtype=computed_in(args)["dtype"],
        device=args.device,
    )
    model, images = measured.model, None
    figures: dict[str, Any] = {
        "model": measured.name,
        "checkpoint": str(args.checkpoint) if args.checkpoint else None,
        "checkpoint_sha256": sha256(args.checkpoint) if args.checkpoint else None,
        "image_size": measured.size,
        "keep_ratio": kept(model),
        "dtype": computed_in(args)["dtype"],
        "device": str(args.device),
    }
    if args.data:
        images = labelled(measured, args.data)
        found = accuracy(measured, images, args.batch_size, args.workers, args.device, world)
        figures |= {"preparation": measured.preparation, "crop_ratio": measured.crop_ratio}
        figures |= {"top1": round(found.top1, 3), "top5": round(found.top5, 3), "images": found.images}
    few = some_images(measured, images, COUNTED).to(args.device)
    if args.data and found.macs:
        figures["gmacs"] = round(found.gmacs, 5)
    else:
        figures["gmacs"] = round(counted_macs(model, few) / 1e9, 5)
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    if args.seconds:
        batches = {n: few[torch.arange(n) % len(few)] for n in SPEED_BATCHES}
        speeds = {str(n): round(images_a_second(model, batch, args.seconds), 3) for n, batch in batches.items()}
        figures |= {"images_per_second": speeds, "threads": torch.get_num_threads()}
    return figures


def kept(model: Any) -> float | None:
    """The share of tokens that a model keeps; None of one that keeps all."""
    if isinstance(model, Baseline):
        return model.options.keep_ratio
    return model.keep_ratio if isinstance(model, BLVisionTransformer) and model.config.routed else None


def table(figures: dict[str, Any]) -> str:
    """The figures of `measure`, for people."""
    keep = f", keep ratio {figures['keep_ratio']:g}" if figures["keep_ratio"] is not None else ""
    lines = [f"{figures['model']} at {figures['image_size']}{keep}, {figures['dtype']} on {figures['device']}"]
    if "top1" in figures:
        lines.append(f"top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} % of {figures['images']} images")
        lines.append(f"images: {figures['preparation']}")
    lines.append(f"{figures['gmacs']:.3f} GMACs an image, {figures['parameters'] / 1e6:.2f} M parameters")
    for batch, speed in figures.get("images_per_second", {}).items():
        lines.append(f"{speed:.1f} images a second at batch {batch}")
    return "\n".join(lines)
