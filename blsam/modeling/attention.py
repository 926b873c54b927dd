"""Attention in which the queries may be fewer than the keys, with SAM's decomposed relative positions.

One module serves SAM's wide attention (all tokens ask), the P-branch (prime tokens ask, all tokens answer: the paper's
semi-cross attention) and the narrow E-branch (all tokens ask, in fewer channels).

    logits[q, k] = scale * q . k + q . R_h[y_q - y_k] + q . R_w[x_q - x_k]        (q unscaled in the last two, as in SAM)

SAM pads partial windows with zeros *before* the projections, so a padded key is the bias of the k and v projections.
Here the projections run on real tokens only and the padding is filled in with those biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .routing import Group, Part, Queries
from .windows import num_windows

# Queries are taken in chunks so that the bias of one chunk has at most this many entries for each head and image.
MAX_BIAS = 2**21


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

    def forward(self, x: torch.Tensor, queries: Queries) -> torch.Tensor:
        """x [B, H, W, dim], normalised -> [P, dim], one row for each of the P queries, in the order of their tokens."""
        b, height, width, _ = x.shape
        rows = x.reshape(b * height * width, -1)
        choice = queries.inverse is None and queries.tokens is not None
        if choice:
            wq, wkv = self.qkv.weight.split([self.inner, 2 * self.inner])
            bq, bkv = self.qkv.bias.split([self.inner, 2 * self.inner])
            chosen = rows[queries.tokens]
            q = F.linear(chosen, wq, bq)
            kv = F.linear(rows if self.semi_cross else chosen, wkv, bkv)
        else:
            q, kv = self.qkv(rows).split([self.inner, 2 * self.inner], dim=-1)
            q = q if queries.tokens is None else q[queries.tokens]

        keys = None if choice and not self.semi_cross else self._keys(kv.view(b, height, width, -1))
        size = (self.window, self.window) if self.window else (height, width)
        out, start = [], 0
        for part in queries.parts:
            images = b if part.images is None else part.images.numel()
            stop, first = start + images * part.count, 0
            done = [q.new_empty(images, 0, self.inner)]
            for group in part.groups:
                cut = _Cut(slice(start, stop), images, slice(first, first + group.num_windows * group.count), group)
                heads = self._attend(cut, q, kv, keys, part, queries, size)  # [b*G, heads, k, d]
                done.append(heads.transpose(1, 2).reshape(images, -1, self.inner))  # -> [b, G*k, inner]
                first = cut.columns.stop
            out.append(torch.cat(done, dim=1).view(-1, self.inner))
            start = stop
        y = self.proj(out[0] if len(out) == 1 else torch.cat(out))
        return y if queries.inverse is None else y[queries.inverse]

    def _keys(self, kv: torch.Tensor) -> torch.Tensor:
        """[B, H, W, 2*inner] -> [2, B, nW, heads, w*w, d], partial windows filled with the projections' bias."""
        b, height, width, _ = kv.shape
        if not self.window:
            kv = kv.view(b, 1, height * width, 2, self.heads, -1)
            return kv.permute(3, 0, 1, 4, 2, 5)  # [B, 1, N, 2, heads, d] -> [2, B, 1, heads, N, d]
        w = self.window
        down, across = num_windows(height, width, w)
        fill = self.qkv.bias[self.inner :].to(kv.dtype)
        if across * w > width:
            kv = torch.cat([kv, fill.expand(b, height, across * w - width, -1)], dim=2)
        if down * w > height:
            kv = torch.cat([kv, fill.expand(b, down * w - height, across * w, -1)], dim=1)
        kv = kv.view(b, down, w, across, w, 2, self.heads, -1)
        kv = kv.permute(5, 0, 1, 3, 6, 2, 4, 7)  # [B, nH, w, nW, w, 2, heads, d] -> [2, B, nH, nW, heads, w, w, d]
        return kv.reshape(2, b, down * across, self.heads, w * w, -1)

    def _attend(
        self,
        cut: _Cut,
        q: torch.Tensor,
        kv: torch.Tensor,
        keys: torch.Tensor | None,
        part: Part,
        queries: Queries,
        size: tuple[int, int],
    ) -> torch.Tensor:
        """Attention of one group of windows: [b*G, heads, k, d]."""
        q = cut(q).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b*G, k, inner] -> [b*G, heads, k, d]
        group = cut.group
        if group.shape is not None:
            rel_h, rel_w = grid_rel_pos(q, self.rel_pos_h, self.rel_pos_w, group.shape, size)
        else:
            y, x = cut(queries.y), cut(queries.x)
            rel_h, rel_w = (rel_pos(q, t, p, n) for t, p, n in zip((self.rel_pos_h, self.rel_pos_w), (y, x), size))

        if keys is not None:  # all tokens of the window answer
            keys = keys if part.images is None else keys[:, part.images]
            keys = keys if group.windows is None else keys[:, :, group.windows]
            k, v = keys.flatten(1, 2)  # [2, b, G, heads, w*w, d] -> 2 x [b*G, heads, w*w, d]
            return attend(q, k, v, rel_h, rel_w)
        k, v = cut(kv).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # -> [2, b*G, heads, k, d]
        bias = at(rel_h, y) + at(rel_w, x)
        if queries.live is not None:
            bias = bias.masked_fill(cut(queries.live)[:, None, None, :] == 0, torch.finfo(bias.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


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


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor
) -> torch.Tensor:
    """q [G, heads, n, d], k and v [G, heads, h*w, d], rel_h [G, heads, n, h], rel_w [G, heads, n, w] -> like q.

    The bias, rel_h + rel_w at every key, is made for a chunk of queries at a time.
    """
    chunk = max(1, MAX_BIAS // k.shape[2])
    out = []
    for part, h, w in zip(q.split(chunk, 2), rel_h.split(chunk, 2), rel_w.split(chunk, 2)):
        bias = (h[..., :, None] + w[..., None, :]).flatten(-2)
        out.append(F.scaled_dot_product_attention(part, k, v, attn_mask=bias))
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def offsets(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of a relative position table [2 * size - 1, d]: [...] places of queries -> [..., size], one for each key."""
    return positions[..., None] - torch.arange(size, device=positions.device) + size - 1


def grid_rel_pos(
    q: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
    shape: tuple[int, int],
    size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Position logits of queries that are a whole grid of `shape`, in windows of `size`.

    q [G, heads, h*w, d] -> [G, heads, h*w, size_h] and [G, heads, h*w, size_w]. One table row serves a row of queries.
    """
    grid = q.unflatten(2, shape)  # [G, heads, h, w, d]
    down = table_h[offsets(torch.arange(shape[0], device=q.device), size[0])]
    across = table_w[offsets(torch.arange(shape[1], device=q.device), size[1])]
    rel_h = torch.einsum("gnyxd,ykd->gnyxk", grid, down)
    rel_w = torch.einsum("gnyxd,xkd->gnyxk", grid, across)
    return rel_h.flatten(2, 3), rel_w.flatten(2, 3)


def rel_pos(q: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, size: int) -> torch.Tensor:
    """Position logits along one axis of queries anywhere: q [G, heads, k, d], positions [G, k] -> [G, heads, k, size]."""
    return torch.einsum("gnqd,gqkd->gnqk", q, table[offsets(positions, size)])


def at(rel: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Position logits at keys anywhere: rel [G, heads, n, size], positions of keys [G, k] -> [G, heads, n, k]."""
    return rel.gather(3, positions[:, None, None, :].expand(-1, *rel.shape[1:3], -1))
