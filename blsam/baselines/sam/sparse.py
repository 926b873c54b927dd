"""Few tokens answer, all ask: a dense SAM made cheaper without training, after SparseSAM (arXiv 2605.17633).

Tokens are put in an order once for the windows and once for the whole image, head by head, by the keys of the first
layer of each kind. Cells of 2 x 2 tokens are ranked by how much their keys differ among themselves, and how little their
mean is like those of the other cells. First come the first tokens of all cells, by rank, then the second ones, and so
forth: a quarter of the order is one token of every cell.

Attention: every token asks, the first tokens of the order answer, a share `keep_ratio` of them. Queries beyond them also
see the keys of their own block of the order (`wide="block"`, SparseSAM's rule; an image has 64 blocks, a window four).
Or nothing more, while those of the first tokens see all keys (`wide="prime"`, ours: semi-cross attention as in bLSAM,
with strided keys in the place of narrow blocks).
Feed-forward parts, of window layers after the first global layer: on the share of the image's tokens that come first in
the mean over heads, while the others pass unchanged. All others are dense: nothing stands for what they would skip.

SparseSAM's code takes blocks of 64 tokens in windows, too, of which 14 x 14 tokens have three and a bit: quarters here.
As there, the order of the keys knows nothing of the image's padding; the choice for the feed-forward parts does (ours).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...config import SparseRule
from ...modeling.attention import Attention, grid_rel_pos
from ...modeling.blocks import Block
from ...modeling.layers import is_plain
from ...modeling.product import BLOCK, one_hot_positions
from ...modeling.routing import Stage
from ..base import gather
from .attention import logits, product
from .base import ReducedEncoder, padding_last
from .macs import fed_of, keys_of

CELL = 2  # tokens along a side


class SparseEncoder(ReducedEncoder):
    """SAM's encoder with few keys, and few tokens in the feed-forward parts of window layers."""

    rule = SparseRule

    def reduce(
        self, grid: torch.Tensor, keep_ratio: float, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[Stage]]:
        orders: dict[bool, torch.Tensor] = {}
        shape, stages, kept = grid.shape, [], None
        for i in range(self.config.depth):
            block, over_image = self.block(i), self.config.is_global(i)
            q, k, v = projections(block.attn, block.norm1(grid))
            if over_image not in orders:
                orders[over_image] = order_of(k)
            first, length = keys_of(k.shape[2] * k.shape[3], keep_ratio, over_image)
            wide = self.options.wide == "prime"
            heads = few_answer(block.attn, q, k, v, orders[over_image], first, length, wide)
            grid = grid + block.attn.proj(whole(heads, shape))
            if over_image and kept is None:
                scores = -orders[True].argsort(dim=2).float().mean(dim=1)  # [B, H*W]
                count = fed_of(scores.shape[1], keep_ratio)
                kept = padding_last(scores, real).argsort(dim=1, descending=True, stable=True)[:, :count]
                stages.append(self.stage(kept, shape, scores))
            grid = grid + block.feed_forward(grid) if over_image or kept is None else fed(block, grid, kept)
        return grid.flatten(1, 2), stages


def fed(block: Block, grid: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The feed-forward part on some tokens, the others unchanged: grid [B, H, W, C], kept [B, k] int64."""
    rows, index = grid.flatten(1, 2), kept[..., None].expand(-1, -1, grid.shape[3])
    return rows.scatter_add(1, index, block.feed_forward(gather(rows, kept)).to(rows.dtype)).view(grid.shape)


# --- windows with their padding --------------------------------------------------------------------------------------


def projections(attn: Attention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a grid, window by window with SAM's padding, or as one: x [B, H, W, C], normalised ->
    [G, heads, h, w, d] each, G = B*nW. Padding is zero before the projections, and so their bias after them."""
    height, width = x.shape[1:3]
    side = attn.window
    down, right = (-height % side, -width % side) if side else (0, 0)
    if is_plain(attn.qkv):
        qkv = F.pad(attn.qkv(x.to(attn.qkv.weight.dtype)), (0, 0, 0, right, 0, down))
        if down or right:
            outside = F.pad(x.new_zeros(height, width, dtype=torch.bool), (0, right, 0, down), value=True)
            qkv = torch.where(outside[..., None], attn.qkv.bias.to(qkv.dtype), qkv)
    else:
        qkv = attn.qkv(F.pad(x, (0, 0, 0, right, 0, down)))
    size = (side, side) if side else (height, width)
    qkv = qkv.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0])).transpose(2, 3)  # [B, nH, nW, h, w, 3 * C]
    qkv = qkv.flatten(0, 2).unflatten(-1, (3, attn.num_heads, -1))
    q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)  # [G, h, w, 3, heads, d] -> [3, G, heads, h, w, d]
    return q, k, v


def whole(heads: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The grid [B, H, W, C] of windows [G, heads, h, w, d], without their padding."""
    height, width = heads.shape[2:4]
    down, across = -(-shape[1] // height), -(-shape[2] // width)
    x = heads.movedim(1, 3).flatten(3)  # [G, heads, h, w, d] -> [G, h, w, C]
    x = x.unflatten(0, (shape[0], down, across))  # -> [B, nH, nW, h, w, C]
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : shape[1], : shape[2]]


# --- the order -------------------------------------------------------------------------------------------------------


def order_of(k: torch.Tensor) -> torch.Tensor:
    """The order of the tokens by their keys: [G, heads, h, w, d] -> [G, heads, h*w] int64."""
    height, width = k.shape[2:4]
    ranks = cell_scores(k).flatten(2).argsort(dim=2, descending=True, stable=True).argsort(dim=2)  # [G, heads, cells]
    y, x = (torch.arange(n, device=k.device) for n in (height, width))
    cell = (y // CELL)[:, None] * -(-width // CELL) + x // CELL
    member = (y % CELL)[:, None] * CELL + x % CELL
    return (member.flatten() * ranks.shape[2] + ranks[:, :, cell.flatten()]).argsort(dim=2)


def cell_scores(k: torch.Tensor) -> torch.Tensor:
    """How much each cell of 2 x 2 tokens says that others do not: keys [G, heads, h, w, d] -> [G, heads, cells] float32.

    z-score of the spread within the cell plus z-score of minus the mean cosine to the other cells; cells at the edge may
    have fewer tokens.
    """
    grid = k.detach().float().flatten(0, 1).permute(0, 3, 1, 2)  # [G*heads, d, h, w]
    mean = F.avg_pool2d(grid, CELL, ceil_mode=True)
    spread = (F.avg_pool2d(grid.square(), CELL, ceil_mode=True) - mean.square()).sum(1).flatten(1)
    direction = F.normalize(mean.flatten(2), dim=1)  # [G*heads, d, cells]
    alike = (direction * (direction.sum(2, keepdim=True) - direction)).sum(1) / max(1, direction.shape[2] - 1)
    return (z_score(spread) - z_score(alike)).unflatten(0, k.shape[:2])


def z_score(values: torch.Tensor) -> torch.Tensor:
    """[..., n] -> the same, of mean 0 and deviation 1 (0 where all are alike)."""
    values = values - values.mean(dim=-1, keepdim=True)
    return values / values.std(dim=-1, keepdim=True, correction=0).clamp(min=1e-12)


# --- attention -------------------------------------------------------------------------------------------------------


def few_answer(
    attn: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: torch.Tensor,
    first: int,
    block: int,
    wide: bool,
) -> torch.Tensor:
    """Attention to the `first` tokens of the order: q, k, v [G, heads, h, w, d], order [G, heads, h*w] -> as q.

    Queries beyond them see their own block of keys too, or (wide) those among them see all keys.
    """
    size, d = (q.shape[2], q.shape[3]), q.shape[4]
    down, across = attn._tables(size, 1.0, q.dtype)
    asked = torch.cat([q * d**-0.5, *grid_rel_pos(q, down, across)], dim=-1)
    answers = torch.cat([k, one_hot_positions(size, sum(size), k).expand(*k.shape[:4], -1)], dim=-1)
    asked, answers, v = (ordered(one.flatten(2, 3), order) for one in (asked, answers, v))
    shared = answers[:, :, :first], v[:, :, :first]
    pieces = [product(attn, asked[:, :, :first], *((answers, v) if wide else shared), None)[0]]
    if wide:
        pieces.append(product(attn, asked[:, :, first:], *shared, None)[0])
    else:
        n = asked.shape[2]
        even = first + (n - first) // block * block
        for start, stop, length in ((first, even, block), (even, n, n - even)):  # the last may be a part of a block
            if stop > start:
                own = [one[:, :, start:stop].unflatten(2, (-1, length)) for one in (asked, answers, v)]
                pieces.append(with_own(attn, own, shared))
    return ordered(torch.cat(pieces, dim=2), order.argsort(dim=2)).unflatten(2, size)


def with_own(attn: Attention, own: list[torch.Tensor], shared: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Queries in blocks that see the shared keys and those of their block -> [G, heads, blocks*b, d].

    own: queries, keys and values [G, heads, blocks, b, ...]; shared: keys and values [G, heads, f, ...]. The map is made
    `BLOCK` weights at a time.
    """
    (blocks, size), f, d, plain = own[0].shape[2:4], shared[0].shape[2], own[2].shape[4], attn.form == "plain"
    few = max(1, BLOCK // (own[0].shape[:2].numel() * size * (f + size)))
    pieces = []
    for start in range(0, blocks, few):
        q, k, v = (one[:, :, start : start + few] for one in own)
        to_shared = logits(q.flatten(2, 3), shared[0], d, plain)
        to_own = logits(q, k, d, plain).flatten(2, 3)
        weights = torch.cat([to_shared, to_own], dim=-1).float().softmax(dim=-1).to(v.dtype)
        of_own = (weights[..., f:].unflatten(2, (-1, size)) @ v).flatten(2, 3)
        pieces.append(weights[..., :f] @ shared[1] + of_own)
    return torch.cat(pieces, dim=2)


def ordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Tokens of each head in its order: x [G, heads, n, d], order [G, heads, n]."""
    return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3]))
