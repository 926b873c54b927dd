"""Attention in which the queries may be fewer than the keys, with SAM's decomposed relative positions.

One module serves SAM's wide attention (all tokens ask), the P-branch (prime tokens ask, all tokens answer: the paper's
semi-cross attention) and the narrow E-branch (all tokens ask, in fewer channels).

    logits[q, k] = scale * q . k + q . R_h[y_q - y_k] + q . R_w[x_q - x_k]        (q unscaled in the last two, as in SAM)

SAM pads partial windows with zeros *before* the projections, so a padded key is the bias of the k and v projections.
Here the projections run on real tokens only and the padding is filled in with those biases.

The bias of all pairs is never held at once. Which of two forms computes the product is decided by measurement:
the folded form in half precision, on other devices than the CPU, and in training; the blocked form in float32 on
the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .routing import Group, Part, Queries
from .windows import regions

BLOCK = 2**21  # logits that the blocked form holds at a time: 8 MB, so that the passes over them stay in the cache
ALIGN = 32  # channels of the folded form are rounded up to this: what matrix units take at once


class Attention(nn.Module):
    """Multi-head attention over windows of `window` tokens a side (0: over the whole grid).

    dim is the width of the tokens, inner that of queries, keys and values (SAM: the same). `semi_cross=False` takes keys
    and values from the query tokens alone.
    """

    def __init__(
        self, dim: int, inner: int, heads: int, window: int, grid: tuple[int, int], semi_cross: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.inner, self.window, self.semi_cross = heads, inner, window, semi_cross
        self.qkv = nn.Linear(dim, 3 * inner)
        self.proj = nn.Linear(inner, dim)
        height, width = (window, window) if window else grid
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, inner // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, inner // heads))
        self.register_buffer("offsets_h", offsets(height), persistent=False)
        self.register_buffer("offsets_w", offsets(width), persistent=False)

    def forward(self, x: torch.Tensor, queries: Queries | None = None) -> torch.Tensor:
        """x [B, H, W, dim], normalised -> [P, dim], one row for each of the P queries; None: all tokens, in order."""
        b, height, width, _ = x.shape
        rows = x.to(self.qkv.weight.dtype).flatten(0, 2)
        if queries is None:
            return self.proj(self._all(self.qkv(rows).view(b, height, width, -1)))
        wq, wkv = self.qkv.weight.split([self.inner, 2 * self.inner])
        bq, bkv = self.qkv.bias.split([self.inner, 2 * self.inner])
        chosen = rows.index_select(0, queries.tokens)
        q = F.linear(chosen, wq, bq)
        kv = F.linear(rows if self.semi_cross else chosen, wkv, bkv)
        return self.proj(self._chosen(q, kv, queries, (b, height, width)))

    def _all(self, qkv: torch.Tensor) -> torch.Tensor:
        """Every token asks: region by region of equal windows, [B, H, W, 3*inner] -> [B*H*W, inner]."""
        b, height, width, _ = qkv.shape
        qkv = qkv.view(b, height, width, 3, self.heads, -1)
        size = (self.window, self.window) if self.window else (height, width)
        core = _Core(qkv, size)
        keys, tables = self._keys(core, qkv[..., 1:, :, :]), self._tables(core.scale, qkv.dtype)
        out = qkv.new_empty(b, height, width, self.heads, qkv.shape[-1])
        for region in regions(height, width, self.window):
            q = region.windows(qkv[..., 0, :, :])  # [B, H, W, heads, d] -> [B, nH, nW, heads, h, w, d]
            rel = grid_rel_pos(q, *(table[:length] for table, length in zip(tables, region.shape)))
            y = core(q, rel, keys[:, :, region.numbers])  # [B*nW, heads, h*w, d]
            y = y.unflatten(2, region.shape).unflatten(0, q.shape[:3])
            region.windows(out).copy_(y)
        return out.view(b * height * width, -1)

    def _chosen(
        self, q: torch.Tensor, kv: torch.Tensor, queries: Queries, shape: tuple[int, int, int]
    ) -> torch.Tensor:
        """Some tokens ask, part by part and group by group: q [P, inner], kv of all tokens (or of these) -> [P, inner]."""
        b, height, width = shape
        size = (self.window, self.window) if self.window else (height, width)
        core = _Core(q.view(len(q), self.heads, self.inner // self.heads), size)
        keys = self._keys(core, kv.view(b, height, width, 2, self.heads, -1)) if self.semi_cross else None
        tables = self._tables(core.scale if self.semi_cross else 1.0, q.dtype)
        out, start = [], 0
        for part in queries.parts:
            images = b if part.images is None else part.images.numel()
            stop, first = start + images * part.count, 0
            done = [q.new_empty(images, 0, self.inner)]
            for group in part.groups:
                cut = _Cut(slice(start, stop), images, slice(first, first + group.num_windows * group.count), group)
                heads = self._group(core, cut, q, kv, keys, tables, part, queries)  # [b*G, heads, k, d]
                done.append(heads.transpose(1, 2).reshape(images, -1, self.inner))  # -> [b, G*k, inner]
                first = cut.columns.stop
            out.append(torch.cat(done, dim=1).view(-1, self.inner))
            start = stop
        return out[0] if len(out) == 1 else torch.cat(out)

    def _group(
        self,
        core: _Core,
        cut: _Cut,
        q: torch.Tensor,
        kv: torch.Tensor,
        keys: torch.Tensor | None,
        tables: list[torch.Tensor],
        part: Part,
        queries: Queries,
    ) -> torch.Tensor:
        """Attention of one group of windows: [b*G, heads, k, d]."""
        q = cut(q).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b*G, k, inner] -> [b*G, heads, k, d]
        y, x = cut(queries.y), cut(queries.x)
        rel = [rel_pos(q, table, places) for table, places in zip(tables, (y, x))]
        if keys is not None:  # all tokens of the window answer
            keys = keys if part.images is None else keys[:, part.images]
            return core(q, rel, keys if cut.group.windows is None else keys[:, :, cut.group.windows])
        k, v = cut(kv).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # -> [2, b*G, heads, k, d]
        bias = at(rel[0], y) + at(rel[1], x)
        if queries.live is not None:
            bias = bias.masked_fill(cut(queries.live)[:, None, None, :] == 0, torch.finfo(bias.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def _keys(self, core: _Core, kv: torch.Tensor) -> torch.Tensor:
        """Keys and values of every window: [B, H, W, 2, heads, d] -> [2, B, nW, heads, w*w, D].

        Region after region; partial windows are filled up with the projections' bias.
        """
        b, height, width, _, heads, d = kv.shape
        places = regions(height, width, self.window)
        buffer = core.empty(b, places[-1].numbers.stop, heads)
        bias = self.qkv.bias[self.inner :].to(kv.dtype).view(2, 1, 1, 1, heads, 1, 1, d)
        for region in places:
            h, w = region.shape
            into = buffer[:, :, region.numbers].unflatten(2, region.count)[..., :d]  # [2, B, nH, nW, heads, w, w, d]
            if region.shape != core.size:
                into[..., h:, :, :] = bias
                into[..., :h, w:, :] = bias
            both = region.windows(kv.flatten(3, 4)).unflatten(3, (2, heads))  # -> [B, nH, nW, 2, heads, h, w, d]
            into[..., :h, :w, :] = both.movedim(3, 0)
        return buffer.flatten(4, 5)

    def _tables(self, scale: float, dtype: torch.dtype) -> list[torch.Tensor]:
        """What a query at each place of an axis meets at each place of a key, times `scale`: 2 x [size, size, d]."""
        pairs = ((self.rel_pos_h, self.offsets_h), (self.rel_pos_w, self.offsets_w))
        # F.embedding is table[offsets], on a CPU several times faster
        return [F.embedding(rows, (table * scale).to(dtype)) for table, rows in pairs]


@dataclass(frozen=True)
class _Cut:
    """The rows of one group of windows in a query list: [P, ...] -> [b*G, k, ...]."""

    rows: slice  # those of the group's part
    images: int
    columns: slice  # those of the group in each image of the part
    group: Group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x[self.rows].unflatten(0, (self.images, -1))[:, self.columns]
        return x.reshape(self.images * self.group.num_windows, self.group.count, *x.shape[2:])


# --- the product -----------------------------------------------------------------------------------------------------


class _Core:
    """softmax(scale * q k' + positions) v in one of two forms, chosen by what the projections of an input look like.

    `size`: height and width of the keys' grid. `positions` and `empty`: what keys and values must hold beside their d
    channels. `scale`: what position logits must be multiplied by before they come in.
    """

    def __init__(self, like: torch.Tensor, size: tuple[int, int]) -> None:
        self.like, self.size, d = like, size, like.shape[-1]
        training = torch.is_grad_enabled() and like.requires_grad
        self.folded = like.dtype != torch.float32 or like.device.type not in ("cpu", "meta") or training
        self.scale = d**0.5 if self.folded else 1.0
        self.positions = one_hot_positions(size, d, like) if self.folded else None

    def empty(self, batch: int, windows: int, heads: int) -> torch.Tensor:
        """A buffer [2, B, nW, heads, h, w, D] for keys and values, with what they hold beyond d channels filled in."""
        d = self.like.shape[-1]
        width = d if self.positions is None else d + self.positions.shape[-1]
        buffer = self.like.new_empty(2, batch, windows, heads, *self.size, width)
        if self.positions is not None:
            buffer[0, ..., d:], buffer[1, ..., d:] = self.positions, 0
        return buffer

    def __call__(self, q: torch.Tensor, rel: list[torch.Tensor], keys: torch.Tensor) -> torch.Tensor:
        """q [..., heads, n or (h, w), d], its position logits [..., size_h] and [..., size_w] -> [G, heads, n, d].

        Keys and values [2, B, nW, heads, h*w, D] in a buffer made by `empty`.
        """
        d, heads = q.shape[-1], self.like.shape[-2]
        k, v = keys.flatten(1, 2)  # [G, heads, h*w, D]
        if self.folded:
            rest = k.shape[-1] - d - sum(self.size)
            folded = torch.cat([q, *rel, q.new_zeros(()).expand(*q.shape[:-1], rest)], dim=-1)
            folded = folded.view(len(k), heads, -1, k.shape[-1])
            return F.scaled_dot_product_attention(folded, k, v, scale=d**-0.5)[..., :d]
        q, rel_h, rel_w = (t.reshape(len(k) * heads, -1, t.shape[-1]) for t in (q, *rel))
        return blocked_attention(q, k.flatten(0, 1), v.flatten(0, 1), rel_h, rel_w).unflatten(0, (-1, heads))


def one_hot_positions(size: tuple[int, int], d: int, like: torch.Tensor) -> torch.Tensor:
    """Channels that turn position logits into part of the product: [h, w, h + w + padding].

    A query that carries its position logits for every row and column, and a key that carries a one at its own, add up
    to exactly the decomposed bias. Padding to a multiple of `ALIGN` in all.
    """
    height, width = size
    rows, cols = (torch.eye(n, dtype=like.dtype, device=like.device) for n in size)
    positions = torch.cat([rows[:, None].expand(-1, width, -1), cols[None].expand(height, -1, -1)], dim=-1)
    return F.pad(positions, (0, -(d + height + width) % ALIGN))


def blocked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor
) -> torch.Tensor:
    """q [G, n, d], k and v [G, h*w, d], rel_h [G, n, h], rel_w [G, n, w] -> [G, n, d]; without gradients.

    `BLOCK` logits at a time, in the same memory: product, positions, softmax and product all find them in the cache.
    """
    (groups, n, d), keys = q.shape, k.shape[1]
    rows = min(n, max(1, BLOCK // keys))
    batch = min(groups, max(1, BLOCK // (rows * keys)))
    k, out, none = k.transpose(1, 2), torch.empty_like(q), q.new_zeros(())
    memory = q.new_empty(batch * rows * keys)
    for i in range(0, groups, batch):
        for j in range(0, n, rows):
            here = (slice(i, i + batch), slice(j, j + rows))
            shape = (*q[here].shape[:2], keys)
            logits = memory[: math.prod(shape)].view(shape)
            torch.baddbmm(none, q[here], k[i : i + batch], beta=0, alpha=d**-0.5, out=logits)
            grid = logits.unflatten(-1, (rel_h.shape[-1], rel_w.shape[-1]))
            grid += rel_h[here][..., None]
            grid += rel_w[here][..., None, :]
            torch.softmax(logits, -1, out=logits)  # each row is read before it is written
            out[here] = torch.bmm(logits, v[i : i + batch])
    return out


# --- relative positions ----------------------------------------------------------------------------------------------


def offsets(size: int) -> torch.Tensor:
    """Rows of a relative position table [2 * size - 1, d]: [size, size], places of queries by places of keys."""
    places = torch.arange(size)
    return places[:, None] - places + size - 1


def grid_rel_pos(q: torch.Tensor, down: torch.Tensor, across: torch.Tensor) -> list[torch.Tensor]:
    """Position logits of queries that are whole windows: q [..., h, w, d] -> [..., h, w, size_h], [..., h, w, size_w].

    down [h, size_h, d], across [w, size_w, d]: what the queries of a row and of a column meet.
    """
    return [torch.einsum("...yxd,ykd->...yxk", q, down), torch.einsum("...yxd,xkd->...yxk", q, across)]


def rel_pos(q: torch.Tensor, table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Position logits along one axis of queries anywhere: q [G, heads, k, d], places [G, k] -> [G, heads, k, size].

    table [size, size, d]: what a query at each place of the axis meets.
    """
    met = F.embedding(places, table.flatten(1)).unflatten(-1, table.shape[1:])  # [G, k, size, d]
    return torch.einsum("gnqd,gqkd->gnqk", q, met)


def at(rel: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Position logits at keys anywhere: rel [G, heads, n, size], positions of keys [G, k] -> [G, heads, n, k]."""
    return rel.gather(3, positions[:, None, None, :].expand(-1, *rel.shape[1:3], -1))
