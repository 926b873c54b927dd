"""The forms that attention with SAM's decomposed positions can take, timed in turn on one layer over the whole image.

    python -m scripts.benchmarks.benchmark_attention                   # ViT-B's global layer at 1024, on this CPU
    python -m scripts.benchmarks.benchmark_attention --device cuda --keep-ratio 0.25 --json attention.jsonl
    python -m scripts.benchmarks.benchmark_attention --train --heads 3                   # forward and backward

All forms get the same q, k, v and the same position logits; the largest gap to float64 stands beside each time.

    folded    positions as channels of q and k, one fused attention   (ours: GPUs, training, bfloat16 on most CPUs)
    blocked   product, positions, softmax, product on blocks in the cache   (ours: float32 on a CPU, bfloat16 on one with
              AVX-512's instructions for it and no matrix unit)
    plain     the formula as it stands                (ours: exports, training of few weights in bfloat16 on a CPU)
    compiled  the plain form through torch.compile
    chunked   fused attention with a bias matrix, a piece of the queries at a time
    flex      FlexAttention under torch.compile, positions added by its score function
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from blsam.config import CONFIGS
from blsam.files import write_text
from blsam.modeling.product import FORMS
from blsam.options import Parser, add_option, check_output, exit_status
from blsam.precision import DTYPES, resolve_dtype

Form = Callable[[], torch.Tensor]
TRAINED = ("folded", "plain")  # forms of ours that have a gradient


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default="vit_b", choices=sorted(n for n, c in CONFIGS.items() if not c.routed))
    add("--image-size", type=int, default=1024)
    add_option(parser, "--keep-ratio", default=1.0, help="share of the tokens that ask")
    add("--dtype", choices=DTYPES, action="append", help="repeat for several; default float32 and bfloat16")
    add("--forms", metavar="F[,F...]", help="default: all, with --train the package's own that have a gradient")
    add("--heads", type=int, help="default: the model's")
    add("--train", action="store_true", help="forward and backward")
    add("--repeats", type=int, default=7)
    add_option(parser, "--device")
    add("--json", type=Path, metavar="JSONL")
    args = parser.parse_args(argv)
    args.forms = args.forms.split(",") if args.forms else [*(TRAINED if args.train else ALL)]
    args.heads = CONFIGS[args.model].heads if args.heads is None else args.heads
    unknown = set(args.forms) - set(ALL)
    sizes = args.image_size % 16 == 0 and min(args.image_size // 16, args.heads, args.repeats) > 0
    if unknown or not sizes or not 0 < args.keep_ratio <= 1:
        parser.error(
            f"no form {', '.join(unknown)}" if unknown else "image size, heads, keep ratio or repeats out of range"
        )
    if args.train and not set(args.forms) <= set(TRAINED):
        parser.error(f"--train is for {', '.join(TRAINED)}")
    return args


def inputs(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """q [heads, n, d], k and v [heads, N, d], position logits rel_h and rel_w [heads, n, side]."""
    config, side = CONFIGS[args.model], args.image_size // 16
    keys, d = side * side, config.dim // config.heads
    n = max(1, round(args.keep_ratio * keys))
    generator = torch.Generator().manual_seed(0)
    q, rel_h, rel_w = (torch.randn(args.heads, n, m, generator=generator) for m in (d, side, side))
    k, v = (torch.randn(args.heads, keys, d, generator=generator) for _ in range(2))
    tensors = {"q": q, "k": k, "v": v, "rel_h": rel_h, "rel_w": rel_w}
    return {name: t.to(args.device, dtype).requires_grad_(args.train) for name, t in tensors.items()} | {"side": side}


def bias_of(rel_h: torch.Tensor, rel_w: torch.Tensor) -> torch.Tensor:
    """[..., n, h] and [..., n, w] -> [..., n, h*w]."""
    return (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)


def ours(name: str, x: dict[str, Any], through: Callable[[Form], Form] = lambda run: run) -> Form:
    """A form of the package; the keys are made once, as they are for all queries of a layer (for a gradient each time)."""
    side, (heads, _, d) = x["side"], x["q"].shape
    product = FORMS[name]((side, side), d)

    def keys() -> tuple[torch.Tensor, torch.Tensor]:
        return product.keys(torch.stack([x["k"], x["v"]]).view(2, 1, heads, side, side, d))

    made = None if x["q"].requires_grad else keys()
    run = through(
        lambda: product(
            x["q"][None], x["rel_h"][None] * product.scale, x["rel_w"][None] * product.scale, made or keys()
        )
    )
    return lambda: run()[0]


def trained(run: Form, x: dict[str, Any]) -> Form:
    """Forward and backward; returns what the forward pass does."""

    def both() -> torch.Tensor:
        with torch.enable_grad():
            out = run()
            torch.autograd.grad(out.sum(), [x[name] for name in ("q", "k", "v", "rel_h", "rel_w")])
        return out.detach()

    return both


def chunked(x: dict[str, Any], rows: int = 512) -> Form:
    def run() -> torch.Tensor:
        parts = zip(*(x[name].split(rows, dim=1) for name in ("q", "rel_h", "rel_w")))
        done = [
            F.scaled_dot_product_attention(q[None], x["k"][None], x["v"][None], attn_mask=bias_of(h, w)[None])
            for q, h, w in parts
        ]
        return torch.cat(done, dim=2)[0]

    return run


def flex(x: dict[str, Any]) -> Form:
    from torch.nn.attention.flex_attention import flex_attention  # torch 2.5 and later

    side, rel_h, rel_w = x["side"], x["rel_h"], x["rel_w"]

    def with_positions(score, batch, head, query, key):
        return score + rel_h[head, query, key // side] + rel_w[head, query, key % side]

    run = torch.compile(flex_attention)
    return lambda: run(x["q"][None], x["k"][None], x["v"][None], score_mod=with_positions)[0]


ALL: dict[str, Callable[[dict[str, Any]], Form]] = {name: partial(ours, name) for name in FORMS}
ALL |= {"compiled": partial(ours, "plain", through=torch.compile), "chunked": chunked, "flex": flex}


def expected(x: dict[str, Any]) -> torch.Tensor:
    """In float64, head by head."""
    q, k, v, rel_h, rel_w = (x[name].cpu().double() for name in ("q", "k", "v", "rel_h", "rel_w"))
    heads = [
        (q[h] @ k[h].T * q.shape[-1] ** -0.5 + bias_of(rel_h[h], rel_w[h])).softmax(-1) @ v[h] for h in range(len(q))
    ]
    return torch.stack(heads)


@torch.no_grad()
def measure(args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    x = inputs(args, dtype)
    reference, rows, forms = expected(x), [], {}
    for name in args.forms:
        began = time.perf_counter()
        row = {"form": name, "dtype": str(dtype).removeprefix("torch."), "model": args.model}
        row |= {"image_size": args.image_size, "keep_ratio": args.keep_ratio}
        row |= {"heads": args.heads, "train": args.train}
        try:
            forms[name] = trained(ALL[name](x), x) if args.train else ALL[name](x)
            gap = (forms[name]().cpu().double() - reference).abs().max() / reference.std()
        except Exception as error:  # a form that this machine or this torch does not have is a row too
            forms.pop(name, None)
            rows.append(row | {"error": (str(error).strip() or type(error).__name__).splitlines()[0][:200]})
            continue
        rows.append(row | {"largest_gap": float(gap), "first_call_s": round(time.perf_counter() - began, 3)})
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(args.repeats):  # in turn, so that a busy moment hits all alike
        for name, run in forms.items():
            began = time.perf_counter()
            run()
            if torch.device(args.device).type == "cuda":
                torch.cuda.synchronize(args.device)
            seconds[name].append(time.perf_counter() - began)
    for row in rows:
        if row["form"] in seconds:
            low, middle, high = np.percentile(seconds[row["form"]], (25, 50, 75)).tolist()
            row |= {"median_s": round(middle, 4), "quartiles_s": [round(low, 4), round(high, 4)]}
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_output("--json", args.json)
    rows = [
        row
        for name in args.dtype or ("float32", "bfloat16")
        for row in measure(args, resolve_dtype(name, args.device, CONFIGS[args.model].dim))
    ]
    print(f"{'form':<10}{'dtype':<10}{'ms':>8}{'quartiles':>18}{'gap':>10}{'first call':>12}")
    for row in rows:
        if "error" in row:
            print(f"{row['form']:<10}{row['dtype']:<10}  {row['error']}")
            continue
        quartiles = " to ".join(f"{1000 * q:.0f}" for q in row["quartiles_s"])
        line = f"{row['form']:<10}{row['dtype']:<10}{1000 * row['median_s']:>8.1f}{quartiles:>18}"
        print(f"{line}{row['largest_gap']:>10.1e}{row['first_call_s']:>10.1f} s")
    if args.json:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(args.json, text)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("benchmark_attention", main))
