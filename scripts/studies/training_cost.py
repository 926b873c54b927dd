"""What training on 2 % of SA-1B would take: an estimate from operation counts and published throughputs.

    python -m scripts.studies.training_cost [--fraction 0.02] [--epochs 10] [--gpus 8] [--nodes 1]

Nothing of it was measured on a GPU by us. Assumptions: a GPU computes the dense encoder at the images a second that
segment-anything-fast published for one A100 40 GB (bfloat16, compiled, scaled_dot_product_attention, batch 8); the
student's forward pass costs its share of operations, its backward pass twice that, at the same rate; decoder, prompts
and optimiser add the share measured here (scripts/studies/results/training). SA-1B: 11,185,362 photos in 1,000 tars,
10.3 TiB.
"""

from __future__ import annotations

import sys

from blsam.config import CONFIGS
from blsam.modeling.macs import encoder_macs
from blsam.options import Parser, exit_status

PHOTOS, BYTES = 11_185_362, 10.3 * 2**40
TEACHER_PER_SECOND = {"blsam_vit_b": 73.2, "blsam_vit_h": 21.92}  # segment-anything-fast, experiments/results.csv
REST = 0.16  # decoder, its backward pass, optimiser: share of a step of blsam_vit_b at 1024 in bfloat16
EMBEDDING = 2 * 256 * 64 * 64  # bytes, half precision


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--fraction", type=float, default=0.02)
    add("--epochs", type=float, default=10)
    add("--gpus", type=int, default=8, help="of a node")
    add("--nodes", type=int, default=1)
    args = parser.parse_args(argv)
    photos, gpus = args.fraction * PHOTOS, args.gpus * args.nodes
    print(
        f"{photos:,.0f} photos, {args.epochs:g} epochs: {photos * BYTES / PHOTOS / 1e9:.0f} GB of tars, "
        f"embeddings of one view {photos * EMBEDDING / 1e9:.0f} GB"
    )
    print(f"{'':<24} {'images/s a GPU':>14} {'one GPU':>10} {f'{gpus} GPUs':>10} {'read a node':>14}")
    for model in TEACHER_PER_SECOND:
        for cached in (False, True):
            each = images_per_second(model, cached)
            hours = [photos * args.epochs / each / n / 3600 for n in (1, gpus)]
            size = BYTES / PHOTOS + (EMBEDDING if cached else 0)
            name = f"{model}, {'cache' if cached else 'live teacher'}"
            times = " ".join(f"{h:>8.1f} h" for h in hours)
            print(f"{name:<24} {each:>14.1f} {times} {each * args.gpus * size / 1e6:>9.0f} MB/s")
    return 0


def images_per_second(model: str, cached: bool) -> float:
    """Of one GPU, by the assumptions above."""
    config = CONFIGS[model]
    student = encoder_macs(config) / encoder_macs(config.dense)  # of a forward pass of the teacher
    passes = 3 * student + (0 if cached else 1)
    rest = REST / (1 - REST) * (3 * student + 1)
    return TEACHER_PER_SECOND[model] / (passes + rest)


if __name__ == "__main__":
    sys.exit(exit_status("training_cost", main))
