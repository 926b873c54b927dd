"""AdaViT by hand, parts that are off, and one image computed in part against all of it multiplied by 0 and 1."""

import math

import pytest
import torch

from blsam.baselines.ada_vit import Decisions, hard, relaxed, usage_loss, visible
from blsam.baselines.macs import layer_macs
from blsam.evaluation.imagenet import counted_macs
from tests.baselines.models import MINI, build, dense, photos, plain_state
from tests.helpers import gap

HEADS = MINI.heads


def decided(batch, patches=None, heads=None, sublayers=(1.0, 1.0)):
    """Decisions of a block; what is not given is on."""
    patches = torch.ones(65) if patches is None else torch.as_tensor(patches)
    heads = torch.ones(HEADS) if heads is None else torch.tensor(heads)
    return Decisions(patches.expand(batch, -1), heads.expand(batch, -1), torch.tensor(sublayers).expand(batch, -1))


def fixed(model, **parts):
    """The model with the same decisions in every block."""
    model.decide = lambda i, x: decided(len(x), **parts)
    return model


def some_patches():
    on = torch.zeros(65)
    on[[0, 3, 10, 11, 40]] = 1
    return on


def test_decisions_by_hand():
    logit = math.log(0.55 / 0.45)
    assert hard(torch.tensor([logit]), 0.6) == 0 and hard(torch.tensor([logit]), 0.5) == 1
    active = torch.tensor([[True, True, False, True]])  # the class token, and (1, 0, 1)
    expected = [[1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 1]]
    assert visible(active).int().tolist() == [expected]


def test_relaxed_decisions_are_hard_and_have_the_soft_ones_gradient(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.fill_(1.0))  # no noise
    logits = torch.tensor([-1.0, 0.4, 3.0], requires_grad=True)
    found = relaxed(logits, 0.5)
    assert found.tolist() == [0, 1, 1]
    found.sum().backward()
    soft = torch.sigmoid(logits.detach() / 5)
    assert torch.allclose(logits.grad, soft * (1 - soft) / 5)


def test_noise_is_logistic():
    torch.manual_seed(0)
    share = relaxed(torch.full((20000,), 1.0), 0.5).mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.015)


def test_usage_by_hand():
    patches = torch.tensor([[1.0, 1, 1, 0, 1]])  # without the class token .75
    heads, on, off = torch.tensor([[1.0, 1, 1, 0]]), torch.ones(1, 2), torch.zeros(1, 2)
    first = Decisions(patches, torch.ones(1, 4), on)
    assert usage_loss([first], 0.5).item() == pytest.approx(0.0625)
    second = Decisions(patches, heads, torch.tensor([[1.0, 0]]))
    assert usage_loss([first, second], 0.5).item() == pytest.approx(0.0625 + 0.25 + 0)
    skipped = Decisions(patches, torch.zeros(1, 4), off)  # whose heads do not count
    assert usage_loss([first, second, skipped], 0.5).item() == pytest.approx(0.0625 + 0.25 + 0.25)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_all_on_is_the_plain_model(batch):
    model, plain, x = build("ada_vit"), dense(), photos(batch)
    plain.load_state_dict(plain_state(model))
    for policy in model.predictors:
        for layer in policy.children():
            layer.bias.fill_(100.0)
    assert gap(model(x), plain(x)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_sublayers_that_are_off_change_nothing(batch):
    model, x = fixed(build("ada_vit"), sublayers=(0.0, 0.0)), photos(batch)
    tokens = model.stem(x)
    assert torch.equal(model.walk(tokens).x, tokens)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_without_heads_biases_are_left(batch):
    model, x = build("ada_vit"), photos(batch)
    block, tokens = model.blocks[0], model.stem(x)
    fixed(model, heads=[0.0] * HEADS, sublayers=(1.0, 0.0))
    step = model.attention(0, model.before_block(0, model.begin(tokens)))[0]
    assert gap(step.x, tokens + block.attn.proj.bias) < 1e-5
    fixed(model, heads=[0.0] * HEADS, sublayers=(0.0, 1.0))
    step = model.feed_forward(0, model.before_block(0, model.begin(tokens)))
    assert gap(step.x, tokens + block.mlp.fc2(block.mlp.act(block.mlp.fc1.bias))) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_patches_that_are_off_pass_and_are_seen_by_nobody(batch):
    on = some_patches()
    model, x = fixed(build("ada_vit"), patches=on), photos(batch)
    tokens = model.stem(x)
    found = model.walk(tokens).x
    assert torch.equal(found[:, on == 0], tokens[:, on == 0])
    other = torch.where(on[:, None] > 0, tokens, tokens + torch.randn_like(tokens))
    assert gap(model.walk(other).x[:, on > 0], found[:, on > 0]) < 1e-5
    alone, plain = tokens[:, on > 0], dense()
    plain.load_state_dict(plain_state(model))
    for block in plain.blocks:
        alone = block(alone)
    assert gap(found[:, on > 0], alone) < 1e-4


PARTS = [
    {},
    {"patches": some_patches()},
    {"heads": [1.0, 0.0, 1.0]},
    {"heads": [0.0, 0.0, 0.0]},
    {"sublayers": (1.0, 0.0), "heads": [0.0, 1.0, 0.0]},
    {"sublayers": (0.0, 1.0), "heads": [0.0, 1.0, 1.0], "patches": some_patches()},
    {"sublayers": (0.0, 0.0)},
]


@torch.no_grad()
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_one_image_in_part_is_all_of_it_multiplied(parts):
    model, x = fixed(build("ada_vit"), **parts), photos(1)
    both = model(torch.cat([x, photos(2)[1:]]))
    assert gap(model(x), both[:1]) < 1e-4
    # decisions that are given cost nothing, in the count they do
    decisions = sum(layer.more for layer in model.walk(model.stem(x)).computed)
    assert model.macs(x) - decisions == counted_macs(model, x)


@torch.no_grad()
def test_decisions_are_made_of_the_blocks_input():
    """By hand, from the linear layers: patches on their normalised input, the rest on the class token as it is."""
    model, x = build("ada_vit"), photos(2)
    tokens = model.stem(x)
    found = model.decide(4, tokens)
    policy, normalised = model.predictors[4], model.blocks[4].norm1(tokens)
    patches = (normalised[:, 1:] @ policy.patches.weight.T + policy.patches.bias)[..., 0].sigmoid() > 0.6
    units = (tokens[:, 0] @ policy.units.weight.T + policy.units.bias).sigmoid() > 0.5
    assert torch.equal(found.patches, torch.cat([torch.ones(2, 1), patches.float()], 1))
    assert torch.equal(torch.cat([found.heads, found.sublayers], 1), units.float())
    first = model.decide(0, tokens)  # which decides on patches alone
    assert first.heads.all() and first.sublayers.all() and not first.patches.all()


def test_macs_in_closed_form():
    """t tokens and h of H heads: 4 t C^2 h / H + 2 t^2 C h / H, and 4 t C^2 h / H + 4 t C^2."""
    model, c = build("ada_vit"), MINI.dim
    t, h = 5, 2
    taken = decided(1, patches=some_patches(), heads=[1.0, 0.0, 1.0])
    expected = (4 * t * c**2 + 2 * t**2 * c) * h // HEADS + 4 * t * c**2 * h // HEADS + 4 * t * c**2
    decisions = (64 + HEADS + 2) * c
    assert layer_macs(c, model.layer(3, taken)).tolist() == [expected + decisions]
    off = decided(1, patches=some_patches(), sublayers=(0.0, 0.0))
    assert layer_macs(c, model.layer(3, off)).tolist() == [decisions]


def test_gradients_reach_decisions():
    model = build("ada_vit").train()
    torch.manual_seed(0)
    found = model.classify(photos(4))
    found.logits.square().mean().backward(retain_graph=True)
    last = model.predictors[11]
    for name, layer in (("units", last.units), ("patches", model.predictors[5].patches)):
        assert layer.weight.grad is not None and layer.weight.grad.any(), name
    assert found.losses["usage"].requires_grad
