"""Training classifiers by DeiT's recipe (arXiv 2012.12877), made of timm's parts; see `run` for the loop.

L = sum of weight * cross-entropy over what a model asks of the classes + 2.5 * L_fd to a dense teacher's tokens + terms
of the model's own. Every draw is a function of (seed, epoch, image) or of (seed, step, part of the batch), so that a run
that was resumed goes on to the bit (of one thread), and two processes see what two passes of one would.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from ..baselines import build_baseline
from ..build_classifier import build_classifier
from ..config import CLASSIFIERS
from ..data.imagenet import (
    EvaluationImages,
    EvaluationTransform,
    LabelledImages,
    TrainingImages,
    checked,
    collate,
    open_images,
    seed_all,
    training_transform,
)
from ..data.views import batches
from ..distributed import CPU, Stopwatch, World, processes
from ..evaluation.imagenet import Correct, count_correct
from ..modeling.classifier import BLVisionTransformer
from .imagenet_settings import ClassifierSettings
from .losses import token_cosine_loss
from .metrics import Rows, fusion_scalars
from .objective import Losses
from .parallel import distributed, last_pass_only
from .run import AnyRun, Progress, autocast, caught_signals, drawn_ratio, loop, outlive_signals, say
from .run_folder import RunFolder, State

NO_DECAY = ("cls_token", "pos_embed")  # as DeiT; and what has one dimension
MOST_WARM_UP = 0.1  # of a run
LR_BATCH = 512  # images that a learning rate is of
VALIDATED = 64  # images of a pass


class TrainedClassifier(nn.Module):
    """A classifier whose forward is a training pass: all that DDP needs to see."""

    def __init__(self, model: BLVisionTransformer, distill_weight: float) -> None:
        super().__init__()
        self.model, self.distill_weight = model, distill_weight
        self.criterion = SoftTargetCrossEntropy()

    def forward(
        self, images: torch.Tensor, target: torch.Tensor, keep_ratio: float | None, taught: torch.Tensor | None = None
    ) -> Losses:
        """images [B, 3, S, S]; target [B, classes], shares; keep_ratio None: the model's own; taught [B, 1 + n, C], the
        teacher's normalised tokens."""
        found = self.model.classify(images, keep_ratio=keep_ratio)
        terms = {"class": sum(w * self.criterion(logits.float(), target) for w, logits in found.heads)}
        if taught is not None:
            terms["fd"] = token_cosine_loss(found.tokens, taught, found.places).mean()
        terms |= found.losses
        weights = {"fd": self.distill_weight}
        loss = torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        return Losses(loss, {name: term.detach() for name, term in terms.items()}, found.routing)


@dataclass
class ClassifierRun(AnyRun):
    """Everything that the loop works with, of a classifier."""

    settings: ClassifierSettings
    world: World
    model: nn.Module  # TrainedClassifier, or DDP around it
    classifier: BLVisionTransformer
    teacher: BLVisionTransformer | None
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    ema: ModelEmaV3
    mixup: Mixup | None
    folder: RunFolder
    training: LabelledImages
    validation: LabelledImages
    steps: int
    progress: Progress = field(default_factory=Progress)

    @property
    def averaged(self) -> State:
        return self.ema.module.state_dict()

    @property
    def epochs(self) -> tuple[float, float]:
        """Where the run is, of how many."""
        each = self.settings.batch_size / len(self.training)
        return self.progress.step * each, self.steps * each

    def samples(self) -> Iterator[Any]:
        """The batches of this process's passes, from where the run is."""
        settings = self.settings
        transform = training_transform(settings.augment, settings.side, settings.erasing, settings.crop)
        order = batches(
            self.progress.step, self.steps, settings.batch_size, settings.accumulate, self.world.rank, self.world.size
        )
        data = TrainingImages(self.training, transform, settings.seed)
        return iter(_loader(data, settings.workers, batch_sampler=order))

    def one_step(self, samples: Iterator[Any], done: float, rows: Rows) -> None:
        one_step(self, samples, rows)

    def validate(self) -> None:
        """Top-1 and top-5 of the averaged weights on all images held out."""
        found = measure(self)
        row: dict[str, Any] = {"val_top1": found.top1, "val_top5": found.top5}
        row |= {"val_gmacs": round(found.gmacs, 5)} if found.macs else {}
        self.folder.log({"step": self.progress.step} | row | {"val_images": found.images})
        self.progress.validated = self.progress.step
        if found.top1 > self.progress.best:
            self.progress.best = found.top1
            self.export("best.safetensors")
        say(self, row)

    def export(self, name: str) -> str:
        """The averaged weights, with what is needed to use them."""
        settings = self.settings
        metadata = {
            "model": settings.baseline or settings.model.name,
            "image_size": str(settings.side),
            "step": str(self.progress.step),
        }
        metadata |= {"baseline": settings.baseline} if settings.baseline else {}
        metadata |= {"classes": json.dumps(self.training.classes), "crop_ratio": str(settings.crop)}
        return str(self.folder.export(name, self.ema.module, metadata))

    def scalars(self) -> dict[str, Any]:
        return {"epoch": round(self.epochs[0], 4)} | fusion_scalars(self.classifier)


def train(settings: ClassifierSettings) -> str:
    """Run it to its end, or to a signal; the path of the exported model.

    What the user can put right is OSError, ValueError or ImportError in one line.
    """
    with processes(settings.device, timedelta(minutes=30)) as world:
        run = set_up(settings, world)
        with caught_signals() as stopped:
            loop(run, stopped)
        path = run.export("model.safetensors")
        run.folder.close()
        return path


def one_step(run: ClassifierRun, samples: Iterator[Any], rows: Rows) -> None:
    """Gradients of a step's images, pass by pass, and the update."""
    settings, step, device = run.settings, run.progress.step, run.settings.device
    keep = None if settings.baseline else drawn_ratio(settings, step)
    run.schedule.step_update(step)
    run.classifier.begin_epoch(*run.epochs)
    run.model.train()
    # on a GPU, parts are waited for in the logged steps alone
    timed = device.type == "cpu" or (step + 1) % settings.log_every == 0
    watch = Stopwatch(device if timed else CPU)
    for i in range(settings.accumulate):
        with watch("data"):
            images, labels = (part.to(device, non_blocking=True) for part in checked(next(samples)))
        seed_all(settings.seed, 3, step, i * run.world.size + run.world.rank)  # mixing, stochastic depth
        images, target = _mixed(run, images, labels)
        with last_pass_only(run.model, i == settings.accumulate - 1):
            with autocast(settings):
                taught = None
                if run.teacher is not None:
                    with watch("teacher"), torch.no_grad():
                        taught = run.teacher.encode(images)[0]
                with watch("student"):
                    losses: Losses = run.model(images, target, keep, taught)
            with watch("student backward"):
                (losses.loss / settings.accumulate).backward()
        rows.add(losses)
    with watch("optimiser"):
        norm = torch.nn.utils.get_total_norm([p.grad for p in run.classifier.parameters() if p.grad is not None])
        if not torch.isfinite(norm):  # before it reaches the weights, and then the checkpoint
            raise ValueError(f"step {step}: the gradient is not finite; a lower --lr or --precision fp32 may help")
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.ema.update(run.classifier, step + 1)
    rows.step(norm, watch if timed else None)


def _mixed(run: ClassifierRun, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images mixed in pairs, and shares of the classes, smoothed."""
    if run.mixup is not None:
        return run.mixup(images, labels)
    return images, mixup_target(labels, run.classifier.num_classes, 1.0, run.settings.smoothing)


def measure(run: ClassifierRun) -> Correct:
    """The averaged weights on the images held out, all processes together."""
    settings, world = run.settings, run.world
    data = EvaluationImages(run.validation, EvaluationTransform(settings.side, settings.crop), world.rank, world.size)
    model = run.ema.module.eval()
    model.begin_epoch(*run.epochs)
    with autocast(settings):
        mine = count_correct(
            model,
            _loader(data, settings.workers, batch_size=VALIDATED),
            settings.device,
        )
    return Correct.together(world.gather(mine))


def _loader(data: Any, workers: int, **more: Any) -> DataLoader:
    return DataLoader(data, num_workers=workers, collate_fn=collate, worker_init_fn=outlive_signals, **more)


# --- setting up ------------------------------------------------------------------------------------------------------


def set_up(settings: ClassifierSettings, world: World) -> ClassifierRun:
    """Read, check and build everything, and go on from the folder's last checkpoint if asked to."""
    training = open_images(settings.data, "train")
    if len(training.classes) < 2:
        raise ValueError(f"all images are of one class, {training.classes[0]}; a classifier needs two")
    given = settings.val_data or settings.data
    validation = open_images(given, "val", marked=not settings.val_data, classes=training.classes)
    an_epoch = math.ceil(len(training) / settings.batch_size)
    settings = replace(settings, validate_every=settings.validate_every or an_epoch)
    steps = settings.steps or math.ceil((settings.epochs or 0) * len(training) / settings.batch_size)

    classifier, teacher = build_models(settings, len(training.classes))
    model = distributed(TrainedClassifier(classifier, settings.distill_weight), world, settings.device)
    optimizer = optimizer_of(classifier, settings)
    folder = RunFolder(settings.output, world)
    run = ClassifierRun(
        settings,
        world,
        model,
        classifier,
        teacher,
        optimizer,
        schedule_of(optimizer, settings, steps, an_epoch),
        ModelEmaV3(classifier, settings.ema, use_warmup=True),
        mixup_of(settings, len(training.classes)),
        folder,
        training,
        validation,
        steps,
    )
    lists = {"classes.txt": list(training.classes), "images.txt": [_digest(training), _digest(validation)]}
    if settings.resume:
        folder.check_same(settings, lists)
        if facts := folder.restore(model, optimizer, run.averaged):
            run.progress = Progress(**facts)
        folder.rewind(run.progress.step if facts else -1)
    for name, lines in lists.items():
        folder.write_ids(name, lines)
    sizes = {"images": len(training), "validated on": len(validation), "classes": len(training.classes)}
    folder.write_config(settings.as_json() | sizes | {"side": settings.side, "crop": settings.crop})
    return run


def _digest(images: LabelledImages) -> str:
    """What images there are, in a line."""
    names = hashlib.sha256("\n".join(images.ids).encode()).hexdigest()
    return f"{len(images)} images, sha256 of their names {names}"


def build_models(settings: ClassifierSettings, classes: int) -> tuple[BLVisionTransformer, BLVisionTransformer | None]:
    """The student, and the teacher if there is one; its weights are the student's start where they fit."""
    teacher, start = None, settings.init
    if settings.teacher is not None:
        config = CLASSIFIERS[settings.teacher]
        teacher = build_classifier(
            config, settings.teacher_checkpoint, image_size=settings.side, device=settings.device
        ).requires_grad_(False)
        if (config.dim, config.patch) != (settings.model.dim, settings.model.patch):
            raise ValueError(
                f"{settings.model.name} learns from a teacher of width {settings.model.dim} and patch "
                f"{settings.model.patch}; {config.name} has {config.dim} and {config.patch}"
            )
        if start is None and config.depth == settings.model.depth:
            start = settings.teacher_checkpoint
    torch.manual_seed(settings.seed)  # fresh weights
    make = partial(build_baseline, settings.baseline) if settings.baseline else build_classifier
    student = make(
        settings.model,
        start,
        image_size=settings.side,
        num_classes=classes,
        keep_ratio=settings.keep_ratio[0],
        device=settings.device,
    )
    student.drop_path_rate = settings.drop_path
    return student, teacher


def optimizer_of(model: nn.Module, settings: ClassifierSettings) -> torch.optim.Optimizer:
    """AdamW; biases, norms, the scalars of the fusion, class token and positions do not decay."""
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=NO_DECAY)
    return create_optimizer_v2(groups, opt="adamw", lr=settings.lr * settings.batch_size / LR_BATCH)


def schedule_of(
    optimizer: torch.optim.Optimizer, settings: ClassifierSettings, steps: int, an_epoch: int
) -> CosineLRScheduler:
    """Linear warm-up of so many epochs, at most a tenth of the run, and a cosine over all of it."""
    warm_up = min(round(settings.warmup_epochs * an_epoch), int(MOST_WARM_UP * steps))
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, steps),
        lr_min=settings.min_lr,
        warmup_t=warm_up,
        warmup_lr_init=settings.warmup_lr,
        t_in_epochs=False,
    )


def mixup_of(settings: ClassifierSettings, classes: int) -> Mixup | None:
    """Mixup and CutMix, half each where there are both; None where there is neither."""
    if not settings.mixes:
        return None
    return Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes)
