"""A-ViT by hand, against masks as in the published code, and the search for the gate's centre."""

import math

import pytest
import torch

from blsam.baselines.a_vit import bell, center_for, halt, halting_prior, released_prior
from tests.baselines.models import build, dense, photos, sizes, timms
from tests.helpers import gap


def halting(*h):
    """Shares of each layer, the layer it ends in (from 1) and the remainder, of one token."""
    total, shares = torch.zeros(1), []
    for i, one in enumerate(h):
        share, halted = halt(torch.tensor([one]), total, last=i + 1 == len(h))
        shares.append(share.item())
        if halted:
            return shares, i + 1, share.item()
        total = total + one


@pytest.mark.parametrize(
    "h, shares",
    [
        ((0.3, 0.4, 0.5, 0.2), (0.3, 0.4, 0.3)),
        ((0.5, 0.495, 0.1), (0.5, 0.5)),  # above .99
        ((0.2, 0.1, 0.1, 0.1), (0.2, 0.1, 0.1, 0.6)),  # forced
    ],
)
def test_by_hand(h, shares):
    found, layer, remainder = halting(*h)
    assert found == pytest.approx(shares) and sum(found) == pytest.approx(1)
    ponder = {3: 3.3, 2: 2.5, 4: 4.6}[layer]
    assert layer + remainder == pytest.approx(ponder)
    if layer == 3:
        assert sum(p * state for p, state in zip(found, (1, 2, 3))) == pytest.approx(2.0)


def test_the_gate_by_hand():
    model = build("a_vit", scale=10.0, center=30.0, search=False)
    x = torch.tensor([2.0, 3, 3.5])
    assert torch.sigmoid(model.gate[0] * x - model.gate[1]).tolist() == pytest.approx([0, 0.5, 0.9933], abs=1e-4)


def masked(model, x):
    """As the published code: all tokens all along; the halted ones are zeroed, seen by nobody and given nothing. Logits,
    mean N + R, how many run in each block."""
    twin, scale, center = timms(model), *model.gate.tolist()
    tokens = twin._pos_embed(twin.patch_embed(x))[0]
    runs, total, ponder = torch.ones(65), torch.zeros(65), torch.zeros(65)
    answer, counts = torch.zeros_like(tokens[0]), []
    for i, block in enumerate(twin.blocks):
        attn = block.attn
        counts.append(int(runs.sum()))
        tokens = tokens * runs[:, None]
        q, k, v = attn.qkv(block.norm1(tokens)).reshape(65, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 - 1000 * (1 - runs)
        out = attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(65, -1))
        tokens = tokens + out * runs[:, None]
        tokens = tokens + block.mlp(block.norm2(tokens)) * runs[:, None]
        h = torch.sigmoid(scale * tokens[:, 0] - center) * runs if i < 11 else runs
        ends = ((total + h > 0.99) & (runs > 0)).float() if i < 11 else runs
        p = ends * (1 - total) + (runs - ends) * h
        answer = answer + p[0] * tokens[0]
        ponder = ponder + runs + ends * (1 - total)
        total, runs = total + h, runs - ends
    return twin.head(twin.norm(answer))[None], ponder.mean(), counts


@pytest.mark.parametrize("center", [0.5, 1.5, 3.0])
@torch.no_grad()
def test_removed_is_masked(center):
    """Of single images, and in a batch, where they are filled up."""
    model, x = build("a_vit", scale=0.5, center=center, search=False), photos(3)
    together, ponders = model.classify(x), []
    for i in range(3):
        logits, ponder, counts = masked(model, x[i : i + 1])
        assert gap(model(x[i : i + 1]), logits) < 1e-4 and gap(together.logits[i : i + 1], logits) < 1e-4
        assert sizes(model, x[i : i + 1]) == [(n, n) for n in counts] and counts[-1] < 65
        computed = model.walk(model.stem(x)).computed
        assert [layer.attention[i].item() for layer in computed] == counts
        ponders.append(ponder)
    loss = model.train().classify(x).losses["ponder"]
    assert loss.item() == pytest.approx(5e-4 * sum(ponders).item() / 3, rel=1e-4)


@torch.no_grad()
def test_a_gate_that_never_opens():
    """The class token's last state, and every token takes all layers and 1 more."""
    model, x = build("a_vit", scale=0.0, center=50.0, search=False), photos()
    plain = dense()
    assert gap(model(x), plain(x)) < 1e-5
    assert model.train().classify(x).losses["ponder"].item() == pytest.approx(5e-4 * 13)


@torch.no_grad()
def test_a_gate_that_is_always_open():
    """All tokens halt in the first block; nothing is computed after it."""
    model, x = build("a_vit", scale=0.0, center=-50.0, search=False), photos()
    assert sizes(model, x[:1]) == [(65, 65)] + [(0, 0)] * 11
    twin = timms(model)
    first = twin.blocks[0](twin._pos_embed(twin.patch_embed(x)))
    assert gap(model(x), twin.head(twin.norm(first)[:, 0])) < 1e-4


def test_priors_by_hand():
    wanted = bell(12, 8.0)
    assert wanted[8].item() == pytest.approx(1 / math.sqrt(2 * math.pi)) and wanted[7] == wanted[9]
    assert (0.98 * wanted / wanted[:8].sum()).sum().item() == pytest.approx(3.26, abs=0.01)  # the published target
    means = torch.full((12,), 0.3, requires_grad=True)
    target = (wanted / wanted.sum()).double()
    even = sum(math.log((1 / 12) / p) / 12 for p in target.tolist())
    assert halting_prior(means, 8.0).item() == pytest.approx(even, rel=1e-4)
    halting_prior(means, 8.0).backward()
    assert means.grad[1] > 0 > means.grad[8]  # halt less early, more at the target
    scaled = (0.98 * wanted / wanted[:8].sum()).double()
    published = sum(p * math.log(p * 12) for p in scaled.tolist()) / 12
    assert released_prior(means, 8.0).item() == pytest.approx(published, rel=1e-4)
    assert released_prior(scaled.float() / scaled.sum(), 8.0) >= 0


def test_the_centre_is_found_by_hand():
    """Two tokens with constant channels: at a centre c they take 1 / h blocks, rounded up."""
    x = torch.tensor([[0.0, 1.0]]).expand(12, 2)
    center = center_for(x, 5.0, 0.5)
    h = [1 / (1 + math.exp(center - 5 * value)) for value in (0, 1)]
    taken = [min(12, math.floor(0.99 / one) + 1) for one in h]
    assert sum(taken) / 2 == pytest.approx(6, abs=1), (center, taken)


@torch.no_grad()
def test_training_begins_at_the_target_depth():
    model, x = build("a_vit", keep_ratio=0.5), photos(4)
    center = model.gate[1].item()
    model(x)
    assert model.gate[1] == center  # inference looks for nothing
    model.train().classify(x)
    assert model.gate[1] != center and model.searched
    found = model.gate[1].item()
    model.classify(photos(2))
    assert model.gate[1] == found  # once
    other = build("a_vit")
    other.load_state_dict(model.state_dict())
    assert other.gate[1] == found and other.searched
    depth = sum(layer.attention.double() for layer in model.eval().walk(model.stem(x)).computed).mean() / 65
    assert 4 < depth < 8, depth  # what halts changes what comes after
