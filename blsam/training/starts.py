"""Closed-form starts of a narrow block from the wide one: cut to where the tokens seen say that it costs least (ours).

Attention: of the wide heads those are taken whose patterns together explain most of what the wide attention adds,
whatever their own values do. The logits of a head are a bilinear form of the tokens, q . c, with c = scale * k or a row
of the position tables: the narrow heads keep the directions of q that carry most of it, the same ones in every head
where all heads share position tables. Values and projection are then fitted anew, head by head, by reduced-rank
regression of what the wide attention adds on the tokens that the narrow patterns gather.

Feed-forward: the hidden units that contribute most, their inputs cut to the directions that drive them, their outputs
fitted anew by reduced-rank regression.

All in float64 on the CPU, whatever the device: some devices have no float64, and the matrices are small.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..modeling.attention import Attention
from ..modeling.blocks import Block, EBlock, take
from ..modeling.classifier import TokenAttention
from ..modeling.routing import Queries

SKETCH = 64  # directions of the tokens that heads are chosen by
SWEEPS = 4  # over the heads whose values are fitted in turn
RIDGE = 0.1  # of that regression, as a share of the mean variance

AnyAttention = Attention | TokenAttention


@torch.no_grad()
def start_attention(narrow: AnyAttention, wide: AnyAttention, x: torch.Tensor, queries: Queries | None = None) -> None:
    """Set the weights of `narrow` from those of `wide`; x [B, *T, dim], whole photos as both see them (normalised).

    queries: the tokens that are regressed on, None for all; all tokens answer. That bounds memory and time.
    """
    rows = take(x.flatten(0, -2), queries).cpu().double()
    mean, moment = rows.mean(0), rows.T @ rows / len(rows)
    dense = copy.deepcopy(wide)
    dense.semi_cross = True  # all tokens answer, whatever they do once routed
    target = _asked(dense, x, queries)
    chosen = list(range(wide.num_heads))
    if narrow.num_heads < wide.num_heads:
        main = torch.linalg.eigh(moment - mean.outer(mean)).eigenvectors.flip(1)[:, :SKETCH]
        seen = _gathered(wide, x, queries, main)
        chosen = _choose(seen, target - target.mean(0), narrow.num_heads)
    _cut_logits(narrow, wide, chosen, mean, moment)
    seen = _gathered(narrow, x, queries, torch.eye(len(mean), dtype=mean.dtype))
    _fit_values(narrow, wide, chosen, seen, target)


def _asked(attention: AnyAttention, x: torch.Tensor, queries: Queries | None) -> torch.Tensor:
    """What attention gives the queries: [P, C] float64 on the CPU."""
    return (attention(x) if queries is None else attention(x, queries)).flatten(0, -2).cpu().double()


def _gathered(
    attention: AnyAttention, x: torch.Tensor, queries: Queries | None, directions: torch.Tensor
) -> list[torch.Tensor]:
    """The tokens as each head's pattern gathers them, softmax(logits) x, along r directions [dim, r]: [P, r] a head.

    By the attention itself, whose values are made as many directions at a time as a head has channels.
    """
    heads, inner, dim = attention.num_heads, attention.inner, x.shape[-1]
    probe: Any = copy.deepcopy(attention)
    found = []
    probe.semi_cross = True
    probe.qkv = torch.nn.Linear(dim, 3 * inner, device=x.device)
    probe.qkv.weight.copy_(attention.qkv.weight)
    probe.qkv.bias.copy_(attention.qkv.bias)
    probe.qkv.bias[2 * inner :] = 0
    probe.proj = torch.nn.Identity()
    for piece in directions.split(inner // heads, dim=1):
        values = probe.qkv.weight[2 * inner :].view(heads, -1, dim)
        values.zero_()
        values[:, : piece.shape[1]] = piece.T.to(values)
        seen = _asked(probe, x, queries).unflatten(1, (heads, -1))  # [P, inner] -> [P, heads, d]
        found.append(seen[..., : piece.shape[1]])
    return list(torch.cat(found, dim=-1).unbind(1))


def _choose(seen: list[torch.Tensor], target: torch.Tensor, count: int) -> list[int]:
    """One after the other, the heads from whose gathered tokens [n, r] the target [n, dim] is predicted best."""
    features = torch.cat([f - f.mean(0) for f in seen], dim=1)
    gram, cross, r = features.T @ features, features.T @ target, seen[0].shape[1]
    gram = gram + _ridge(gram, 1e-6)
    places = torch.arange(features.shape[1]).view(len(seen), r)
    chosen: list[int] = []
    for _ in range(count):

        def explained(h: int, chosen: list[int] = chosen) -> float:
            of = places[[*chosen, h]].flatten()
            return (torch.linalg.solve(gram[of][:, of], cross[of]) * cross[of]).sum().item()

        chosen.append(max((h for h in range(len(seen)) if h not in chosen), key=explained))
    return sorted(chosen)


def _cut_logits(
    narrow: AnyAttention, wide: AnyAttention, chosen: list[int], mean: torch.Tensor, moment: torch.Tensor
) -> None:
    """Queries, keys and position tables of the narrow heads from those of the chosen wide ones."""
    dim, d, d_e = wide.qkv.in_features, wide.inner // wide.num_heads, narrow.inner // narrow.num_heads
    wq, wk = wide.qkv.weight.cpu().double().view(3, wide.num_heads, d, dim)[:2, chosen]
    bq, bk = wide.qkv.bias.cpu().double().view(3, wide.num_heads, d)[:2, chosen]
    tables = [table.cpu().double() for table in wide.position_tables]

    # second moments: of q about zero; of keys about their mean, which no softmax sees
    extended = torch.cat([torch.cat([moment, mean[:, None]], 1), torch.cat([mean, mean.new_ones(1)])[None]])
    with_bias = torch.cat([wq, bq[..., None]], dim=-1)
    of_q = with_bias @ extended @ with_bias.mT  # [heads, d, d]
    of_c = wk @ (moment - mean.outer(mean)) @ wk.mT / d + sum(table.T @ table / len(table) for table in tables)
    r = min(d, d_e)
    shared = of_q.sum(0, keepdim=True) if tables else of_q  # [1 or heads, d, d]
    inverse = torch.stack([_roots(one)[1] for one in shared])
    weighed = (of_q @ of_c @ of_q).sum(0, keepdim=True) if tables else of_q @ of_c @ of_q
    directions = torch.linalg.eigh(inverse @ weighed @ inverse).eigenvectors.flip(-1)[..., :r]
    p = inverse @ directions  # [1 or heads, d, r], p' shared p = 1
    # [heads, r, d]: the best k for q cut down to p' q; a pseudo-inverse, for queries may lie in fewer dimensions
    back = torch.linalg.pinv(p.mT @ of_q @ p, hermitian=True) @ p.mT @ of_q
    keys = back * (d_e / d) ** 0.5

    weight, bias = wq.new_zeros(2, narrow.num_heads, d_e, dim), bq.new_zeros(2, narrow.num_heads, d_e)
    weight[0, :, :r], bias[0, :, :r] = p.mT @ wq, (bq[:, None] @ p)[:, 0]
    weight[1, :, :r], bias[1, :, :r] = keys @ wk, (keys @ bk[..., None])[..., 0]
    narrow.qkv.weight[: 2 * narrow.inner].copy_(weight.flatten(0, 2))
    narrow.qkv.bias[: 2 * narrow.inner].copy_(bias.flatten())
    for mine, table in zip(narrow.position_tables, tables):
        mine.zero_()
        mine[:, :r].copy_(table @ shared[0] @ p[0])


def _fit_values(
    narrow: AnyAttention, wide: AnyAttention, chosen: list[int], seen: list[torch.Tensor], target: torch.Tensor
) -> None:
    """Values and projection of the narrow heads: what the chosen heads add, then in turn more of what is left.

    What is added in a sweep is a ridge regression, since the tokens that a head gathers vary little within a photo.
    """
    dim, d, d_e = wide.qkv.in_features, wide.inner // wide.num_heads, narrow.inner // narrow.num_heads
    values = wide.qkv.weight.cpu().double().view(3, wide.num_heads, d, dim)[2, chosen]
    out = wide.proj.weight.cpu().double().view(dim, wide.num_heads, d).transpose(0, 1)[chosen]
    means, left = [f.mean(0) for f in seen], target - target.mean(0)
    seen = [f - mean for f, mean in zip(seen, means)]
    grams = [f.T @ f / len(f) for f in seen]
    factors = [torch.linalg.cholesky(gram + _ridge(gram, RIDGE)) for gram in grams]
    roots = [_roots(gram) for gram in grams]
    pairs = [_cut(root, o @ v, d_e) for root, v, o in zip(roots, values, out)]
    for features, (v, o) in zip(seen, pairs):
        left = left - features @ v.T @ o.T
    for _ in range(SWEEPS):
        for e, features in enumerate(seen):
            v, o = pairs[e]
            more = torch.cholesky_solve(features.T @ left / len(left), factors[e]).T
            pairs[e] = _cut(roots[e], o @ v + more, d_e)
            left = left + features @ v.T @ o.T - features @ pairs[e][0].T @ pairs[e][1].T
    offset = target.mean(0) - sum(o @ (v @ mean) for (v, o), mean in zip(pairs, means))
    narrow.qkv.weight[2 * narrow.inner :].copy_(torch.cat([v for v, _ in pairs]))
    narrow.qkv.bias[2 * narrow.inner :].zero_()
    narrow.proj.weight.copy_(torch.cat([o for _, o in pairs], dim=1))
    narrow.proj.bias.copy_(offset)


def _ridge(gram: torch.Tensor, share: float) -> torch.Tensor:
    """A multiple of the identity, a share of the mean variance."""
    return (share * gram.diagonal().mean() + 1e-30) * torch.eye(len(gram), dtype=gram.dtype)


def _cut(
    roots: tuple[torch.Tensor, torch.Tensor], weight: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """a [rank, n], b [m, rank], so that b a is nearest to weight [m, n] on inputs whose second moments have these roots."""
    root, inverse = roots
    u, s, vt = torch.linalg.svd(root @ weight.T, full_matrices=False)
    half = s[:rank].sqrt()
    return (u[:, :rank] * half).T @ inverse, vt[:rank].T * half


@torch.no_grad()
def start_feed_forward(narrow: EBlock, wide: Block, rows: torch.Tensor) -> None:
    """Set `entry`, `mlp` and `exit` of `narrow` from the wide block's MLP; rows [n, dim], after the norm both share."""
    hidden, inner = narrow.mlp.lin1.out_features, narrow.entry.out_features
    rows = rows.cpu().double()
    w1, b1 = wide.mlp.lin1.weight.cpu().double(), wide.mlp.lin1.bias.cpu().double()
    active = wide.mlp.act(rows @ w1.T + b1)
    out = wide.mlp.lin2.weight.cpu().double()
    target = active @ out.T + wide.mlp.lin2.bias.cpu().double()
    energy = active.var(0) * out.square().sum(0)
    chosen = energy.argsort(descending=True)[:hidden].sort().values

    mean = rows.mean(0)
    root, inverse = _roots((rows - mean).T @ (rows - mean) / len(rows))
    importance = energy[chosen].sqrt()[:, None]
    importance = importance.clamp(min=1e-6 * importance.max() + 1e-30)  # units that never fire
    u, s, vt = torch.linalg.svd(importance * w1[chosen] @ root, full_matrices=False)
    entry, lin1 = vt[:inner] @ inverse, u[:, :inner] * s[:inner] / importance
    bias1 = b1[chosen] + w1[chosen] @ mean

    features = wide.mlp.act((rows - mean) @ entry.T @ lin1.T + bias1)
    centre = features.mean(0)
    gram = (features - centre).T @ (features - centre)
    best = torch.linalg.solve(gram + _ridge(gram, 1e-9), (features - centre).T @ target).T
    lin2, exit_ = _cut(_roots(gram), best, inner)

    values = {"entry": (entry, -entry @ mean), "mlp.lin1": (lin1, bias1)}
    values |= {"mlp.lin2": (lin2, -lin2 @ centre), "exit": (exit_, target.mean(0))}
    for name, (weight, bias) in values.items():
        narrow.get_parameter(f"{name}.weight").copy_(weight)
        narrow.get_parameter(f"{name}.bias").copy_(bias)


def _roots(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root and inverse square root of a symmetric matrix, directions without weight left out of the inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)
    root = values.sqrt()
    inverse = torch.where(values > 1e-9 * values[-1], 1 / root.clamp(min=1e-30), 0)
    return vectors * root @ vectors.T, vectors * inverse @ vectors.T
