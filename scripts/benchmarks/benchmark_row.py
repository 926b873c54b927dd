"""One row of the benchmark: its process, which holds one model, and what can be measured of its parts."""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT

from blsam.baselines.sam.build import build_encoder
from blsam.baselines.sam.macs import config_macs
from blsam.build_sam import build_sam
from blsam.config import MODELS, EncoderConfig
from blsam.modeling.image_encoder import ImageEncoder
from blsam.modeling.macs import sam_macs
from blsam.precision import resolve_dtype
from blsam.runtimes.backends import BACKENDS
from blsam.runtimes.engine import Engine

REFERENCE = "segment_anything:"


@dataclass(frozen=True)
class Row:
    """What one process measures."""

    model: str
    dtype: str
    keep_ratio: float | None
    image_size: int
    batch_size: int
    true_size: tuple[int, int] | None
    checkpoint: str | None
    device: str
    threads: int
    compile: bool
    runtime: str = "torch"

    @property
    def config(self) -> EncoderConfig:
        return MODELS[self.model.removeprefix(REFERENCE)]

    @property
    def is_reference(self) -> bool:
        return self.model.startswith(REFERENCE)

    @property
    def name(self) -> str:
        keep = "" if self.keep_ratio is None else f" keep {self.keep_ratio:g}"
        extents = "" if self.true_size is None else f" {self.true_size[1]}x{self.true_size[0]}"
        where = "" if self.runtime == "torch" else f" {self.runtime}"
        return f"{self.model}{keep}{extents} {self.dtype}{where}" + (" compiled" if self.compile else "")

    @property
    def gmacs(self) -> float:
        """Multiply-adds of one image, as the row's encoder computes it, in thousands of millions."""
        if self.is_reference:
            return sam_macs(self.config, self.image_size) / 1e9
        return config_macs(self.config, self.image_size, self.keep_ratio or 1.0, self.true_size) / 1e9


# --- one row's process -----------------------------------------------------------------------------------------------


def build(row: Row) -> torch.nn.Module:
    """The row's encoder; without a checkpoint with seeded weights, positions not zero, alike for all rows of a size."""
    if row.checkpoint:
        encoder = build_sam(row.config, row.checkpoint, image_size=row.image_size, dtype=row.dtype).image_encoder
    elif row.is_reference:
        encoder = reference_encoder(row.config, row.image_size)
        encoder.load_state_dict(dense_weights(row.config, row.image_size))
    else:
        torch.manual_seed(1)
        encoder = build_encoder(row.config, row.image_size)
        encoder.load_state_dict(dense_weights(row.config, row.image_size), strict=not row.config.routed)
        encoder.use_dtype(resolve_dtype(row.dtype, row.device, row.config.dim))
    encoder = encoder.eval().to(row.device)
    if row.runtime != "torch" and row.is_reference:
        return in_runtime(encoder, row)
    if row.runtime != "torch":
        encoder.engine = Engine(row.runtime, Path(named) if (named := os.environ.get("BLSAM_CACHE")) else None)
        if row.keep_ratio is not None:
            encoder.keep_ratio = row.keep_ratio
        encoder.engine.prepare(encoder)  # not at the first image
    return torch.compile(encoder) if row.compile else encoder


def in_runtime(encoder: ImageEncoderViT, row: Row) -> Any:
    """The reference's encoder as another runtime computes it: its own graph, with nothing of ours."""
    backend = BACKENDS[row.runtime]
    inputs = (torch.randn(1, 3, row.image_size, row.image_size),)
    with tempfile.TemporaryDirectory() as folder:
        backend.make(encoder, inputs, backend.ways[0], Path(folder))
        run = backend.read(Path(folder), resolve_dtype(row.dtype, "cpu", row.config.dim, row.runtime))
    return lambda x: torch.cat([torch.from_numpy(run(one[None].numpy())[0]) for one in x])


def reference_encoder(config: EncoderConfig, size: int) -> ImageEncoderViT:
    """`segment_anything`'s encoder of the same shape."""
    return ImageEncoderViT(
        img_size=size,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=config.window,
        global_attn_indexes=config.global_layers,
    )


def dense_weights(config: EncoderConfig, size: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    encoder = ImageEncoder(config.dense, size)
    for name, parameter in encoder.named_parameters():
        if "pos" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return encoder.state_dict()


@torch.no_grad()
def work(row: Row, embedding_file: str) -> None:
    """Build, warm up, write the embedding; then one forward pass for every line on standard input."""
    torch.set_num_threads(row.threads)
    on_gpu = torch.device(row.device).type == "cuda"
    encoder = build(row)
    size, generator = row.image_size, torch.Generator().manual_seed(2)
    x = torch.randn(row.batch_size, 3, size, size, generator=generator).to(row.device)
    options: dict[str, Any] = {}
    if not row.is_reference:
        sizes = None if row.true_size is None else [row.true_size] * row.batch_size
        options = {"true_sizes": sizes} | ({} if row.keep_ratio is None else {"keep_ratio": row.keep_ratio})
    base = memory_now(on_gpu, reset=True)
    start = time.perf_counter()
    embedding = encoder(x, **options)
    if on_gpu:
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    peak = memory_peak(on_gpu) - base
    torch.save(embedding[:1].float().cpu(), embedding_file)
    report = {"first_s": first, "weights_gb": base, "peak_gb": peak}
    print(json.dumps(report), flush=True)
    for line in sys.stdin:
        if line.strip() == "profile":
            print(json.dumps(profile(encoder, x, options)), flush=True)
            continue
        start = time.perf_counter()
        encoder(x, **options)
        if on_gpu:
            torch.cuda.synchronize()
        print(json.dumps(time.perf_counter() - start), flush=True)


def memory_now(on_gpu: bool, reset: bool = False) -> float:
    """GB that the process holds; `reset` starts the measurement of the peak anew."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    if reset and Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def memory_peak(on_gpu: bool) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if on_gpu else _status("VmHWM")


def _status(key: str) -> float:
    path = Path("/proc/self/status")
    if not path.exists():  # not Linux: the peak since the start
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(key)) / 2**20


KINDS = {  # the beginning of an operator's name -> where its time is booked
    "linear layers": ("aten::addmm", "aten::linear", "mkldnn::_linear"),
    "attention: product, softmax, product in one": ("aten::_scaled_dot",),
    "attention products": ("aten::bmm", "aten::baddbmm"),
    "softmax": ("aten::_softmax",),
    "convolutions": ("aten::mkldnn_conv", "aten::cudnn_conv", "aten::convolution"),
    "norms": ("aten::native_layer_norm", "aten::mean", "aten::pow", "aten::sqrt", "aten::div"),
    "GELU": ("aten::gelu",),
    "choosing, gathering, scattering": ("aten::sort", "aten::index", "aten::gather", "aten::scatter", "aten::argsort"),
    "copies and conversions": ("aten::copy_", "aten::cat", "aten::fill_", "aten::clone", "aten::constant_pad"),
    "sums and products of single values": ("aten::add", "aten::mul", "aten::sub", "aten::where"),
}


def profile(encoder: torch.nn.Module, x: torch.Tensor, options: dict[str, Any]) -> dict[str, float]:
    """Share of the time by kind of operator; "importance scores" are counted there once more, by themselves."""
    with torch.profiler.profile() as found:
        encoder(x, **options)
    scored = _time_in(getattr(encoder, "predictors", []), partial(encoder, x, **options))
    events = [(e.key, max(e.self_cpu_time_total, e.self_device_time_total)) for e in found.key_averages()]
    total = sum(t for _, t in events)
    shares = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for key, seconds in events:
        kind = next((kind for kind, beginnings in KINDS.items() if key.startswith(beginnings)), "the rest")
        shares[kind] += seconds / total
    return shares | {"importance scores": scored}


def _time_in(modules: Iterable[torch.nn.Module], run: Callable[[], Any]) -> float:
    """Share of a run's time that is spent in these modules (on a CPU)."""
    inside, handles = [0.0], []
    for module in modules:
        before = module.register_forward_pre_hook(lambda *_: inside.append(-time.perf_counter()))
        after = module.register_forward_hook(lambda *_: inside.append(time.perf_counter()))
        handles += [before, after]
    began = time.perf_counter()
    run()
    share = sum(inside) / (time.perf_counter() - began)
    for handle in handles:
        handle.remove()
    return share


# --- reference rows that do not fit, and the floor -------------------------------------------------------------------


def fits(row: Row) -> bool:
    """Whether the reference's attention maps of a global layer stay below half of the free memory."""
    if not row.is_reference or row.runtime != "torch":
        return True
    tokens = (row.image_size // 16) ** 2
    maps = 2 * row.batch_size * row.config.heads * tokens**2 * 4  # logits and softmax
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return maps < free / 2


@torch.no_grad()
def time_from_parts(row: Row) -> float:
    """Seconds of the reference put together: a window layer, a global layer's linear parts, and one head's attention."""
    config, side = row.config, row.image_size // 16
    small = replace(config, depth=1, global_layers=())
    encoder = reference_encoder(small, row.image_size)
    x = torch.randn(1, side, side, config.dim)
    window_layer = _median(lambda: encoder.blocks[0](x))
    head_config = replace(config, dim=config.dim // config.heads, heads=1, depth=1, global_layers=(0,))
    head = reference_encoder(head_config, row.image_size).blocks[0].attn
    of_head = torch.randn(1, side, side, head_config.dim)
    one_head = _median(lambda: head(of_head))
    attention = encoder.blocks[0].attn
    linear = _median(lambda: (attention.qkv(x), attention.proj(x), encoder.blocks[0].mlp(encoder.blocks[0].norm2(x))))
    ends = _median(
        lambda: encoder.neck(encoder.patch_embed(torch.randn(1, 3, *[row.image_size] * 2)).permute(0, 3, 1, 2))
    )
    count = len(config.global_layers)
    layers = (config.depth - count) * window_layer + count * (linear + config.heads * one_head)
    return row.batch_size * (layers + ends)


@torch.no_grad()
def floor(config: EncoderConfig, size: int, dtype: torch.dtype) -> float:
    """Seconds of a dense model's matrix products alone, each measured by itself, for one image on the CPU."""
    tokens, dim, d = (size // 16) ** 2, config.dim, config.dim // config.heads
    x, wide = torch.randn(tokens, dim).to(dtype), torch.randn(tokens, 4 * dim).to(dtype)
    weights = [torch.randn(out, dim).to(dtype) for out in (3 * dim, dim, 4 * dim)]
    back = torch.randn(dim, 4 * dim).to(dtype)
    total = config.depth * (
        sum(_median(partial(F.linear, x, w)) for w in weights) + _median(lambda: F.linear(wide, back))
    )
    down = -(-(size // 16) // config.window)
    shapes = [(config.heads, min(tokens, 512), tokens, len(config.global_layers) * -(-tokens // 512))]
    shapes.append(
        (down**2 * config.heads, config.window**2, config.window**2, config.depth - len(config.global_layers))
    )
    for groups, queries, keys, times in shapes:
        q, k = torch.randn(groups, queries, d).to(dtype), torch.randn(groups, keys, d).to(dtype)
        p = torch.randn(groups, queries, keys).to(dtype)
        total += times * (_median(lambda q=q, k=k: q @ k.transpose(1, 2)) + _median(lambda p=p, k=k: p @ k))
    return total


def _median(f: Any, rounds: int = 5) -> float:
    f()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    values["true_size"] = tuple(values["true_size"]) if values["true_size"] else None
    work(Row(**values), sys.argv[2])
