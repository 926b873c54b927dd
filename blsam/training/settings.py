"""The settings of a training run, as its command line gives them, checked before work starts."""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..cli import parse_device
from ..config import CONFIGS
from .losses import DISTILLATION_LOSSES, MASK_LOSSES
from .parallel import STRATEGIES
from .teachers import DENSE, TEACHERS

# what may change when a run goes on: where things lie, how long it takes, how it is computed and logged
FREE = {"data", "images", "init", "teacher_checkpoint", "cache", "output", "resume", "epochs", "steps", "minutes"}
FREE |= {"device", "strategy", "checkpointing", "compile", "workers", "validate_every", "save_every", "log_every"}


@dataclass(frozen=True)
class TrainSettings:
    """What `scripts/train_sam.py --help` says of each."""

    model: str
    data: tuple[Path, ...]
    output: Path
    images: Path | None = None
    fraction: float = 1.0
    holdout: float = 0.05
    init: Path | None = None
    teacher: str | None = None
    teacher_checkpoint: Path | None = None
    cache: Path | None = None
    train: str = "all"
    stage: str = "all"
    image_size: int = 1024
    keep_ratio: tuple[float, ...] = (0.25,)
    distill_weight: float = 2.5
    distill_loss: str = "cosine"
    mask_loss: str = "sam"
    clicks: int = 1
    max_objects: int = 8
    lr: float = 2e-4
    epochs: float | None = None
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 4
    accumulate: int = 1
    precision: str = "fp32"
    strategy: str = "ddp"
    checkpointing: bool = False
    compile: str | None = None
    workers: int = 1
    validate_every: int = 500
    save_every: int = 100
    log_every: int = 20
    seed: int = 0
    device: torch.device = torch.device("cpu")
    resume: bool = False

    def check_same(self, stored: dict[str, Any]) -> None:
        """ValueError names the first setting that a run was begun with otherwise, of those that it depends on."""
        now = self.as_json()
        for name in sorted(now.keys() - FREE):
            if stored.get(name) != now[name]:
                raise ValueError(
                    f"{self.output} was begun with {name} {stored.get(name)}, this command has {now[name]}"
                )

    def as_json(self) -> dict[str, Any]:
        """As json holds it; paths and the device as text."""
        return json.loads(json.dumps(asdict(self), default=str))

    @property
    def supervised(self) -> bool:
        """Masks are learnt, not the teacher's embedding alone."""
        return self.stage == "all"


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, choices=sorted(CONFIGS))
    add("--init", type=Path, help="checkpoint to start from, a calibrated one best; default: the teacher's weights")
    add("--teacher", choices=TEACHERS)
    add("--teacher-checkpoint", type=Path)
    add("--cache", type=Path, metavar="DIR", help="the teacher's embeddings, from scripts/cache_embeddings.py")
    add("--stage", choices=("all", "encoder"), help="encoder: L_fd alone, with the teacher's decoder")
    add("--train", choices=("all", "decoder"), help="decoder: the image encoder stays as it is")
    add("--image-size", type=int)
    add(
        "--keep-ratio",
        type=_ratios,
        metavar="R[,R...]",
        help="each step draws one of them; validation takes the first",
    )

    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, nargs="+", required=True, metavar="PATH", help="SA-1B: folders of NAME.jpg + NAME.json or"
        " of .tar, .tar files; or COCO or LVIS .json with --images")  # fmt: skip
    add("--images", type=Path, metavar="DIR", help="where the photos of a .json lie")
    add("--fraction", type=float, metavar="F", help="a seeded share of the photos, 0.02: 2 %%")
    add("--holdout", type=float, metavar="F", help="share of those kept for validation")
    add("--max-objects", type=int, help="prompts an image")
    add("--workers", type=int, help="of each process, that read and augment")

    add = parser.add_argument_group("objective").add_argument
    add("--distill-weight", type=float, help="weight of L_fd (the paper's best; used with a teacher)")
    add("--distill-loss", choices=sorted(DISTILLATION_LOSSES))
    add("--mask-loss", choices=sorted(MASK_LOSSES), help="balanced: better for small models and data")
    add("--clicks", type=int, metavar="N", help="0 to N corrective clicks after the first prompt")

    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=float)
    add("--steps", type=int)
    add("--minutes", type=float)
    add("--batch-size", type=int, help="images a step, over all processes and passes")
    add("--accumulate", type=int, metavar="N", help="passes that a step's images are cut into")
    add("--lr", type=float)
    add("--seed", type=int)
    add("--validate-every", type=int, metavar="STEPS")
    add("--save-every", type=int, metavar="STEPS")
    add("--log-every", type=int, metavar="STEPS")

    add = parser.add_argument_group("machine").add_argument
    add("--device", type=parse_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("fp32", "bf16"))
    add("--strategy", choices=STRATEGIES, help="of several processes; fsdp for ViT-H")
    add("--checkpointing", action="store_true", help="recompute activations instead of keeping them")
    add("--compile", choices=("teacher", "all"), help="torch.compile of the teacher, or of the student's blocks too")
    add("--output", type=Path, required=True, metavar="DIR", help="run folder")
    add("--resume", action="store_true", help="go on in it; torchrun's restarts do so by themselves")
    given = {f.name: f.default for f in fields(TrainSettings) if f.default is not MISSING and f.name != "device"}
    parser.set_defaults(**given)
    return parser


def parse_settings(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> TrainSettings:
    """Exits with 2 and one line where the options do not go together."""
    args = parser.parse_args(argv)
    if sum(value is not None for value in (args.epochs, args.steps, args.minutes)) != 1:
        parser.error("give one of --epochs, --steps and --minutes")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if min(args.batch_size, args.accumulate) < 1:
        parser.error("--batch-size and --accumulate must be at least 1")
    if args.batch_size % (args.accumulate * processes):
        parser.error(
            f"--batch-size {args.batch_size} is not a multiple of {args.accumulate} passes x {processes} processes"
        )
    for name in ("epochs", "minutes", "lr", "fraction", "holdout", "distill_weight"):
        if getattr(args, name) is not None and not math.isfinite(getattr(args, name)):
            parser.error(f"--{name.replace('_', '-')} must be a finite number")
    for name in ("steps", "epochs", "minutes", "lr", "max_objects", "validate_every", "save_every", "log_every"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if not 0 < args.fraction <= 1 or not 0 <= args.holdout < 1 or args.clicks < 0 or args.workers < 0:
        parser.error("--fraction lies in (0, 1], --holdout in [0, 1); --clicks and --workers are not negative")
    if (args.teacher is None) != (args.teacher_checkpoint is None):
        parser.error("--teacher and --teacher-checkpoint go together")
    taught = args.teacher is not None or args.cache is not None
    if args.stage == "encoder" and not taught:
        parser.error("--stage encoder learns from a --teacher or a --cache")
    if args.stage == "encoder" and args.train == "decoder":
        parser.error("--stage encoder and --train decoder leave nothing to train")
    if args.train == "decoder" and taught:
        parser.error("--train decoder keeps the image encoder as it is: a teacher has nothing to teach")
    if CONFIGS[args.model].routed and args.init is None and args.teacher not in DENSE:
        parser.error(f"{args.model} starts from --init or from a dense --teacher")
    if args.train == "decoder" and args.init is None:
        parser.error("--train decoder needs --init")
    main = int(os.environ.get("RANK", 0)) == 0
    # what elastic torchrun starts again goes on by itself, in the folder that it began and no other
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    resume = args.resume or (restarted and (not main or begun_by(args.output) == launcher()))
    if main and not resume and args.output.is_dir() and any(args.output.iterdir()):
        parser.error(f"{args.output} is not empty; --resume continues the run in it")
    values = vars(args) | {"data": tuple(args.data), "resume": resume}
    return TrainSettings(**{f.name: values[f.name] for f in fields(TrainSettings)})


def launcher() -> str:
    """The process that started this one: torchrun's agent, which stays the same over its restarts."""
    return f"{socket.gethostname()} {os.getppid()}"


def begun_by(folder: Path) -> str | None:
    """The launcher of the run in a folder; None where there is none."""
    path = folder / "config.json"
    return json.loads(path.read_text()).get("launcher") if path.is_file() else None


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        ratios = ()
    if not ratios or not all(0 < r <= 1 for r in ratios):
        raise argparse.ArgumentTypeError(f"keep ratios lie in (0, 1] and are parted by commas, got {text!r}")
    return ratios
