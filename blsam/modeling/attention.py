"""Attention in which the queries may be fewer than the keys, with SAM's decomposed relative positions.

One module serves SAM's wide attention (all tokens ask), the P-branch (prime tokens ask, all tokens answer: the paper's
semi-cross attention) and the narrow E-branch (all tokens ask, in fewer channels).

    logits[q, k] = scale * q . k + q . R_h[y_q - y_k] + q . R_w[x_q - x_k]        (q unscaled in the last two, as in SAM)

SAM pads partial windows with zeros *before* the projections, so a padded key is the bias of the k and v projections.
Here the projections run on real tokens only and the padding is filled in with those biases. A projection that somebody
has wrapped, hooked or quantised is called as SAM calls it, on the grid with its padding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention as _Attention
from torch import nn

from .layers import input_dtype, is_plain
from .product import FORMS, Keys, Plain, choose_form
from .routing import Queries
from .windows import Region, merge, num_windows, regions


class Attention(_Attention):
    """Multi-head attention over windows of `window` tokens a side (0: over the whole grid).

    dim is the width of the tokens, inner that of queries, keys and values (SAM: the same). `semi_cross=False` takes keys
    and values from the query tokens alone. `pool`: over the whole grid, the means of cells of pool x pool tokens answer
    instead of each, positions included (ours). Attributes: `window`, which may be changed (the tables of positions are
    resampled, as SAM does); `form`, a name of `product.FORMS` to force, None: what is fastest. Called by hand, it is
    SAM's on windows of `window` tokens a side: it cuts larger grids itself.
    """

    offsets_h: torch.Tensor
    offsets_w: torch.Tensor

    def __init__(
        self,
        dim: int,
        inner: int,
        num_heads: int,
        window: int,
        grid: tuple[int, int],
        semi_cross: bool = True,
        pool: int = 1,
    ) -> None:
        nn.Module.__init__(self)  # SAM's own would make layers of one width
        if pool > 1 and (window or not semi_cross):
            raise ValueError("cells of tokens answer over the whole grid alone, and where all tokens do")
        self.num_heads, self.inner, self.window, self.semi_cross = num_heads, inner, window, semi_cross
        self.pool = pool
        self.form: str | None = None
        self.scale, self.use_rel_pos = (inner // num_heads) ** -0.5, True  # as SAM's says
        self.qkv = nn.Linear(dim, 3 * inner)
        self.proj = nn.Linear(inner, dim)
        height, width = (window, window) if window else grid
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, inner // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, inner // num_heads))
        self.register_buffer("offsets_h", offsets(height), persistent=False)
        self.register_buffer("offsets_w", offsets(width), persistent=False)

    def forward(self, x: torch.Tensor, queries: Queries | None = None) -> torch.Tensor:
        """x [B, H, W, dim], normalised -> the same shape, or [P, dim] with a row for each of P queries."""
        q, kv = self._projections(x, queries)
        if self.pool > 1:
            kv = cell_means(kv, self.pool)
        return self.proj(self._all(q, kv) if queries is None else self._chosen(q, kv, queries, x.shape[:3]))

    @property
    def position_tables(self) -> tuple[nn.Parameter, ...]:
        """What all heads share of relative positions, [2 * size - 1, d] each."""
        return self.rel_pos_h, self.rel_pos_w

    def _projections(self, x: torch.Tensor, queries: Queries | None) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B, H, W, inner], or [P, inner] of the queries, and kv [B, H', W', 2 * inner], or of the queries alone.

        H' x W' is the grid, or with its padding if `qkv` is no plain layer.
        """
        sizes = [self.inner, 2 * self.inner]
        x = x.to(input_dtype(self.qkv))
        if not is_plain(self.qkv):
            height, width, side = *x.shape[1:3], self.window or 1
            q, kv = self.qkv(F.pad(x, (0, 0, 0, -width % side, 0, -height % side))).split(sizes, dim=-1)
            q = q[:, :height, :width]
            if queries is None:
                return q, kv
            if not self.semi_cross:
                kv = kv[:, :height, :width].flatten(0, 2).index_select(0, queries.tokens)
            return q.flatten(0, 2).index_select(0, queries.tokens), kv
        if queries is None:
            q, kv = self.qkv(x).split(sizes, dim=-1)
            return q, kv
        wq, wkv = self.qkv.weight.split(sizes)
        bq, bkv = self.qkv.bias.split(sizes)
        chosen = x.flatten(0, 2).index_select(0, queries.tokens)
        return F.linear(chosen, wq, bq), F.linear(x if self.semi_cross else chosen, wkv, bkv)

    def _all(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Every token asks, region by region of equal windows: q [B, H, W, inner] -> the same shape."""
        product, pieces, places = self._product(q, q.shape), [], regions(q.shape[1], q.shape[2], self.window)
        down, across = self._tables(self._reach(q.shape), product.scale, q.dtype)
        for region in places:
            h, w = region.shape
            q_here = self._by_head(region.windows(q), 1)[0]
            keys = product.keys(self._answers(kv, region, product.size))
            y = product(q_here, *grid_rel_pos(q_here, down[:h], across[:w]), keys)
            # [G, heads, h*w, d] -> [down, across, B, h, w, heads, d]
            pieces.append(y.unflatten(2, region.shape).unflatten(0, (*region.count, -1)).movedim(3, 5))
        return merge(pieces, places).flatten(3)

    def _chosen(self, q: torch.Tensor, kv: torch.Tensor, queries: Queries, grid: torch.Size) -> torch.Tensor:
        """Some tokens ask, group by group: q [P, inner], kv of all tokens (or of these) -> [P, inner]."""
        product = self._product(q, grid)
        keys: list[Keys] = []
        if self.semi_cross:
            for region in regions(grid[1], grid[2], self.window):
                keys.append(product.keys(self._answers(kv, region, product.size)))
        down, across = self._tables(self._reach(grid), product.scale if self.semi_cross else 1.0, q.dtype)
        sizes = [group.num_windows * group.count for group in queries.groups]
        lists = [one.split(sizes) for one in (q, queries.y, queries.x)]
        out = [q.new_empty(0, self.inner)]
        for number, group in enumerate(queries.groups):
            q, y, x = (one[number].unflatten(0, (-1, group.count)) for one in lists)
            q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [G, k, inner] -> [G, heads, k, d]
            rel = rel_pos(q, down, y), rel_pos(q, across, x)
            if self.semi_cross:  # all tokens of the window answer
                k, v = keys[group.region]
                heads = product(q, *rel, (k[group.windows], v[group.windows]))
            else:
                kv_here = (
                    kv.split(sizes)[number].unflatten(0, (-1, group.count)).unflatten(-1, (2, self.num_heads, -1))
                )
                k, v = kv_here.permute(2, 0, 3, 1, 4)  # [G, k, 2, heads, d] -> [2, G, heads, k, d]
                bias = at(rel[0], y) + at(rel[1], x)
                if queries.live is not None:
                    live = queries.live.split(sizes)[number].unflatten(0, (-1, group.count))
                    bias = bias.masked_fill(~live[:, None, None], torch.finfo(bias.dtype).min)
                heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            out.append(heads.transpose(1, 2).flatten(0, 1).flatten(1))  # [G, heads, k, d] -> [G*k, inner]
        return torch.cat(out)

    def _product(self, q: torch.Tensor, grid: torch.Size) -> Plain:
        """The form of the product for these projections."""
        size = num_windows(*self._reach(grid), self.pool)  # of the keys' grid
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, self.rel_pos_h, self.rel_pos_w))
        count, asking = math.prod(size), q.numel() // self.inner
        form = self.form or choose_form(q.dtype, q.device, gradient, count, self.num_heads * asking * count)
        return FORMS[form](size, self.inner // self.num_heads)

    def _reach(self, grid: torch.Size) -> tuple[int, int]:
        """Rows and columns of tokens that a query meets."""
        return (self.window, self.window) if self.window else (grid[1], grid[2])

    def _by_head(self, windows: torch.Tensor, parts: int) -> torch.Tensor:
        """Projections of windows, a view: [down, across, B, h, w, parts*inner] -> [parts, ..., B, heads, h, w, d]."""
        return windows.unflatten(-1, (parts, self.num_heads, -1)).permute(5, 0, 1, 2, 6, 3, 4, 7)

    def _answers(self, kv: torch.Tensor, region: Region, size: tuple[int, int]) -> torch.Tensor:
        """Keys and values of windows, partial ones filled up to `size`: -> [2, down, across, B, heads, h, w, d].

        kv [B, H, W, 2 * inner] may hold the padding; if not, it is filled in with the bias.
        """
        filled = region.filled(size)
        if filled.rows.stop <= kv.shape[1] and filled.cols.stop <= kv.shape[2]:
            return self._by_head(filled.windows(kv), 2)
        kv = self._by_head(region.windows(kv), 2)
        (h, w, d), bias = kv.shape[-3:], self.qkv.bias[self.inner :].to(kv.dtype)
        bias = bias.view(2, 1, 1, 1, self.num_heads, 1, 1, d)
        if w < size[1]:
            kv = torch.cat([kv, bias.expand(*kv.shape[:-2], size[1] - w, d)], dim=-2)
        if h < size[0]:
            kv = torch.cat([kv, bias.expand(*kv.shape[:-3], size[0] - h, size[1], d)], dim=-3)
        return kv

    def _tables(self, reach: tuple[int, int], scale: float, dtype: torch.dtype) -> list[torch.Tensor]:
        """What a query at each place of an axis meets at each place of a key, times `scale`: 2 x [size, keys, d].

        Of other sizes than the tables are made for, they are resampled, as in SAM.
        """
        found = []
        pairs = ((self.rel_pos_h, self.offsets_h), (self.rel_pos_w, self.offsets_w))
        for (table, rows), size in zip(pairs, reach):
            rows = rows if len(rows) == size else offsets(size).to(rows.device)
            # F.embedding is table[rows], on a CPU several times faster
            met = F.embedding(rows, (resampled(table, 2 * size - 1) * scale).to(dtype))
            if self.pool > 1:  # a mean of tokens meets the mean of what they would meet
                met = cell_means(met[:, :, None], self.pool)[:, :, 0]  # along the keys
            found.append(met)
        return found


def cell_means(grid: torch.Tensor, side: int) -> torch.Tensor:
    """Means over cells of side x side tokens, those at the right and bottom edge maybe smaller: [B, H, W, C] -> [B,
    ceil(H / side), ceil(W / side), C]."""
    down, across = grid.shape[1:3]
    # sums with zeros beyond the edge, over how many tokens there are: pooling with `ceil_mode` comes out otherwise in an
    # ONNX graph, and OpenVINO cannot compile it in bfloat16
    whole = F.pad(grid, (0, 0, 0, -across % side, 0, -down % side))
    # [B, h * side, w * side, C] -> [B, h, side, w, side, C] -> [B, h, w, C]
    sums = whole.unflatten(2, (-1, side)).unflatten(1, (-1, side)).sum((2, 4))
    h, w = ((n - torch.arange(0, n, side, device=grid.device)).clamp(max=side) for n in (down, across))
    return (sums / (h[:, None] * w)[..., None]).to(grid.dtype)


# --- relative positions ----------------------------------------------------------------------------------------------


def offsets(size: int) -> torch.Tensor:
    """Rows of a relative position table [2 * size - 1, d]: [size, size], places of queries by places of keys."""
    places = torch.arange(size)
    return places[:, None] - places + size - 1


def resampled(table: torch.Tensor, length: int) -> torch.Tensor:
    """A relative position table of another length, [L, d] -> [length, d], linearly, as SAM does."""
    if table.shape[0] == length:
        return table
    return F.interpolate(table.float().T[None], size=length, mode="linear")[0].T.to(table.dtype)  # [1, d, L] -> [L, d]


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
