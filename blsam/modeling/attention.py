"""Attention in which the queries may be fewer than the keys, with SAM's decomposed relative positions.

One module serves SAM's wide attention (all tokens ask), the P-branch (prime tokens ask, all tokens answer: the paper's
semi-cross attention) and the narrow E-branch (all tokens ask, in fewer channels).

    logits[q, k] = scale * q . k + q . R_h[y_q - y_k] + q . R_w[x_q - x_k]        (q unscaled in the last two, as in SAM)

SAM pads partial windows with zeros *before* the projections, so a padded key is the bias of the k and v projections.
Here the projections run on real tokens only and the padding is filled in with those biases.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .product import FORMS, Keys, Plain, choose_form
from .routing import Queries
from .windows import merge, regions


class Attention(nn.Module):
    """Multi-head attention over windows of `window` tokens a side (0: over the whole grid).

    dim is the width of the tokens, inner that of queries, keys and values (SAM: the same). `semi_cross=False` takes keys
    and values from the query tokens alone. Attribute `form`: a name of `product.FORMS` to force, None: what is fastest.
    """

    offsets_h: torch.Tensor
    offsets_w: torch.Tensor

    def __init__(
        self, dim: int, inner: int, heads: int, window: int, grid: tuple[int, int], semi_cross: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.inner, self.window, self.semi_cross = heads, inner, window, semi_cross
        self.form: str | None = None
        self.qkv = nn.Linear(dim, 3 * inner)
        self.proj = nn.Linear(inner, dim)
        height, width = (window, window) if window else grid
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, inner // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, inner // heads))
        self.register_buffer("offsets_h", offsets(height), persistent=False)
        self.register_buffer("offsets_w", offsets(width), persistent=False)

    def forward(self, x: torch.Tensor, queries: Queries | None = None) -> torch.Tensor:
        """x [B, H, W, dim], normalised -> [P, dim], one row for each of the P queries; None: all tokens, in order."""
        grid = x.shape[:3]
        rows = x.to(self.qkv.weight.dtype).flatten(0, 2)
        if queries is None:
            return self.proj(self._all(self.qkv(rows), grid))
        wq, wkv = self.qkv.weight.split([self.inner, 2 * self.inner])
        bq, bkv = self.qkv.bias.split([self.inner, 2 * self.inner])
        chosen = rows.index_select(0, queries.tokens)
        q = F.linear(chosen, wq, bq)
        kv = F.linear(rows if self.semi_cross else chosen, wkv, bkv)
        return self.proj(self._chosen(q, kv, queries, grid))

    def _all(self, qkv: torch.Tensor, grid: torch.Size) -> torch.Tensor:
        """Every token asks, region by region of equal windows: [B*H*W, 3*inner] -> [B*H*W, inner]."""
        product, pieces, places = self._product(qkv, grid), [], regions(grid[1], grid[2], self.window)
        down, across = self._tables(product.scale, qkv.dtype)
        for region in places:
            h, w = region.shape
            qkv_here = by_head(region.windows(qkv.view(*grid, 3, self.heads, -1)))
            q, kv = qkv_here[0], self._padded(qkv_here[1:], product.size)
            y = product(q, *grid_rel_pos(q, down[:h], across[:w]), product.keys(kv))
            # [G, heads, h*w, d] -> [down, across, B, h, w, heads, d]
            pieces.append(y.unflatten(2, region.shape).unflatten(0, (*region.count, -1)).movedim(3, 5))
        return merge(pieces, places).view(-1, self.inner)

    def _chosen(self, q: torch.Tensor, kv: torch.Tensor, queries: Queries, grid: torch.Size) -> torch.Tensor:
        """Some tokens ask, group by group: q [P, inner], kv of all tokens (or of these) -> [P, inner]."""
        product = self._product(q, grid)
        keys: list[Keys] = []
        if self.semi_cross:
            kv = kv.view(*grid, 2, self.heads, -1)
            for region in regions(grid[1], grid[2], self.window):
                keys.append(product.keys(self._padded(by_head(region.windows(kv)), product.size)))
        down, across = self._tables(product.scale if self.semi_cross else 1.0, q.dtype)
        sizes = [group.num_windows * group.count for group in queries.groups]
        lists = [one.split(sizes) for one in (q, queries.y, queries.x)]
        out = [q.new_empty(0, self.inner)]
        for number, group in enumerate(queries.groups):
            q, y, x = (one[number].unflatten(0, (-1, group.count)) for one in lists)
            q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [G, k, inner] -> [G, heads, k, d]
            rel = rel_pos(q, down, y), rel_pos(q, across, x)
            if self.semi_cross:  # all tokens of the window answer
                k, v = keys[group.region]
                heads = product(q, *rel, (k[group.windows], v[group.windows]))
            else:
                kv_here = kv.split(sizes)[number].unflatten(0, (-1, group.count)).unflatten(-1, (2, self.heads, -1))
                k, v = kv_here.permute(2, 0, 3, 1, 4)  # [G, k, 2, heads, d] -> [2, G, heads, k, d]
                bias = at(rel[0], y) + at(rel[1], x)
                if queries.live is not None:
                    live = queries.live.split(sizes)[number].unflatten(0, (-1, group.count))
                    bias = bias.masked_fill(~live[:, None, None], torch.finfo(bias.dtype).min)
                heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            out.append(heads.transpose(1, 2).flatten(0, 1).flatten(1))  # [G, heads, k, d] -> [G*k, inner]
        return torch.cat(out)

    def _product(self, like: torch.Tensor, grid: torch.Size) -> Plain:
        """The form of the product for these projections."""
        size = (self.window, self.window) if self.window else (grid[1], grid[2])
        inputs = (like, self.qkv.weight, self.rel_pos_h, self.rel_pos_w)
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        form = self.form or choose_form(like.dtype, like.device, gradient)
        return FORMS[form](size, self.inner // self.heads)

    def _padded(self, kv: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Keys and values [2, ..., heads, h, w, d] of windows, partial ones filled up to `size` with the bias."""
        (h, w, d), bias = kv.shape[-3:], self.qkv.bias[self.inner :].to(kv.dtype)
        bias = bias.view(2, 1, 1, 1, self.heads, 1, 1, d)
        if w < size[1]:
            kv = torch.cat([kv, bias.expand(*kv.shape[:-2], size[1] - w, d)], dim=-2)
        if h < size[0]:
            kv = torch.cat([kv, bias.expand(*kv.shape[:-3], size[0] - h, size[1], d)], dim=-3)
        return kv

    def _tables(self, scale: float, dtype: torch.dtype) -> list[torch.Tensor]:
        """What a query at each place of an axis meets at each place of a key, times `scale`: 2 x [size, size, d]."""
        pairs = ((self.rel_pos_h, self.offsets_h), (self.rel_pos_w, self.offsets_w))
        # F.embedding is table[offsets], on a CPU several times faster
        return [F.embedding(rows, (table * scale).to(dtype)) for table, rows in pairs]


def by_head(windows: torch.Tensor) -> torch.Tensor:
    """Projections of windows, a view: [down, across, B, h, w, parts, heads, d] -> [parts, ..., B, heads, h, w, d]."""
    return windows.permute(5, 0, 1, 2, 6, 3, 4, 7)


# --- relative positions ----------------------------------------------------------------------------------------------


def offsets(size: int) -> torch.Tensor:
    """Rows of a relative position table [2 * size - 1, d]: [size, size], places of queries by places of keys."""
    places = torch.arange(size)
    return places[:, None] - places + size - 1


def grid_rel_pos(q: torch.Tensor, down: torch.Tensor, across: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Position logits of queries that are whole windows: q [..., h, w, d] -> [..., h, w, size_h], [..., h, w, size_w].

    down [h, size_h, d], across [w, size_w, d]: what the queries of a row and of a column meet.
    """
    return torch.einsum("...yxd,ykd->...yxk", q, down), torch.einsum("...yxd,xkd->...yxk", q, across)


def rel_pos(q: torch.Tensor, table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Position logits along one axis of queries anywhere: q [G, heads, k, d], places [G, k] -> [G, heads, k, size].

    table [size, size, d]: what a query at each place of the axis meets.
    """
    met = F.embedding(places, table.flatten(1)).unflatten(-1, table.shape[1:])  # [G, k, size, d]
    return torch.einsum("gnqd,gqkd->gnqk", q, met)


def at(rel: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Position logits at keys anywhere: rel [G, heads, n, size], positions of keys [G, k] -> [G, heads, n, k]."""
    return rel.gather(3, positions[:, None, None, :].expand(-1, *rel.shape[1:3], -1))
