#!/usr/bin/env python3
"""Train a dense SAM, or a bLSAM against a dense teacher, on photos with masks in SA-1B's layout.

    # a dense model, from a checkpoint on
    python scripts/train_sam.py --model vit_t --init vit_t.safetensors --data PHOTOS --image-size 512 \
        --minutes 45 --output runs/vit_t

    # a dense image encoder alone, from MobileSAM's, to be used with MobileSAM's (which is SAM's) decoder
    python scripts/train_sam.py --stage encoder --model vit_t --init vit_t.safetensors --teacher mobile_sam \
        --teacher-checkpoint mobile_sam.pt --distill-loss mse --data PHOTOS --image-size 256 --minutes 45 --output runs/e

    # its big.LITTLE student: starts from the teacher's weights, L = L_sup + 2.5 L_fd, elastic keep ratio
    python scripts/train_sam.py --model blsam_vit_t --teacher vit_t --teacher-checkpoint runs/vit_t/model.safetensors \
        --data PHOTOS --image-size 512 --keep-ratio 0.1,0.25,0.5 --minutes 45 --output runs/blsam_vit_t

The run folder holds `config.json`, `metrics.jsonl`, `last.pt` (everything `--resume` needs) and `model.safetensors`
(the moving average of the weights, half precision, for `sam_model_registry`). Ctrl-C and SIGTERM write both and exit.
The views of step n and the prompts drawn for it depend on the seed and n alone, so a resumed run sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import blsam
from blsam import checkpoint as ckpt
from blsam import sam_model_registry
from blsam.cli import parse_device
from blsam.config import CONFIGS
from blsam.data.sa1b import Sample, TrainingViews, list_photos, split_photos
from blsam.evaluation.commands import run_script
from blsam.modeling.sam import Sam
from blsam.modeling.windows import real_tokens
from blsam.training.calibrate import peak_gb
from blsam.training.losses import DISTILLATION_LOSSES, MASK_LOSSES, mask_iou, supervised_loss
from blsam.training.prompts import corrective_clicks, first_clicks, noisy_boxes
from blsam.training.teachers import DENSE, TEACHERS, load_teacher

SINGLE, MULTI = slice(0, 1), slice(1, 4)  # mask tokens of SAM's decoder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, choices=sorted(CONFIGS))
    add(
        "--init",
        type=Path,
        help="checkpoint to start from; default: the teacher's weights, if it is one of these models",
    )
    add("--teacher", choices=TEACHERS)
    add("--teacher-checkpoint", type=Path)
    add(
        "--stage", choices=("all", "encoder"), default="all", help="encoder: distillation alone, the teacher's decoder"
    )
    add("--data", type=Path, nargs="+", required=True, metavar="PATH", help="folders of NAME.jpg + NAME.json")
    add("--image-size", type=int, default=1024)
    add("--keep-ratio", type=_ratios, default=(0.25,), metavar="R[,R...]", help="each step draws one of them")
    add("--distill-weight", type=float, default=2.5, help="weight of L_fd (the paper's best; used with --teacher)")
    add("--distill-loss", choices=sorted(DISTILLATION_LOSSES), default="cosine")
    add("--mask-loss", choices=sorted(MASK_LOSSES), default="sam", help="balanced: better for small models and data")
    add("--lr", type=float, default=2e-4)
    add("--steps", type=int)
    add("--minutes", type=float)
    add("--batch-size", type=int, default=4)
    add("--max-objects", type=int, default=8, help="prompts an image")
    add("--clicks", type=int, default=1, help="corrective clicks after the first prompt")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--holdout", type=float, default=0.05, help="share of the photos kept for validation")
    add("--validate-every", type=int, default=500, metavar="STEPS")
    add("--save-every", type=int, default=100, metavar="STEPS")
    add("--workers", type=int, default=1)
    add("--compile", action="store_true", help="compile the teacher's image encoder")
    add("--device", type=parse_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--output", type=Path, required=True)
    add("--resume", action="store_true")
    args = parser.parse_args(argv)
    if (args.steps is None) == (args.minutes is None):
        parser.error("give --steps or --minutes")
    if (args.teacher is None) != (args.teacher_checkpoint is None):
        parser.error("--teacher and --teacher-checkpoint go together")
    if args.stage == "encoder" and args.teacher is None:
        parser.error("--stage encoder learns from a --teacher")
    if CONFIGS[args.model].routed and args.init is None and args.teacher not in DENSE:
        parser.error(f"{args.model} starts from --init or from a dense --teacher")
    if args.output.exists() and any(args.output.iterdir()) and not args.resume:
        parser.error(f"{args.output} is not empty; --resume continues the run in it")
    return args


def _ratios(text: str) -> tuple[float, ...]:
    ratios = tuple(float(part) for part in text.split(","))
    if not all(0 < r <= 1 for r in ratios):
        raise argparse.ArgumentTypeError(f"keep ratios lie in (0, 1], got {text}")
    return ratios


# --- one step --------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """images float [B, 3, S, S], normalised; true_sizes (h, w); objects: masks [P, S/4, S/4] and boxes [P, 4] of each."""

    images: torch.Tensor
    true_sizes: list[tuple[int, int]]
    objects: list[tuple[torch.Tensor, torch.Tensor]]


def to_batch(samples: list[Sample], sam: Sam) -> Batch:
    device = sam.device
    images = torch.stack([sam.preprocess(sample.image.to(device).float()) for sample in samples])
    sizes = [tuple(sample.image.shape[-2:]) for sample in samples]
    return Batch(images, sizes, [(s.masks.to(device), s.boxes.to(device)) for s in samples])


def decode(
    sam: Sam, embedding: torch.Tensor, points=None, boxes=None, logits=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [P, 4, S/4, S/4] and scores [P, 4] of all mask tokens for P prompts on one embedding [1, 256, h, w]."""
    sparse, dense = sam.prompt_encoder(points, boxes, logits)
    return sam.mask_decoder.predict_masks(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense)


def prompted_loss(
    sam: Sam,
    embedding: torch.Tensor,
    masks: torch.Tensor,
    boxes: torch.Tensor,
    args: argparse.Namespace,
    rng: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """L_sup of one image over a first prompt and corrective clicks, and the IoU of the first prompt's best mask.

    First a box or a click with three masks, for a box the single one as well (ours: a box is not ambiguous, and users
    ask for one mask); from the second prompt on three masks or the single one, half each. The most confident mask goes
    on: its logits are fed back, the next click lies where it is wrong.
    """
    size = sam.image_encoder.img_size
    if torch.rand((), generator=rng) < 0.5:
        points, boxes = None, noisy_boxes(boxes, size, rng)
    else:
        points, boxes = first_clicks(masks, rng), None
    logits, scores = decode(sam, embedding, points, boxes)
    first = [MULTI] if boxes is None else [MULTI, SINGLE]
    losses = [torch.stack([supervised_loss(logits, scores, masks, m, args.mask_loss) for m in first]).mean()]
    asked = MULTI
    with torch.no_grad():
        first_iou = mask_iou(logits[:, MULTI], masks).max(1).values.mean()
    for _ in range(args.clicks):
        best = asked.start + scores[:, asked].argmax(1)
        previous = logits[torch.arange(len(masks)), best].detach().float()
        new = corrective_clicks(previous, masks, rng)
        points = new if points is None else tuple(torch.cat(pair, 1) for pair in zip(points, new))
        logits, scores = decode(sam, embedding, points, boxes, previous[:, None])
        asked = MULTI if torch.rand((), generator=rng) < 0.5 else SINGLE
        losses.append(supervised_loss(logits, scores, masks, asked, args.mask_loss))
    return torch.stack(losses).mean(), first_iou


def supervised_losses(
    sam: Sam, embeddings: torch.Tensor, batch: Batch, args: argparse.Namespace, rng: torch.Generator
) -> dict[str, torch.Tensor]:
    """L_sup and the first prompts' IoU, means over the images that have an object."""
    per_image = [
        prompted_loss(sam, embedding[None], masks, boxes, args, rng)
        for embedding, (masks, boxes) in zip(embeddings, batch.objects)
        if len(masks)
    ]
    if not per_image:  # a batch without an object still has a gradient
        return {"sup": embeddings.sum() * 0, "iou": embeddings.sum().detach() * 0}
    losses, ious = zip(*per_image)
    return {"sup": torch.stack(losses).mean(), "iou": torch.stack(ious).mean()}


def step_losses(
    sam: Sam, teacher: nn.Module | None, batch: Batch, keep_ratio: float, args: argparse.Namespace, step: int
) -> dict[str, torch.Tensor]:
    """The losses of one step, apart; all random draws depend on (seed, step)."""
    rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    embeddings = sam.image_encoder(batch.images, true_sizes=batch.true_sizes, keep_ratio=keep_ratio)
    losses = {} if args.stage == "encoder" else supervised_losses(sam, embeddings, batch, args, rng)
    if teacher is not None:
        with torch.no_grad():
            target = teacher(batch.images)
        side = embeddings.shape[-1]
        real = real_tokens(side, side, torch.tensor(batch.true_sizes, device=embeddings.device))
        losses["fd"] = DISTILLATION_LOSSES[args.distill_loss](embeddings, target, real)
    losses["loss"] = losses.get("sup", 0) + args.distill_weight * losses.get("fd", 0)
    return losses


@torch.no_grad()
def validate(sam: Sam, loader: DataLoader, keep_ratio: float) -> dict[str, float]:
    """Mean IoU over held-out objects at the decoder's resolution, most confident of three: true boxes, one click."""
    found = {"val_box": [], "val_click": []}
    rng = torch.Generator().manual_seed(0)
    for samples in loader:
        batch = to_batch(samples, sam)
        embeddings = sam.image_encoder(batch.images, true_sizes=batch.true_sizes, keep_ratio=keep_ratio)
        for embedding, (masks, boxes) in zip(embeddings, batch.objects):
            if not len(masks):
                continue
            for name, points, given in (("val_box", None, boxes), ("val_click", first_clicks(masks, rng), None)):
                logits, scores = decode(sam, embedding[None], points, given)
                best = MULTI.start + scores[:, MULTI].argmax(1)
                found[name] += mask_iou(logits[torch.arange(len(masks)), best][:, None], masks)[:, 0].tolist()
    return {name: float(np.mean(values)) for name, values in found.items()}


# --- the run ---------------------------------------------------------------------------------------------------------


def build_models(args: argparse.Namespace) -> tuple[Sam, nn.Module | None]:
    """The student, and the teacher's image encoder."""
    teacher, decoder = None, {}
    if args.teacher is not None:
        teacher, decoder = load_teacher(args.teacher, args.teacher_checkpoint, args.image_size)
        teacher = teacher.to(args.device, memory_format=torch.channels_last)
        if args.compile:
            teacher = torch.compile(teacher, options={"freezing": True})
    start = args.init or (args.teacher_checkpoint if args.teacher in CONFIGS else None)
    torch.manual_seed(args.seed)  # fresh E-blocks and predictors
    build = sam_model_registry[args.model]
    sam = build(start, image_size=args.image_size, keep_ratio=args.keep_ratio[0]).to(args.device)
    if args.stage == "encoder":
        sam.load_state_dict(decoder, strict=False)
        sam.mask_decoder.requires_grad_(False)
    sam.prompt_encoder.requires_grad_(False)
    return sam, teacher


def optimizer_of(sam: Sam, lr: float) -> torch.optim.AdamW:
    """AdamW; biases, norms, positions and the scalars of the fusion do not decay."""
    decay, plain = [], []
    for name, p in sam.named_parameters():
        if p.requires_grad:
            (plain if p.dim() < 2 or "pos" in name or "fusion" in name else decay).append(p)
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def average(averaged: list[torch.Tensor], current: list[torch.Tensor], seen: torch.Tensor) -> None:
    """Moving average of the weights with decay 0.999, less at first so that a short run does not ship its start."""
    decay = min(0.999, (1 + int(seen)) / (10 + int(seen)))
    torch._foreach_lerp_(averaged, current, 1 - decay)


def rate(lr: float, step: int, progress: float, warm_up: int = 100) -> float:
    """Linear warm-up, then a cosine to zero over the run."""
    return lr * min(1, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(1, progress)))


def outlive_signals(worker: int) -> None:
    """A terminal sends Ctrl-C to the workers too; the main process still wants the views they are making."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def save(args: argparse.Namespace, step: int, minutes: float, sam: Sam, ema: AveragedModel, optimizer) -> None:
    state = {"sam": sam.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"step": step, "minutes": minutes}
    ckpt.write_atomically(args.output / "last.pt", lambda path: torch.save(state, path))
    metadata = {"model": args.model, "image_size": str(args.image_size), "step": str(step)}
    ckpt.save(args.output / "model.safetensors", ema.module.state_dict(), metadata, torch.float16)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    train_photos, val_photos = split_photos(list_photos(args.data), args.holdout, seed=0)
    sam, teacher = build_models(args)
    ema = AveragedModel(sam, multi_avg_fn=torch.no_grad()(average))
    optimizer = optimizer_of(sam, args.lr)
    args.output.mkdir(parents=True, exist_ok=True)

    first, spent = 0, 0.0
    if args.resume and (args.output / "last.pt").is_file():
        saved = torch.load(args.output / "last.pt", map_location=args.device, weights_only=True)
        sam.load_state_dict(saved["sam"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        first, spent = saved["step"], saved["minutes"]
    settings = dict(vars(args))
    settings |= {"photos": len(train_photos), "torch": torch.__version__, "blsam": blsam.__version__}
    text = json.dumps(settings, indent=1, default=str)
    ckpt.write_atomically(args.output / "config.json", lambda path: Path(path).write_text(text))

    total = args.steps or 10**7
    objects = 0 if args.stage == "encoder" else args.max_objects
    views = TrainingViews(train_photos, args.image_size, objects, args.seed, total * args.batch_size)
    rest = Subset(views, range(first * args.batch_size, len(views)))
    loader = DataLoader(
        rest, args.batch_size, num_workers=args.workers, collate_fn=list, worker_init_fn=outlive_signals
    )
    held_out = TrainingViews(val_photos, args.image_size, args.max_objects, 0, len(val_photos)) if val_photos else None

    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.append(True))
    step, start, log = first, time.monotonic() - 60 * spent, (args.output / "metrics.jsonl").open("a")
    bar = tqdm(total=args.steps, initial=first, unit="step", disable=not sys.stderr.isatty())
    sums: dict[str, list[float]] = {}
    for samples in loader:
        minutes = (time.monotonic() - start) / 60
        progress = step / total if args.steps else minutes / args.minutes
        if progress >= 1 or stopped:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(args.lr, step, progress)
        keep = args.keep_ratio[int(np.random.default_rng([args.seed, 2, step]).integers(len(args.keep_ratio)))]
        device_type = sam.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=args.precision == "bf16"):
            losses = step_losses(sam, teacher, to_batch(samples, sam), keep, args, step)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(sam)
        step += 1

        for name, value in losses.items():
            sums.setdefault(name, []).append(value.item())
        bar.update()
        if step % 20 == 0:
            row = {"step": step, "minutes": round(minutes, 2), "lr": optimizer.param_groups[0]["lr"]}
            row |= {name: round(float(np.mean(values)), 5) for name, values in sums.items()}
            row["images_per_second"] = round((step - first) * args.batch_size / (60 * (minutes - spent) + 1e-9), 2)
            row["peak_gb"] = round(peak_gb(sam.device), 2)
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.set_postfix({name: row[name] for name in ("loss", "iou") if name in row})
            sums = {}
        if held_out is not None and step % args.validate_every == 0:
            result = validate(ema.module, DataLoader(held_out, args.batch_size, collate_fn=list), args.keep_ratio[0])
            log.write(json.dumps({"step": step} | {k: round(v, 4) for k, v in result.items()}) + "\n")
        if step % args.save_every == 0:
            save(args, step, minutes, sam, ema, optimizer)
    save(args, step, (time.monotonic() - start) / 60, sam, ema, optimizer)
    if held_out is not None:
        result = validate(ema.module, DataLoader(held_out, args.batch_size, collate_fn=list), args.keep_ratio[0])
        log.write(json.dumps({"step": step} | {k: round(v, 4) for k, v in result.items()}) + "\n")
        print(f"step {step}: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in result.items()), file=sys.stderr)
    log.close()
    print(args.output / "model.safetensors")
    return 0


if __name__ == "__main__":
    run_script("train_sam", main)
