#!/usr/bin/env python3
"""bLViT, token-reduction baselines and efficient networks side by side: parameters, multiply-adds, images a second.

    python scripts/compare_imagenet.py                                      # what each costs on this machine
    python scripts/compare_imagenet.py --data IMAGENET --checkpoint vit_base_patch16_224=deit_base.pth ...
    python scripts/compare_imagenet.py --models vit_base_patch16_224,evit_base --dtype bfloat16 --batch-sizes 1,64

Models run in turn, round by round, and the median is shown. What ATS, A-ViT and AdaViT compute depends on weights and
images: they are run if named in --models, with a checkpoint, and best with --data, over all of which their multiply-adds
are then a mean (without: over one image of noise). Top-1 is measured where --data and a checkpoint are given;
beside it stands what was published, with its source. All with 224 pixels, crop ratio 0.875, MobileViT with its 256.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from blsam.baselines import BASELINES
from blsam.config import CLASSIFIERS
from blsam.distributed import World
from blsam.evaluation.classifiers import Measured, labelled, load_classifier
from blsam.evaluation.imagenet import Correct, accuracy, counted_macs, images_a_second
from blsam.files import provenance, write_json
from blsam.options import Parser, UsageError, add_option, check_output, exit_status

ROUNDS = 3


@dataclass(frozen=True)
class Published:
    """Top-1 in percent and 10^9 multiply-adds as their sources have them."""

    top1: float | None
    gmacs: float | None
    source: str


DEIT, EVIT, EVO = (
    "DeiT, arXiv 2012.12877",
    "EViT, arXiv 2202.07800, its README",
    "Evo-ViT, arXiv 2108.01390, its README",
)
PUBLISHED = {
    "vit_base_patch16_224": Published(81.8, 17.6, DEIT),
    "vit_small_patch16_224": Published(79.8, 4.6, DEIT),
    "evit_base": Published(81.3, 11.6, "keep 0.7, in SAViT's table"),
    "evit_small": Published(79.5, 3.0, f"keep 0.7; {EVIT}"),
    "evo_vit_base": Published(81.3, 11.7, EVO),
    "evo_vit_small": Published(79.4, 3.0, EVO),
    "dynamic_vit_base": Published(81.3, 11.2, "keep 0.7; DynamicViT, arXiv 2106.02034"),
    "dynamic_vit_small": Published(79.3, 2.9, "keep 0.7; DynamicViT, arXiv 2106.02034"),
    "tome_base": Published(None, None, "r 13"),
    "tome_small": Published(79.4, 2.7, "r 13; ToMe, arXiv 2210.09461, its README"),
    "ats_small": Published(79.7, 2.9, "ATS, arXiv 2111.15667, in others' tables"),
    "a_vit_small": Published(78.6, 3.6, "A-ViT, arXiv 2112.07658, in others' tables"),
    "ada_vit_small": Published(77.3, 2.3, "AdaViT, arXiv 2111.15668, its README"),
    "timm:efficientvit_m5": Published(77.1, 0.52, "EfficientViT, arXiv 2305.07027"),
    "timm:mobilevit_s": Published(78.4, 2.0, "MobileViT, arXiv 2110.02178, at 256"),
}
ROUTED = ("blvit_base_tiny_patch16_224", "blvit_small_tiny_patch16_224")
MODELS = (*PUBLISHED, *ROUTED)
BY_IMAGE = tuple(name for name in PUBLISHED if getattr(BASELINES.get(name.rpartition("_")[0]), "by_image", False))
DEFAULT = tuple(name for name in MODELS if name not in BY_IMAGE)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--models",
        type=lambda text: text.split(","),
        default=list(DEFAULT),
        help=f"of {', '.join(MODELS)}; default: all but {', '.join(BY_IMAGE)}",
    )
    add("--data", type=Path, nargs="+", metavar="PATH", help="labelled images, for top-1")
    add("--checkpoint", action="append", default=[], metavar="MODEL=FILE", help="weights of a model; may be repeated")
    add_option(parser, "--keep-ratio", help="of bLViT; default 0.25")
    add_option(parser, "--dtype", default="float32", help="of ours; timm's run in float32")
    add_option(parser, "--device")
    add("--batch-sizes", type=lambda text: [int(n) for n in text.split(",")], default=[1, 64], metavar="N[,N]")
    add("--seconds", type=float, default=2.0, help="of each model at each batch size in every round; 0: no timing")
    add("--json", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.models if name not in MODELS]:
        parser.error(f"no model {unknown[0]!r}: there are {', '.join(MODELS)}")
    if any(n < 1 for n in args.batch_sizes) or args.seconds < 0:
        parser.error("--batch-sizes are at least 1, --seconds is not negative")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    weights = dict(pair.partition("=")[::2] for pair in args.checkpoint)
    if wrong := [name for name in weights if name not in args.models or not weights[name]]:
        raise UsageError(f"--checkpoint MODEL=FILE: {wrong[0]!r} is not one of --models, or has no file")
    if bare := [name for name in args.models if name in BY_IMAGE and name not in weights]:
        raise UsageError(f"what {bare[0]} computes depends on its weights: give --checkpoint {bare[0]}=FILE")
    check_output("--json", args.json, taken=[Path(path) for path in weights.values()], suffixes=(".json",))
    models = {name: load(name, weights.get(name), args) for name in args.models}
    rows = {name: facts(name, one) for name, one in models.items()}
    for name, row in rows.items():
        row["top1"] = None
        if args.data and name in weights:
            found = correct(models[name], args)
            row |= {"top1": found.top1} | ({"gmacs": found.gmacs} if found.macs else {})
    if args.seconds:
        time_in_turn(models, rows, args)
    print(table(rows, args))
    if args.json is not None:
        settings = {"dtype": args.dtype, "keep_ratio": args.keep_ratio, "device": str(args.device)}
        write_json(args.json, provenance() | settings | {"models": rows})
    return 0


def load(name: str, checkpoint: str | None, args: argparse.Namespace) -> Measured:
    """A model of the table, with random weights if no others are given."""
    path = None if checkpoint is None else Path(checkpoint)
    method, _, size = name.rpartition("_")
    if name.startswith("timm:"):
        return load_classifier(name, path, device=args.device)
    how: dict[str, Any] = {"dtype": args.dtype, "device": args.device}
    if method in BASELINES:
        return load_classifier(f"vit_{size}_patch16_224", path, baseline=method, **how)
    return load_classifier(name, path, keep_ratio=args.keep_ratio if CLASSIFIERS[name].routed else None, **how)


def facts(name: str, one: Measured) -> dict[str, Any]:
    """What does not depend on the machine; multiply-adds are counted in float32."""
    published = PUBLISHED.get(name)
    image = torch.randn(1, 3, one.size, one.size, generator=torch.Generator().manual_seed(0))
    return {
        "parameters": sum(p.numel() for p in one.model.parameters()),
        "gmacs": counted_macs(one.model, image.to(next(one.model.parameters()).device)) / 1e9,
        "size": one.size,
        "published": None if published is None else vars(published),
    }


def correct(one: Measured, args: argparse.Namespace) -> Correct:
    """On the validation images."""
    return accuracy(one, labelled(one, args.data), 64, 2, args.device, World())


def time_in_turn(models: dict[str, Measured], rows: dict[str, Any], args: argparse.Namespace) -> None:
    """Images a second of all models, one after the other, round by round."""
    taken: dict[tuple[str, int], list[float]] = {}
    rounds = [(n, name) for _ in range(ROUNDS) for n in args.batch_sizes for name in models]
    for n, name in tqdm(rounds, unit="timing", disable=not sys.stderr.isatty()):
        one = models[name]
        images = torch.randn(n, 3, one.size, one.size, device=args.device)
        taken.setdefault((name, n), []).append(images_a_second(one.model, images, args.seconds))
    for (name, n), rates in taken.items():
        rows[name].setdefault("images_per_second", {})[str(n)] = median(rates)


def table(rows: dict[str, Any], args: argparse.Namespace) -> str:
    """Markdown."""
    speeds = [f"images/s, batch {n}" for n in args.batch_sizes] if args.seconds else []
    heads = ["model", "parameters", "GMACs", *speeds, "top-1", "published top-1, GMACs", "source"]
    lines = [heads, ["---"] * len(heads)]
    for name, row in rows.items():
        published = row["published"]
        rates = [f"{row['images_per_second'][str(n)]:.1f}" for n in args.batch_sizes] if speeds else []
        said = "" if published is None or published["top1"] is None else f"{published['top1']}, {published['gmacs']}"
        found = "-" if row["top1"] is None else f"{row['top1']:.2f}"
        source = "" if published is None else published["source"]
        lines.append(
            [f"`{name}`", f"{row['parameters'] / 1e6:.1f} M", f"{row['gmacs']:.2f}", *rates, found, said, source]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(exit_status("compare_imagenet", main))
