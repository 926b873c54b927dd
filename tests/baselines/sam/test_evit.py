"""EViT in SAM: what is dropped, fused, frozen and put back."""

from dataclasses import replace

import pytest
import torch

from blsam.baselines.base import gather
from blsam.baselines.sam import evit
from blsam.baselines.sam.attention import Places, window_of
from blsam.config import EViTRule
from tests.baselines.sam.models import largest, small
from tests.helpers import gap, images


@pytest.fixture
def watched(monkeypatch):
    """What every drop was given and made, and what was put together in the end."""
    seen = {"before": [], "after": [], "index": []}
    drop, restored = evit.drop, evit.restored

    def watching_drop(now, *rest):
        seen["before"].append(now)
        seen["after"].append(drop(now, *rest))
        return seen["after"][-1]

    def watching_restored(pieces, index):
        seen["index"].append(torch.cat(index, dim=1))
        return restored(pieces, index)

    monkeypatch.setattr(evit, "drop", watching_drop)
    monkeypatch.setattr(evit, "restored", watching_restored)
    return seen


def tokens_of(encoder, x):
    """What comes out of the last block, [B, n, C]."""
    return encoder.run(x, None, None, None)[0].flatten(1, 2)


def test_a_drop_by_hand():
    places = Places(torch.tensor([[0, 1, 2, 3, 5, 7]]), (2, 4), 2)  # windows of 2 x 2: 0 1 5 | 2 3 7
    x = torch.tensor([[1.0, 2, 3, 4, 6, 8]])[..., None]
    scores = torch.tensor([[0.1, 0.3, 0.2, 0.1, 0.25, 0.05]])
    now = evit.drop(evit.Survivors(x, places), scores, 3, None, True)
    assert now.places.index.tolist() == [[1, 5, 2]] and now.index[0].tolist() == [[0, 3, 7]]
    assert now.x.flatten().tolist() == pytest.approx([2, 6, 3, 1, (0.1 * 4 + 0.05 * 8) / 0.15])
    assert now.mass.flatten().tolist() == pytest.approx([0.1, 0.15]) and now.places.live.all()
    scores = torch.tensor([[0.3, 0.1, 0.2, 0.9, 0.9]])  # fused tokens do not compete
    again = evit.drop(now, scores, 2, None, True)
    assert again.places.index.tolist() == [[1, 2]] and again.index[1].tolist() == [[5]]
    assert again.x.flatten().tolist() == pytest.approx([2, 3, (0.1 * 1 + 0.1 * 6) / 0.2, 0.8 / 0.15])
    assert again.mass.flatten().tolist() == pytest.approx([0.2, 0.15])
    without = evit.drop(evit.Survivors(x, places), scores[:, :6].new_tensor([[6, 5, 4, 3, 2, 1.0]]), 6, None, True)
    assert not without.places.live.any(), "a window that dropped nothing has no fused token"


@pytest.mark.parametrize("fuse", [True, False])
@torch.no_grad()
def test_dropped_cells_are_frozen_and_every_place_is_written_once(watched, fuse):
    encoder = small(EViTRule(fuse=fuse), keep_ratio=0.6)
    found = tokens_of(encoder, images(2))
    assert [now.places.index.shape[1] for now in watched["after"]] == [60, 36]
    for before, after in zip(watched["before"], watched["after"]):
        n = before.places.index.shape[1]
        where = torch.full((2, 100), -1).scatter(1, before.places.index, torch.arange(n).expand(2, -1))
        gone = after.index[-1]
        expected = gather(before.x, where.gather(1, gone))
        assert torch.equal(gather(found, gone), expected), largest(gather(found, gone), expected)
    assert torch.equal(watched["index"][0].sort(1).values, torch.arange(100).expand(2, -1))


@torch.no_grad()
def test_a_dropped_token_moves_no_survivor(monkeypatch):
    encoder, x, drop = small(EViTRule(fuse=False)), images(), evit.drop
    expected, kept = tokens_of(encoder, x), []

    def disturbed(now, *rest):  # what was dropped changes before the next layer
        now = drop(now, *rest)
        kept.append(now.places.index)
        return replace(now, dropped=[*now.dropped[:-1], now.dropped[-1] + 1])

    monkeypatch.setattr(evit, "drop", disturbed)
    found = tokens_of(encoder, x)
    assert torch.equal(gather(found, kept[-1]), gather(expected, kept[-1]))
    changed = (found - expected).abs().amax(-1) > 0
    assert changed.sum() == 100 - kept[-1].shape[1], "and every dropped one is put back as it is"


@pytest.mark.parametrize("fuse", [True, False])
@torch.no_grad()
def test_the_order_of_survivors_does_not_matter(monkeypatch, fuse):
    encoder, x, drop = small(EViTRule(fuse=fuse)), images(2), evit.drop
    expected = tokens_of(encoder, x)

    def shuffled(now, *rest):
        now = drop(now, *rest)
        n = now.places.index.shape[1]
        order = torch.rand(2, n, generator=torch.Generator().manual_seed(n)).argsort(1)
        mixed = torch.cat([gather(now.x[:, :n], order), now.x[:, n:]], dim=1)
        return replace(now, x=mixed, places=replace(now.places, index=now.places.index.gather(1, order)))

    monkeypatch.setattr(evit, "drop", shuffled)
    difference = gap(tokens_of(encoder, x), expected)
    assert difference < 1e-5, f"{difference:.1e} of the deviation"


@torch.no_grad()
def test_filled_cells_are_their_windows_fused_token(watched):
    encoder = small(EViTRule(fill=True))
    found = tokens_of(encoder, images())
    gone = torch.cat(watched["after"][-1].index, dim=1)[0]
    windows = window_of(gone, (10, 10), 7)
    assert len(set(windows.tolist())) > 1
    for window in set(windows.tolist()):
        cells = found[0, gone[windows == window]]
        assert largest(cells, cells[:1]) == 0, f"window {window}: {largest(cells, cells[:1])}"
    with pytest.raises(ValueError, match="goes with fuse=True"):
        EViTRule(fill=True, fuse=False)
