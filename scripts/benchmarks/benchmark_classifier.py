"""Where the time of a bLViT's layer goes, beside the plain ViT's: part by part, in turn.

    python -m scripts.benchmarks.benchmark_classifier --batch-sizes 1,64 --dtype bfloat16

Each part runs alone on the tokens that it has in the model, so the sum leaves out what lies between the parts; the whole
layer stands beside it.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from blsam.build_classifier import build_classifier
from blsam.config import CLASSIFIERS
from blsam.modeling.blocks import RoutedBlock, take
from blsam.modeling.classifier import BLVisionTransformer
from blsam.modeling.macs import classifier_macs
from blsam.options import Parser, add_option, exit_status

ROUTED = tuple(name for name, config in CLASSIFIERS.items() if config.routed)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser, "--model", choices=ROUTED, default=ROUTED[0])
    parser.add_argument("--batch-sizes", type=lambda text: [int(n) for n in text.split(",")], default=[1, 64])
    parser.add_argument("--rounds", type=int, default=10)
    add_option(parser, "--keep-ratio")
    add_option(parser, "--dtype", default="float32")
    add_option(parser, "--device")
    args = parser.parse_args(argv)
    config = CLASSIFIERS[args.model]
    routed = build_classifier(config, keep_ratio=args.keep_ratio, dtype=args.dtype, device=args.device)
    plain = build_classifier(config.dense, dtype=args.dtype, device=args.device)
    for n in args.batch_sizes:
        images = torch.randn(n, 3, *routed.img_size, device=args.device)
        whole = in_turn({"plain": partial(plain, images), "routed": partial(routed, images)}, args.rounds)
        macs = classifier_macs(config, keep_ratio=args.keep_ratio) / classifier_macs(config.dense)
        times = whole["routed"] / whole["plain"]
        print(f"\n{args.model} over {config.dense.name}, {args.dtype}, batch {n}: {times:.2f} of the time, "
              f"{macs:.2f} of the multiply-adds\n")  # fmt: skip
        print("| part of a layer | ms |\n|---|---|")
        for name, seconds in in_turn(parts(routed, plain, images), args.rounds).items():
            print(f"| {name} | {1000 * seconds:.2f} |")
    return 0


@torch.no_grad()
def parts(routed: BLVisionTransformer, plain: BLVisionTransformer, images: torch.Tensor) -> dict[str, Callable]:
    """Layer 1 of both, whole and in its parts, on the tokens that come to it."""
    block, dense = routed.blocks[1], plain.blocks[1]
    assert isinstance(block, RoutedBlock) and block.e_block is not None
    e = block.e_block
    x = routed.run_stage(routed.stem(images), None)
    scores = routed.scores(0, x)
    stage = routed.choose(scores, scores, routed.keep_ratio)
    prime, rows = block.prime(stage), x.flatten(0, 1)
    d_p, d_e = block.attention(x, prime).flatten(0, -2), e.attention(x).flatten(0, -2)
    return {
        "plain layer": lambda: dense.dense(x),
        "plain attention": lambda: dense.attention(x),
        "plain feed-forward": lambda: dense.feed_forward(x),
        "routed layer": lambda: block(x, stage),
        "P attention, prime tokens ask": lambda: block.attention(x, prime),
        "P feed-forward of prime tokens": lambda: block.feed_forward(take(rows, prime)),
        "E attention": lambda: e.attention(x),
        "E feed-forward": lambda: e.feed_forward(rows),
        "fusion, twice": lambda: [block.fusion(i, rows, d_e.clone(), d_p, scores, prime) for i in (0, 1)],
        "predictor and choice, once a stage": lambda: routed.choose(s := routed.scores(0, x), s, routed.keep_ratio),
    }


@torch.no_grad()
def in_turn(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round, after one round to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: median(values[1:]) for name, values in taken.items()}


if __name__ == "__main__":
    sys.exit(exit_status("benchmark_classifier", main))
