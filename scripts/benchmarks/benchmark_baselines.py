"""What the keep ratio of every method of token reduction does to its speed: three settings each, beside the plain ViT.

    python -m scripts.benchmarks.benchmark_baselines                         # DeiT-S, random weights, noise
    python -m scripts.benchmarks.benchmark_baselines --model vit_mini_patch4_32 --checkpoint TEACHER \
        --images cifar10_test.tar.xz --rounds 5

All take turns, round by round; single images and batches of 64. Where training decides what is computed, the decisions
are set: A-ViT's gate halts at the setting's share of the depth, a mean over these images, and AdaViT's policies take
that share of patches and units. ATS samples by the attention of whatever weights there are.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from blsam.baselines import build_baseline
from blsam.baselines.ada_vit import PATCH_ON
from blsam.baselines.base import log_odds
from blsam.build_classifier import build_classifier
from blsam.config import CLASSIFIERS, ClassifierConfig
from blsam.data.imagenet import EvaluationTransform, open_images
from blsam.evaluation.imagenet import counted_macs, images_a_second
from blsam.files import provenance, write_json
from blsam.options import Parser, add_option, check_output, exit_status

PLAIN = tuple(name for name, config in CLASSIFIERS.items() if not config.routed)
SETTINGS = {  # by how much each computes, in what the method counts
    "evit": (0.9, 0.7, 0.5),
    "evo_vit": (0.7, 0.5, 0.3),
    "dynamic_vit": (0.9, 0.7, 0.5),
    "tome": (0.6, 0.45, 0.2),
    "ats": (1.0, 0.5, 0.25),
    "a_vit": (0.9, 0.72, 0.5),
    "ada_vit": (0.9, 0.8, 0.7),
}
BATCH = 64
ALONE = 8  # images that are timed one by one, and whose multiply-adds are counted: they may differ in what they cost
SECONDS = 0.2  # of each in a round, one pass in any case


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser, "--model", choices=PLAIN, default="vit_small_patch16_224")
    parser.add_argument("--checkpoint", type=Path, help="weights of the plain ViT; default: random")
    parser.add_argument("--images", type=Path, metavar="PATH", help="labelled images; default: noise")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds is at least 1")
    check_output("--json", args.json, taken=(args.checkpoint, args.images), suffixes=(".json",))
    config = CLASSIFIERS[args.model]
    x = chosen_images(config, args.images)
    models: dict[str, Any] = {"dense": build_classifier(config, args.checkpoint)}
    for name, ratios in SETTINGS.items():
        models |= {f"{name} {keep:g}": at_setting(config, args.checkpoint, name, keep, x) for keep in ratios}
    found = measured_in_turn(models, x, args.rounds)
    print(f"| {args.model} | MMACs | images a second, batch 1 | batch {BATCH} |\n|---|---|---|---|")
    for name, one in found.items():
        print(f"| {name} | {one['mmacs']:.1f} | {one['batch 1']:.1f} | {one[f'batch {BATCH}']:.1f} |")
    if args.json is not None:
        write_json(args.json, provenance() | {"model": args.model, "rounds": args.rounds, "speeds": found})
    return 0


def chosen_images(config: ClassifierConfig, path: Path | None, count: int = BATCH) -> torch.Tensor:
    """[count, 3, S, S]: spread over labelled images, or noise."""
    if path is None:
        side = config.image_size
        return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    images, transform = open_images((path,), "val"), EvaluationTransform(config.image_size)
    return torch.stack([transform(images.read(i * len(images) // count)) for i in range(count)])


@torch.no_grad()
def at_setting(
    config: ClassifierConfig, checkpoint: Path | None, name: str, keep: float, x: torch.Tensor
) -> torch.nn.Module:
    """A method on the plain ViT's weights, its decisions set for images [n, 3, S, S]."""
    torch.manual_seed(0)
    model: Any = build_baseline(name, config, checkpoint, keep_ratio=keep)
    if name == "a_vit":
        model.search(model.stem(x), keep)
    if name == "ada_vit":
        tokens = model.begin(model.stem(x))
        for i, policy in enumerate(model.predictors):
            patches, units = policy(tokens.x, model.block(i).norm1(tokens.x))
            policy.patches.bias -= patches.quantile(1 - keep) - log_odds(PATCH_ON)
            if units is not None:
                policy.units.bias -= units.quantile(1 - keep, dim=0)  # each unit on for this share of the images
            tokens = model.before_block(i, tokens)
            tokens = model.after_block(i, model.feed_forward(i, model.attention(i, tokens)[0]))
    return model


def measured_in_turn(models: dict[str, Any], x: torch.Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """10^6 multiply-adds and images a second of each, on images [BATCH, 3, S, S]; medians of rounds."""
    speeds: dict[tuple[str, str], list[float]] = {}
    turns = [(key, model) for _ in range(rounds) for key, model in models.items()]
    for key, model in tqdm(turns, unit="turn", disable=not sys.stderr.isatty()):
        alone = partial(one_by_one, model)
        for batch, passed, images in (("batch 1", alone, x[:ALONE]), (f"batch {BATCH}", model, x)):
            speeds.setdefault((key, batch), []).append(images_a_second(passed, images, SECONDS, least=1))
    found = {key: {"mmacs": counted_macs(model, x[:ALONE]) / 1e6} for key, model in models.items()}
    for (key, batch), rates in speeds.items():
        found[key][batch] = round(median(rates), 1)
    return found


def one_by_one(model: Any, images: torch.Tensor) -> None:
    """Passes of single images, which may differ in what they cost."""
    for image in images:
        model(image[None])


if __name__ == "__main__":
    sys.exit(exit_status("benchmark_baselines", main))
