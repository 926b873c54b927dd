"""ATS by hand and against a slow version on timm's ViT; images of a batch that keep different numbers."""

import pytest
import torch

from blsam.baselines import build_baseline
from blsam.baselines.ats import released_sample, sample, significance
from tests.baselines.models import MINI, build, dense, photos, sizes, timms
from tests.helpers import gap


def ids(picked):
    return [one.nonzero()[:, 0].tolist() for one in picked]


def test_by_hand():
    """A = (.1, .2, .3, .4) of patches, lengths of values 4, 3, 2, 1."""
    attention = torch.tensor([[[0.5, 0.05, 0.1, 0.15, 0.2]]])  # of sum 1, with the class token's half
    v = torch.tensor([9.0, 4, 3, 2, 1])[None, None, :, None] * torch.tensor([0.6, 0.8])
    scores = significance(attention, v, torch.ones(1, 5, dtype=torch.bool))
    assert torch.allclose(scores, torch.tensor([[0.2, 0.3, 0.3, 0.2]]))
    assert ids(sample(scores, 2)) == [[0, 2]]
    assert ids(sample(scores, 4)) == [[0, 1, 2]]  # the second twice
    assert ids(sample(torch.tensor([[0.9, 0.05, 0.03, 0.02], [0.2, 0.3, 0.3, 0.2]]), 3)) == [[0], [0, 1, 2]]


def test_heads_are_summed_each_with_its_own_lengths():
    attention = torch.tensor([[[0.2, 0.8, 0], [0.2, 0, 0.8]]])
    v = torch.tensor([[[[1.0], [3], [100]], [[1.0], [100], [1]]]])
    found = significance(attention, v, torch.ones(1, 3, dtype=torch.bool))
    assert torch.allclose(found, torch.tensor([[0.75, 0.25]]))


def test_what_fills_up_an_image_has_no_share():
    attention, v = torch.tensor([[[0.4, 0.2, 0.2, 0.2]]]), torch.ones(1, 1, 4, 1)
    scores = significance(attention, v, torch.tensor([[True, True, True, False]]))
    assert torch.allclose(scores, torch.tensor([[0.5, 0.5, 0]]))
    assert ids(sample(scores, 8)) == [[0, 1]] and ids(released_sample(scores, 8)) == [[1]]


def test_the_published_codes_sampler_by_hand():
    """z = (0, .2222, .5556, 1), points .2222, .4815, .7407, 1: the lowest is never picked."""
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.3, 0.2]])
    assert ids(released_sample(scores, 4)) == [[1, 2, 3], [0, 2, 3]]
    assert ids(released_sample(scores, 1000)) == [[1, 2, 3], [0, 2, 3]]


def slow_ats(twin, x, points, first):
    """One image, token by token: logits, patches that are left, how many ask in each block."""
    rows, names, asked = twin._pos_embed(twin.patch_embed(x))[0], list(range(65)), []
    for i, block in enumerate(twin.blocks):
        attn, n = block.attn, len(rows)
        q, k, v = attn.qkv(block.norm1(rows)).reshape(n, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)  # [heads, n, n]
        stay = list(range(n))
        if i >= first:
            row, length = weights[:, 0].tolist(), v.norm(dim=2).tolist()
            scores = [sum(row[h][j] * length[h][j] for h in range(3)) for j in range(1, n)]
            sums = [sum(scores[: j + 1]) / sum(scores) for j in range(n - 1)]
            hits = {min(range(n - 1), key=lambda j: abs(sums[j] - (m + 0.5) / points)) for m in range(points)}
            stay = [0, *(1 + j for j in sorted(hits))]
        out = attn.proj((weights @ v)[:, stay].transpose(0, 1).reshape(len(stay), -1))
        rows, names = rows[stay] + out, [names[j] for j in stay]
        rows = rows + block.mlp(block.norm2(rows))
        asked.append(len(stay))
    return twin.head(twin.norm(rows)[0])[None], names, asked


@pytest.mark.parametrize("ratio, first", [(0.9, 3), (0.5, 1)])
@torch.no_grad()
def test_against_a_slow_version(ratio, first):
    """In a batch, where images are filled up, and alone."""
    model, x = build("ats", keep_ratio=ratio, first=first), photos(4)
    twin, found, lengths = timms(model), model.classify(x), set()
    for i in range(4):
        logits, names, asked = slow_ats(twin, x[i : i + 1], int(64 * ratio), first)
        alone = model.classify(x[i : i + 1])
        assert alone.places[0].tolist() == names and [m for _, m in sizes(model, x[i : i + 1])] == asked
        assert found.places[i].tolist() == names + [-1] * (found.places.shape[1] - len(names))
        assert gap(alone.logits, logits) < 1e-4 and gap(found.logits[i : i + 1], logits) < 1e-4
        lengths.add(len(names))
    assert len(lengths) > 1, "all images keep as many: nothing is filled up"


@torch.no_grad()
def test_survivors_read_the_tokens_that_are_dropped():
    """What the first sampling block gives its survivors is what the plain one gives them."""
    model, plain = build("ats", first=0, keep_ratio=0.3), dense()
    plain.load_state_dict(model.state_dict())
    tokens = model.begin(model.stem(photos(1)))
    found = model.attention(0, tokens)[0]
    expected = tokens.x + plain.blocks[0].attention(tokens.x)
    assert 1 < found.x.shape[1] < 65
    assert gap(found.x[0], expected[0, found.places[0]]) < 1e-5


def test_first_must_be_a_block():
    with pytest.raises(ValueError, match="first must be 0 or more"):
        build_baseline("ats", MINI, first=-1)
