"""What a training step minimises: L_sup over prompts in the loop, plus L_fd to a teacher's embedding, plus the distance
to its answers to prompts.

One module around the `Sam`, whose forward is all that DDP and FSDP need to see. Every term is a mean over images, so
that a batch cut into passes and processes gives the gradient of the whole; every draw depends on the view's key alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..data.views import Sample
from ..distributed import Stopwatch
from ..modeling.mask_decoder import decode_photo
from ..modeling.routing import Routing
from ..modeling.sam import Sam
from ..modeling.windows import real_tokens
from .losses import (
    DISTILLATION_LOSSES,
    answer_loss,
    cosine_loss,
    mask_iou,
    relative_mse_loss,
    score_loss,
    supervised_loss,
)
from .prompts import boxes_of, corrective_clicks, first_clicks, noisy_boxes, random_clicks

SINGLE, MULTI = slice(0, 1), slice(1, 4)  # mask tokens of SAM's decoder
Objects = tuple[torch.Tensor, torch.Tensor]
Clicks = tuple[torch.Tensor, torch.Tensor]  # coordinates [P, N, 2], labels [P, N]


@dataclass
class Batch:
    """images float [B, 3, S, S], normalised; sizes: true (h, w) of each; objects: masks [P, 4 h, 4 w] and boxes [P, 4]
    of each; keys, what prompts are drawn from; weights [B], 0 for a damaged photo; target [B, 256, h, w], the teacher's
    embedding, if there is one. h, w: cells of the student's embedding."""

    images: torch.Tensor
    sizes: list[tuple[int, int]]
    objects: list[Objects]
    keys: list[int]
    weights: torch.Tensor
    target: torch.Tensor | None = None


def to_batch(
    samples: Sequence[Sample], sam: Sam, device: torch.device, teacher: nn.Module | None = None, carried: int = 1
) -> Batch:
    """Samples on the device, with the teacher's embedding from the samples or from the teacher itself.

    carried: pixels of the samples along one of the student's frame, which it gets the means of. Of an embedding on a
    finer grid than the student's it learns the means.
    """
    full = framed(samples, sam, device, carried)
    images = F.avg_pool2d(full, carried)
    sizes = [(s.image.shape[-2] // carried, s.image.shape[-1] // carried) for s in samples]
    weights = torch.tensor([float(not sample.damaged) for sample in samples], device=device)
    objects = [(s.masks.to(device), s.boxes.to(device)) for s in samples]
    batch = Batch(images, sizes, objects, [s.key for s in samples], weights)
    # of all, or of none; float32 first: bfloat16's autocast on a CPU does not know half precision
    targets = [s.target.to(device).float() for s in samples if s.target is not None]
    if targets:
        batch.target = _on_grid_of(sam, torch.stack(targets))
    elif teacher is not None:
        with torch.no_grad():
            batch.target = _on_grid_of(sam, teacher(full).float())
    return batch


def framed(samples: Sequence[Sample], sam: Sam, device: torch.device, carried: int) -> torch.Tensor:
    """The samples' images, normalised and padded as SAM does, to [B, 3, carried * S, carried * S]."""
    side = carried * sam.image_encoder.img_size
    normal = [(sample.image.to(device).float() - sam.pixel_mean) / sam.pixel_std for sample in samples]
    return torch.stack([F.pad(x, (0, side - x.shape[-1], 0, side - x.shape[-2])) for x in normal])


def _on_grid_of(sam: Sam, target: torch.Tensor) -> torch.Tensor:
    """A teacher's embedding [B, 256, n * h, n * w] in means of n x n cells, as many as the student's has."""
    return F.avg_pool2d(target, target.shape[-1] // sam.prompt_encoder.image_embedding_size[0])


@dataclass(frozen=True)
class Objective:
    """Which terms there are and how they weigh; `clicks`: at most so many corrective ones after the first prompt;
    `answers`: prompts an image whose answers are to be the teacher's, by a frozen decoder that is the teacher's;
    `scores_alone`: of L_sup the error of the predicted IoU alone, of all four masks whatever is asked for."""

    mask_loss: str = "sam"
    distill_loss: str = "cosine"
    distill_weight: float = 2.5
    clicks: int = 1
    supervised: bool = True
    answers: int = 0
    scores_alone: bool = False

    def __post_init__(self) -> None:
        if self.answers and self.supervised:
            raise ValueError("a decoder that learns masks is no longer the teacher's, whose answers are to be learnt")


@dataclass
class Losses:
    """loss: what is minimised; terms: its parts, detached, means over the good images of the pass; routing: of the
    encoder's pass."""

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    routing: Routing = field(default_factory=Routing)


@dataclass
class Measured:
    """IoU of every object from its box and from one click (most confident of three, at the decoder's resolution), how far
    the predicted IoU is off for both; cosine to the teacher of every image and its error as a share of the teacher's
    variance; prime tokens [B, H, W] bool of every stage."""

    values: dict[str, list[float]]
    prime: list[torch.Tensor]


class TrainedSam(nn.Module):
    """A `Sam` whose forward is a training or a validation pass.

    Attributes: `sam`; `objective`; `encoder_frozen`: the image encoder runs without a graph.
    """

    def __init__(self, sam: Sam, objective: Objective) -> None:
        super().__init__()
        self.sam, self.objective = sam, objective
        self.encoder_frozen = not any(p.requires_grad for p in sam.image_encoder.parameters())

    def forward(
        self, batch: Batch, keep_ratio: float, *, measure: bool = False, watch: Stopwatch | None = None
    ) -> Losses | Measured:
        """A training pass, or with `measure` what validation looks at; `watch` takes the seconds of both parts."""
        watch = watch or Stopwatch(batch.images.device)
        with watch("student"), torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            embeddings, routing = self.sam.image_encoder.encode(
                batch.images, true_sizes=batch.sizes, keep_ratio=keep_ratio
            )
        if measure:
            return self._measure(batch, embeddings, routing)
        terms: dict[str, torch.Tensor] = {}
        if self.objective.supervised:
            with watch("decoder"):
                terms |= self._supervised(batch, embeddings)
        # where the decoder's backward pass ends and the encoder's begins
        if embeddings.requires_grad and (self.objective.supervised or self.objective.answers):
            embeddings.register_hook(lambda _: watch.split("decoder backward"))
        if batch.target is not None:
            loss = DISTILLATION_LOSSES[self.objective.distill_loss]
            terms["fd"] = loss(embeddings, batch.target, _real(batch, embeddings))
            if self.objective.answers:
                with watch("decoder"):
                    terms["answers"] = self._answered(batch, embeddings)
        per_image = terms.get("sup", 0) + self.objective.distill_weight * terms.get("fd", 0) + terms.get("answers", 0)
        good = batch.weights.sum().clamp(min=1)
        means = {name: (values.detach() * batch.weights).sum() / good for name, values in terms.items()}
        return Losses((per_image * batch.weights).mean(), means, routing)

    def _supervised(self, batch: Batch, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        """L_sup and the first prompts' IoU of every image, [B] each; 0 for an image without an object."""
        found = []
        for embedding, (masks, boxes), key in zip(embeddings, batch.objects, batch.keys):
            if len(masks):
                found.append(self._prompted(embedding[None], masks, boxes, key))
            else:  # zero, with every gradient that the other processes wait for
                parameters = [p.sum() for p in self.sam.mask_decoder.parameters() if p.requires_grad]
                zero = 0 * (embedding.sum() + sum(parameters))
                found.append((zero, zero.detach()))
        sup, iou = (torch.stack(column) for column in zip(*found))
        return {"sup": sup, "iou": iou}

    def _prompted(
        self, embedding: torch.Tensor, masks: torch.Tensor, boxes: torch.Tensor, key: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """L_sup of one image over a first prompt and corrective clicks, and the IoU of the first prompt's best mask.

        First a box or a click with three masks, for a box the single one as well (ours: a box is not ambiguous, and
        users ask for one mask); from the second prompt on three masks or the single one, half each. The most confident
        mask goes on: its logits are fed back, the next click lies where it is wrong.
        """
        rng = torch.Generator().manual_seed(key)
        points: Clicks | None = None
        given: torch.Tensor | None = None
        if torch.rand((), generator=rng) < 0.5:
            given = noisy_boxes(boxes, self.sam.image_encoder.img_size, rng)
        else:
            points = first_clicks(masks, rng, self._pixels)
        logits, scores = decode(self.sam, embedding, points, given)
        first = [MULTI] if given is None or self.objective.scores_alone else [MULTI, SINGLE]
        losses = [torch.stack([self._round(logits, scores, masks, asked) for asked in first]).mean()]
        asked = MULTI
        with torch.no_grad():
            first_iou = mask_iou(logits[:, MULTI], masks).max(1).values.mean()
        for _ in range(int(torch.randint(self.objective.clicks + 1, (), generator=rng))):
            best = asked.start + scores[:, asked].argmax(1)
            previous = logits[torch.arange(len(masks)), best].detach().float()
            new = corrective_clicks(previous, masks, rng, self._pixels)
            points = new if points is None else (torch.cat([points[0], new[0]], 1), torch.cat([points[1], new[1]], 1))
            logits, scores = decode(self.sam, embedding, points, given, previous[:, None])
            asked = MULTI if torch.rand((), generator=rng) < 0.5 else SINGLE
            losses.append(self._round(logits, scores, masks, asked))
        return torch.stack(losses).mean(), first_iou

    def _round(self, logits: torch.Tensor, scores: torch.Tensor, masks: torch.Tensor, asked: slice) -> torch.Tensor:
        """L_sup of one round of prompts; of scores alone that of all four masks, whichever are asked for."""
        if self.objective.scores_alone:
            return score_loss(logits, scores, masks)
        return supervised_loss(logits, scores, masks, asked, self.objective.mask_loss)

    def _answered(self, batch: Batch, embeddings: torch.Tensor) -> torch.Tensor:
        """Distance to the teacher's answers, [B]: to clicks anywhere in the image, or to boxes around what it answers to
        them, with three masks or the single one. No object is needed."""
        assert batch.target is not None
        found = []
        for embedding, target, size, key in zip(embeddings, batch.target, batch.sizes, batch.keys):
            rng = torch.Generator().manual_seed(key)
            h, w = (-(-side // self._pixels) for side in size)  # of the masks, without the padding
            with torch.no_grad():
                points, boxes = self._asked(target[None], h, w, rng)
                three = bool(torch.rand((), generator=rng) < 0.5)
                goal = self._answers(target[None], h, w, points, boxes, three)
            found.append(answer_loss(*self._answers(embedding[None], h, w, points, boxes, three), *goal))
        return torch.stack(found)

    def _asked(
        self, target: torch.Tensor, h: int, w: int, rng: torch.Generator
    ) -> tuple[Clicks | None, torch.Tensor | None]:
        """Clicks, or boxes [P, 4], half each."""
        everywhere = torch.ones(self.objective.answers, h, w, dtype=torch.bool, device=target.device)
        places, _ = random_clicks(everywhere, rng, self._pixels)
        points = places, torch.ones_like(places[..., 0])
        if torch.rand((), generator=rng) < 0.5:
            return points, None
        logits, scores = self._answers(target, h, w, points, None, three=True)
        best = logits[torch.arange(len(logits)), scores.argmax(1)]
        return None, boxes_of(best > 0, self._pixels)

    def _answers(
        self,
        embedding: torch.Tensor,
        h: int,
        w: int,
        points: Clicks | None,
        boxes: torch.Tensor | None,
        three: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [P, M, h, w] of the part of the frame that is image, and scores [P, M], for P prompts on [1, 256, ...];
        M 3 or 1."""
        sparse, dense, positions = encode_prompts(self.sam, points, boxes)
        logits, scores = decode_photo(self.sam.mask_decoder, embedding, positions, sparse, dense, three)
        return logits[..., :h, :w], scores

    @property
    def _pixels(self) -> int:
        """Of the frame along a pixel of the decoder's masks."""
        return self.sam.image_encoder.img_size // (4 * self.sam.prompt_encoder.image_embedding_size[0])

    def _measure(self, batch: Batch, embeddings: torch.Tensor, routing: Routing) -> Measured:
        found: dict[str, list[float]] = {"box": [], "click": [], "score_error": []}
        for embedding, (masks, boxes), key in zip(embeddings, batch.objects, batch.keys):
            if not len(masks):  # or damaged
                continue
            h, w = masks.shape[-2:]
            clicks = first_clicks(masks, torch.Generator().manual_seed(key), self._pixels)
            for name, points, given in (("box", None, boxes), ("click", clicks, None)):
                logits, scores = self._answers(embedding[None], h, w, points, given, three=True)
                best = scores.max(1)
                true = mask_iou(logits[torch.arange(len(masks)), best.indices][:, None], masks)[:, 0]
                found[name] += true.tolist()
                found["score_error"] += (best.values - true).abs().tolist()
        if batch.target is not None:
            good, both = batch.weights > 0, (embeddings, batch.target, _real(batch, embeddings))
            found["cosine"] = (1 - cosine_loss(*both))[good].tolist()
            found["error"] = relative_mse_loss(*both)[good].tolist()
        return Measured(found, [stage.mask for stage in routing.stages])


def decode(
    sam: Sam,
    embedding: torch.Tensor,
    points: Clicks | None = None,
    boxes: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [P, 4, 4 h, 4 w] and scores [P, 4] of all mask tokens for P prompts on one embedding [1, 256, h, w]."""
    sparse, dense, places = encode_prompts(sam, points, boxes, logits)
    return sam.mask_decoder.predict_masks(embedding, places, sparse, dense)


def encode_prompts(
    sam: Sam,
    points: Clicks | None = None,
    boxes: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What SAM's prompt encoder makes of P prompts, [P, T, 256] and [P, 256, h, w], and of the places of the embedding,
    [1, 256, h, w]. In float32, whatever the decoder runs in: coordinates in bfloat16 would be off by a pixel."""
    with torch.autocast(sam.device.type, enabled=False):
        return *sam.prompt_encoder(points, boxes, logits), sam.prompt_encoder.get_dense_pe()


def _real(batch: Batch, embeddings: torch.Tensor) -> torch.Tensor:
    side = embeddings.shape[-1]
    sizes = torch.tensor(batch.sizes, device=embeddings.device)
    return real_tokens(side, side, sizes, batch.images.shape[-1] // side)
