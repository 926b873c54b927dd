"""ToMe: tokens that resemble each other are merged, in every block (Bolya et al., ICLR 2023, arXiv 2210.09461).

Between attention and the feed-forward part, every second token (A, the class token first among them) looks for the one
of the others (B) whose keys, averaged over heads, have the highest cosine; the r closest pairs merge into the mean of
all patches they stand for. Attention then counts a token as often as it has patches: log(size) is added to its logits.
The class token is never merged into another. No parameters, no loss; the choice has no gradient, training and inference
merge alike, and it works on a trained ViT as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .base import Baseline, BaselineOptions, Projected, Tokens, full_precision, gather
from .macs import LayerTokens


@dataclass(frozen=True)
class ToMeOptions(BaselineOptions):
    """keep_ratio: of the patches, as many tokens as are left after the last block; 1: all (ours: the paper gives r, the
    tokens merged in a block, which is the nearest whole number; 0.2 is its 13 of 196 patches and 12 blocks, 0.51 its 8).
    falling: 2 r in the first block, none in the last, as the paper's other schedule."""

    keep_ratio: float = 0.2
    falling: bool = False


class ToMe(Baseline):
    """A ViT with ToMe's merging. The answer is the class token's; a merged token counts in no distillation loss."""

    Options = ToMeOptions
    options: ToMeOptions

    @property
    def r(self) -> int:
        """Tokens merged in a block."""
        return round((1 - self.options.keep_ratio) * self.patches / len(self.blocks))

    def count(self, i: int, tokens: int) -> int:
        """How many of so many, class token included, are merged in block i: never more than half of the others."""
        wanted = self.r
        if self.options.falling:
            wanted = int(2 * self.r * (1 - i / max(1, len(self.blocks) - 1)))
        return min(wanted, (tokens - 1) // 2)

    def attend(self, i: int, tokens: Tokens, projected: Projected) -> torch.Tensor:
        if tokens.carried is None:
            return super().attend(i, tokens, projected)
        weight = tokens.carried.log().to(projected.q.dtype)[:, None, None]  # [B, m] -> [B, 1, 1, m], of keys
        return F.scaled_dot_product_attention(*projected, attn_mask=weight)

    def between(self, i: int, tokens: Tokens, projected: Projected) -> Tokens:
        count = self.count(i, tokens.x.shape[1])
        if not count:
            return tokens
        sizes = torch.ones_like(tokens.x[..., 0]) if tokens.carried is None else tokens.carried
        pairs = match(projected.k, count)
        x, sizes = merge(tokens.x, sizes, *pairs)
        places = torch.cat([tokens.places[:, ::2].gather(1, pairs[2]), tokens.places[:, 1::2]], dim=1)
        return replace(tokens, x=x, places=places.where(sizes == 1, -1), carried=sizes)

    def layer_tokens(self) -> list[LayerTokens]:
        found, n = [], 1 + self.patches
        for i in range(len(self.blocks)):
            count = self.count(i, n)
            pairs = (n + 1) // 2 * (n // 2)  # A x B
            found.append(LayerTokens(n, n - count, more=pairs * self.config.dim // self.config.heads if count else 0))
            n -= count
        return found


@torch.no_grad()
def match(keys: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which tokens merge: keys [B, heads, m, d] -> three index sets, int64.

    source [B, count] among A, the tokens at even places, target [B, count] among B, those at odd ones; rest
    [B, |A| - count], of A what stays, in order.
    """
    with full_precision(keys.device):
        metric = F.normalize(keys.float().mean(dim=1), dim=-1)
        cosine = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # [B, |A|, |B|]
    cosine[:, 0] = -torch.inf  # the class token
    best, partner = cosine.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    source = order[:, :count]
    return source, partner.gather(1, source), order[:, count:].sort(dim=1).values


def merge(
    x: torch.Tensor, sizes: torch.Tensor, source: torch.Tensor, target: torch.Tensor, rest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens after merging, and how many patches each stands for: x [B, m, C], sizes [B, m], index sets of `match` ->
    [B, m - count, C] and [B, m - count], first what is left of A, then B."""
    whole = x * sizes[..., None]
    a, b, a_sizes, b_sizes = whole[:, ::2], whole[:, 1::2], sizes[:, ::2], sizes[:, 1::2]
    b = b.scatter_add(1, target[..., None].expand(-1, -1, x.shape[-1]), gather(a, source))
    b_sizes = b_sizes.scatter_add(1, target, a_sizes.gather(1, source))
    merged = torch.cat([a_sizes.gather(1, rest), b_sizes], dim=1)
    return torch.cat([gather(a, rest), b], dim=1) / merged[..., None], merged
