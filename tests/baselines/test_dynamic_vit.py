"""DynamicViT by hand, by counts, against a slow version on timm's ViT, and masks against removal."""

import math

import pytest
import torch
import torch.nn.functional as F

from blsam.baselines import build_baseline
from blsam.baselines.dynamic_vit import masked_mean, masked_softmax, ratio_loss
from blsam.config import CLASSIFIERS
from tests.baselines.models import MINI, build, photos, sizes, timms
from tests.helpers import gap


def test_attention_by_hand():
    """The second of three tokens is dropped: only it sees itself."""
    found = masked_softmax(torch.zeros(1, 1, 3, 3), torch.tensor([[1.0, 0, 1]]))[0, 0]
    expected = torch.tensor([[0.5, 0, 0.5], [1 / 3] * 3, [0.5, 0, 0.5]])
    assert (found - expected).abs().max() < 1e-6
    logits = torch.randn(2, 3, 5, 5)
    assert (masked_softmax(logits, torch.ones(2, 5)) - logits.softmax(-1)).abs().max() < 1e-6


def test_losses_and_means_by_hand():
    keep = torch.tensor([[1.0] * 8 + [0] * 2])  # .8, then .49
    last = torch.tensor([[1.0] * 49 + [0] * 51])
    losses = [ratio_loss(keep, 0.7), ratio_loss(last, 0.49)]
    assert (sum(losses) / 2).item() == pytest.approx(0.005)
    of_two = torch.tensor([[1.0, 1], [1, 0]])
    assert ratio_loss(of_two, 0.5).item() == pytest.approx((0.25 + 0) / 2)
    x = torch.tensor([[[1.0], [5], [3]]])
    assert masked_mean(x, torch.tensor([[1.0, 0, 1]])).item() == 2
    assert masked_mean(x, torch.zeros(1, 3)).item() == 0  # not NaN


@pytest.mark.parametrize("ratio, counts", [(0.7, (137, 96, 67)), (0.9, (176, 158, 142)), (0.5, (98, 49, 24))])
def test_counts(ratio, counts):
    with torch.device("meta"):
        model = build_baseline("dynamic_vit", CLASSIFIERS["vit_tiny_patch16_224"], keep_ratio=ratio)
        found = sizes(model, torch.empty(1, 3, 224, 224))
    stages = [(196, *counts)[i] for i in (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)]
    assert found == [(1 + n, 1 + n) for n in stages]


def best_of(model):
    """In training keep what inference keeps."""
    left = {}

    def draw(stage, scores):
        ranked = scores[..., 0] if stage == 0 else scores[..., 0].masked_fill(left["keep"] == 0, -torch.inf)
        index = ranked.argsort(dim=1, descending=True, stable=True)[:, : model.count(stage)]
        left["keep"] = torch.zeros_like(ranked).scatter(1, index, 1.0)
        return left["keep"]

    return draw


@torch.no_grad()
def test_masked_is_removed():
    model, x = build("dynamic_vit"), photos(3)
    removed = model.classify(x)
    model.train().draw = best_of(model)
    masked = model.classify(x)
    assert masked.tokens.shape[1] == 65 and removed.tokens.shape[1] == 1 + int(0.343 * 64)
    assert gap(masked.logits, removed.logits) < 1e-4
    for i in range(3):
        places = removed.places[i]
        assert set(masked.places[i].tolist()) == {-1, *places.tolist()}
        assert gap(masked.tokens[i, places], removed.tokens[i]) < 1e-4
    shares = [int(0.7 ** (s + 1) * 64) / 64 - 0.7 ** (s + 1) for s in range(3)]
    assert masked.losses["ratio"].item() == pytest.approx(2 / 3 * sum(s**2 for s in shares), rel=1e-3)


def test_what_was_dropped_stays_dropped():
    model = build("dynamic_vit", stages=(0, 1)).train()
    draws = iter([torch.tensor([[1.0, 0] * 32]), torch.ones(1, 64)])
    model.draw = lambda stage, scores: next(draws)
    assert (model.classify(photos(1)).places >= 0).sum() == 33


def test_gradients_reach_predictors_through_the_masks():
    model = build("dynamic_vit").train()
    torch.manual_seed(0)
    model.classify(photos()).logits.square().mean().backward()
    for predictor in model.predictors:
        for name, parameter in predictor.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name


def test_training_begins_at_its_target():
    """As good as: draws of random weights lie around it."""
    torch.manual_seed(0)
    model = build_baseline("dynamic_vit", MINI, keep_ratio=0.7).train()
    places = model.classify(photos(64)).places
    share = (places[:, 1:] >= 0).float().mean().item()
    assert share == pytest.approx(0.343, abs=0.08)


def test_training_draws_and_inference_does_not():
    model, x = build("dynamic_vit").train(), photos()
    torch.manual_seed(0)
    first, second = (model.classify(x).places for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(model.eval()(x), model(x))


def slow_dynamic_vit(model, twin, x):
    """One image: logits and the patches that are left, best first."""
    tokens, names = twin._pos_embed(twin.patch_embed(x)), list(range(65))
    for i, block in enumerate(twin.blocks):
        if i in (3, 6, 9):
            stage, rows = i // 3 - 1, tokens[0, 1:]
            predictor = model.predictors[stage]
            features = F.gelu(F.linear(predictor.norm(rows), predictor.entry.weight, predictor.entry.bias))
            own, others = features[:, : MINI.dim // 2], features[:, MINI.dim // 2 :].mean(0)
            pairs = [predictor.exit(torch.cat([one, others])) for one in own]
            keep = [math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in torch.stack(pairs).double().tolist()]
            ranked = sorted(range(len(keep)), key=lambda j: -keep[j])[: math.floor(64 * 0.7 ** (stage + 1))]
            stay = [0, *(1 + j for j in ranked)]
            tokens, names = tokens[:, stay], [names[j] for j in stay]
        tokens = block(tokens)
    return twin.head(twin.norm(tokens)[:, 0]), names


@torch.no_grad()
def test_against_a_slow_version():
    model, x = build("dynamic_vit"), photos(2)
    twin, found = timms(model), model.classify(x)
    for i in range(2):
        logits, names = slow_dynamic_vit(model, twin, x[i : i + 1])
        assert found.places[i].tolist() == names
        assert gap(found.logits[i : i + 1], logits) < 1e-4


def test_stages_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="stages must lie in 0 ... 11"):
        build_baseline("dynamic_vit", MINI, stages=(3, 12))
