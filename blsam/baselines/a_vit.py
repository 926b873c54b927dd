"""A-ViT: every token halts on its own, after as many blocks as it needs (Yin et al., CVPR 2022, arXiv 2112.07658).

After each block a token's first channel says how likely it halts there, h = sigmoid(scale * x_0 - center); when the sum
of its h exceeds 1 - 0.01 it is done: from the next block on it is not computed. What remains of 1 at that block is its
remainder R, and p = h before, R there. The classifier reads the class token's states, weighted by p. The class token
halts like any other. Losses: how many blocks tokens take, N + R, and how far the h of the layers lie from a bell around
a target depth. Training and inference remove alike; nothing is random.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..config import ClassifierConfig
from ..modeling.classifier import Classified
from .base import Baseline, BaselineOptions, Projected, Tokens, gather, key_mask, pack
from .macs import LayerTokens

EPS = 0.01  # a token halts above a sum of 1 - EPS
SEARCHED = 40  # halvings of an interval, when the gate's centre is looked for


@dataclass(frozen=True)
class AViTOptions(BaselineOptions):
    """keep_ratio: target depth over the depth; 1: nothing halts. The paper's is 8 of 12. scale, center: of the gate.
    search: at the first step of training, set the centre so that on its images tokens would take `keep_ratio` of the
    blocks on average (ours: the first channel of other weights lies elsewhere, and the losses are too weak to move it
    in a short training). ponder_weight, prior_weight: of the losses. released: the prior as the published code has it
    (`released_prior`), not as the paper's formula."""

    keep_ratio: float = 8 / 12
    scale: float = 5.0
    center: float = 10.0
    search: bool = True
    ponder_weight: float = 5e-4
    prior_weight: float = 1e-3
    released: bool = False


@dataclass(frozen=True)
class Halting:
    """What a pass carries. real [B, m] bool: tokens that still run; None: all. total [B, m]: sums of their h. answer
    [B, C]: the class token's states so far, weighted. ponder [B]: sum of N + R over tokens. means: of h in each layer,
    over all tokens, scalars."""

    real: torch.Tensor | None
    total: torch.Tensor
    answer: torch.Tensor
    ponder: torch.Tensor
    means: tuple[torch.Tensor, ...] = ()


class AViT(Baseline):
    """A ViT with A-ViT's halting. What comes out: the class token's weighted mean first, then the tokens that were not
    halted before the last block. `gate` [2] is scale and centre, kept with the weights but not learnt.
    """

    Options = AViTOptions
    options: AViTOptions
    by_image = True
    gate: torch.Tensor
    searched: torch.Tensor

    def __init__(self, config: ClassifierConfig, options: AViTOptions | None = None, **vit: Any) -> None:
        super().__init__(config, options, **vit)
        self.register_buffer("gate", torch.tensor([self.options.scale, self.options.center]))
        self.register_buffer("searched", torch.tensor(not self.options.search))

    @property
    def halts(self) -> bool:
        return self.options.keep_ratio < 1

    def walk(self, x: torch.Tensor) -> Tokens:
        if self.halts and self.training and not self.searched:
            self.search(x, self.options.keep_ratio)
        return super().walk(x)

    @torch.no_grad()
    def search(self, x: torch.Tensor, ratio: float) -> None:
        """Set the gate's centre so that tokens would take this share of the blocks, judged by the first channel in a
        pass without halting. x [B, 1 + n, C], patches with their positions."""
        seen = []
        for i in range(len(self.blocks)):
            x = self.block(i).dense(x)
            seen.append(x[..., 0].float())
        self.gate[1] = center_for(torch.stack(seen), self.gate[0].item(), ratio)
        self.searched.fill_(True)

    def begin(self, x: torch.Tensor) -> Tokens:
        none_yet = x.new_zeros(x.shape[:2], dtype=torch.float32)
        return replace(super().begin(x), carried=Halting(None, none_yet, torch.zeros_like(x[:, 0]), none_yet[:, 0]))

    def before_block(self, i: int, tokens: Tokens) -> Tokens:
        n = running(tokens).sum(dim=1)
        return replace(tokens, computed=(*tokens.computed, LayerTokens(n, n)))

    def attend(self, i: int, tokens: Tokens, projected: Projected) -> torch.Tensor:
        return F.scaled_dot_product_attention(*projected, attn_mask=key_mask(tokens.carried.real))

    def after_block(self, i: int, tokens: Tokens) -> Tokens:
        if not self.halts:
            return tokens
        state, runs = tokens.carried, running(tokens)
        h = torch.sigmoid(self.gate[0] * tokens.x[..., 0].float() - self.gate[1]) * runs
        share, halted = halt(h, state.total, last=i + 1 == len(self.blocks))
        share = share * runs
        of_class = (share * (tokens.places == 0)).to(tokens.x.dtype)
        everyone = len(h) * (1 + self.patches)
        state = Halting(
            state.real,
            state.total + h,
            state.answer + (of_class[..., None] * tokens.x).sum(dim=1),
            state.ponder + runs.sum(dim=1) + (share * halted).sum(dim=1),
            (*state.means, h.sum() / everyone),
        )
        if i + 1 == len(self.blocks):
            return replace(tokens, carried=state)
        index, real = pack(runs & ~halted)
        places = tokens.places.gather(1, index)
        state = replace(state, real=real, total=state.total.gather(1, index))
        places = places if real is None else places.where(real, -1)
        return replace(tokens, x=gather(tokens.x, index), places=places, carried=state)

    def finish(self, tokens: Tokens) -> Classified:
        if not self.halts:
            return super().finish(tokens)
        state = tokens.carried
        x = torch.cat([state.answer[:, None], tokens.x], dim=1)
        others = tokens.places.where(tokens.places != 0, -1)  # the class token's last state is not its answer
        places = F.pad(others, (1, 0), value=0)
        losses = dict(tokens.losses)
        if self.training:
            losses["ponder"] = self.options.ponder_weight * state.ponder.mean() / (1 + self.patches)
            prior = released_prior if self.options.released else halting_prior
            means = torch.stack(state.means)
            losses["prior"] = self.options.prior_weight * prior(means, self.options.keep_ratio * len(means))
        return super().finish(replace(tokens, x=x, places=places, losses=losses))

    def complete(self, state: dict[str, Any], prefix: str = "") -> None:
        super().complete(state, prefix)
        for name in ("gate", "searched"):
            state.setdefault(prefix + name, self.state_dict()[name])


def running(tokens: Tokens) -> torch.Tensor:
    """Which tokens still run: [B, m] bool."""
    real = tokens.carried.real
    return torch.ones_like(tokens.places, dtype=torch.bool) if real is None else real


def halt(h: torch.Tensor, total: torch.Tensor, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's share p of each token, and which of them halt there: h and the sum of those before, any shape."""
    halted = total + h > 1 - EPS
    if last:
        halted = torch.ones_like(halted)
    return torch.where(halted, 1 - total, h), halted


def halting_prior(means: torch.Tensor, depth: float) -> torch.Tensor:
    """KL from the layers' mean h [L], made a distribution, to a normal one around `depth` with deviation 1."""
    found = (means / means.sum()).clamp(0.01, 0.99)
    wanted = bell(len(means), depth).to(means.device)
    return (found * (found / (wanted / wanted.sum())).log()).sum()


def released_prior(means: torch.Tensor, depth: float) -> torch.Tensor:
    """As the published code: the divergence the other way round over L, where it is above 0, and a target whose layers
    before `depth` sum to 0.98 (all of them to more than 1)."""
    found = (means / means.sum()).clamp(0.01, 0.99)
    wanted = bell(len(means), depth).to(means.device)
    wanted = wanted * 0.98 / wanted[: round(depth)].sum()
    return ((wanted * (wanted / found).log()).sum() / len(means)).clamp(min=0)


def bell(layers: int, depth: float) -> torch.Tensor:
    """The normal density around `depth`, deviation 1, at layers 0, 1, ...: [L]."""
    return torch.distributions.Normal(depth, 1.0).log_prob(torch.arange(float(layers))).exp().clamp(min=1e-30)


def center_for(x: torch.Tensor, scale: float, ratio: float) -> float:
    """The centre at which tokens take this share of the blocks: their first channel after each, [L, ...]."""
    low, high = scale * x.min().item() - 10, scale * x.max().item() + 10
    for _ in range(SEARCHED):
        middle = (low + high) / 2
        total = torch.sigmoid(scale * x - middle).cumsum(dim=0)
        taken = 1 + (total[:-1] <= 1 - EPS).sum(dim=0)  # N of every token
        low, high = (middle, high) if taken.float().mean() < ratio * len(x) else (low, middle)
    return (low + high) / 2
