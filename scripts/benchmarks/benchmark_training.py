"""Where the seconds of a training step go, its memory, and how many images a second the data side alone delivers.

    python -m scripts.benchmarks.benchmark_training --model blsam_vit_t --init blsam_vit_t.safetensors --teacher vit_t \
        --teacher-checkpoint vit_t.safetensors --data PHOTOS --image-size 512 --steps 10 --json training.jsonl

Options as of train_sam.py, with --steps, without --output; the first step, which allocates and compiles, is not
counted.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

from blsam.commands.train import add_arguments, settings_of
from blsam.distributed import World
from blsam.files import provenance
from blsam.options import Parser, UsageError, check_output, exit_status
from blsam.training.loop import one_step, set_up, training_loader
from blsam.training.metrics import Rows
from blsam.training.settings import TrainSettings

PARTS = ("data", "teacher", "student", "decoder", "decoder_backward", "student_backward", "optimiser")
DATA_STEPS = 20  # of the data alone


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="OUT", help="append the row to this file")
    arguments = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*arguments, "--output", folder]
        args = parser.parse_args(arguments)
        settings = settings_of(args)
        if settings.steps is None or settings.steps < 2:
            raise UsageError("--steps must be given, and at least 2: the first is not counted")
        check_output("--json", args.json, taken=(args.init, args.teacher_checkpoint, *args.data))
        row = measure(replace(settings, log_every=1))  # so that a GPU is waited for at every part
    if args.json is not None:
        with args.json.open("a") as file:
            file.write(json.dumps(row) + "\n")
    total = sum(row.get(f"s_{part}", 0) for part in PARTS)
    print(f"{row['model']} at {row['image_size']}, batch {row['batch_size']}, {row['precision']}:")
    for part in PARTS:
        if seconds := row.get(f"s_{part}"):
            print(f"  {part.replace('_', ' '):<17} {seconds:8.3f} s  {100 * seconds / total:4.0f} %")
    print(f"  {'a step':<17} {total:8.3f} s, {row['images_per_second']:.2f} images a second, {row['peak_gb']:.1f} GB")
    print(f"  data alone        {row['data_images_per_second']:8.1f} images a second, {row['workers']} worker(s)")
    return 0


def measure(settings: TrainSettings) -> dict[str, float | str]:
    """One row: the settings that matter, seconds a step by part, images a second of the step and of the data alone."""
    run = set_up(settings, World())
    rows = Rows(settings.batch_size, settings.device, run.world)
    samples = iter(training_loader(run))
    one_step(run, samples, 0.0, rows)
    rows = Rows(settings.batch_size, settings.device, run.world)
    start = time.perf_counter()
    for step in range(1, run.steps):
        run.progress.step = step
        one_step(run, samples, 0.0, rows)
    row = rows.row(time.perf_counter() - start)

    run.progress.step, run.steps = 0, 2 * DATA_STEPS
    loader = iter(training_loader(run))
    next(loader)  # the workers are up
    start = time.perf_counter()
    seen = sum(len(batch) for batch in islice(loader, DATA_STEPS))
    row["data_images_per_second"] = round(seen / (time.perf_counter() - start), 1)
    names = ("model", "image_size", "batch_size", "precision", "checkpointing", "stage", "train", "workers")
    names += ("mask_loss", "accumulate", "compile")
    facts = settings.as_json()
    return {name: facts[name] for name in names} | {"device": str(settings.device)} | row | provenance()


if __name__ == "__main__":
    sys.exit(exit_status("benchmark_training", main))
