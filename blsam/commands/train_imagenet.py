r"""Train an image classifier of the same blocks: a plain ViT (DeiT), or a big.LITTLE one (bLViT) against it.

    # the paper's B+T against DeiT-B on ImageNet: starts from its weights, L = L_sup + 2.5 L_fd
    torchrun --nproc-per-node 8 -m blsam train-imagenet --model blvit_base_tiny_patch16_224 --data IMAGENET \
        --teacher vit_base_patch16_224 --teacher-checkpoint deit_base.pth --epochs 30 --batch-size 1024 \
        --precision bf16 --output runs/blvit

    # CIFAR-10 on a laptop
    blsam train-imagenet --model vit_mini_patch4_32 --data cifar10 --augment light --mixup 0 --cutmix 0 \
        --epochs 20 --batch-size 128 --output runs/mini

--data is a folder with train/ and val/ (or test/), each with a folder of images per class; such a tree in .tar or
.tar.xz; or webdataset shards (KEY.jpg + KEY.cls) with train and val in their names. The recipe is DeiT's by default:
AdamW, cosine, RandAugment, mixup, CutMix, random erasing, stochastic depth, label smoothing, and a moving average of
the weights, which is what is validated and exported. For short runs the warm-up of the learning rate takes a tenth of
the steps at most, and the average forgets its start.

The run folder holds settings, git revision and versions (`config.json`), the classes in order (`classes.txt`),
`metrics.jsonl`, the last checkpoint (`checkpoints/step-N`, for `--resume`), and the averaged weights in half precision
(`model.safetensors`, and `best.safetensors` by top-1), for `blsam.build_classifier` and scripts/eval_imagenet.py.
Ctrl-C and SIGTERM write all of it and exit. Augmentation is drawn from (seed, epoch, image), mixing and stochastic depth
from (seed, step), so a run that was resumed sees what it would have seen.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..baselines import BASELINES
from ..checkpoint import checked_path
from ..config import CLASSIFIERS
from ..data.imagenet import AUGMENT, require_timm
from ..options import UsageError, add_option, check_folder, parse_crop, parse_ratios
from ..training.imagenet_settings import ClassifierSettings
from .train import goes_on

ABOVE_0 = {"epochs", "steps", "lr", "image_size", "save_every", "log_every"}
NOT_NEGATIVE = {"min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "distill_weight", "mixup", "cutmix"}
NOT_NEGATIVE |= {"workers", "validate_every"}
SHARES = {"erasing", "smoothing", "drop_path", "ema"}
PLAIN = sorted(name for name, config in CLASSIFIERS.items() if not config.routed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add_option(group, "--model", default=None, required=True, choices=sorted(CLASSIFIERS))
    add("--init", type=Path, metavar="FILE", help="weights to start from; default: the teacher's, if they fit")
    add("--teacher", choices=PLAIN, help="a plain ViT of the student's width, whose tokens it learns")
    add("--teacher-checkpoint", type=Path, metavar="FILE")
    add("--image-size", type=int, metavar="S", help="side of the input in pixels; default: the model's")
    add("--baseline", choices=sorted(BASELINES), help="a method that computes fewer tokens of a plain --model")
    more: dict = {"type": parse_ratios, "metavar": "R[,R...]", "default": None}
    words = "each step draws one of them; validation takes the first; default 0.25, of a --baseline its paper's"
    add_option(group, "--keep-ratio", **more, help=words)

    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, nargs="+", required=True, metavar="PATH", help="folders or tars, see above")
    add("--val-data", type=Path, nargs="+", metavar="PATH", help="validation images; default: those of --data")
    add("--crop-ratio", type=parse_crop, metavar="R", help="share of an image's short side that validation sees;"
        " default 0.875, for inputs of at most 32 pixels 1")  # fmt: skip
    add("--workers", type=int, help="of each process, that read and augment")

    add = parser.add_argument_group("recipe").add_argument
    add("--augment", choices=AUGMENT, help="deit: random resized crop, flip, RandAugment, erasing; light: a crop of"
        " the padded image, flip")  # fmt: skip
    add("--erasing", type=float, metavar="P", help="probability, with --augment deit; default 0.25")
    add("--mixup", type=float, metavar="ALPHA", help="0: none; default 0.8")
    add("--cutmix", type=float, metavar="ALPHA", help="0: none; default 1")
    add("--smoothing", type=float, help="of labels; default 0.1")
    add("--drop-path", type=float, metavar="P", help="of the last layer; default 0.1")
    add("--distill-weight", type=float, help="of L_fd, with a --teacher; default 2.5")
    add("--lr", type=float, help="for 512 images a step, scaled to --batch-size; default 5e-4")
    add("--min-lr", type=float, help="default 1e-5")
    add("--warmup-lr", type=float, help="default 1e-6")
    add("--warmup-epochs", type=float, help="default 5, at most a tenth of the run")
    add("--weight-decay", type=float, help="default 0.05")
    add("--ema", type=float, metavar="DECAY", help="of the moving average, less at first; default 0.99996")

    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=float)
    add("--steps", type=int)
    add("--batch-size", type=int, help="images a step, over all processes and passes; default 256")
    add("--accumulate", type=int, metavar="N", help="passes that a step's images are cut into")
    add("--seed", type=int)
    add("--validate-every", type=int, metavar="STEPS", help="default: an epoch")
    add("--save-every", type=int, metavar="STEPS")
    add("--log-every", type=int, metavar="STEPS")

    group = parser.add_argument_group("machine")
    add_option(group, "--device")
    group.add_argument("--precision", choices=("fp32", "bf16"))
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="run folder")
    group.add_argument("--resume", action="store_true", help="go on in it; torchrun's restarts do so by themselves")
    left = ("device", "keep_ratio")
    given = {f.name: f.default for f in fields(ClassifierSettings) if f.default is not MISSING and f.name not in left}
    parser.set_defaults(**given)


def run(args: argparse.Namespace) -> None:
    """Train, and say where the model lies."""
    settings = settings_of(args)
    for path in (settings.init, settings.teacher_checkpoint):
        if path is not None:
            checked_path(path)
    check_folder("--output", settings.output)
    require_timm()
    from ..training.imagenet import train

    print(train(settings))


def settings_of(args: argparse.Namespace) -> ClassifierSettings:
    """The settings that options ask for; UsageError where they do not go together."""
    if (args.epochs is None) == (args.steps is None):
        raise UsageError("give one of --epochs and --steps")
    if (args.teacher is None) != (args.teacher_checkpoint is None):
        raise UsageError("--teacher and --teacher-checkpoint go together")
    if args.baseline and CLASSIFIERS[args.model].routed:
        raise UsageError(
            f"--baseline {args.baseline} runs on a plain model, such as {CLASSIFIERS[args.model].dense.name}"
        )
    if args.keep_ratio is None:
        options: Any = BASELINES[args.baseline].Options() if args.baseline else None
        args.keep_ratio = (options.keep_ratio if options else 0.25,)
    elif args.baseline and (len(args.keep_ratio) > 1 or args.keep_ratio[0] > 1):
        raise UsageError(f"--baseline {args.baseline} takes one --keep-ratio, at most 1")
    check_numbers(args)
    values = vars(args) | {"model": CLASSIFIERS[args.model], "resume": goes_on(args)}
    values |= {"data": tuple(args.data), "val_data": tuple(args.val_data or ())}
    return ClassifierSettings(**{f.name: values[f.name] for f in fields(ClassifierSettings)})


def check_numbers(args: argparse.Namespace) -> None:
    """UsageError for a number that makes no sense."""
    for name in sorted(ABOVE_0 | NOT_NEGATIVE | SHARES):
        value = getattr(args, name)
        if value is None:
            continue
        if name in SHARES:
            fits, wanted = 0 <= value < 1, "at least 0 and below 1"
        else:
            fits, wanted = (value > 0, "above 0") if name in ABOVE_0 else (value >= 0, "0 or more")
        if not (fits and math.isfinite(value)):
            raise UsageError(f"--{name.replace('_', '-')} must be {wanted}, is {value}")
    if args.seed < 0:
        raise UsageError(f"--seed is at least 0, is {args.seed}")
    if min(args.batch_size, args.accumulate) < 1:
        raise UsageError("--batch-size and --accumulate must be at least 1")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    each, rest = divmod(args.batch_size, args.accumulate * processes)
    if rest:
        raise UsageError(
            f"--batch-size {args.batch_size} is not a multiple of {args.accumulate} passes x {processes} processes"
        )
    if each % 2 and (args.mixup or args.cutmix):
        raise UsageError(
            f"images are mixed in pairs, and {each} a pass are not even; change --batch-size, or --mixup 0 --cutmix 0"
        )
