"""Which tokens are prime: importance scores, the choice in every window, and the index lists made from it.

Paper sections on the "importance predictor" and "token selection": a linear layer and a softmax score every token, and
the same number is chosen in every window. Ours: the score's normalisation, partial windows, images with padding.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from . import windows as win
from .layers import input_dtype

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
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.forward(x)
        if input_dtype(self) != torch.float32:  # the whole model was cast
            return functional_call(self, {name: p.float() for name, p in self.named_parameters()}, (x,))
        return self.linear(self.norm(x.float())).softmax(dim=-1)[..., 1]


# --- what tokens can be ranked by ------------------------------------------------------------------------------------

Scorer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def by_predictor(x: torch.Tensor, scores: torch.Tensor, image: torch.Tensor, number: int) -> torch.Tensor:
    """As the predictor says: the paper's choice."""
    return scores


def by_norm(x: torch.Tensor, scores: torch.Tensor, image: torch.Tensor, number: int) -> torch.Tensor:
    """By the length of the token."""
    return x.float().norm(dim=-1)


def by_chance(x: torch.Tensor, scores: torch.Tensor, image: torch.Tensor, number: int) -> torch.Tensor:
    """At random, seeded by the image's own values: the batch does not matter."""
    seeds = [zlib.crc32(one.float().cpu().numpy().tobytes()) + number for one in image.detach()]
    draws = [torch.rand(scores.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(draws).to(scores)


# What `EncoderConfig.score` names; others may join. Tokens [B, H, W, C], the predictor's scores [B, H, W], the image
# [B, 3, S, S] and the predictor's number -> what orders the tokens of a window, [B, H, W] float32.
SCORERS: dict[str, Scorer] = {"predictor": by_predictor, "norm": by_norm, "random": by_chance}


# --- the choice within groups ----------------------------------------------------------------------------------------


def rank(scores: torch.Tensor) -> torch.Tensor:
    """The place of every score in its group, highest first, ties to the lower index: [G, n] -> [G, n] int64.

    By counting who comes before, which means the same in every runtime; not all have a stable sort.
    """
    mine, other = scores[:, :, None], scores[:, None, :]
    index = torch.arange(scores.shape[1], device=scores.device)
    return ((other > mine) | ((other == mine) & (index < index[:, None]))).sum(-1)


def first(ranks: torch.Tensor, count: int) -> torch.Tensor:
    """Who holds the places 0 ... count - 1: [G, n] -> [G, count]. No two ranks are equal, so that any sort will do."""
    return ranks.topk(count, dim=-1, largest=False).indices


# --- the routing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Windows of one region with equally many queries, so that their attention is one batch.

    windows: their places among the region's, window by window and in each image by image (a slice where they are
    neighbours); count: queries in each of them. In global attention an image is a window.
    """

    region: int
    windows: torch.Tensor | slice
    num_windows: int
    count: int


@dataclass(frozen=True)
class Queries:
    """A list of P query tokens, group by group, window by window.

    tokens [P] int64 into the B*H*W tokens of the batch; y, x [P] int64, the place of each in its window (of a sequence
    none has one).
    In the static form alone: live [P] bool, False for an unused slot; rows [B*H*W] int64, the row in which each token
    of the batch is found when those of the P slots are followed by those of all tokens.
    """

    tokens: torch.Tensor
    groups: tuple[Group, ...]
    y: torch.Tensor
    x: torch.Tensor
    live: torch.Tensor | None = None
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """The choice of one predictor, which holds for all layers up to the next.

    mask [B, H, W] bool, prime tokens; scores [B, H, W] float32 or None; counts [B, nW] int64, prime tokens of each
    window. Supplied to `encode`, the mask replaces the choice and the scores, if not None, the predictor's.
    window, image: the prime tokens as queries of window and of global attention; None: every token.
    """

    mask: torch.Tensor
    scores: torch.Tensor | None
    counts: torch.Tensor
    window: Queries | None = None
    image: Queries | None = None

    @classmethod
    def from_mask(cls, mask: torch.Tensor, window: int, scores: torch.Tensor | None = None) -> Stage:
        """A stage from a mask [B, H, W] bool alone, for windows of side `window`."""
        return cls(mask, scores, win.partition(mask.long(), window).sum(-1))


@dataclass(frozen=True)
class Routing:
    """One `Stage` for every predictor of the encoder, in order; none for an exact model."""

    stages: tuple[Stage, ...] = ()

    def of_image(self, i: int) -> Routing:
        """The routing of image i of the batch alone."""
        one = slice(i, i + 1)
        return Routing(
            tuple(Stage(s.mask[one], None if s.scores is None else s.scores[one], s.counts[one]) for s in self.stages)
        )


def route(
    scores: torch.Tensor,
    rank_by: torch.Tensor,
    window: int,
    keep_ratio: float,
    true_sizes: TrueSizes,
) -> Stage:
    """Choose the prime tokens of every window by `rank_by` [B, H, W], highest first, ties to the lower index.

    `true_sizes` as Python integers gives exact index lists. As an int64 tensor [B, 2], and in an export, it is the
    static form: every window has the slots of its full shape, and what is in unused ones goes nowhere (no shape
    depends on the sizes).
    """
    b, height, width = rank_by.shape
    shapes, device = win.window_shapes(height, width, window), scores.device
    if keep_ratio >= 1:  # every token, padding too: exactly SAM
        counts = torch.tensor([h * w for h, w in shapes], device=device).expand(b, -1)
        return Stage(torch.ones_like(scores, dtype=torch.bool), scores, counts)

    if win.exporting() and true_sizes is not None:
        true_sizes = torch.as_tensor(true_sizes, device=device)
    static = isinstance(true_sizes, torch.Tensor) or win.exporting()
    if isinstance(true_sizes, torch.Tensor):
        real = win.real_tokens(height, width, true_sizes)
        table = torch.tensor([keep_count(n, keep_ratio) for n in range(window * window + 1)], device=device)
        counts = table[win.partition(real.long(), window).sum(-1)]  # [B, nW]
        slots = [[keep_count(h * w, keep_ratio) for h, w in shapes]]
    else:
        sizes = true_sizes or [(height * win.PATCH, width * win.PATCH)]
        slots = [[keep_count(n, keep_ratio) for n in win.real_counts(height, width, window, s)] for s in sizes]
        slots = slots[:1] if all(row == slots[0] for row in slots) else slots
        counts = torch.tensor(slots, device=device).expand(b, -1)
        real = win.real_tokens(height, width, torch.tensor(sizes, device=device))
    rank_by = rank_by.masked_fill(~real, torch.finfo(rank_by.dtype).min)
    return _stage(scores, rank_by, window, slots, counts, static)


def route_supplied(supplied: Stage, scores: torch.Tensor, window: int, name: str) -> Stage:
    """The stage of a routing made elsewhere; its counts may differ from those of any keep ratio."""
    scores = _checked(supplied, scores, name)
    counts = win.partition(supplied.mask.long(), window).sum(-1)
    if supplied.counts.shape != counts.shape or not torch.equal(supplied.counts.to(counts), counts):
        raise ValueError(f"{name}.counts do not match {name}.mask; Stage.from_mask makes them from it")
    return _stage(scores, supplied.mask.float(), window, counts.tolist(), counts, static=False)


def route_sequence(scores: torch.Tensor, rank_by: torch.Tensor, keep_ratio: float) -> Stage:
    """Choose among the patches of sequences that begin with a class token, [B, 1 + n]: one choice for an image, the class
    token prime beside it. Every image has as many queries, so that an export is in the same form."""
    b, n, device = rank_by.shape[0], int(rank_by.shape[1]), rank_by.device
    count, images = keep_count(n - 1, keep_ratio), torch.arange(b, device=device)
    counts = torch.full((b, 1), min(count, n - 1), device=device)
    if keep_ratio >= 1:
        return Stage(torch.ones_like(scores, dtype=torch.bool), scores, counts)
    rank_by = rank_by.detach()[:, 1:]
    ranks = rank(rank_by)
    chosen = F.pad(first(ranks, count) + 1, (1, 0))  # [B, 1 + k], the class token first
    queries = _of_sequences([(slice(0, b), images, chosen)], n)
    ranks = F.pad(ranks + 1, (1, 0))
    mask = ranks <= count
    if win.exporting():  # no scatter: each token is looked up, in the rows of the P queries or behind them
        others = b * (1 + count) + images[:, None] * n + torch.arange(n, device=device)
        rows = torch.where(mask, images[:, None] * (1 + count) + ranks, others)
        queries = replace(queries, rows=rows.flatten())
    return Stage(mask, scores, counts, image=queries)


def route_sequence_supplied(supplied: Stage, scores: torch.Tensor, name: str) -> Stage:
    """As `route_supplied`, for `route_sequence`: masks [B, 1 + n] are True at the class token."""
    scores, mask = _checked(supplied, scores, name), supplied.mask
    if not mask[:, 0].all():
        raise ValueError(f"{name}.mask must be True at the class token, [:, 0]")
    totals, images, found = mask.sum(1).tolist(), torch.arange(len(mask), device=mask.device), []
    for group in _groups(0, totals, 1, mask.device):
        of_each = mask[group.windows].nonzero()[:, 1].view(-1, group.count)
        found.append((group.windows, images[group.windows], of_each))
    counts = torch.tensor(totals, device=mask.device)[:, None] - 1
    return Stage(mask, scores, counts, image=_of_sequences(found, mask.shape[1]))


def _of_sequences(found: list[tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor]], n: int) -> Queries:
    """Queries from (places of the images in the batch, the same as numbers [G], their tokens [G, k]), for sequences of
    n tokens."""
    groups = tuple(Group(0, places, *of_each.shape) for places, _, of_each in found)
    tokens = torch.cat([(numbers[:, None] * n + of_each).flatten() for _, numbers, of_each in found])
    return Queries(tokens, groups, tokens[:0], tokens[:0])


def _checked(supplied: Stage, scores: torch.Tensor, name: str) -> torch.Tensor:
    """The scores of a stage made elsewhere, or these; ValueError unless its shapes fit."""
    if supplied.mask.shape != scores.shape or supplied.mask.dtype != torch.bool:
        raise ValueError(
            f"{name}.mask must be bool {list(scores.shape)}, is {supplied.mask.dtype} {list(supplied.mask.shape)}"
        )
    if supplied.scores is None:
        return scores
    if supplied.scores.shape != scores.shape:
        raise ValueError(f"{name}.scores must be {list(scores.shape)}, are {list(supplied.scores.shape)}")
    return supplied.scores.to(scores)


def _stage(
    scores: torch.Tensor,
    rank_by: torch.Tensor,
    window: int,
    slots: list[list[int]],
    counts: torch.Tensor,
    static: bool,
) -> Stage:
    """Take the first `slots` tokens of every window, of which `counts` [B, nW] are prime.

    `slots`: the number of queries for each window, a row for each image, or one for all.
    """
    (b, height, width), device = rank_by.shape, rank_by.device
    places, each = win.regions(height, width, window), b if len(slots) == 1 else 1
    ranks = [rank(windows) for windows in _cut(rank_by.detach(), places)]
    tokens = _cut(torch.arange(b * height * width, device=device).view(b, height, width), places)
    limits = [counts[:, list(region.numbers)].T.reshape(-1, 1) for region in places]  # [B, nW] -> [G, 1]
    prime = [of_window < limit for of_window, limit in zip(ranks, limits)]

    groups, chosen = [], [tokens[0][:0, :0]]
    for i, region in enumerate(places):
        for group in _groups(i, [row[number] for number in region.numbers for row in slots], each, device):
            groups.append(group)
            chosen.append(tokens[i][group.windows].gather(1, first(ranks[i][group.windows], group.count)))
    by_window, totals = torch.cat([t.flatten() for t in chosen]), [sum(row) for row in slots]
    if len(slots) == 1:
        by_image = _image_by_image(chosen[1:], b) if groups else by_window
    else:  # those with equally many together, as their groups are
        order = torch.tensor([-total for total in totals], device=device) * b + torch.arange(b, device=device)
        by_image = by_window[order[by_window // (height * width)].sort(stable=True).indices]

    y, x = by_window % (height * width) // width, by_window % width
    in_windows = Queries(by_window, tuple(groups), y % window, x % window)
    y, x = by_image % (height * width) // width, by_image % width
    in_images = Queries(by_image, _groups(0, totals, each, device), y, x)
    if static:
        in_windows, in_images = _static(in_windows, in_images, b, places, ranks, tokens, limits)
    return Stage(_paste(prime, places), scores, counts, in_windows, in_images)


def _static(
    in_windows: Queries,
    in_images: Queries,
    b: int,
    places: list[win.Region],
    ranks: list[torch.Tensor],
    tokens: list[torch.Tensor],
    limits: list[torch.Tensor],
) -> tuple[Queries, Queries]:
    """Both lists with what the static form needs. A group is a whole region there, its slots those of every image."""
    sizes = [len(region.numbers) * group.count for region, group in zip(places, in_windows.groups)]  # of an image
    total, counts = b * sum(sizes), [group.count for group in in_windows.groups]
    live = [torch.arange(k, device=n.device) < n for k, n in zip(counts, limits)]  # [G, k]
    numbers = torch.arange(total, device=limits[0].device)
    # the number of every window's first slot, [G, 1], as the slots lie window by window and image by image
    starts = [part.view(-1, k)[:, :1] for k, part in zip(counts, numbers.split([b * size for size in sizes]))]
    parts = numbers.view(b, -1).split(sizes, dim=1)
    starts_in_image = [part.unflatten(1, (-1, k))[..., 0].T.reshape(-1, 1) for k, part in zip(counts, parts)]

    def rows(of_windows: list[torch.Tensor]) -> torch.Tensor:
        found = zip(of_windows, ranks, limits, tokens)
        return _paste([torch.where(r < n, s + r, total + t) for s, r, n, t in found], places).flatten()

    return (
        replace(in_windows, live=torch.cat([t.flatten() for t in live]), rows=rows(starts)),
        replace(in_images, live=_image_by_image(live, b), rows=rows(starts_in_image)),
    )


def _cut(grid: torch.Tensor, places: list[win.Region]) -> list[torch.Tensor]:
    """[B, H, W] -> [G, h*w] for every region, its G = nW*B windows one after the other, each image by image."""
    return [region.windows(grid).flatten(3).flatten(0, 2) for region in places]


def _paste(pieces: list[torch.Tensor], places: list[win.Region]) -> torch.Tensor:
    """What `_cut` has cut, back in its place: -> [B, H, W]."""
    shaped = [t.unflatten(1, r.shape).unflatten(0, (*r.count, -1)) for t, r in zip(pieces, places)]
    return win.merge(shaped, places)


def _image_by_image(pieces: list[torch.Tensor], b: int) -> torch.Tensor:
    """[nW*B, k] of every group -> [P], all of the first image, then all of the second."""
    return torch.cat([t.unflatten(0, (-1, b)).transpose(0, 1).flatten(1) for t in pieces], dim=1).flatten()


def _groups(region: int, counts: list[int], each: int, device: torch.device) -> tuple[Group, ...]:
    """Windows with equally many queries together, those without any in none; every count is that of `each` windows."""
    found = []
    for count in sorted(set(counts) - {0}, reverse=True):
        places = [i for i, number in enumerate(counts) if number == count]
        if places == list(range(places[0], places[-1] + 1)):  # a slice, so that nothing has to be copied
            windows: slice | torch.Tensor = slice(places[0] * each, (places[-1] + 1) * each)
        else:
            windows = (
                torch.tensor(places, device=device)[:, None] * each + torch.arange(each, device=device)
            ).flatten()
        found.append(Group(region, windows, len(places) * each, count))
    return tuple(found)
