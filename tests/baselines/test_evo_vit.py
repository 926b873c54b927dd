"""Evo-ViT by hand, by counts, and against a slow version on timm's ViT."""

import pytest
import torch

from blsam.baselines import build_baseline
from blsam.baselines.evo_vit import follow, in_order, represent, split
from blsam.config import CLASSIFIERS
from tests.baselines.models import MINI, build, full_attention, photos, sizes, timms
from tests.helpers import gap

ROW = [0.4, 0.1, 0.3, 0.2]


def test_by_hand():
    everyone = torch.arange(4)[None]
    g = follow(torch.tensor([ROW]), everyone, torch.tensor([[0.1, 0.6, 0.1, 0.2]]))
    assert torch.allclose(g, torch.tensor([[0.25, 0.35, 0.2, 0.2]]))
    slow, fast = split(g, 2)
    assert slow.tolist() == [[1, 0]] and fast.tolist() == [[2, 3]]
    waiting = torch.tensor([[[2.0, 0], [0, 4]]])
    rep = represent(waiting, g.gather(1, fast))
    assert torch.allclose(rep, torch.tensor([[[1.0, 2]]]))
    later = follow(g, slow, torch.tensor([[0.55, 0.15]]))
    assert torch.allclose(later[0, :2], torch.tensor([0.2, 0.45])) and torch.equal(later[0, 2:], g[0, 2:])
    patches = torch.tensor([[[1.0], [0], [2], [3]]])
    assert in_order(patches, slow, fast).flatten().tolist() == [0, 1, 2, 3]


class Adds(torch.nn.Module):
    """A sublayer that adds this, whatever comes in."""

    def __init__(self, *added):
        super().__init__()
        self.added = torch.tensor(added)

    def forward(self, x):
        return self.added.expand_as(x)


@pytest.mark.parametrize("rep", [True, False])
def test_placeholders_take_what_the_representative_was_added(rep):
    """Attention adds (.1, 0), the feed-forward part (0, .2), to every token that runs."""
    model = build("evo_vit", rep=rep, keep_ratio=1 / 32)  # two of 64
    for block in model.blocks:
        block.attn.proj, block.mlp = Adds(*[0.1, 0.0] * 12), Adds(*[0.0, 0.2] * 12)
    x = torch.randn(1, 65, MINI.dim)
    found = model.walk(x).x - x
    step = torch.tensor([0.1, 0.2] * 12)
    runs = (found[0] - 12 * step).abs().amax(1) < 1e-4
    if rep:
        assert runs.all()
    else:  # four dense blocks, then only those that were chosen
        assert runs[0] and 3 <= runs.sum() <= 5
        waited = [((found[0] - n * step).abs().amax(1) < 1e-4).sum().item() for n in (4, 8, 12)]
        assert sum(waited) == 65 and waited[0] >= 60


@pytest.mark.parametrize("rep", [True, False])
def test_counts(rep):
    with torch.device("meta"):
        model = build_baseline("evo_vit", CLASSIFIERS["vit_tiny_patch16_224"], rep=rep)
        x = torch.empty(1, 3, 224, 224)
        for training in (False, True):
            found = sizes(model.train(training), x)
            assert found == [(197, 197)] * 4 + [(99 + rep, 99 + rep)] * 8
        assert model.classify(x).tokens.shape == (1, 197, 192)


def slow_evo_vit(twin, x, ratio, rep, choices):
    """One image, token by token: what comes out of the last block."""
    tokens = twin._pos_embed(twin.patch_embed(x))[0]
    count, g, slow = int(ratio * 64), [0.0] * 65, None
    for i, block in enumerate(twin.blocks):
        if i in choices:
            ranked = sorted(range(1, 65), key=lambda j: -g[j])
            slow, fast = ranked[:count], ranked[count:]
            total = sum(g[j] for j in fast)
            before = sum(g[j] / total * tokens[j] for j in fast)
            inner = torch.stack([tokens[0], *(tokens[j] for j in slow), *([before] if rep else [])])
        elif slow is None:
            inner = tokens
        added, weights = full_attention(block, inner[None])
        row = weights[0, :, 0].mean(0).tolist()
        if slow is None:
            g = row
        else:
            for at, j in enumerate(slow):
                g[j] = 0.5 * g[j] + 0.5 * row[1 + at]
        inner = inner + added[0]
        inner = inner + block.mlp(block.norm2(inner))
        if slow is None:
            tokens = inner
        elif i + 1 in choices or i == 11:
            tokens = tokens.clone()
            tokens[0] = inner[0]
            for at, j in enumerate(slow):
                tokens[j] = inner[1 + at]
            for j in fast if rep else ():
                tokens[j] = tokens[j] + inner[-1] - before
    return tokens[None]


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("ratio, rep", [(0.5, True), (0.3, True), (0.5, False)])
@torch.no_grad()
def test_against_a_slow_version(ratio, rep, by_layer):
    model, x = build("evo_vit", keep_ratio=ratio, rep=rep).train(by_layer), photos(2)
    twin, found = timms(model), model.classify(x)
    for i in range(2):
        tokens = slow_evo_vit(twin, x[i : i + 1], ratio, rep, range(4, 12) if by_layer else (4, 8))
        assert gap(found.tokens[i : i + 1], twin.norm(tokens)) < 1e-4
        logits = twin.head(twin.norm(tokens[:, 1:].mean(1)))  # placeholders too
        assert gap(found.logits[i : i + 1], logits) < 1e-4
    assert torch.equal(found.places, torch.arange(65).expand(2, -1))


@torch.no_grad()
def test_layer_mode_ends_with_the_first_two_thirds_of_training():
    model, x = build("evo_vit"), photos()
    by_stage = model.encode(x)[0]
    by_layer = model.train().encode(x)[0]  # before any epoch is known
    assert gap(by_layer, by_stage) > 1e-3
    for epoch, expected in ((0, by_layer), (19, by_layer), (20, by_stage), (29, by_stage)):
        model.begin_epoch(epoch, 30)
        assert torch.equal(model.train().encode(x)[0], expected)
        assert torch.equal(model.eval().encode(x)[0], by_stage)


def test_two_heads_in_training_one_at_inference():
    model, x = build("evo_vit"), photos()
    [(weight, logits)] = model.classify(x).heads
    assert weight == 1 and torch.equal(logits, model(x))
    model.begin_epoch(1, 1)  # stage mode, as at inference
    found = model.train().classify(x)
    (first, of_mean), (second, of_class) = found.heads
    assert first == second == 0.5 and torch.equal(of_mean, logits)
    state = model.forward_features(x)[:, 0]
    expected = torch.nn.functional.layer_norm(state, (MINI.dim,), model.norm_cls.weight, model.norm_cls.bias, 1e-6)
    assert torch.allclose(of_class, expected @ model.head_cls.weight.T + model.head_cls.bias, atol=1e-5)


def test_the_class_tokens_head_begins_as_the_loaded_one():
    model, other = build("evo_vit"), build("evo_vit")
    plain = {key: value + 1 for key, value in other.state_dict().items() if "_cls." not in key}
    model.load_state_dict(plain, strict=True)
    for kind in ("weight", "bias"):
        assert torch.equal(getattr(model.norm_cls, kind), plain[f"norm.{kind}"])
        assert torch.equal(getattr(model.head_cls, kind), plain[f"head.{kind}"])
    model.load_state_dict(other.state_dict(), strict=True)  # one that has its own
    assert torch.equal(model.head_cls.weight, other.head_cls.weight)
    with pytest.raises(RuntimeError, match="head_cls.bias"):
        model.load_state_dict({key: value for key, value in other.state_dict().items() if key != "head_cls.bias"})


def test_other_classes():
    model = build("evo_vit").train()
    model.reset_classifier(3)
    assert [logits.shape for _, logits in model.classify(photos()).heads] == [(2, 3), (2, 3)]
    model.reset_classifier(0)
    assert model.eval()(photos()).shape == (2, MINI.dim)


@torch.no_grad()
def test_a_permutation_of_the_patches_permutes_what_comes_out():
    model, x = build("evo_vit"), photos(1)
    tokens, order = model.stem(x), torch.randperm(64, generator=torch.Generator().manual_seed(0)) + 1
    order = torch.cat([torch.zeros(1, dtype=torch.int64), order])
    found, other = model.walk(tokens).x, model.walk(tokens[:, order]).x
    assert gap(other, found[:, order]) < 1e-4
    assert gap(model.forward_head(other), model.forward_head(found)) < 1e-4


@pytest.mark.parametrize("stages", [(), (8, 4), (0, 4), (4, 12)])
def test_stages_that_cannot_be_are_refused(stages):
    with pytest.raises(ValueError, match="stages must"):
        build_baseline("evo_vit", MINI, stages=stages)
