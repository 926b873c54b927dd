#!/usr/bin/env python3
"""One table to paste: is this SAM's published file, does our encoder give what SAM's gives, how fast, and calibrated?

    python scripts/verify_official.py --checkpoint sam_vit_b_01ec64.pth
    python scripts/verify_official.py --checkpoint sam_vit_b_01ec64.pth --calibrate PHOTOS \
        --annotations instances_val2017.json --images val2017

Compares with `segment_anything` on one photo, in float32: the embedding, then the masks of one click and one box.
Needs as much memory as `segment_anything` does (7 GB for ViT-H at 1024).
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import segment_anything
import torch

import blsam
from blsam import SamPredictor, sam_model_registry
from blsam import checkpoint as ckpt
from blsam.config import CONFIGS
from blsam.data.annotations import Annotations
from blsam.files import sha256
from blsam.images import read_image
from blsam.options import Parser, add_option, exit_status
from blsam.precision import resolve_dtype
from blsam.training import calibrate

OFFICIAL = {  # SHA-256 of the files of github.com/facebookresearch/segment-anything#model-checkpoints
    "vit_h": ("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    "vit_l": ("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_b": ("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True)
    add("--image", type=Path, help="photo to compare on; default: scikit-image's coffee")
    add("--calibrate", type=Path, metavar="DIR", help="photos to calibrate the bLSAM of this checkpoint on")
    add("--limit", type=int, metavar="N", help="of them")
    add("--annotations", type=Path, metavar="JSON", help="COCO's format: box mean IoU before and after calibration")
    add("--images", type=Path, metavar="DIR", help="their photos")
    add("--repeats", type=int, default=3, help="encodings that are timed, after one that is not")
    add_option(parser, "--device")
    args = parser.parse_args(argv)
    if (args.annotations is None) != (args.images is None) or (args.annotations and not args.calibrate):
        parser.error("--annotations and --images go together, with --calibrate")
    if args.repeats < 1:
        parser.error("--repeats is at least 1")
    return args


def identify(path: Path, state: ckpt.State) -> tuple[str, str]:
    """The model that a checkpoint fits, and what its SHA-256 says."""
    for name in OFFICIAL:
        try:
            ckpt.check_fits(state, CONFIGS[name], str(path))
        except ckpt.CheckpointError:
            continue
        file, digest = OFFICIAL[name]
        found = sha256(path)
        said = f"the published {file}" if found == digest else "not a published file"
        return name, f"{found[:12]}..., {said}"
    raise ValueError(f"{path} fits none of SAM's models (ViT-B, L, H)")


def encode(sam: torch.nn.Module, kind: type, image: np.ndarray, repeats: int) -> tuple[Any, float]:
    """A predictor that holds the image, and the median seconds of encoding it."""
    predictor, seconds = kind(sam), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        predictor.set_image(image)
        _wait(sam.device)
        seconds.append(time.perf_counter() - began)
    return predictor, float(np.median(seconds[1:]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(args: argparse.Namespace, name: str, state: ckpt.State, image: np.ndarray) -> list[tuple[str, str]]:
    """Rows of the table: parity and times."""
    reference = segment_anything.sam_model_registry[name]()
    try:
        reference.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"segment_anything does not take {args.checkpoint} as {name} ({reason})") from None
    reference.to(args.device).eval()
    theirs, seconds = encode(reference, segment_anything.SamPredictor, image, args.repeats)
    h, w = image.shape[:2]
    prompts = {
        "click": {"point_coords": np.array([[w / 2, h / 2]]), "point_labels": np.array([1])},
        "box": {"box": np.array([w / 4, h / 4, 3 * w / 4, 3 * h / 4])},
    }
    expected = {key: theirs.predict(**prompt) for key, prompt in prompts.items()}
    embedding = theirs.features.cpu()
    del reference, theirs
    rows = [("segment_anything, float32", f"{seconds:.3f} s")]

    def ours(dtype: str) -> tuple[Any, float]:
        sam = sam_model_registry[name](args.checkpoint, dtype=dtype, device=args.device)
        return encode(sam, SamPredictor, image, args.repeats)

    predictor, exact = ours("float32")
    gap = ((predictor.features.cpu() - embedding).abs().max() / embedding.std()).item()
    rows.append((f"{name}, float32", f"{exact:.3f} s, {seconds / exact:.2f}x, largest gap {gap:.1e} of the std"))
    for key, prompt in prompts.items():
        rows.append((f"masks of a {key}, three", agreement(predictor.predict(**prompt), expected[key])))
    del predictor
    auto = str(resolve_dtype("auto", args.device, CONFIGS[name].dim)).removeprefix("torch.")
    if auto != "float32":
        predictor, half = ours(auto)
        cosine = torch.cosine_similarity(predictor.features.cpu(), embedding, dim=1).mean().item()
        rows.append((f"{name}, {auto}", f"{half:.3f} s, {seconds / half:.2f}x, cosine {cosine:.5f}"))
    return rows


def agreement(found: tuple, expected: tuple) -> str:
    """Of masks [3, H, W] and their scores."""
    differing = 100 * float((found[0] != expected[0]).mean())
    return f"{differing:.3f} % of pixels differ, scores by {np.abs(found[1] - expected[1]).max():.1e}"


def calibrated(args: argparse.Namespace, name: str) -> list[tuple[str, str]]:
    """Rows of the table: the bLSAM of this checkpoint, before and after."""
    model = f"blsam_{name}"
    limit = calibrate.default_limit(CONFIGS[model]) if args.limit is None else args.limit
    photos = calibrate.choose_photos(args.calibrate, limit, seed=0)
    annotations = Annotations(args.annotations, args.images, "coco") if args.annotations else None
    with tempfile.TemporaryDirectory() as folder:
        report = calibrate.calibrate(
            CONFIGS[model],
            args.checkpoint,
            photos,
            f"{folder}/{model}.safetensors",
            annotations=annotations,
            device=args.device,
        )
    took = f"{report['photos']} photos, {report['seconds'] / 60:.1f} minutes, {report['peak_gb']:.1f} GB"
    rows = [(f"{model} calibrated", took)]
    for row in report["by_keep_ratio"]:
        text = f"cosine {row['cosine_before']:.4f} -> {row['cosine_after']:.4f}"
        if annotations is not None:
            text += f", box mIoU {row['box_miou_before']:.2f} -> {row['box_miou_after']:.2f}"
            text += f" (dense {row['box_miou_dense']:.2f})"
        rows.append((f"at keep ratio {row['keep_ratio']:g}", text))
    return rows


def default_image() -> np.ndarray:
    try:
        from skimage import data
    except ImportError:
        raise FileNotFoundError("no --image given, and scikit-image with its photos is not installed") from None
    return data.coffee()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    state, _ = ckpt.read(args.checkpoint)
    name, identity = identify(args.checkpoint, state)
    image = read_image(args.image) if args.image else default_image()
    steps: list[Callable[[], list[tuple[str, str]]]] = [lambda: compare(args, name, state, image)]
    steps += [lambda: calibrated(args, name)] if args.calibrate else []
    machine = platform.processor() or platform.machine()
    if torch.device(args.device).type == "cuda":
        machine = torch.cuda.get_device_name(args.device)
    versions = f"blsam {blsam.__version__}, torch {torch.__version__}, {machine}, {torch.get_num_threads()} threads"
    print(f"| {args.checkpoint.name} | {identity} |\n|---|---|\n| machine | {versions} |", flush=True)
    for step in steps:
        for what, value in step():
            print(f"| {what} | {value} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("verify_official", main))
