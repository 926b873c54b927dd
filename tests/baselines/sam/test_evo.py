"""Evo-ViT in SAM: slow tokens, placeholders, the running score."""

import pytest
import torch

from blsam.baselines.base import gather
from blsam.baselines.sam import evo
from blsam.baselines.sam.attention import window_of
from blsam.config import EvoViTRule
from tests.baselines.sam.models import largest, small
from tests.helpers import gap, images


def stages_of(encoder, x):
    """Every stage: tokens before it and after, g, which were slow and which fast, and what the slow ones received."""
    seen, run = [], encoder.two_paths

    def watching(layers, x, g, slow, fast, whole):
        after, scores = run(layers, x, g, slow, fast, whole)
        seen.append((x, after, g, slow, fast, scores, layers))
        return after, scores

    encoder.two_paths = watching
    encoder(x)
    return seen


@torch.no_grad()
def test_placeholders_of_a_window_share_what_is_added():
    seen = stages_of(small(EvoViTRule()), images(2))
    assert [list(one[-1]) for one in seen] == [[2, 3], [4, 5]], "a stage ends with the next global layer"
    for before, after, _, slow, fast, _, _ in seen:
        assert slow.shape == (2, 50) and fast.shape == (2, 50)
        added, windows = gather(after - before, fast), window_of(fast, (10, 10), 7)
        assert added.abs().amax() > 1e-3, "they are moved at all"
        for b in range(2):
            for window in set(windows[b].tolist()):
                mine = added[b, windows[b] == window]
                assert largest(mine, mine[:1]) < 1e-5, f"window {window}: {largest(mine, mine[:1]):.1e}"
            of_windows = torch.stack([added[b, windows[b] == w][0] for w in set(windows[b].tolist())])
            assert largest(of_windows, of_windows[:1]) > 1e-3, "and windows differently"


@torch.no_grad()
def test_without_representatives_placeholders_wait():
    for before, after, _, slow, fast, _, _ in stages_of(small(EvoViTRule(rep=False)), images(2)):
        assert torch.equal(gather(after, fast), gather(before, fast))
        assert not torch.equal(gather(after, slow), gather(before, slow))


@torch.no_grad()
def test_the_highest_scores_are_slow_and_only_theirs_move_on():
    first, second = stages_of(small(EvoViTRule()), images(2))
    for _, _, g, slow, fast, _, _ in (first, second):
        assert (g.gather(1, slow).amin(1) >= g.gather(1, fast).amax(1)).all()
    g, slow, fast, scores = first[2:6]
    assert torch.equal(second[2].gather(1, fast), g.gather(1, fast)), "placeholders keep theirs"
    halfway = (g.gather(1, slow) + scores[:, :50]) / 2
    assert largest(second[2].gather(1, slow), halfway) < 1e-7
    assert largest(g.sum(1), torch.ones(2)) < 1e-5, "attention received, a mean over those that ask"


@torch.no_grad()
def test_the_order_of_the_slow_tokens_does_not_matter(monkeypatch):
    encoder, x, split = small(EvoViTRule()), images(2), evo.split
    expected = encoder(x)

    def shuffled(g, count):
        slow, fast = split(g, count)
        return slow.flip(1), fast.roll(7, 1)

    monkeypatch.setattr(evo, "split", shuffled)
    difference = gap(encoder(x), expected)
    assert difference < 1e-5, f"{difference:.1e} of the deviation"


@pytest.mark.parametrize("keep", [0.01, 0.29, 0.99])
@torch.no_grad()
def test_any_share(keep):
    embedding, routing = small(EvoViTRule()).encode(images(), keep_ratio=keep)
    assert torch.isfinite(embedding).all()
    assert [int(stage.mask.sum()) for stage in routing.stages] == [round(100 * keep)] * 2
