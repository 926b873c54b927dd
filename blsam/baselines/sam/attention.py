"""Attention among tokens that are no whole grid, with SAM's relative positions at the places where they lie.

Tokens are the survivors of an image's grid, in any order, and extra ones, one a window, that stand for others. In a
window layer each meets those of its window, and SAM's padding of partial windows; in a global layer all meet all. An
extra token has no place: its position logits are zero, whether it asks or answers (ours).

Windows hold different numbers of tokens: all are filled up to the largest, and what is filled up has no weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...modeling.attention import Attention, rel_pos
from ...modeling.layers import is_plain
from ...modeling.product import BLOCK, one_hot_positions
from ...modeling.windows import num_windows, window_shapes
from ..base import Projected, project


@dataclass(frozen=True)
class Places:
    """Where m tokens lie: `index` [B, n] int64 of survivors into the H*W of `grid`, then an extra token for each window
    (m = n + nW) or none (m = n).

    window: side of the windows. live [B, nW] bool: of the extra tokens, False for one that stands for nothing; None:
    there are none.
    """

    index: torch.Tensor
    grid: tuple[int, int]
    window: int
    live: torch.Tensor | None = None

    @classmethod
    def all(cls, shape: torch.Size, window: int, device: torch.device) -> Places:
        """Every token of a grid, in its order; shape [B, H, W]."""
        index = torch.arange(shape[1] * shape[2], device=device).expand(shape[0], -1)
        return cls(index, (shape[1], shape[2]), window)

    @property
    def count(self) -> int:
        """Of the grid's windows."""
        return math.prod(num_windows(*self.grid, self.window))

    @property
    def present(self) -> torch.Tensor:
        """Which tokens stand for something: [B, m] bool."""
        found = torch.ones_like(self.index, dtype=torch.bool)
        return found if self.live is None else torch.cat([found, self.live], dim=1)

    def windows(self) -> torch.Tensor:
        """The window of every token, extra ones too: [B, m] int64."""
        found = window_of(self.index, self.grid, self.window)
        if self.live is None:
            return found
        return torch.cat([found, torch.arange(self.count, device=found.device).expand(len(found), -1)], dim=1)

    def coordinates(self, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(y, x) of every token in its window of `side` tokens a side (0: in the grid), -1 without a place: [B, m]."""
        y, x = self.index // self.grid[1], self.index % self.grid[1]
        if side:
            y, x = y % side, x % side
        more = (0, 0 if self.live is None else self.count)
        return F.pad(y, more, value=-1), F.pad(x, more, value=-1)


def window_of(index: torch.Tensor, grid: tuple[int, int], window: int) -> torch.Tensor:
    """The number of the window in which a token lies, windows counted row by row; index into the H*W of the grid."""
    across = num_windows(*grid, window)[1]
    return index // grid[1] // window * across + index % grid[1] // window


def attend(
    attn: Attention, x: torch.Tensor, places: Places, received: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention adds to tokens that meet one another, x [B, m, C] normalised -> [B, m, C].

    received, of a global layer: also how much attention each token gets, a mean over heads and over all that ask,
    [B, m] float32; else an empty tensor.
    """
    projected = project(attn, x)
    asked, answers = with_positions(attn, projected, places)
    if attn.window:
        heads, found = in_windows(attn, asked, answers, projected.v, places), x.new_zeros(0)
    else:
        mask = None if places.live is None else ignored(~places.present, asked.dtype)[:, None, None]  # [B, 1, 1, m]
        heads, found = product(attn, asked, answers, projected.v, mask, received)
    return attn.proj(heads.transpose(1, 2).flatten(2)), found  # [B, heads, m, d] -> [B, m, C]


def with_positions(attn: Attention, projected: Projected, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys whose product holds the position logits: [B, heads, m, d + h + w] each.

    As `modeling.product.Folded`: a query carries its logits for every row and column, a key a one at its own.
    """
    q, k, _ = projected
    size = (attn.window, attn.window) if attn.window else places.grid
    y, x = places.coordinates(attn.window)
    placed = (y >= 0)[:, None, :, None]  # [B, 1, m, 1]
    down, across = attn._tables(size, 1.0, q.dtype)
    rel = torch.cat([rel_pos(q, down, y.clamp(min=0)), rel_pos(q, across, x.clamp(min=0))], dim=-1)
    asked = torch.cat([q * q.shape[-1] ** -0.5, rel * placed], dim=-1)
    ones = one_hot_positions(size, sum(size), k)[y.clamp(min=0), x.clamp(min=0)]  # [B, m, h + w]
    ones = (ones[:, None] * placed).expand(*k.shape[:2], -1, -1)
    return asked, torch.cat([k, ones], dim=-1)


def ignored(absent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to logits of keys: nothing, or so little that they have no weight beside any other. Finite, so that
    a window without any key gives no NaN, even in gradients."""
    return torch.zeros(absent.shape, dtype=dtype, device=absent.device).masked_fill(absent, torch.finfo(dtype).min / 2)


# --- the product -----------------------------------------------------------------------------------------------------


def product(
    attn: Attention,
    asked: torch.Tensor,
    answers: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    received: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(asked answers^T + mask) v: [G, heads, n, D], [G, heads, m, D], [G, heads, m, d] -> [G, heads, n, d].

    received: also what each of m tokens that meet one another (n = m) gets of the weights, a mean over heads and over
    those that the mask does not leave out, [G, m] float32; else empty. The map is made `BLOCK` weights at a time.
    """
    d, plain = v.shape[-1], attn.form == "plain"
    if not (received or plain):
        v = F.pad(v, (0, asked.shape[-1] - d))  # the fused product wants one width
        heads = F.scaled_dot_product_attention(asked, answers, v, attn_mask=mask, scale=1.0)
        return heads[..., :d], heads.new_zeros(0)
    asks = torch.ones(len(v), v.shape[2], device=v.device) if mask is None else (mask[:, 0, 0] == 0).float()  # [G, m]
    rows = max(1, BLOCK // v.shape[:3].numel())
    pieces, total = [], asks.new_zeros(asks.shape)
    for start in range(0, asked.shape[2], rows):
        weights = logits(asked[:, :, start : start + rows], answers, d, plain)
        weights = (weights if mask is None else weights + mask).float().softmax(dim=-1)
        pieces.append(weights.to(v.dtype) @ v)
        if received:  # [G, heads, rows, m] -> [G, m]
            total = total + (weights.mean(dim=1) * asks[:, start : start + rows, None]).sum(dim=1)
    return torch.cat(pieces, dim=2), total / asks.sum(dim=1, keepdim=True)


def logits(asked: torch.Tensor, answers: torch.Tensor, d: int, plain: bool) -> torch.Tensor:
    """asked answers^T: [..., n, D], [..., m, D] -> [..., n, m]; plain: positions are added without a product, as they are
    counted."""
    if not plain:
        return asked @ answers.transpose(-1, -2)
    positions = (asked[..., :, None, d:] * answers[..., None, :, d:]).sum(dim=-1)
    return asked[..., :d] @ answers[..., :d].transpose(-1, -2) + positions


# --- windows ---------------------------------------------------------------------------------------------------------


def in_windows(
    attn: Attention, asked: torch.Tensor, answers: torch.Tensor, v: torch.Tensor, places: Places
) -> torch.Tensor:
    """Tokens meet those of their window and its padding: [B, heads, m, D] twice, [B, heads, m, d] -> [B, heads, m, d]."""
    slots, live, back = slots_of(places.windows(), places.count)
    live = live & places.present.gather(1, slots.flatten(1)).view(live.shape)
    q, k, values = (cut(one, slots) for one in (asked, answers, v))  # [B*nW, heads, L, ...]
    mask = ignored(~live, q.dtype).flatten(0, 1)[:, None, None]  # [B*nW, 1, 1, L]
    if any(side % places.window for side in places.grid):
        pad_k, pad_v, pad_mask = padding(attn, places, q.dtype, q.device)
        times = len(q) // places.count
        k, values = (torch.cat([a, b.repeat(times, 1, 1, 1)], dim=2) for a, b in ((k, pad_k), (values, pad_v)))
        mask = torch.cat([mask, pad_mask.repeat(times, 1, 1, 1)], dim=3)
    heads = product(attn, q, k, values, mask)[0]
    heads = heads.unflatten(0, (-1, places.count)).transpose(1, 2).flatten(2, 3)  # -> [B, heads, nW*L, d]
    return heads.gather(2, back[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[3]))


def slots_of(windows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens window by window: [B, m] int64 -> which token is in each slot [B, nW, L] int64, whether there is one
    (bool), and in which of the nW*L slots each token is [B, m]. L: of the fullest window."""
    order = windows.argsort(dim=1, stable=True)
    sizes = torch.zeros(len(windows), count, dtype=torch.int64, device=windows.device)
    sizes = sizes.scatter_add(1, windows, torch.ones_like(windows))
    starts, longest = sizes.cumsum(1) - sizes, int(sizes.max())
    places = torch.arange(longest, device=windows.device)
    slots = (starts[..., None] + places).clamp(max=windows.shape[1] - 1)
    slots = order.gather(1, slots.flatten(1)).view(slots.shape)
    back = windows * longest + order.argsort(dim=1) - starts.gather(1, windows)
    return slots, places < sizes[..., None], back


def cut(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The tokens of every slot: x [B, heads, m, d], slots [B, nW, L] -> [B*nW, heads, L, d]."""
    index = slots.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index).unflatten(2, slots.shape[1:]).transpose(1, 2).flatten(0, 1)


def padding(
    attn: Attention, places: Places, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SAM's padding of partial windows as keys and values, [nW, heads, P, ...], and what is added to their logits,
    [nW, 1, 1, P]: windows have different numbers of it.

    It is zero before the projections, and so their bias after them.
    """
    side = attn.window
    bias = attn.qkv.bias if is_plain(attn.qkv) else attn.qkv(attn.qkv.weight.new_zeros(1, attn.qkv.in_features))[0]
    _, k, v = bias.to(dtype).view(3, attn.num_heads, 1, -1)
    shapes = torch.tensor(window_shapes(*places.grid, side), device=device)
    y, x = torch.meshgrid(*[torch.arange(side, device=device)] * 2, indexing="ij")
    absent = (y.flatten() >= shapes[:, :1]) | (x.flatten() >= shapes[:, 1:])  # [nW, w*w]
    longest = int(absent.sum(1).max())
    slots = absent.long().argsort(dim=1, descending=True, stable=True)[:, :longest]  # [nW, P]
    ones = one_hot_positions((side, side), 2 * side, k).flatten(0, 1)[slots]  # [nW, P, 2 * w]
    shape = (places.count, attn.num_heads, longest, -1)
    k = torch.cat([k.expand(shape), ones[:, None].expand(shape)], dim=-1)
    return k, v.expand(shape), ignored(~absent.gather(1, slots), dtype)[:, None, None]
