"""Which tokens are prime: importance scores, the choice in every window, and the index lists made from it.

Paper sections on the "importance predictor" and "token selection": a linear layer and a softmax score every token, and
the same number is chosen in every window. Ours: the score's normalisation, partial windows, images with padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import windows as win

TrueSizes = Sequence[tuple[int, int]] | torch.Tensor | None


def keep_count(n: int, keep_ratio: float) -> int:
    """Prime tokens of a window that has n real ones."""
    return 0 if n == 0 else max(1, math.floor(keep_ratio * n + 0.5))


class ImportancePredictor(nn.Module):
    """x [B, H, W, C] -> s [B, H, W] float32 in (0, 1), the probability that a token is prime.

    Always in float32: rounded scores tie, and ties decide which tokens are computed.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, 2)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)  # zeros would make every score tie
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"  # "meta" has none
        with torch.autocast(kind, enabled=False):
            return self.linear(self.norm(x.float())).softmax(dim=-1)[..., 1]


# --- the routing as a value ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageRouting:
    """The choice of one predictor, which holds for all layers up to the next.

    mask [B, H, W] bool, prime tokens; scores [B, H, W] float32 or None; counts [B, nW] int64, prime tokens of each
    window. Supplied to `encode`, the mask replaces the choice and the scores, if not None, the predictor's.
    """

    mask: torch.Tensor
    scores: torch.Tensor | None
    counts: torch.Tensor

    @classmethod
    def from_mask(cls, mask: torch.Tensor, window: int, scores: torch.Tensor | None = None) -> StageRouting:
        """A routing from a mask [B, H, W] bool alone, for windows of side `window`."""
        return cls(mask, scores, win.partition(mask.long(), window).sum(-1))


@dataclass(frozen=True)
class Routing:
    """One `StageRouting` for every predictor of the encoder, in order; none for an exact model."""

    stages: tuple[StageRouting, ...] = ()

    def of_image(self, i: int) -> Routing:
        """The routing of image i of the batch alone."""
        one = slice(i, i + 1)
        return Routing(
            tuple(
                StageRouting(s.mask[one], None if s.scores is None else s.scores[one], s.counts[one])
                for s in self.stages
            )
        )


# --- the routing as index lists: what the layers work with -----------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Windows of an image with equally many queries, so that their attention is one batch.

    windows: their places in the order of the grid's regions (a slice where they are neighbours); None: the image is
    one window.
    """

    windows: torch.Tensor | slice | None
    num_windows: int
    count: int  # queries in each window


@dataclass(frozen=True)
class Part:
    """Images that share the numbers of queries in every window."""

    images: torch.Tensor | None  # [b] places in the batch; None: the whole batch
    groups: tuple[Group, ...]

    @property
    def count(self) -> int:
        """Queries of each image."""
        return sum(g.num_windows * g.count for g in self.groups)


@dataclass(frozen=True)
class Queries:
    """A list of P query tokens, cut up for attention: part by part, image by image, group by group, window by window.

    tokens [P] int64 into the B*H*W tokens of the batch; y, x [P] int64, the place of each in its window; live [P]
    float, 0 for an unused slot of the static form.
    """

    tokens: torch.Tensor
    parts: tuple[Part, ...]
    y: torch.Tensor
    x: torch.Tensor
    live: torch.Tensor | None


@dataclass(frozen=True)
class Selection:
    """Tokens that a layer works on: as queries of window attention, of global attention, and as plain rows."""

    window: Queries
    image: Queries
    tokens: torch.Tensor  # [P] int64
    live: torch.Tensor | None = None  # [P] float


@dataclass(frozen=True)
class Stage:
    """What the layers of a stage need: the prime tokens (None: all), and mask and scores of all tokens."""

    selection: Selection | None
    mask: torch.Tensor  # [B, H, W] bool
    scores: torch.Tensor  # [B, H, W] float32
    counts: torch.Tensor  # [B, nW] int64

    def as_value(self) -> StageRouting:
        """Without the index lists."""
        return StageRouting(self.mask, self.scores, self.counts)


def route(
    scores: torch.Tensor,
    rank_by: torch.Tensor,
    window: int,
    keep_ratio: float,
    true_sizes: TrueSizes,
) -> Stage:
    """Choose the prime tokens of every window by `rank_by` [B, H, W], highest first, ties to the lower index.

    `true_sizes` as Python integers gives exact index lists; as an int64 tensor [B, 2] the static form, in which every
    window has the slots of its full shape and unused ones are weighted 0 (no shape depends on the sizes).
    """
    b, height, width = rank_by.shape
    shapes = win.window_shapes(height, width, window)
    if keep_ratio >= 1:  # every token, padding too: exactly SAM
        counts = torch.tensor([h * w for h, w in shapes], device=scores.device).repeat(b, 1)
        return Stage(None, torch.ones_like(scores, dtype=torch.bool), scores, counts)

    if isinstance(true_sizes, torch.Tensor):
        real = win.real_tokens(height, width, true_sizes)
        table = torch.tensor([keep_count(n, keep_ratio) for n in range(window * window + 1)], device=scores.device)
        counts = table[win.partition(real.long(), window).sum(-1)]  # [B, nW]
        slots = [[keep_count(h * w, keep_ratio) for h, w in shapes]]
    else:
        sizes = true_sizes or [(height * win.PATCH, width * win.PATCH)]
        slots = [[keep_count(n, keep_ratio) for n in win.real_counts(height, width, window, s)] for s in sizes]
        counts = torch.tensor(slots, device=scores.device).expand(b, -1)
        real = win.real_tokens(height, width, torch.tensor(sizes, device=scores.device))
    rank_by = rank_by.masked_fill(~real, torch.finfo(rank_by.dtype).min)
    return _stage(scores, rank_by, window, slots, counts, static=isinstance(true_sizes, torch.Tensor))


def route_supplied(supplied: StageRouting, scores: torch.Tensor, window: int, name: str) -> Stage:
    """The stage of a routing made elsewhere; its counts may differ from those of any keep ratio."""
    if supplied.mask.shape != scores.shape or supplied.mask.dtype != torch.bool:
        raise ValueError(
            f"{name}.mask must be bool {list(scores.shape)}, is {supplied.mask.dtype} {list(supplied.mask.shape)}"
        )
    counts = win.partition(supplied.mask.long(), window).sum(-1)
    if supplied.counts.shape != counts.shape or not torch.equal(supplied.counts.to(counts), counts):
        raise ValueError(f"{name}.counts do not match {name}.mask; StageRouting.from_mask makes them from it")
    if supplied.scores is not None:
        if supplied.scores.shape != scores.shape:
            raise ValueError(f"{name}.scores must be {list(scores.shape)}, are {list(supplied.scores.shape)}")
        scores = supplied.scores.to(scores)
    return _stage(scores, supplied.mask.float(), window, counts.tolist(), counts, static=False)


def _stage(
    scores: torch.Tensor,
    rank_by: torch.Tensor,
    window: int,
    slots: list[list[int]],
    counts: torch.Tensor,
    static: bool,
) -> Stage:
    """Sort every window and take its first `slots` tokens; `slots` has a row for each image, or one for all."""
    b, height, width = rank_by.shape
    device = rank_by.device
    ranked = win.partition(rank_by.detach(), window, fill=-torch.inf)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices  # [B, nW, w*w]
    table = win.window_tokens(height, width, window, device)
    ordered = table.expand(b, -1, -1).gather(2, order) + _offsets(b, height * width, device)

    alive = torch.arange(window * window, device=device) < counts[..., None]  # [B, nW, w*w], for the static form

    place = win.region_order(height, width, window)
    window_parts, image_parts, tokens, live = [], [], [], []
    for images, row in _patterns(slots, device):
        mine = ordered if images is None else ordered[images]
        groups, numbers = [], []
        for count in sorted(set(row) - {0}, reverse=True):
            places = [i for i, number in enumerate(place) if row[number] == count]
            groups.append(Group(_neighbours(places, device), len(places), count))
            numbers.append(torch.tensor([place[i] for i in places], device=device))
        window_parts.append(Part(images, tuple(groups)))
        image_parts.append(Part(images, (Group(None, 1, sum(row)),) if groups else ()))
        tokens.append(_slots(mine, groups, numbers))
        if static:
            live.append(_slots(alive, groups, numbers))

    flat = torch.cat(tokens)
    weight = torch.cat(live).float() if static else None
    y, x = flat % (height * width) // width, flat % width
    selection = Selection(
        Queries(flat, tuple(window_parts), y % window, x % window, weight),
        Queries(flat, tuple(image_parts), y, x, weight),
        flat,
        weight,
    )
    chosen = torch.cat(live) if static else torch.ones_like(flat, dtype=torch.bool)
    mask = torch.zeros(b * height * width, dtype=torch.bool, device=device).scatter(0, flat, chosen)
    return Stage(selection, mask.view(b, height, width), scores, counts)


def _slots(x: torch.Tensor, groups: list[Group], numbers: list[torch.Tensor]) -> torch.Tensor:
    """The first `count` places of every window, group by group: [b, nW, w*w] -> [P]."""
    rows = [x[:, windows, : group.count].flatten(1) for group, windows in zip(groups, numbers)]
    return torch.cat([x[:, :0].flatten(1), *rows], dim=1).view(-1)  # [b, G, k] -> [b, G*k] -> [P]


def _patterns(slots: list[list[int]], device: torch.device) -> list[tuple[torch.Tensor | None, list[int]]]:
    """Images with the same slots go together: [(places in the batch or None for all, slots of each window)]."""
    if all(row == slots[0] for row in slots):
        return [(None, slots[0])]
    distinct = sorted({tuple(row) for row in slots}, reverse=True)
    places = [[i for i, row in enumerate(slots) if tuple(row) == pattern] for pattern in distinct]
    return [(torch.tensor(p, device=device), list(pattern)) for p, pattern in zip(places, distinct)]


def _neighbours(places: list[int], device: torch.device) -> torch.Tensor | slice:
    """A slice where the places follow one another, so that nothing has to be copied."""
    if places == list(range(places[0], places[-1] + 1)):
        return slice(places[0], places[-1] + 1)
    return torch.tensor(places, device=device)


def _offsets(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(batch, device=device) * tokens)[:, None, None]
