"""EViT by hand, by counts, and against a slow version on timm's ViT."""

import math

import pytest
import torch

from blsam.baselines import build_baseline
from blsam.baselines.evit import reorganise, scheduled_ratio
from blsam.config import CLASSIFIERS
from tests.baselines.models import MINI, build, full_attention, photos, sizes, timms
from tests.helpers import gap


def test_by_hand():
    """Two heads: (.1, .4, .2, .1) and (.3, .2, .1, .2) over four patches."""
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.1], [0.3, 0.2, 0.1, 0.2]]).mean(0)
    assert torch.allclose(attention, torch.tensor([0.2, 0.3, 0.15, 0.15]))
    x = torch.tensor([[9.0, 9], [1, 1], [3, 3], [2, 0], [0, 4]])
    for fuse in (True, False):
        found, kept = reorganise(x[None], attention[None], 2, fuse)
        assert kept.tolist() == [[0, 2, 1]]
        expected = [[9.0, 9], [3, 3], [1, 1], [0.3, 0.6]]  # the sum is not divided by .3
        assert torch.allclose(found[0], torch.tensor(expected[: 3 + fuse]))


COUNTS = [
    (0.7, True, (197, 140, 100, 72)),
    (0.5, True, (197, 100, 52, 28)),
    (0.9, True, (197, 179, 163, 148)),
    (0.7, False, (197, 139, 98, 69)),
    (1.0, True, (197, 197, 197, 197)),
]


@pytest.mark.parametrize("ratio, fuse, counts", COUNTS)
def test_counts(ratio, fuse, counts):
    with torch.device("meta"):
        model = build_baseline("evit", CLASSIFIERS["vit_tiny_patch16_224"], keep_ratio=ratio, fuse=fuse)
        found = sizes(model, torch.empty(1, 3, 224, 224))
    stages = [counts[i] for i in (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3)]
    assert [attention for attention, _ in found] == stages
    assert [feed_forward for _, feed_forward in found] == stages[1:] + [counts[3]]


def test_rounding_does_not_keep_one_more():
    model = build("evit", keep_ratio=0.55)
    assert math.ceil(0.55 * 100) == 56 and model.count(3, 100, 0.55) == 55
    assert model.count(3, 196, 0.7) == 138 and model.count(4, 196, 0.7) == 196


def slow_evit(twin, x, ratio, fuse):
    """One image, token by token: logits and the patches that are left, None for a fused one."""
    tokens, names = twin._pos_embed(twin.patch_embed(x)), list(range(65))
    for i, block in enumerate(twin.blocks):
        added, weights = full_attention(block, tokens)
        tokens = tokens + added
        if i in (3, 6, 9):
            a = weights[0, :, 0].mean(0).tolist()
            ranked = sorted(range(1, len(names)), key=lambda j: -a[j])
            stay, leave = ranked[: math.ceil(ratio * len(ranked))], ranked[math.ceil(ratio * len(ranked)) :]
            rows, names = [tokens[0, j] for j in [0, *stay]], [names[j] for j in [0, *stay]]
            if fuse:
                rows.append(sum(a[j] * tokens[0, j] for j in leave))
                names.append(-1)
            tokens = torch.stack(rows)[None]
        tokens = tokens + block.mlp(block.norm2(tokens))
    return twin.head(twin.norm(tokens)[:, 0]), names


@pytest.mark.parametrize("ratio, fuse", [(0.7, True), (0.4, True), (0.7, False)])
@torch.no_grad()
def test_against_a_slow_version(ratio, fuse):
    model, x = build("evit", keep_ratio=ratio, fuse=fuse), photos(2)
    twin, found = timms(model), model.classify(x)
    for i in range(2):
        logits, names = slow_evit(twin, x[i : i + 1], ratio, fuse)
        assert gap(found.logits[i : i + 1], logits) < 1e-4 and found.places[i].tolist() == names


@torch.no_grad()
def test_a_permutation_of_the_patches_changes_nothing_but_their_names():
    model, x = build("evit"), photos(1)
    tokens, order = model.stem(x), torch.randperm(64, generator=torch.Generator().manual_seed(0)) + 1
    shuffled = torch.cat([tokens[:, :1], tokens[:, order]], dim=1)
    found, other = model.finish(model.walk(tokens)), model.finish(model.walk(shuffled))
    assert gap(other.logits, found.logits) < 1e-4
    names = torch.cat([torch.zeros(1, dtype=torch.int64), order, torch.tensor([-1])])  # -1: the last
    assert torch.equal(names[other.places], found.places)


def test_gradients_reach_the_weights_of_the_fused_token():
    attention = torch.tensor([[0.4, 0.3, 0.2, 0.1]], requires_grad=True)
    x = torch.randn(1, 5, 3, requires_grad=True)
    reorganise(x, attention, 2)[0][:, -1].sum().backward()
    assert attention.grad.tolist()[0][:2] == [0, 0] and attention.grad[0, 2:].all()
    assert torch.allclose(x.grad[0, 4], torch.tensor(0.1))


def test_the_schedule_of_the_paper():
    epochs = (0, 10, 35, 60, 85, 110, 299)
    found = [scheduled_ratio(epoch, 300, 0.7) for epoch in epochs]
    assert found == pytest.approx([1, 1, 0.9561, 0.85, 0.7439, 0.7, 0.7], abs=1e-4)
    assert scheduled_ratio(6, 30, 0.7) == pytest.approx(0.85)


def test_the_schedule_holds_in_training_only():
    scheduled, fixed = build("evit", schedule=True), build("evit")
    few, all_of = sizes(fixed, photos())[-1], (65, 65)
    assert few[0] < 65
    for model, expected in ((scheduled, [all_of, all_of, few]), (fixed, [few, few, few])):
        found = [sizes(model.train(), photos())[-1]]  # before any epoch is known
        for epoch in (0, 299):
            model.begin_epoch(epoch, 300)
            found.append(sizes(model.train(), photos())[-1])
            assert sizes(model.eval(), photos())[-1] == few
        assert found == expected


def test_layers_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="drop_layers must lie in 0 ... 11"):
        build_baseline("evit", MINI, drop_layers=(3, 12))
