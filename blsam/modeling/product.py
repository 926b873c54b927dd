"""The product of attention with SAM's decomposed relative positions, in the forms that it can be computed in.

    out[q] = softmax over k of (d^-0.5 q . k + rel_h[q, y_k] + rel_w[q, x_k]) v[k]

Keys lie on a grid of h x w places. The bias of all pairs, [queries, keys], need not be held at once: it is the sum of a
value for the key's row and one for its column. All forms have one interface and give the same values:

    product = form((h, w), d)
    keys = product.keys(kv)                    # once for all queries
    out = product(q, rel_h * product.scale, rel_w * product.scale, keys)

Which is the fastest was measured (`scripts/benchmarks/benchmark_attention.py`); `choose_form` is where that is decided.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..precision import processor
from .windows import exporting

# logits that the blocked form holds at a time: 8 MB (in bfloat16 12), so that the passes over them stay in the cache
BLOCK = 2**21
FEW = 196  # keys, those of a window of 14 x 14, up to which training in bfloat16 on a CPU is fastest with all weights held
KIND = processor()
# weights (256 MB, several times over) up to which it does so with more keys; with a matrix unit it was not measured
HELD = 0 if KIND == "amx" else 2**27
ALIGN = 32  # channels of the folded form are rounded up to this: what matrix units take at once

Keys = tuple[torch.Tensor, torch.Tensor]


class Plain:
    """As the formula stands: what runtimes know how to fuse, and every other form is compared with."""

    def __init__(self, size: tuple[int, int], d: int) -> None:
        self.size, self.d = size, d
        self.scale = 1.0  # what position logits are multiplied by before they come in

    def keys(self, kv: torch.Tensor) -> Keys:
        """Keys and values [2, ..., heads, h, w, d] -> what a call takes: [G, heads, h*w, D] each."""
        kv = kv.reshape(2, -1, kv.shape[-4], math.prod(self.size), self.d)
        return kv[0], kv[1]

    def __call__(self, q: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor, keys: Keys) -> torch.Tensor:
        """q [..., heads, n, d] (n may be a grid), rel_h [..., h], rel_w [..., w] -> [G, heads, n, d]."""
        k, v = keys
        q, rel_h, rel_w = (t.reshape(*k.shape[:2], -1, t.shape[-1]) for t in (q, rel_h, rel_w))
        logits = (q * self.d**-0.5) @ k.transpose(-1, -2)
        logits = logits.unflatten(-1, self.size) + rel_h[..., None] + rel_w[..., None, :]
        return logits.flatten(-2).softmax(dim=-1) @ v


class Folded(Plain):
    """Positions as channels of the product, for torch's fused attention.

    A query carries its position logits for every row and column, a key a one at its own: their product adds up to
    exactly the bias. Channels are filled up to a multiple of `ALIGN`.
    """

    def __init__(self, size: tuple[int, int], d: int) -> None:
        super().__init__(size, d)
        self.scale = d**0.5
        self.more = sum(size) + -(d + sum(size)) % ALIGN

    def keys(self, kv: torch.Tensor) -> Keys:
        k, v = kv
        positions = one_hot_positions(self.size, self.more, k).expand(*k.shape[:-1], -1)
        k, v = torch.cat([k, positions], dim=-1), F.pad(v, (0, self.more))
        shape = (-1, k.shape[-4], math.prod(self.size), self.d + self.more)
        return k.reshape(shape), v.reshape(shape)

    def __call__(self, q: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor, keys: Keys) -> torch.Tensor:
        k, v = keys
        rest = q.new_zeros(()).expand(*q.shape[:-1], self.more - sum(self.size))
        q = torch.cat([q, rel_h, rel_w, rest], dim=-1).view(*k.shape[:2], -1, k.shape[-1])
        return F.scaled_dot_product_attention(q, k, v, scale=self.d**-0.5)[..., : self.d]


class Blocked(Plain):
    """`BLOCK` logits at a time, in the same memory: every step finds them in the cache. Without gradients.

    In half precision both products are, and what they give is rounded to it; positions and softmax are float32.
    """

    def __call__(self, q: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor, keys: Keys) -> torch.Tensor:
        heads, (k, v) = keys[0].shape[1], (t.flatten(0, 1) for t in keys)
        q, rel_h, rel_w = (t.reshape(len(k), -1, t.shape[-1]) for t in (q, rel_h, rel_w))  # [G*heads, n, ...]
        exact = torch.promote_types(q.dtype, torch.float32)
        rel_h, rel_w = rel_h.to(exact), rel_w.to(exact)
        n, count = q.shape[1], k.shape[1]
        rows = min(n, max(1, BLOCK // count))
        batch = min(len(k), max(1, BLOCK // (rows * count)))
        k, out, none = k.transpose(1, 2), torch.empty_like(q), q.new_zeros(())
        memory = q.new_empty(batch * rows * count, dtype=exact)
        products = memory if q.dtype == exact else q.new_empty(memory.shape)
        for i in range(0, len(k), batch):
            for j in range(0, n, rows):
                here = (slice(i, i + batch), slice(j, j + rows))
                shape = (*q[here].shape[:2], count)
                logits, product = (held[: math.prod(shape)].view(shape) for held in (memory, products))
                torch.baddbmm(none, q[here], k[i : i + batch], beta=0, alpha=self.d**-0.5, out=product)
                if products is not memory:
                    logits.copy_(product)
                grid = logits.unflatten(-1, self.size)
                grid += rel_h[here][..., None]
                grid += rel_w[here][..., None, :]
                torch.softmax(logits, -1, out=logits)  # each row is read before it is written
                if products is not memory:
                    product.copy_(logits)
                out[here] = torch.bmm(product, v[i : i + batch])
        return out.unflatten(0, (-1, heads))


FORMS: dict[str, type[Plain]] = {"plain": Plain, "folded": Folded, "blocked": Blocked}


def choose_form(dtype: torch.dtype, device: torch.device, gradient: bool, count: int, weights: int) -> str:
    """The form that was measured to be the fastest.

    Blocked on a CPU without gradients, in float32 and, on the kind of processor where it was measured, in bfloat16: with a
    matrix unit torch's fused attention is faster there. Plain in exports, and in training in bfloat16 on a CPU where the
    keys are few, as in windows, or (without a matrix unit) all weights of attention fit into little memory: forward and
    backward, fused attention takes up to twice as long there. Elsewhere folded.

    `gradient`: whether any input of the product needs one; `count`: of keys; `weights`: of all heads, queries and keys.
    """
    if exporting():
        return "plain"
    half = dtype == torch.bfloat16
    if not gradient and device.type in ("cpu", "meta") and (dtype == torch.float32 or half and KIND == "avx512_bf16"):
        return "blocked"
    if gradient and half and device.type == "cpu" and (count <= FEW or weights <= HELD):
        return "plain"
    return "folded"


def one_hot_positions(size: tuple[int, int], channels: int, like: torch.Tensor) -> torch.Tensor:
    """For the key at each place of a grid a one at its row and one at its column: [h, w, channels], zeros behind."""
    height, width = size
    rows, cols = (torch.eye(n, dtype=like.dtype, device=like.device) for n in size)
    positions = torch.cat([rows[:, None].expand(-1, width, -1), cols[None].expand(height, -1, -1)], dim=-1)
    return F.pad(positions, (0, channels - height - width))
