"""What moving tokens costs in a routed layer, as they lie now and prime first, timed in turn.

    python -m scripts.benchmarks.benchmark_order                       # blsam_vit_b at 1024, both dtypes, on this CPU

Only what moves rows is timed: gathers, scatters, and what cuts keys and values into windows and heads. The products are
the same either way.

    raster       ours: tokens as on the grid; prime ones are gathered as queries, for the feed-forward part and for
                 fusion, and put back; keys are cut out of the grid, window by window
    prime first  within a stage the prime tokens stand in front: they are a slice for P, and fusion adds to slices.
                 But the position bias of all pairs is only free where keys lie on their grid, and position logits of all
                 tokens only where queries do: P's keys and values, and what E projects and gives back, change order
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from blsam.config import CONFIGS, EncoderConfig
from blsam.modeling.routing import route
from blsam.modeling.windows import regions
from blsam.options import ROUTED, Parser, add_option, exit_status

Moves = Callable[[], None]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_option(parser, "--model", choices=ROUTED, default="blsam_vit_b")
    add_option(parser, "--image-size", default=1024)
    add_option(parser, "--keep-ratio")
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args(argv)


def layouts(config: EncoderConfig, layer: int, side: int, keep_ratio: float, dtype: torch.dtype) -> dict[str, Moves]:
    """Everything that a layer moves, in both orders; x is float32, what linear layers give is in `dtype`."""
    window = 0 if config.is_global(layer) else config.window
    scores = torch.rand(1, side, side)
    stage = route(scores, scores, config.window, keep_ratio, None)
    tokens = (stage.window if window else stage.image).tokens
    rest = torch.ones(side * side, dtype=torch.bool).index_fill(0, tokens, False).nonzero()[:, 0]
    order = torch.cat([tokens, rest])  # prime first
    back = order.argsort()
    n, dim, inner = side * side, config.dim, config.e_dim
    x, d_e = torch.randn(n, dim), torch.randn(n, dim)
    normalised, wide, narrow = (torch.randn(n, width).to(dtype) for width in (dim, 2 * dim, 3 * inner))
    given = torch.randn(n, inner).to(dtype)

    def cut(projected: torch.Tensor, parts: int, heads: int) -> None:
        for region in regions(side, side, window):
            windows = region.windows(projected.view(1, side, side, parts, heads, -1))
            windows.permute(
                5, 0, 1, 2, 6, 3, 4, 7
            ).contiguous()  # [a, b, B, h, w, 3, heads, d] -> [3, ..., heads, h, w, d]

    def raster() -> None:
        normalised.index_select(0, tokens)  # queries
        cut(wide, 2, config.heads)
        cut(narrow, 3, config.e_heads_of(layer))
        for _ in range(2):  # attention, feed-forward
            new = x.index_select(0, tokens) + d_e.index_select(0, tokens)
            (x + d_e).index_copy_(0, tokens, new)
        x.index_select(0, tokens)  # what the feed-forward part takes

    def prime_first() -> None:
        cut(wide.index_select(0, back), 2, config.heads)
        cut(narrow.index_select(0, back), 3, config.e_heads_of(layer))
        given.index_select(0, order)
        for _ in range(2):
            total = x + d_e
            total[: len(tokens)] += x[: len(tokens)]

    return {"raster": raster, "prime first": prime_first}


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    config = CONFIGS[args.model]
    routed = [i for i in range(config.depth) if config.has_e_block(i)]
    found = {config.is_global(i): i for i in routed}
    for is_global, layer in sorted(found.items()):
        for dtype in (torch.float32, torch.bfloat16):
            moves = layouts(config, layer, args.image_size // 16, args.keep_ratio, dtype)
            seconds: dict[str, list[float]] = {name: [] for name in moves}
            for repeat in range(args.repeats + 3):  # three to warm up
                for name, move in moves.items():
                    began = time.perf_counter()
                    move()
                    if repeat >= 3:
                        seconds[name].append(time.perf_counter() - began)
            medians = ", ".join(f"{name} {1000 * statistics.median(s):.1f} ms" for name, s in seconds.items())
            kind = "over the image" if is_global else "in windows"
            print(f"{args.model}, a layer {kind}, {str(dtype).removeprefix('torch.')}: {medians}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("benchmark_order", main))
