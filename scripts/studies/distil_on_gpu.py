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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from blsam.build_sam import sam_model_registry
from blsam.config import CONFIGS
from blsam.data.sa1b import choose_photos, list_photos
from blsam.distributed import Stopwatch, peak_gb
from blsam.files import write_atomically, write_text
from blsam.modeling.sam import Sam
from blsam.options import Parser, check_folder, exit_status, parse_device, parse_image_size
from blsam.training.loop import take_decoder
from blsam.training.losses import mask_iou, relative_mse_loss
from blsam.training.objective import MULTI
from blsam.training.optim import optimizer_of
from blsam.training.teachers import DENSE, TEACHERS, check_grid, load_teacher

from .device_prompts import decode, prompted, prompts, tuned
from .device_views import Ring, Zoom, read_photos
from .taught_views import Made, fused, orders, validation_views, views

HELD_OUT, VALIDATED = 0.05, 96  # share of the photos, at most so many
SAVE_EVERY, SAY_EVERY = 30, 10  # seconds
PHASES = ("encoder", "masks", "decoder")
STATE = "state.pt"
FREE = ("minutes", "device", "readers", "data", "init", "teacher_checkpoint", "output", "validate_every", "watch")
WEIGHT = {"encoder": 1.0, "masks": 0.5, "decoder": 0.0}  # of the distance to the teacher's embedding


def main() -> int:
    return exit_status("distil_on_gpu", lambda: train(parse()))


def train(args: argparse.Namespace) -> None:
    check(args)
    device, image_size = args.device, args.image_size
    photos = list_photos(args.data, plain=True)
    training, validation = choose_photos(photos, 1.0, HELD_OUT, 0, VALIDATED)
    if not validation:
        raise ValueError(f"{len(photos)} photos are too few to hold any out: at least 11 are needed")
    say(f"{len(training)} photos, {len(validation)} held out")
    state = go_on(args)
    sam = sam_model_registry[args.model](args.init, image_size=image_size)
    teacher, decoder = load_teacher(args.teacher, args.teacher_checkpoint, args.finer * image_size)
    teacher = fused(teacher).to(device, memory_format=torch.channels_last)
    reader = copy.deepcopy(sam).eval().requires_grad_(False).to(device)
    reader.load_state_dict({k: v for k, v in decoder.items() if not k.startswith("image_encoder.")}, strict=False)
    if args.minutes[0]:  # it learns to be read by the teacher's decoder; without this phase it keeps its own
        take_decoder(sam, decoder)
    if state:
        sam.load_state_dict(state["sam"])
    started = time.monotonic()
    held = [read_photos(some, args.readers).to(device) for some in (training, validation)]
    say(f"photos read in {time.monotonic() - started:.0f} s, {len(held[0].masks)} masks")
    made = Made(
        held[0], teacher, reader, sam.to(device), args.finer, args.mosaic, args.unlabelled, args.objects, Zoom()
    )
    fixed = validation_views(made, held[1])
    with (args.output / "metrics.jsonl").open("a") as log:
        for number, minutes in enumerate(args.minutes):
            if minutes and number >= state.get("number", 0):
                mine = state if number == state.get("number") else {}
                run(number, 60 * minutes, mine, made, fixed, args, log)


def check(args: argparse.Namespace) -> None:
    """What can be wrong with the options, before anything is read."""
    for path in (args.init, args.teacher_checkpoint):
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
    check_folder("--output", args.output)
    check_grid(CONFIGS[args.model], args.teacher, args.finer)
    if min(*args.batch_size, args.objects, args.readers, args.filled, args.finer) < 1:
        raise ValueError("--batch-size, --objects, --readers, --filled and --finer are at least 1")
    for ring, batch in zip((args.ring[0], args.ring[1], args.ring[1]), args.batch_size):
        if ring < batch:
            raise ValueError(f"--ring {ring} does not hold a batch of {batch}")


def go_on(args: argparse.Namespace) -> dict[str, Any]:
    """What the output folder's run goes on from, {} for a new one; ValueError if it was begun with other settings."""
    args.output.mkdir(parents=True, exist_ok=True)
    mine = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    place = args.output / "config.json"
    if place.is_file():
        for name, value in json.loads(place.read_text()).items():
            if mine.get(name) != value:
                raise ValueError(f"{args.output} was begun with {name} {value}, this command has {mine.get(name)}")
    write_text(place, json.dumps(mine, indent=1))
    stored = args.output / STATE
    # on the CPU: the optimiser's counters would make it wait for a GPU in every step
    return torch.load(stored, map_location="cpu", weights_only=True) if stored.is_file() else {}


def run(
    number: int,
    seconds: float,
    state: dict[str, Any],
    made: Made,
    fixed: list[dict[str, torch.Tensor]],
    args: argparse.Namespace,
    log: Any,
) -> None:
    """One phase to the end of its seconds, from its state in an earlier run if there is one."""
    sam, phase, batch = made.sam, PHASES[number], args.batch_size[number]
    sam.requires_grad_(False)
    sam.image_encoder.requires_grad_(phase != "decoder")
    sam.mask_decoder.requires_grad_(phase != "encoder")
    optimizer = optimizer_of(sam, args.lr[number])
    step, clock, tally = state.get("step", 0), Clock(state.get("seconds", 0.0), seconds), Tally(args)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    if clock.share >= 1:
        return
    rng, ring = np.random.default_rng([args.seed, number, step]), Ring(args.ring[number > 0])
    torch.manual_seed(int(rng.integers(2**31)))
    order, fresh = orders(made.photos, rng), max(1, round(batch * args.fresh))
    for _ in range(args.filled):
        ring.add(views(made, order, batch, rng, phase))

    def close(kind: str, always: bool = False) -> None:
        at = {"phase": phase, "step": step, "minutes": round(clock.seconds / 60, 3)}
        if kind == "validate" and (always or clock.due(kind, args.validate_every)):
            write(log, at | measured(sam, fixed))
        if kind == "save" and (always or clock.due(kind, SAVE_EVERY)):
            save(args, sam, optimizer, number, step, clock.seconds)
        if kind == "say" and clock.due(kind, SAY_EVERY):
            write(log, at | {"views": step * batch} | tally.row(batch))

    while clock.share < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(args.lr[number], clock.share)
        with tally.part("views"):
            ring.add(views(made, order, fresh, rng, phase))
        with tally.part("losses"):
            found = losses(sam, ring.draw(batch, fresh), phase, args.clicks)
        with tally.part("backward"):
            optimizer.zero_grad(set_to_none=True)
            total = WEIGHT[phase] * found["fd"] + found.get("sup", 0)
            if total.requires_grad:  # the decoder alone, and hardly an object in the batch: nothing to learn
                total.backward()
            found["norm"] = nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
            optimizer.step()
        step += 1
        tally.add(found)
        for kind in ("say", "validate", "save"):
            close(kind)
    for kind in ("validate", "save"):
        close(kind, always=True)


class Tally:
    """Means of what steps found, since they were asked for last, and with --watch the seconds of a step by part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.watch = args.device, Stopwatch(args.device)
        self.part: Callable[[str], AbstractContextManager[None]] = (
            self.watch if args.watch else lambda _: nullcontext()
        )
        self.terms: dict[str, list[torch.Tensor]] = {}
        self.since = time.monotonic()

    def add(self, found: dict[str, torch.Tensor]) -> None:
        """A step."""
        for name, value in found.items():
            self.terms.setdefault(name, []).append(value.detach())

    def row(self, batch: int) -> dict[str, float]:
        """Begins anew."""
        found = {name: round(torch.stack(values).mean().item(), 4) for name, values in self.terms.items()}
        steps, now = len(self.terms["fd"]), time.monotonic()
        found["views_per_second"] = round(steps * batch / (now - self.since), 1)
        found |= {f"s_{name}": round(seconds / steps, 4) for name, seconds in self.watch.seconds.items()}
        self.terms, self.since = {}, now
        self.watch.seconds.clear()
        return found | {"gb": round(peak_gb(self.device), 1)}


def rate_at(lr: float, share: float) -> float:
    """Linear warm-up over a twentieth of the time, and a cosine to zero."""
    return lr * min(1, share / 0.05) * 0.5 * (1 + math.cos(math.pi * min(1, share)))


class Clock:
    """Seconds of a phase, and what is due every so many of them."""

    def __init__(self, done: float, whole: float) -> None:
        self.begun, self.whole = time.monotonic() - done, whole
        self.last: dict[str, float] = {}

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


# --- losses ----------------------------------------------------------------------------------------------------------


def losses(sam: Sam, batch: dict[str, torch.Tensor], phase: str, corrections: int) -> dict[str, torch.Tensor]:
    """fd: the squared distance to the teacher's embedding as a share of its variance; sup: L_sup over prompts."""
    images = batch["image"].float()
    with torch.autocast(images.device.type, torch.bfloat16):
        with torch.set_grad_enabled(phase != "decoder"):
            embedding = sam.image_encoder(images)
        found = {"fd": relative_mse_loss(embedding, batch["target"], batch["real"]).mean()}
        if phase == "masks":
            found |= prompted(sam, embedding, batch, corrections)
        if phase == "decoder":
            found |= tuned(sam, embedding, batch)
    return found


# --- what is measured and kept ---------------------------------------------------------------------------------------


@torch.no_grad()
def measured(sam: Sam, fixed: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Error to the teacher's embedding; IoU of the most confident of three, from the box and from a click in the middle."""
    errors, ious = [], {"box": [], "click": []}
    side = sam.image_encoder.img_size
    for batch in fixed:
        image = batch["image"].float()
        which, slot = batch["there"].nonzero(as_tuple=True)
        with torch.autocast(image.device.type, torch.bfloat16):
            embedding = sam.image_encoder(image)
            errors.append(relative_mse_loss(embedding, batch["target"], batch["real"]))
            if not len(which):
                continue
            target = batch["masks"][which, slot].float() / 255
            points = batch["middle"][which, slot][:, None] * side, torch.ones(len(target), 1, device=target.device)
            given = {"box": prompts(sam, boxes=batch["boxes"][which, slot] * side), "click": prompts(sam, points)}
            for name, one in given.items():
                logits, scores = decode(sam, embedding, which, one)
                best = MULTI.start + scores[:, MULTI].argmax(1)
                rows = torch.arange(len(best), device=best.device)
                ious[name].append(mask_iou(logits[rows, best][:, None], target)[:, 0])
    found = {"val_error": torch.cat(errors).mean().item()}
    found |= {f"val_{name}": torch.cat(values).mean().item() for name, values in ious.items() if values}
    return {name: round(value, 4) for name, value in found.items()}


def save(
    args: argparse.Namespace, sam: Sam, optimizer: torch.optim.Optimizer, number: int, step: int, seconds: float
) -> None:
    """The weights in half precision, and what a later run goes on from; ValueError where they are not finite."""
    half = {name: value.detach().half().cpu().contiguous() for name, value in sam.state_dict().items()}
    if not all(value.isfinite().all() for value in half.values()):
        raise ValueError(f"step {step}: the weights are not finite; a lower --lr may help")
    about = {"model": args.model, "image_size": str(args.image_size), "step": str(step), "format": "pt"}
    write_atomically(args.output / "model.safetensors", lambda path: save_file(half, path, about))
    state = {"sam": sam.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"number": number, "step": step, "seconds": seconds}
    write_atomically(args.output / STATE, lambda path: torch.save(state, path))


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
    add("--model", choices=DENSE, default="vit_t_fine")
    add("--image-size", type=parse_image_size, default=512)
    add("--finer", type=int, default=2, help="pixels of the teacher's frame along one of the student's (2)")
    names = tuple(name.upper() for name in PHASES)
    add("--minutes", type=float, nargs=3, default=(7.0, 4.0, 2.0), metavar=names)
    add("--batch-size", type=int, nargs=3, default=(128, 32, 32), metavar=names)
    add("--lr", type=float, nargs=3, default=(1.5e-3, 3e-4, 1e-4), metavar=names)
    add("--clicks", type=int, default=2, help="at most so many where a mask is wrong (2)")
    add("--objects", type=int, default=8, help="of a view, at most (8)")
    add("--ring", type=int, nargs=2, default=(16000, 6000), metavar=("ENCODER", "OTHERS"), help="views that are held")
    add("--filled", type=int, default=8, help="batches that the ring holds at the first step (8)")
    add("--fresh", type=float, default=0.25, help="share of each batch that is new (0.25)")
    add("--mosaic", type=float, default=0.25, help="share of the encoder's views that show four photos (0.25)")
    add("--unlabelled", type=float, default=0.4, help="share of the masks' views without annotations (0.4)")
    add("--validate-every", type=float, default=60, help="seconds (60)")
    add("--readers", type=int, default=8, help="processes that read the photos (8)")
    add("--watch", action="store_true", help="seconds of a step by part; waiting for each of them costs a little")
    add("--device", type=parse_device, default="auto")
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
