"""The training run: one loop, the same in one process and in many."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..build_sam import build_sam
from ..checkpoint import read
from ..config import CONFIGS
from ..data.sa1b import TarPhoto, TrainingPhoto, choose_photos, list_photos
from ..data.views import LOW_RES, Sample, TarViews, Views, ViewSettings, batches
from ..distributed import CPU, Stopwatch, World, processes
from ..files import sha256, write_atomically
from ..modeling.sam import Sam
from .embeddings import EmbeddingCache
from .metrics import Damaged, Rows, fusion_scalars, jaccard, whole
from .objective import Losses, Objective, TrainedSam, to_batch
from .optim import Average, optimizer_of, rate
from .parallel import last_pass_only, prepare
from .run import ENDLESS, AnyRun, Progress, autocast, caught_signals, drawn_ratio, loop, outlive_signals, say
from .run_folder import RunFolder, State
from .settings import TrainSettings
from .teachers import check_grid, finer_by, load_teacher, placed

MOST_VALIDATED = 200  # photos


@dataclass
class Run(AnyRun):
    """Everything that the loop works with, of a SAM."""

    settings: TrainSettings
    world: World
    sam: Sam
    teacher: nn.Module | None
    model: nn.Module  # TrainedSam, as `prepare` left it
    optimizer: torch.optim.AdamW
    ema: Average
    folder: RunFolder
    training: list[TrainingPhoto]
    validation: list[TrainingPhoto]
    views: ViewSettings
    steps: int
    damaged: Damaged
    progress: Progress = field(default_factory=Progress)

    @property
    def averaged(self) -> State:
        return self.ema.averaged

    def samples(self) -> Iterator[list[Sample]]:
        return iter(training_loader(self))

    def one_step(self, samples: Iterator[list[Sample]], done: float, rows: Rows) -> None:
        one_step(self, samples, done, rows)

    def validate(self) -> None:
        validate(self)

    def scalars(self) -> dict[str, Any]:
        return fusion_scalars(self.sam.image_encoder) | {"damaged": self.damaged.check()}


def train(settings: TrainSettings) -> str:
    """Run it to its end, or to a signal; the path of the exported model.

    What the user can put right is OSError, ValueError or ImportError in one line.
    """
    with processes(settings.device, timedelta(minutes=30)) as world:
        run = set_up(settings, world)
        with caught_signals() as stopped:
            loop(run, stopped)
        with run.ema.in_place_of(run.model):
            path = run.folder.export("model.safetensors", run.model, _metadata(run))
        run.folder.close()
        return str(path)


def one_step(run: Run, samples: Iterator[list[Sample]], done: float, rows: Rows) -> None:
    """Gradients of a step's images, pass by pass, and the update; `done`: share of the run behind it."""
    settings, step = run.settings, run.progress.step
    keep = drawn_ratio(settings, step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate(settings.lr, step, done, run.steps)
    # on a GPU, parts are waited for in the logged steps alone
    timed = settings.device.type == "cpu" or (step + 1) % settings.log_every == 0
    watch = Stopwatch(settings.device if timed else CPU)
    backward = "student backward" if settings.train == "all" else "decoder backward"
    for i in range(settings.accumulate):
        with watch("data"):
            given = next(samples)
        run.damaged.count(given)
        with last_pass_only(run.model, i == settings.accumulate - 1):
            with autocast(settings):
                with watch("teacher"):
                    batch = to_batch(given, run.sam, settings.device, run.teacher, run.views.carried)
                losses: Losses = run.model(batch, keep, watch=watch)
            with watch(backward):
                (losses.loss / settings.accumulate).backward()
        rows.add(losses)
    with watch("optimiser"):
        norm = whole(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0))
        if not torch.isfinite(norm):  # before it reaches the weights, and then the checkpoint
            raise ValueError(f"step {step}: the gradient is not finite; a lower --lr or --precision fp32 may help")
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.ema.update(run.model)
    rows.step(norm, watch if timed else None)


def validate(run: Run) -> None:
    """Measure the averaged weights on the photos held out; keep them as `best.safetensors` if they are."""
    if not run.validation:
        return
    with run.ema.in_place_of(run.model):
        found, prime = measure(run)
        row = {name: round(value, 4) for name, value in found.items()}
        if prime and run.world.is_main:
            row["prime_jaccard"] = round(jaccard(prime, _prime_at_start(run, prime)), 4)
        run.folder.log({"step": run.progress.step} | row)
        run.progress.validated = run.progress.step
        if run.settings.train == "scores":
            score = -found["val_score_error"] if "val_score_error" in found else None
        else:
            score = found.get("val_box" if run.settings.supervised else "val_cosine")
        if score is None:
            raise ValueError("no photo held out has an object to validate on; --holdout 0 goes without")
        if score > run.progress.best:
            run.progress.best = score
            run.folder.export("best.safetensors", run.model, _metadata(run))
    say(run, row)


@torch.no_grad()
def measure(run: Run) -> tuple[dict[str, float], list[np.ndarray]]:
    """Means over the photos held out, and their prime tokens, the same on every process."""
    settings, n = run.settings, len(run.validation)
    seed = settings.seed if run.views.targets else 0  # a cache has the views of its seed alone
    held_out = Views(run.validation, replace(run.views, max_objects=settings.max_objects, seed=seed))
    each = max(1, min(8, settings.batch_size // (settings.accumulate * run.world.size)))
    values: dict[str, list[float]] = {}
    prime: dict[int, list[np.ndarray]] = {}
    for start in range(0, n, each * run.world.size):  # every process makes every pass: FSDP waits for all
        mine = [i for i in range(start + run.world.rank * each, start + (run.world.rank + 1) * each) if i < n]
        given = [held_out[i] for i in mine or [0]]
        run.damaged.count(given)
        with autocast(settings):
            batch = to_batch(given, run.sam, settings.device, run.teacher, run.views.carried)
            measured = run.model(batch, settings.keep_ratio[0], measure=True)
        if mine:
            for name, some in measured.values.items():
                values.setdefault(f"val_{name}", []).extend(some)
            prime |= {i: [mask[j].cpu().numpy() for mask in measured.prime] for j, i in enumerate(mine)}
    names = ("val_box", "val_click", "val_score_error", "val_cosine", "val_error")
    parts = run.world.gather((values, prime))
    together = {name: [v for found, _ in parts for v in found.get(name, [])] for name in names}
    masks = {i: one for _, found in parts for i, one in found.items()}
    return {k: float(np.mean(v)) for k, v in together.items() if v}, [m for i in sorted(masks) for m in masks[i]]


def _prime_at_start(run: Run, prime: list[np.ndarray]) -> list[np.ndarray]:
    """The prime tokens of the run's first validation, which its folder keeps."""
    path = run.settings.output / "prime_at_start.npz"
    if not path.is_file():
        write_atomically(path, lambda temporary: np.savez_compressed(temporary, *prime))
        return prime
    with np.load(path) as stored:
        return [stored[f"arr_{i}"] for i in range(len(stored.files))]


def _metadata(run: Run) -> dict[str, str]:
    settings = run.settings
    return {"model": settings.model.name, "image_size": str(settings.image_size), "step": str(run.progress.step)}


# --- setting up ------------------------------------------------------------------------------------------------------


def set_up(settings: TrainSettings, world: World) -> Run:
    """Read, check and build everything, and go on from the folder's last checkpoint if asked to."""
    cache = EmbeddingCache(settings.cache) if settings.cache else None
    photos = list_photos(settings.data, settings.images, plain=not settings.supervised)
    training, validation = choose_photos(photos, settings.fraction, settings.holdout, 0, MOST_VALIDATED)
    streamed = check_streamed(training, world.size * max(1, settings.workers))
    if settings.holdout and not validation and world.is_main:
        text = f"no photo of {len(training)} is held out: no best.safetensors without a larger --holdout"
        tqdm.write(text, file=sys.stderr)
    ids = {"photos.txt": [photo.id for photo in training], "validation.txt": [photo.id for photo in validation]}
    # the cache's views were drawn until an object was in them, so ours must be
    objects = settings.max_objects if settings.supervised else int(cache is not None)
    views = ViewSettings(settings.image_size, objects, settings.seed, low_res=LOW_RES // settings.model.grow)
    teacher_name, seen = settings.teacher, settings.teacher_size
    if cache is not None:
        _check_cache(cache, settings, training + validation)
        views = replace(views, views=cache.settings["views"], targets=cache)
        teacher_name, seen = cache.settings["teacher"], cache.settings.get("teacher_size")
    views = replace(views, finer=finer_by(seen, settings.image_size))
    if teacher_name is not None:
        check_grid(settings.model, teacher_name, views.finer)

    sam, teacher = build_models(settings, cache)
    objective = Objective(
        settings.mask_loss,
        settings.distill_loss,
        settings.distill_weight,
        settings.clicks,
        settings.supervised,
        settings.answers,
        settings.train == "scores",
    )
    model = prepare(
        TrainedSam(sam, objective),
        world,
        settings.device,
        strategy=settings.strategy,
        checkpointing=settings.checkpointing,
    )
    steps = settings.steps or ENDLESS
    if settings.epochs:
        steps = math.ceil(settings.epochs * len(training) / settings.batch_size)
    folder = RunFolder(settings.output, world)
    optimizer, ema = optimizer_of(model, settings.lr), Average(model)
    damaged = Damaged(len(training) + len(validation), world, settings.output / "damaged.txt")
    run = Run(
        settings, world, sam, teacher, model, optimizer, ema, folder, training, validation, views, steps, damaged
    )
    if settings.resume:
        folder.check_same(settings, ids, max(1, settings.workers) if streamed else None)
        if facts := folder.restore(model, optimizer, ema.averaged):
            run.progress = Progress(**facts)
            ema.seen = run.progress.step
        folder.rewind(run.progress.step if facts else -1)
    for name, found in ids.items():
        folder.write_ids(name, found)
    folder.write_config(settings.as_json() | {"photos": len(training), "validated on": len(validation)})
    return run


def check_streamed(photos: Sequence[TrainingPhoto], readers: int) -> bool:
    """Whether the photos are read from tars; ValueError or ImportError if so many readers could not."""
    tars = {photo.tar for photo in photos if isinstance(photo, TarPhoto)}
    if not tars:
        return False
    if not all(isinstance(photo, TarPhoto) for photo in photos):
        raise ValueError("tars are streamed, other photos are not: --data takes the one or the other")
    if importlib.util.find_spec("webdataset") is None:
        raise ImportError("tars need webdataset: pip install 'blsam[train]'")
    if readers > len(tars):
        raise ValueError(f"{readers} readers (processes x workers) need as many tars, there are {len(tars)}")
    return True


def build_models(settings: TrainSettings, cache: EmbeddingCache | None) -> tuple[Sam, nn.Module | None]:
    """The student with what is not trained frozen, and the teacher's image encoder unless a cache stands for it."""
    teacher: Any = None
    decoder: dict[str, torch.Tensor] = {}
    if settings.teacher is not None and cache is None:
        assert settings.teacher_checkpoint is not None  # they go together
        seen = settings.teacher_size or settings.image_size
        teacher, decoder = load_teacher(settings.teacher, settings.teacher_checkpoint, seen)
        teacher = placed(teacher, settings.device, settings.compile is not None)
    elif cache is not None:
        decoder, _ = read(cache.decoder)
    start = settings.init or (settings.teacher_checkpoint if settings.teacher in CONFIGS else None)
    torch.manual_seed(settings.seed)  # fresh E-blocks and predictors
    sam = build_sam(settings.model, start, image_size=settings.image_size, keep_ratio=settings.keep_ratio[0])
    sam.prompt_encoder.requires_grad_(False)
    if settings.stage == "encoder":
        take_decoder(sam, decoder)
        sam.mask_decoder.requires_grad_(False)
    if settings.train != "all":
        sam.image_encoder.requires_grad_(False)
    if settings.train == "scores":
        sam.mask_decoder.requires_grad_(False)
        sam.mask_decoder.iou_prediction_head.requires_grad_(True)
    return sam, teacher


def take_decoder(sam: Sam, decoder: dict[str, torch.Tensor]) -> None:
    """The teacher's prompt encoder and mask decoder, and as a start its last norm, which is the scale that they read in;
    a student that has them already, saved in half precision perhaps, goes on with its own norm."""
    own = sam.state_dict()
    parts = {key: value for key, value in decoder.items() if not key.startswith("image_encoder.")}
    continued = all(torch.allclose(own[key], value.float(), rtol=1e-3, atol=1e-6) for key, value in parts.items())
    sam.load_state_dict(parts if continued else decoder, strict=False)


def training_loader(run: Run) -> DataLoader:
    """The samples of each pass of this process, from where the run is."""
    settings, rank, size = run.settings, run.world.rank, run.world.size
    first, passes = run.progress.step, settings.accumulate
    common: dict[str, Any] = {"num_workers": settings.workers, "collate_fn": list, "worker_init_fn": outlive_signals}
    tars = [photo for photo in run.training if isinstance(photo, TarPhoto)]  # all, or none
    if tars:
        each = settings.batch_size // (passes * size)
        views = TarViews(tars, run.views, rank, size, each, skip=first * passes * each)
        return DataLoader(views, each, **common)
    order = batches(first, run.steps, settings.batch_size, passes, rank, size)
    return DataLoader(Views(run.training, run.views), batch_sampler=order, **common)


def _check_cache(cache: EmbeddingCache, settings: TrainSettings, photos: list[TrainingPhoto]) -> None:
    wanted: dict[str, Any] = {"image_size": settings.image_size, "seed": settings.seed}
    if settings.teacher_checkpoint is not None:
        wanted["teacher_sha256"] = sha256(settings.teacher_checkpoint)
    cache.check(wanted)
    missing = cache.missing([photo.id for photo in photos])
    if missing:
        raise ValueError(f"{cache.folder} lacks {len(missing)} of {len(photos)} photos, the first {missing[0]}")
