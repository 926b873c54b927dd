r"""Train a dense SAM, or a bLSAM against a dense teacher, on SA-1B, on photos of your own, on COCO or LVIS.

    # a bLSAM: start from a calibrated one, L = L_sup + 2.5 L_fd, elastic keep ratio
    blsam train --model blsam_vit_b --init blsam_vit_b.safetensors --teacher vit_b \
        --teacher-checkpoint sam_vit_b.pth --data SA-1B --fraction 0.02 --keep-ratio 0.1,0.15,0.25,0.35,0.5 \
        --epochs 10 --batch-size 8 --precision bf16 --output runs/blsam_vit_b

    # the same on 8 GPUs of one machine; what breaks off is started again and goes on
    torchrun --nproc-per-node 8 --max-restarts 3 -m blsam train ... --batch-size 64

    # an image encoder alone, to be used with the teacher's decoder (here MobileSAM's, which is SAM's)
    blsam train --stage encoder --model vit_t --init vit_t.safetensors --teacher mobile_sam \
        --teacher-checkpoint mobile_sam.pt --distill-loss mse --data PHOTOS --image-size 512 --minutes 45 --output runs/e

    # the mask decoder alone, on COCO-style annotations of your own
    blsam train --train decoder --model blsam_vit_t --init blsam_vit_t.safetensors \
        --data annotations.json --images PHOTOS --image-size 512 --epochs 3 --output runs/mine

The run folder holds settings, git revision and versions (`config.json`), the ids of its photos, `metrics.jsonl`
(TensorBoard too, if it is installed), the last checkpoint (`checkpoints/step-N`, for `--resume` with any number of
processes), and the moving average of the weights in half precision for `sam_model_registry` (`model.safetensors`, and
`best.safetensors` by validation). Ctrl-C and SIGTERM write all of it and exit; after a kill the last --save-every
steps are lost. Views and prompts are drawn from (seed, epoch, photo) and keep ratios from (seed, step), so a run that
was resumed sees what it would have seen.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import MISSING, fields
from pathlib import Path

from ..checkpoint import checked_path
from ..config import MODELS
from ..options import UsageError, add_option, check_folder, parse_image_size, parse_ratios
from ..training.loop import train
from ..training.losses import DISTILLATION_LOSSES, MASK_LOSSES
from ..training.parallel import STRATEGIES
from ..training.settings import TrainSettings, begun_by, launcher
from ..training.teachers import DENSE, TEACHERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add_option(group, "--model", choices=sorted(MODELS), default=None, required=True)
    add("--init", type=Path, help="checkpoint to start from, a calibrated one best; default: the teacher's weights")
    add("--teacher", choices=TEACHERS)
    add("--teacher-checkpoint", type=Path)
    add("--teacher-size", type=parse_image_size, metavar="S", help="side of the frame that the teacher sees, a"
        " multiple of --image-size; its embedding is averaged to the student's grid")  # fmt: skip
    add("--cache", type=Path, metavar="DIR", help="the teacher's embeddings, from scripts/cache_embeddings.py")
    add("--stage", choices=("all", "encoder"), help="encoder: L_fd alone, with the teacher's decoder")
    add("--train", choices=("all", "decoder", "scores"), help="decoder: the image encoder stays as it is; scores:"
        " the masks too, only what predicts their IoU learns")  # fmt: skip
    add_option(group, "--image-size", help="side of the model's input, a multiple of 16; default 1024")
    more = {"type": parse_ratios, "metavar": "R[,R...]", "default": None}
    words = "each step draws one of them; validation takes the first; default: the model's own, 0.25 of a bLSAM"
    add_option(group, "--keep-ratio", **more, help=words)

    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, nargs="+", required=True, metavar="PATH", help="SA-1B: folders of NAME.jpg + NAME.json or"
        " of .tar, .tar files; or COCO or LVIS .json with --images; --stage encoder needs no .json")  # fmt: skip
    add("--images", type=Path, metavar="DIR", help="where the photos of a .json lie")
    add("--fraction", type=float, metavar="F", help="a seeded share of the photos, 0.02: 2 %%")
    add("--holdout", type=float, metavar="F", help="share of those kept for validation")
    add("--max-objects", type=int, help="prompts an image")
    add("--workers", type=int, help="of each process, that read and augment")

    add = parser.add_argument_group("objective").add_argument
    add("--distill-weight", type=float, help="weight of L_fd (the paper's best; used with a teacher)")
    add("--distill-loss", choices=sorted(DISTILLATION_LOSSES))
    add("--answers", type=int, metavar="N", help="with --stage encoder: learn the teacher's masks and scores for N prompts"
        " an image as well; slower, but masks are what is asked for")  # fmt: skip
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

    group = parser.add_argument_group("machine")
    add = group.add_argument
    add_option(group, "--device")
    add("--precision", choices=("fp32", "bf16"))
    add("--strategy", choices=STRATEGIES, help="of several processes; fsdp for ViT-H")
    add("--checkpointing", action="store_true", help="recompute activations instead of keeping them")
    add("--compile", choices=("teacher",), help="torch.compile of the teacher")
    add("--output", type=Path, required=True, metavar="DIR", help="run folder")
    add("--resume", action="store_true", help="go on in it; torchrun's restarts do so by themselves")
    left = ("device", "keep_ratio")
    given = {f.name: f.default for f in fields(TrainSettings) if f.default is not MISSING and f.name not in left}
    parser.set_defaults(**given)


def run(args: argparse.Namespace) -> None:
    """Train, and say where the model lies."""
    settings = settings_of(args)
    for path in (settings.init, settings.teacher_checkpoint):
        if path is not None:
            checked_path(path)
    check_folder("--output", settings.output)
    print(train(settings))


def settings_of(args: argparse.Namespace) -> TrainSettings:
    """The settings that options ask for; UsageError where they do not go together."""
    if sum(value is not None for value in (args.epochs, args.steps, args.minutes)) != 1:
        raise UsageError("give one of --epochs, --steps and --minutes")
    check_numbers(args)
    check_together(args)
    model = MODELS[args.model]
    values = vars(args) | {"model": model, "data": tuple(args.data), "resume": goes_on(args)}
    values["keep_ratio"] = args.keep_ratio or (model.keep_ratio,)
    return TrainSettings(**{f.name: values[f.name] for f in fields(TrainSettings)})


def goes_on(args: argparse.Namespace) -> bool:
    """Whether a run continues in the folder --output; UsageError if another's would be written over."""
    main = int(os.environ.get("RANK", 0)) == 0
    # what elastic torchrun starts again goes on by itself, in the folder that it began and no other
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    resume = args.resume or (restarted and (not main or begun_by(args.output) == launcher()))
    if main and not resume and args.output.is_dir() and any(args.output.iterdir()):
        raise UsageError(f"{args.output} is not empty; --resume continues the run in it")
    return resume


def check_numbers(args: argparse.Namespace) -> None:
    """UsageError for a number that makes no sense."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if min(args.batch_size, args.accumulate) < 1:
        raise UsageError("--batch-size and --accumulate must be at least 1")
    if args.batch_size % (args.accumulate * processes):
        raise UsageError(
            f"--batch-size {args.batch_size} is not a multiple of {args.accumulate} passes x {processes} processes"
        )
    for name in ("epochs", "minutes", "lr", "fraction", "holdout", "distill_weight"):
        if getattr(args, name) is not None and not math.isfinite(getattr(args, name)):
            raise UsageError(f"--{name.replace('_', '-')} must be a finite number")
    for name in ("steps", "epochs", "minutes", "lr", "max_objects", "validate_every", "save_every", "log_every"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} must be above 0")
    if not 0 < args.fraction <= 1 or not 0 <= args.holdout < 1 or min(args.clicks, args.answers, args.workers) < 0:
        raise UsageError(
            "--fraction lies in (0, 1], --holdout in [0, 1); --clicks, --answers and --workers are not negative"
        )


def check_together(args: argparse.Namespace) -> None:
    """UsageError for options that want others, or exclude them."""
    if (args.teacher is None) != (args.teacher_checkpoint is None):
        raise UsageError("--teacher and --teacher-checkpoint go together")
    if args.teacher_size is not None and (args.teacher is None or args.cache is not None):
        raise UsageError("--teacher-size is of a --teacher; a --cache knows its own")
    taught = args.teacher is not None or args.cache is not None
    if args.stage == "encoder" and not taught:
        raise UsageError("--stage encoder learns from a --teacher or a --cache")
    if args.answers and args.stage != "encoder":
        raise UsageError("--answers are those of the teacher's decoder, which only --stage encoder keeps")
    if args.stage == "encoder" and args.train != "all":
        raise UsageError(f"--stage encoder and --train {args.train} leave nothing to train")
    if args.train != "all" and taught:
        raise UsageError(f"--train {args.train} keeps the image encoder as it is: a teacher has nothing to teach")
    if MODELS[args.model].routed and args.init is None and args.teacher not in DENSE:
        raise UsageError(f"{args.model} starts from --init or from a dense --teacher")
    if MODELS[args.model].rule is not None and (args.strategy == "fsdp" or args.checkpointing):
        raise UsageError(f"{args.model} does not run its blocks whole: no --strategy fsdp, no --checkpointing")
    if args.train == "scores" and args.mask_loss != "sam":
        raise UsageError("--train scores learns no masks: no --mask-loss")
    if args.train != "all" and args.init is None:
        raise UsageError(f"--train {args.train} needs --init")
