"""ToMe by hand, by counts, and against a slow version on timm's ViT."""

import pytest
import torch
import torch.nn.functional as F

from blsam.baselines import build_baseline
from blsam.baselines.base import Projected, Tokens
from blsam.baselines.tome import match, merge
from blsam.config import CLASSIFIERS
from tests.baselines.models import build, photos, sizes, timms
from tests.helpers import gap


def test_by_hand():
    """Five tokens: 2 goes to 1 (cosine .995), 4 to 3 (.8); the class token, at 0, goes nowhere."""
    keys = torch.tensor([[[[9.0, 9], [1, 0], [1, 0.1], [0, 1], [0.6, 0.8]]]])
    assert [part.tolist() for part in match(keys, 1)] == [[[1]], [[0]], [[0, 2]]]
    assert [part.tolist() for part in match(keys, 2)] == [[[1, 2]], [[0, 1]], [[0]]]
    x, ones = torch.tensor([[[0.0], [2], [4], [7], [9]]]), torch.ones(1, 5)
    merged, sizes_ = merge(x, ones, *match(keys, 1))
    assert merged.flatten().tolist() == [0, 9, 3, 7] and sizes_.tolist() == [[1, 1, 2, 1]]
    again = torch.tensor([[1]]), torch.tensor([[0]]), torch.tensor([[0]])  # the second of A into the first of B
    x, sizes_ = torch.tensor([[[0.0], [3], [9], [7]]]), torch.tensor([[1.0, 2, 1, 1]])
    merged, sizes_ = merge(x, sizes_, *again)
    assert merged.flatten().tolist() == [0, 5, 7] and sizes_.tolist() == [[1, 3, 1]]  # (2 * 3 + 9) / 3


def test_several_may_merge_into_one():
    keys = torch.tensor([[[[0.0, 1], [1, 0], [1, 0.1], [0, -1], [1, 0.2]]]])
    source, target, rest = match(keys, 2)
    assert source.tolist() == [[1, 2]] and target.tolist() == [[0, 0]] and rest.tolist() == [[0]]
    merged, sizes_ = merge(torch.tensor([[[0.0], [3], [6], [1], [9]]]), torch.ones(1, 5), source, target, rest)
    assert merged.flatten().tolist() == [0, 6, 1] and sizes_.tolist() == [[1, 3, 1]]


COUNTS = [
    (0.2, [184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41]),
    (0.02, [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),  # at most half in the last
    (1.0, [197] * 12),
]


@pytest.mark.parametrize("ratio, counts", COUNTS)
def test_counts(ratio, counts):
    with torch.device("meta"):
        model = build_baseline("tome", CLASSIFIERS["vit_tiny_patch16_224"], keep_ratio=ratio)
        found = sizes(model, torch.empty(1, 3, 224, 224))
    assert found == list(zip([197, *counts], counts))
    assert model.r == {0.2: 13, 0.02: 16, 1.0: 0}[ratio]


def test_the_falling_schedule():
    model = build("tome", keep_ratio=0.5, falling=True)
    assert model.r == 3 and [model.count(i, 65) for i in range(12)] == [6, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]


def test_a_merged_token_counts_as_often_as_it_has_patches():
    """Three tokens of equal logits and sizes 1, 2, 1: weights 1/4, 1/2, 1/4; and a doubled token is one of size 2."""
    model = build("tome")
    sized = Tokens(torch.zeros(1, 3, 24), torch.arange(3)[None], carried=torch.tensor([[1.0, 2, 1]]))
    same, v = torch.zeros(1, 3, 3, 8), torch.randn(1, 3, 3, 8)
    expected = (v * torch.tensor([0.25, 0.5, 0.25])[:, None]).sum(2, keepdim=True).expand_as(v)
    assert torch.allclose(model.attend(1, sized, Projected(same, same, v)), expected, atol=1e-6)
    q, k = torch.randn(2, 1, 3, 3, 8)
    doubled = F.scaled_dot_product_attention(q, torch.cat([k, k[:, :, 1:2]], 2), torch.cat([v, v[:, :, 1:2]], 2))
    assert torch.allclose(model.attend(1, sized, Projected(q, k, v)), doubled, atol=1e-6)


def slow_tome(twin, x, r):
    """One image, pair by pair: logits, and the patches that are no merged token."""
    rows, names, many = list(twin._pos_embed(twin.patch_embed(x))[0]), [[j] for j in range(65)], [1.0] * 65
    for block in twin.blocks:
        attn, n = block.attn, len(rows)
        tokens = torch.stack(rows)[None]
        q, k, v = attn.qkv(block.norm1(tokens)).reshape(n, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + torch.tensor(many).log()
        tokens = tokens + attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(1, n, -1))
        rows, mean = list(tokens[0]), k.mean(0)
        cosine = F.cosine_similarity(mean[:, None], mean, dim=2).tolist()
        edges = []
        for a in range(2, n, 2):
            best, b = max((cosine[a][b], -b) for b in range(1, n, 2))
            edges.append((-best, a, -b))
        total = [row * size for row, size in zip(rows, many)]
        gone = set()
        for _, a, b in sorted(edges)[: min(r, (n - 1) // 2)]:
            total[b], many[b], names[b] = total[b] + total[a], many[b] + many[a], names[b] + names[a]
            gone.add(a)
        order = [j for j in range(0, n, 2) if j not in gone] + list(range(1, n, 2))
        rows = [total[j] / many[j] for j in order]
        many, names = [many[j] for j in order], [names[j] for j in order]
        tokens = torch.stack(rows)[None]
        rows = list((tokens + block.mlp(block.norm2(tokens)))[0])
    answer = twin.head(twin.norm(torch.stack(rows)[None])[:, 0])
    return answer, [one[0] if len(one) == 1 else -1 for one in names]


@pytest.mark.parametrize("ratio", [0.25, 0.6])
@torch.no_grad()
def test_against_a_slow_version(ratio):
    model, x = build("tome", keep_ratio=ratio), photos(2)
    twin, found = timms(model), model.classify(x)
    for i in range(2):
        logits, names = slow_tome(twin, x[i : i + 1], model.r)
        assert gap(found.logits[i : i + 1], logits) < 1e-4 and found.places[i].tolist() == names
