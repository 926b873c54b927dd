"""Closed-form starts of a narrow block from the wide one: cut to where the tokens seen say that it costs least (ours).

Attention: the logits of a head are a bilinear form of the tokens, q . c, with c = scale * k or a row of the position
tables. The narrow heads keep the directions of q that carry most of it, the same ones in every head, since all heads
share the position tables; their values keep those that carry most through the output projection.

Feed-forward: the hidden units that contribute most, their inputs cut to the directions that drive them, their outputs
fitted anew by reduced-rank regression.
"""

from __future__ import annotations

import torch

from ..modeling.attention import Attention
from ..modeling.blocks import Block, EBlock


@torch.no_grad()
def start_attention(narrow: Attention, wide: Attention, rows: torch.Tensor) -> None:
    """Set the weights of `narrow` from those of `wide`; rows [n, dim], tokens as both see them (after their norm).

    The wide heads whose values matter most are taken where the narrow branch has fewer.
    """
    dim, d, d_e = wide.qkv.in_features, wide.inner // wide.heads, narrow.inner // narrow.heads
    weight = wide.qkv.weight.double().view(3, wide.heads, d, dim)
    bias = wide.qkv.bias.double().view(3, wide.heads, d)
    out = wide.proj.weight.double().view(dim, wide.heads, d).transpose(0, 1)  # [heads, dim, d]
    tables = [table.double() for table in (wide.rel_pos_h, wide.rel_pos_w)]
    rows = rows.double()
    mean, moment = rows.mean(0), rows.T @ rows / len(rows)
    covariance = moment - mean.outer(mean)

    of_v = weight[2] @ covariance @ weight[2].mT  # [heads, d, d]
    energy = (out @ of_v @ out.mT).diagonal(dim1=1, dim2=2).sum(-1)
    chosen = energy.argsort(descending=True)[: narrow.heads].sort().values
    all_values = weight[2] @ mean + bias[2]  # [heads, d]: what is added whatever attention looks at
    offset = wide.proj.bias.double() + torch.einsum("hcd,hd->c", out, all_values)
    (wq, wk, wv), (bq, bk, _) = weight[:, chosen], bias[:, chosen]
    out, of_v = out[chosen], of_v[chosen]

    # second moments: of q about zero; of keys about their mean, which no softmax sees
    extended = torch.cat([torch.cat([moment, mean[:, None]], 1), torch.cat([mean, mean.new_ones(1)])[None]])
    with_bias = torch.cat([wq, bq[..., None]], dim=-1)
    of_q = with_bias @ extended @ with_bias.mT
    of_c = wk @ covariance @ wk.mT / d + sum(table.T @ table / len(table) for table in tables)
    r = min(d, d_e)
    shared = of_q.sum(0)
    root, inverse = _roots(shared)
    directions = torch.linalg.eigh(inverse @ (of_q @ of_c @ of_q).sum(0) @ inverse).eigenvectors.flip(1)[:, :r]
    p = inverse @ directions  # [d, r], p' shared p = 1
    back = torch.linalg.solve(p.T @ of_q @ p, p.T @ of_q)  # [heads, r, d]: the best k for q cut down to p' q

    qkv, biases = weight.new_zeros(3, narrow.heads, d_e, dim), bias.new_zeros(3, narrow.heads, d_e)
    projection = out.new_zeros(narrow.heads, dim, d_e)
    qkv[0, :, :r], biases[0, :, :r] = p.T @ wq, bq @ p
    keys = back * (d_e / d) ** 0.5
    qkv[1, :, :r], biases[1, :, :r] = keys @ wk, (keys @ bk[..., None])[..., 0]
    for h in range(narrow.heads):
        root, inverse = _roots(of_v[h])
        u, s, vt = torch.linalg.svd(out[h] @ root, full_matrices=False)
        cut = s[:r, None].sqrt() * vt[:r] @ inverse
        qkv[2, h, :r], biases[2, h, :r] = cut @ wv[h], -cut @ (wv[h] @ mean)
        projection[h, :, :r] = u[:, :r] * s[:r].sqrt()

    narrow.qkv.weight.copy_(qkv.flatten(0, 2))
    narrow.qkv.bias.copy_(biases.flatten())
    narrow.proj.weight.copy_(projection.transpose(0, 1).flatten(1))
    narrow.proj.bias.copy_(offset)
    for mine, table in zip((narrow.rel_pos_h, narrow.rel_pos_w), tables):
        mine[:, :r].copy_(table @ shared @ p)


@torch.no_grad()
def start_feed_forward(narrow: EBlock, wide: Block, rows: torch.Tensor) -> None:
    """Set `entry`, `mlp` and `exit` of `narrow` from the wide block's MLP; rows [n, dim], after the norm both share."""
    hidden, inner = narrow.mlp.lin1.out_features, narrow.entry.out_features
    rows = rows.double()
    w1, b1 = wide.mlp.lin1.weight.double(), wide.mlp.lin1.bias.double()
    active = wide.mlp.act(rows @ w1.T + b1)
    out = wide.mlp.lin2.weight.double()
    target = active @ out.T + wide.mlp.lin2.bias.double()
    energy = active.var(0) * out.square().sum(0)
    chosen = energy.argsort(descending=True)[:hidden].sort().values

    mean = rows.mean(0)
    root, inverse = _roots((rows - mean).T @ (rows - mean) / len(rows))
    importance = energy[chosen].sqrt()[:, None]
    u, s, vt = torch.linalg.svd(importance * w1[chosen] @ root, full_matrices=False)
    entry, lin1 = vt[:inner] @ inverse, u[:, :inner] * s[:inner] / importance
    bias1 = b1[chosen] + w1[chosen] @ mean

    features = wide.mlp.act((rows - mean) @ entry.T @ lin1.T + bias1)
    centre = features.mean(0)
    root, inverse = _roots((features - centre).T @ (features - centre) / len(rows))
    of_target = inverse @ (features - centre).T @ (target - target.mean(0)) / len(rows)
    u, s, vt = torch.linalg.svd(of_target, full_matrices=False)
    lin2, exit_ = (u[:, :inner].T @ inverse), (vt[:inner].T * s[:inner])

    values = {"entry": (entry, -entry @ mean), "mlp.lin1": (lin1, bias1)}
    values |= {"mlp.lin2": (lin2, -lin2 @ centre), "exit": (exit_, target.mean(0))}
    for name, (weight, bias) in values.items():
        layer = narrow.get_submodule(name)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


def _roots(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root and inverse square root of a symmetric matrix, directions without weight left out of the inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)
    root = values.sqrt()
    inverse = torch.where(values > 1e-9 * values[-1], 1 / root.clamp(min=1e-30), 0)
    return vectors * root @ vectors.T, vectors * inverse @ vectors.T
