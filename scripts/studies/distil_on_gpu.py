"""A small SAM from a large one on one GPU in minutes: the encoder from the teacher's embeddings, all of it on masks, then
the decoder alone.

    python -m scripts.studies.distil_on_gpu --teacher-checkpoint mobile_sam.pt --init START.safetensors \
        --data sa_mini photos --minutes 7 4 2 --output runs/gpu

Photos lie on the device and views are cut there (`device_views`); a ring of views with their teacher's embeddings is
drawn from several times. Run again, it goes on where it was. `OUTPUT/model.safetensors` is written every half minute.

Of photos without annotations the teacher's own masks are learnt, found from random points.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from blsam.build_sam import sam_model_registry
from blsam.data.sa1b import choose_photos, list_photos
from blsam.distributed import Stopwatch, peak_gb
from blsam.files import write_atomically
from blsam.modeling.sam import Sam
from blsam.options import Parser, exit_status
from blsam.training.losses import mask_iou, relative_mse_loss
from blsam.training.objective import MULTI
from blsam.training.optim import optimizer_of
from blsam.training.teachers import TEACHERS, load_teacher

from .device_prompts import clicks, decode, prompted, prompts, tuned
from .device_views import (
    Objects,
    Photos,
    Ring,
    Zoom,
    chosen_objects,
    draw_windows,
    images_of,
    mosaics,
    objects_of,
    reached,
    read_photos,
    shuffled,
    take,
)

POINTS, ASKED = 16, 3  # of a view that the teacher is asked at for objects of its own, and for what it draws there
HELD_OUT, VALIDATED = 0.05, 96  # share of the photos, at most so many
SAVE_EVERY, SAY_EVERY = 30, 10  # seconds
PHASES = ("encoder", "masks", "decoder")
WEIGHT = {"encoder": 1.0, "masks": 0.5, "decoder": 0.0}  # of the distance to the teacher's embedding


@dataclass
class Made:
    """What views are made with: photos of training, the teacher (encoder, and a copy of the decoder that reads it), the
    student, sides of the frame, shares."""

    photos: Photos
    teacher: nn.Module
    reader: Sam
    sam: Sam
    finer: int
    mosaic: float
    unlabelled: float
    objects: int
    zoom: Zoom

    @property
    def side(self) -> int:
        """Of the student's frame, in pixels."""
        return self.sam.image_encoder.img_size

    @property
    def grid(self) -> int:
        """Cells along the student's embedding."""
        return self.sam.prompt_encoder.image_embedding_size[0]


def main() -> int:
    return exit_status("distil_on_gpu", lambda: train(parse()))


def train(args: argparse.Namespace) -> None:
    for path in (args.init, args.teacher_checkpoint):
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    photos = list_photos(args.data, plain=True)
    training, validation = choose_photos(photos, 1.0, HELD_OUT, 0, VALIDATED)
    if not validation:
        raise ValueError(f"{len(photos)} photos are too few to hold any out: at least 11 are needed")
    say(f"{len(training)} photos, {len(validation)} held out")
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    held = read_photos(training, args.readers), read_photos(validation, args.readers)
    say(f"photos read in {time.monotonic() - started:.0f} s, {len(held[0].masks)} masks")
    sam = sam_model_registry[args.model](args.init, image_size=args.image_size).to(device)
    teacher, decoder = load_teacher(args.teacher, args.teacher_checkpoint, args.finer * args.image_size)
    teacher = fused(teacher).to(device, memory_format=torch.channels_last)
    reader = copy.deepcopy(sam).eval().requires_grad_(False)
    reader.load_state_dict({k: v for k, v in decoder.items() if not k.startswith("image_encoder.")}, strict=False)
    if args.minutes[0]:  # it learns to be read by the teacher's decoder; without this phase it keeps its own
        sam.mask_decoder.load_state_dict(reader.mask_decoder.state_dict())
    made = Made(
        held[0].to(device), teacher, reader, sam, args.finer, args.mosaic, args.unlabelled, args.objects, Zoom()
    )
    fixed = validation_views(made, held[1].to(device))
    log = (args.output / "metrics.jsonl").open("a")
    for number, minutes in enumerate(args.minutes):
        run(number, 60 * minutes, made, fixed, args, log)


def run(number: int, seconds: float, made: Made, fixed: list[dict[str, torch.Tensor]], args: Any, log: Any) -> None:
    """One phase to the end of its seconds, from where the output folder says that it was."""
    sam, phase, masks = made.sam, PHASES[number], PHASES[number] != "encoder"
    sam.requires_grad_(False)
    sam.image_encoder.requires_grad_(phase != "decoder")
    sam.mask_decoder.requires_grad_(masks)
    optimizer = optimizer_of(sam, args.lr[number])
    batch = args.batch_size[number]
    place = args.output / f"{phase}.pt"
    done, step = 0.0, 0
    if place.is_file():
        state = torch.load(place, map_location=args.device, weights_only=True)
        sam.load_state_dict(state["sam"])
        optimizer.load_state_dict(state["optimizer"])
        done, step = state["seconds"], state["step"]
    if done >= seconds:
        return
    rng, ring = np.random.default_rng([args.seed, step, number]), Ring(args.ring[masks])
    order = orders(made.photos, rng)
    fresh = max(1, round(batch * args.fresh))
    for _ in range(args.filled):
        ring.add(views(made, order, batch, rng, phase))
    clock = Clock(done, seconds)
    watch = Stopwatch(torch.device(args.device))
    part = watch if args.watch else lambda name: nullcontext()
    terms: dict[str, list[torch.Tensor]] = {}
    while clock.share < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(args.lr[number], clock.share)
        with part("views"):
            ring.add(views(made, order, fresh, rng, phase))
        with part("losses"):
            found = losses(sam, ring.draw(batch, fresh), phase, args.clicks, args.bf16)
        with part("backward"):
            optimizer.zero_grad(set_to_none=True)
            (WEIGHT[phase] * found["fd"] + found.get("sup", 0)).backward()
            found["norm"] = nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
            optimizer.step()
        step += 1
        for name, value in found.items():
            terms.setdefault(name, []).append(value.detach())
        if clock.due("say", SAY_EVERY):
            means = {name: round(torch.stack(values).mean().item(), 4) for name, values in terms.items()}
            row = {
                "phase": phase,
                "step": step,
                "minutes": round(clock.seconds / 60, 3),
                "views": step * batch,
            } | means
            row["views_per_second"] = round(len(terms["fd"]) * batch / clock.lap(), 1)
            row |= {f"s_{name}": round(seconds / len(terms["fd"]), 4) for name, seconds in watch.seconds.items()}
            watch.seconds.clear()
            write(log, row | {"gb": round(peak_gb(torch.device(args.device)), 1)})
            terms = {}
        last = clock.share >= 1
        if clock.due("validate", args.validate_every) or last:
            write(
                log,
                {"phase": phase, "step": step, "minutes": round(clock.seconds / 60, 3)}
                | measured(sam, fixed, args.bf16),
            )
        if clock.due("save", SAVE_EVERY) or last:
            save(args, sam, optimizer, phase, step, clock.seconds)


def rate_at(lr: float, share: float) -> float:
    """Linear warm-up over a twentieth of the time, and a cosine to zero."""
    return lr * min(1, share / 0.05) * 0.5 * (1 + math.cos(math.pi * min(1, share)))


class Clock:
    """Seconds of a phase, and what is due every so many of them."""

    def __init__(self, done: float, whole: float) -> None:
        self.begun, self.whole = time.monotonic() - done, whole
        self.last: dict[str, float] = {}
        self.lapped = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    @property
    def share(self) -> float:
        return self.seconds / self.whole

    def due(self, name: str, every: float) -> bool:
        last = self.last.setdefault(name, time.monotonic())
        if time.monotonic() - last < every:
            return False
        self.last[name] = time.monotonic()
        return True

    def lap(self) -> float:
        """Seconds since it was asked before."""
        before, self.lapped = self.lapped, time.monotonic()
        return self.lapped - before


# --- views with their teacher's answers ------------------------------------------------------------------------------


def orders(photos: Photos, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Endless orders of all photos, of those with masks and of those without."""
    labelled = np.diff(photos.first) > 0
    every, with_masks, without = (np.flatnonzero(x) for x in (labelled | True, labelled, ~labelled))
    return tuple((which, shuffled(len(which), rng)) for which in (every, with_masks, without))


@torch.no_grad()
def views(made: Made, order: Any, count: int, rng: np.random.Generator, phase: str) -> dict[str, torch.Tensor]:
    """So many new views: image half [3, S, S], real bool [g, g], target half [256, g, g], after the
    first phase their objects."""
    masks = phase != "encoder"
    many = 0 if masks else round(made.mosaic * count)
    if masks and len(order[2][0]):
        without = int(rng.binomial(count, made.unlabelled))
        chosen = np.concatenate([following(order[1], count - without), following(order[2], without)])
    else:
        chosen = following(order[0], count - many)
    windows = draw_windows(made.photos, chosen, made.zoom, rng)
    side, mean, std = made.finer * made.side, made.sam.pixel_mean, made.sam.pixel_std
    frames, shown = images_of(made.photos, windows, side, rng, mean, std), windows.shown
    if many:
        tiles = draw_windows(made.photos, following(order[0], 4 * many), made.zoom, rng, cover=True)
        frames = torch.cat([frames, mosaics(images_of(made.photos, tiles, side // 2, rng, mean, std))])
        shown = torch.cat([shown, torch.ones_like(shown[:1]).expand(many, -1)])
    found = seen(made, frames, shown)
    if masks:
        objects = objects_of(made.photos, windows, 4 * made.grid, made.objects, rng)
        blank = ~torch.from_numpy(np.diff(made.photos.first)[chosen] > 0).to(frames.device)
        if blank.any():
            own = teachers_objects(made, found["target"][blank].float(), shown[blank])
            for name, values in vars(own).items():
                getattr(objects, name)[blank] = values
        found |= vars(objects)
    if phase == "decoder":
        found |= answers(made, found["target"].float(), shown)
    return found


def following(order: Any, count: int) -> np.ndarray:
    """The next numbers of photos of an endless order."""
    return order[0][take(order[1], count)]


@torch.no_grad()
def seen(made: Made, frames: torch.Tensor, shown: torch.Tensor) -> dict[str, torch.Tensor]:
    """Frames as the student gets them, and what the teacher says."""
    target = []
    with torch.autocast(frames.device.type, torch.bfloat16):
        for piece in frames.split(64):
            target.append(made.teacher(piece.contiguous(memory_format=torch.channels_last)).float())
    answer = torch.cat(target)
    answer = F.avg_pool2d(answer, answer.shape[-1] // made.grid)
    image = F.avg_pool2d(frames, made.finer)
    return {"image": image.half(), "real": reached(shown, made.grid), "target": answer.half()}


@torch.no_grad()
def answers(made: Made, target: torch.Tensor, shown: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the teacher says at random points: asked [n, Q, 2], x and y as shares of the frame, told bool [n, Q, 3, m, m]
    and its scores, sure [n, Q, 3]."""
    place = torch.rand(len(target), ASKED, 2, device=target.device) * shown.flip(1)[:, None]
    logits, scores = told_by(made, target, place)
    shape = len(target), ASKED
    return {"asked": place, "told": (logits > 0).unflatten(0, shape), "sure": scores.unflatten(0, shape)}


def told_by(made: Made, target: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's three masks and scores at each place [n, Q, 2] of its embeddings [n, 256, g, g]."""
    points = place.flatten(0, 1)[:, None] * made.side
    which = torch.arange(len(target), device=target.device).repeat_interleave(place.shape[1])
    with torch.autocast(target.device.type, torch.bfloat16):
        given = prompts(made.reader, (points, torch.ones(len(points), 1, device=points.device)))
        logits, scores = decode(made.reader, target, which, given)
    return logits[:, MULTI].float(), scores[:, MULTI].float()


@torch.no_grad()
def teachers_objects(made: Made, target: torch.Tensor, shown: torch.Tensor) -> Objects:
    """Objects that the teacher finds at random points: sure and stable masks that do not cover everything."""
    count = len(target)
    place = torch.rand(count, POINTS, 2, device=target.device) * shown.flip(1)[:, None]
    logits, scores = told_by(made, target, place)
    best = scores.argmax(1)
    rows = torch.arange(len(best), device=best.device)
    mask, score = logits[rows, best], scores[rows, best]
    stable = (mask > 1).sum((1, 2)) / (mask > -1).sum((1, 2)).clamp(min=1)
    hit = (mask > 0).float().unflatten(0, (count, POINTS))
    part = hit.mean((2, 3)) / shown.prod(1)[:, None]
    good = (score > 0.85) & (stable > 0.85)
    return chosen_objects(hit, good.view(count, POINTS) & (part < 0.7), made.objects, hit.shape[-1])


# --- losses ----------------------------------------------------------------------------------------------------------


def losses(
    sam: Sam, batch: dict[str, torch.Tensor], phase: str, corrections: int, bf16: bool
) -> dict[str, torch.Tensor]:
    """fd: the squared distance to the teacher's embedding as a share of its variance; sup: L_sup over prompts."""
    images = batch["image"].float()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        with torch.set_grad_enabled(phase != "decoder"):
            embedding = sam.image_encoder(images)
        found = {"fd": relative_mse_loss(embedding, batch["target"], batch["real"]).mean()}
        if phase == "masks":
            found |= prompted(sam, embedding, batch, corrections)
        if phase == "decoder":
            found |= tuned(sam, embedding, batch)
    return found


# --- what is measured and kept ---------------------------------------------------------------------------------------


def validation_views(made: Made, photos: Photos) -> list[dict[str, torch.Tensor]]:
    """Photos held out, each whole, in its own colours, with its teacher's embedding and objects."""
    rng, found = np.random.default_rng(0), []
    for some in np.array_split(np.arange(len(photos.sizes)), max(1, len(photos.sizes) // 16)):
        windows = draw_windows(photos, some, Zoom(fitted=1.0), rng, mirror=False)
        side = made.finer * made.side
        frames = images_of(photos, windows, side, None, made.sam.pixel_mean, made.sam.pixel_std)
        found.append(
            seen(made, frames, windows.shown) | vars(objects_of(photos, windows, 4 * made.grid, made.objects, rng))
        )
    return found


@torch.no_grad()
def measured(sam: Sam, fixed: list[dict[str, torch.Tensor]], bf16: bool) -> dict[str, float]:
    """Error to the teacher's embedding; IoU of the most confident of three, from the box and from a click in the middle."""
    errors, ious = [], {"box": [], "click": []}
    side = sam.image_encoder.img_size
    for batch in fixed:
        image = batch["image"].float()
        which, slot = batch["there"].nonzero(as_tuple=True)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
            embedding = sam.image_encoder(image)
            errors.append(relative_mse_loss(embedding, batch["target"], batch["real"]))
            if not len(which):
                continue
            target = batch["masks"][which, slot].float() / 255
            where = clicks(target > 0.5, middle=torch.ones(len(target), dtype=torch.bool, device=target.device))
            points = where[:, None] * side, torch.ones(len(target), 1, device=target.device)
            given = {"box": prompts(sam, boxes=batch["boxes"][which, slot] * side), "click": prompts(sam, points)}
            for name, one in given.items():
                logits, scores = decode(sam, embedding, which, one)
                best = MULTI.start + scores[:, MULTI].argmax(1)
                rows = torch.arange(len(best), device=best.device)
                ious[name].append(mask_iou(logits[rows, best][:, None], target)[:, 0])
    found = {"val_error": torch.cat(errors).mean().item()}
    found |= {f"val_{name}": torch.cat(values).mean().item() for name, values in ious.items() if values}
    return {name: round(value, 4) for name, value in found.items()}


def save(args: Any, sam: Sam, optimizer: torch.optim.Optimizer, phase: str, step: int, seconds: float) -> None:
    """The weights in half precision, and what the phase goes on from."""
    half = {name: value.detach().half().cpu().contiguous() for name, value in sam.state_dict().items()}
    about = {"model": args.model, "image_size": str(args.image_size), "step": str(step), "format": "pt"}
    write_atomically(args.output / "model.safetensors", lambda path: save_file(half, path, about))
    state = {"sam": sam.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    write_atomically(args.output / f"{phase}.pt", lambda path: torch.save(state, path))


def fused(teacher: nn.Module) -> nn.Module:
    """MobileSAM's convolutions with the norms that follow them as one."""
    for module in teacher.modules():
        for name, child in module.named_children():
            if callable(getattr(child, "fuse", None)):
                setattr(module, name, child.fuse().requires_grad_(False))
    return teacher


def say(text: str) -> None:
    print(text, flush=True)


def write(log: Any, row: dict[str, Any]) -> None:
    text = json.dumps(row)
    say(text)
    log.write(text + "\n")
    log.flush()


def parse() -> argparse.Namespace:
    parser = Parser(prog="distil_on_gpu", description=__doc__)
    add = parser.add_argument
    add("--teacher", choices=TEACHERS, default="mobile_sam")
    add("--teacher-checkpoint", type=Path, required=True)
    add("--init", type=Path, required=True, help="weights of the student to begin with")
    add("--data", nargs="+", required=True, help="folders of photos, with a json beside each that is annotated")
    add("--output", type=Path, required=True)
    add("--model", default="vit_t_fine")
    add("--image-size", type=int, default=512)
    add("--finer", type=int, default=2, help="pixels of the teacher's frame along one of the student's (2)")
    names = tuple(name.upper() for name in PHASES)
    add("--minutes", type=float, nargs=3, default=(7.0, 4.0, 2.0), metavar=names)
    add("--batch-size", type=int, nargs=3, default=(128, 32, 32), metavar=names)
    add("--lr", type=float, nargs=3, default=(1.5e-3, 3e-4, 1e-4), metavar=names)
    add("--clicks", type=int, default=2, help="at most so many where a mask is wrong (2)")
    add("--objects", type=int, default=8, help="of a view, at most (8)")
    add("--ring", type=int, nargs=2, default=(16000, 6000), metavar=("ENCODER", "OTHERS"), help="views that are held")
    add("--filled", type=int, default=8, help="batches that the ring holds at the first step (8)")
    add("--fresh", type=float, default=1 / 3, help="share of each batch that is new (1/3)")
    add("--mosaic", type=float, default=0.25, help="share of the encoder's views that show four photos (0.25)")
    add("--unlabelled", type=float, default=0.4, help="share of the masks' views without annotations (0.4)")
    add("--validate-every", type=float, default=60, help="seconds (60)")
    add("--readers", type=int, default=8, help="processes that read the photos (8)")
    add("--watch", action="store_true", help="seconds of a step by part; waiting for each of them costs a little")
    add("--device", default="cuda")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True)
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
