"""Time, memory and agreement of image encoders, in turn in one run.

    python -m scripts.benchmarks.benchmark --models segment_anything:vit_b,vit_b,blsam_vit_b   # 1024, both dtypes
    python -m scripts.benchmarks.benchmark --models vit_t,blsam_vit_t --image-sizes 512,1024 --rounds 15
    python -m scripts.benchmarks.benchmark --models blsam_vit_b --keep-ratios 0.1,0.25,0.5,1 --dtypes bfloat16
    python -m scripts.benchmarks.benchmark --models vit_b --profile                            # where the time goes
    python -m scripts.benchmarks.benchmark --models vit_h,blsam_vit_h --device cuda --batch-sizes 1,4
    python -m scripts.benchmarks.benchmark --models segment_anything:vit_b,vit_b,blsam_vit_b --runtimes torch,openvino

Every row is a process of its own that holds one model; rows of one image and batch size take turns, one forward pass
each, so that a noisy hour falls on all of them. Weights are random but the same (--checkpoint gives real ones); the
input is a fixed noise image, or a photo's extents with --true-sizes. The first row is what the others are compared
with; `segment_anything` in another runtime is its own graph there. `floor` is the time of the model's matrix products
alone, on this machine, in the same dtype.

ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 MKL_ENABLE_INSTRUCTIONS=AVX512_E3 before it hides a matrix unit; the rows say so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from blsam.config import CONFIGS, MODELS
from blsam.files import provenance
from blsam.options import Parser, add_option, check_output, exit_status, parse_ratios
from blsam.precision import DTYPES
from blsam.runtimes.backends import BACKENDS
from scripts.benchmarks import benchmark_row
from scripts.benchmarks.benchmark_row import REFERENCE, Row, fits, floor, time_from_parts

# what rows say of their environment: instructions of the processor that are hidden from all runtimes, and the allocator
SAID = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "GLIBC_TUNABLES")

# --- in turn ---------------------------------------------------------------------------------------------------------


class Worker:
    """A row's process."""

    def __init__(self, row: Row, embedding_file: Path) -> None:
        self.row, self.embedding_file, self.seconds = row, embedding_file, []
        command = [sys.executable, "-m", benchmark_row.__name__, json.dumps(asdict(row)), str(embedding_file)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.report = self._read()  # waits: no other row runs while this one is built

    def _read(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"{self.row.name} failed: see above")
        return json.loads(line)

    def ask(self, what: str) -> Any:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(rows: list[Row], rounds: int, profiled: bool, bar: tqdm) -> list[dict[str, Any]]:
    """All rows of one image and batch size, in turn."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(row, Path(folder) / f"{i}.pt") for i, row in enumerate(rows) if fits(row)]
        for _ in range(rounds):
            for worker in workers:
                worker.seconds.append(worker.ask("go"))
                bar.update()
        of_row = {worker.row: worker for worker in workers}
        embeddings = {worker.row: torch.load(worker.embedding_file) for worker in workers}
        for row in rows:
            if row not in of_row:
                seconds = time_from_parts(row)
                bar.update(rounds)
                results.append(asdict(row) | {"median_s": seconds, "gmacs": row.gmacs, "from_parts": True})
                continue
            worker = of_row[row]
            result = asdict(row) | statistics_of(worker.seconds) | worker.report | {"gmacs": row.gmacs}
            result |= agreement(row, embeddings)
            result["gflops_per_s"] = 2 * row.gmacs * row.batch_size / result["median_s"]
            if profiled:
                result["profile"] = worker.ask("profile")
            results.append(result)
        for worker in workers:
            worker.close()
    return results


def statistics_of(seconds: list[float]) -> dict[str, Any]:
    low, median, high = (float(torch.tensor(seconds).quantile(q)) for q in (0.25, 0.5, 0.75))
    p95 = float(torch.tensor(seconds).quantile(0.95))
    return {"median_s": median, "quartiles_s": [low, high], "p95_s": p95, "rounds": len(seconds)}


def agreement(row: Row, embeddings: dict[Row, torch.Tensor]) -> dict[str, Any]:
    """Gap to the same weights elsewhere: exact models to the reference, half precision to float32."""
    twin = replace(row, dtype="float32", compile=False, runtime="torch")
    if not row.config.reduces and not row.is_reference:
        reference = replace(twin, model=REFERENCE + row.model)
        twin = reference if reference in embeddings else twin
    if twin == row or twin not in embeddings:
        return {}
    a, b = embeddings[row], embeddings[twin]
    cosine = F.cosine_similarity(a, b, dim=1).mean().item()
    return {"agrees_with": twin.name, "cosine": cosine, "largest_gap_in_std": ((a - b).abs().max() / b.std()).item()}


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        f"{'':<38}{'median':>9}{'quartiles':>16}{'p95':>8}{'ratio':>7}{'GMACs':>8}{'GFLOP/s':>9}{'peak':>7}  agreement"
    ]
    base = results[0]["median_s"]
    for result in results:
        row = row_of(result)
        line = f"{row.name:<38}{result['median_s']:>8.3f}s"
        if result.get("from_parts"):
            lines.append(
                line + f"  put together from its parts: its attention maps do not fit{base / result['median_s']:>9.2f}"
            )
            continue
        low, high = result["quartiles_s"]
        line += f"{f'{low:.3f} to {high:.3f}':>16}{result['p95_s']:>8.3f}{base / result['median_s']:>6.2f}x"
        line += f"{result['gmacs']:>8.1f}{result['gflops_per_s']:>9.0f}{result['peak_gb']:>6.2f}G"
        if "cosine" in result:
            line += (
                f"  cosine {result['cosine']:.6f}, gap {result['largest_gap_in_std']:.1e} to {result['agrees_with']}"
            )
        lines.append(line)
    return "\n".join(lines)


def row_of(result: dict[str, Any]) -> Row:
    values = {field: result[field] for field in Row.__dataclass_fields__}
    return Row(**values | {"true_size": tuple(values["true_size"]) if values["true_size"] else None})


# --- the command -----------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    names = [*MODELS, *(REFERENCE + name for name, config in CONFIGS.items() if not config.routed)]
    add("--models", required=True, type=lambda text: text.split(","), help=", ".join(names))
    add(
        "--dtypes",
        type=lambda text: text.split(","),
        default=["float32", "bfloat16"],
        help="segment_anything: float32",
    )
    add("--keep-ratios", type=parse_ratios, help="default: each model's own, 0.25 of a bLSAM")
    add("--image-sizes", type=numbers, default=[1024])
    add("--batch-sizes", type=numbers, default=[1])
    add(
        "--true-sizes",
        type=numbers,
        nargs="+",
        default=[None],
        metavar="H,W",
        help="of the photo; the rest is padding",
    )
    add("--checkpoint", type=Path, help="for all rows; default: random weights")
    add("--rounds", type=int, default=7, help="timed passes of each row, after one that is not counted")
    add("--threads", type=int, default=torch.get_num_threads())
    add_option(parser, "--device", default="cpu")
    add("--runtimes", type=lambda text: text.split(","), default=["torch"], help=", ".join(BACKENDS) + ", torch")
    add("--compile", action="store_true", help="torch.compile beside eager, for models of this package")
    add("--profile", action="store_true", help="share of the time by kind of operator")
    add("--floor", action="store_true", help="the time of the dense models' matrix products alone")
    add("-o", "--output", type=Path, metavar="JSONL", help="append every row to this file")
    args = parser.parse_args(argv)
    for name in args.models:
        if name not in names:
            parser.error(f"no model {name!r}: choose from {', '.join(names)}")
    for what, given, there in (("dtype", args.dtypes, DTYPES), ("runtime", args.runtimes, ("torch", *BACKENDS))):
        for name in given:
            if name not in there:
                parser.error(f"no {what} {name!r}: choose from {', '.join(there)}")
    for extents in args.true_sizes:
        if extents is not None and (len(extents) != 2 or not all(1 <= n <= min(args.image_sizes) for n in extents)):
            parser.error("--true-sizes are H,W in pixels, within the image size")
    if args.rounds < 1 or any(size < 16 or size % 16 for size in args.image_sizes):
        parser.error("--rounds is at least 1, --image-sizes are multiples of 16")
    if args.checkpoint and (not args.checkpoint.is_file() or any(REFERENCE in name for name in args.models)):
        parser.error("--checkpoint is a file, and goes with models of this package only")
    return args


def ways(args: argparse.Namespace, reference: bool) -> list[tuple[str, str]]:
    """Runtimes and dtypes of a model: the reference in torch, and ONNX Runtime, know float32 alone."""
    found = []
    for runtime in args.runtimes:
        alone = runtime == "onnxruntime" or (reference and runtime == "torch")
        found += [(runtime, dtype) for dtype in (["float32"] if alone else args.dtypes)]
    return found


def rows_of(args: argparse.Namespace, size: int, batch: int) -> list[Row]:
    rows = []
    for model in args.models:
        reference = model.startswith(REFERENCE)
        config = MODELS[model.removeprefix(REFERENCE)]
        ratios = args.keep_ratios or [config.keep_ratio]
        for runtime, dtype in ways(args, reference):
            for keep in ratios if config.reduces else [None]:
                for true_size in args.true_sizes if config.reduces else [None]:
                    for compiled in (
                        [False, True] if args.compile and not reference and runtime == "torch" else [False]
                    ):
                        checkpoint = str(args.checkpoint) if args.checkpoint else None
                        where = (checkpoint, str(args.device), args.threads, compiled, runtime)
                        rows.append(Row(model, dtype, keep, size, batch, true_size and tuple(true_size), *where))
    return rows


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> int:
    args = parse_args()
    check_output("--output", args.output, taken=(args.checkpoint,))
    comparisons = [rows_of(args, size, batch) for size in args.image_sizes for batch in args.batch_sizes]
    machine = {"processor": processor(), "cores": os.cpu_count()}
    machine |= {name: os.environ[name] for name in SAID if name in os.environ}
    total = args.rounds * sum(map(len, comparisons))
    with tqdm(total=total, unit="pass", disable=not sys.stderr.isatty()) as bar:
        for rows in comparisons:
            results = compare(rows, args.rounds, args.profile, bar)
            print(f"\n{rows[0].image_size} x {rows[0].image_size}, batch {rows[0].batch_size}, {args.threads} threads, "
                  f"{machine['processor']}, {machine['cores']} cores, {args.device}")  # fmt: skip
            print(table(results), flush=True)
            for result in results:
                for kind, share in result.get("profile", {}).items():
                    print(f"    {row_of(result).name:<34}{kind:<46}{100 * share:>5.1f} %")
            if args.floor:
                for config, dtype in sorted({(row.config.name, row.dtype) for row in rows if not row.config.reduces}):
                    seconds = floor(CONFIGS[config], rows[0].image_size, getattr(torch, dtype))
                    print(f"{config} {dtype}: matrix products alone {seconds:.3f} s")
                    results.append(
                        {"model": config, "dtype": dtype, "image_size": rows[0].image_size, "floor_s": seconds}
                    )
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                with args.output.open("a") as file:
                    for result in results:
                        file.write(json.dumps(result | machine | provenance()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("benchmark", main))
