"""Which tokens are prime."""

from dataclasses import replace

import pytest
import torch

from blsam.modeling.routing import SCORERS, Group, first, keep_count, rank, route
from tests.helpers import TINY, images, tiny


def test_rank_and_choice_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (40, 49), generator=generator).float()  # ties everywhere
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(rank(scores), order.argsort(-1))
    for count in (1, 12, 49):
        assert torch.equal(first(rank(scores), count), order[:, :count])


def test_ties_by_hand():
    assert rank(torch.tensor([[1.0, 3.0, 1.0, 3.0]])).tolist() == [[2, 0, 3, 1]]
    assert first(rank(torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0]])), 2).tolist() == [[0, 1], [1, 2]]


def test_queries_by_hand():
    """A 2 x 3 grid, windows of 2: one whole, one of a column; two images, of the second only the first row is real."""
    scores = torch.tensor([[[1.0, 2, 9], [3, 4, 8]], [[5, 6, 7], [9, 9, 9]]])
    stage = route(scores, scores, 2, 0.5, [(32, 48), (16, 48)])
    assert stage.mask.int().tolist() == [[[0, 0, 1], [1, 1, 0]], [[0, 1, 1], [0, 0, 0]]]
    assert stage.counts.tolist() == [[2, 1], [1, 1]]
    # window by window, in each image by image: those with two queries, with one; then the column's
    assert stage.window.tokens.tolist() == [4, 3, 7, 2, 8]
    assert stage.window.groups == (
        Group(0, slice(0, 1), 1, 2),
        Group(0, slice(1, 2), 1, 1),
        Group(1, slice(0, 2), 2, 1),
    )
    assert (stage.window.y.tolist(), stage.window.x.tolist()) == ([1, 1, 0, 0, 0], [1, 0, 1, 0, 0])
    assert stage.image.tokens.tolist() == [4, 3, 2, 7, 8]
    assert stage.image.groups == (Group(0, slice(0, 1), 1, 3), Group(0, slice(1, 2), 1, 2))
    assert (stage.image.y.tolist(), stage.image.x.tolist()) == ([1, 1, 0, 0, 0], [1, 0, 2, 1, 2])


def test_rows_of_the_static_form_by_hand():
    scores = torch.tensor([[[1.0, 2, 9], [3, 4, 8]], [[5, 6, 7], [9, 9, 9]]])
    stage = route(scores, scores, 2, 0.5, torch.tensor([[32, 48], [16, 48]]))
    for queries in (stage.window, stage.image):
        total = len(queries.tokens)
        for token, row in enumerate(queries.rows.tolist()):
            prime = stage.mask.flatten()[token].item()
            assert (queries.tokens[row].item() == token and queries.live[row]) if prime else row == total + token
        assert queries.live.sum() == stage.mask.sum() == 5


def test_a_scorer_can_join(monkeypatch):
    def by_place(x, scores, image, number):
        return torch.arange(scores[0].numel(), dtype=torch.float32).view(1, *scores.shape[1:]).expand_as(scores)

    monkeypatch.setitem(SCORERS, "place", by_place)
    _, routing = tiny(replace(TINY, score="place")).encode(images(), keep_ratio=0.25)
    assert routing.stages[0].mask[0, :7, :7].flatten().nonzero()[:, 0].tolist() == list(range(37, 49))
    with pytest.raises(ValueError, match="score must be one of"):
        tiny(replace(TINY, score="fashion"))


def test_keep_count():
    assert [keep_count(n, 0.25) for n in (0, 1, 2, 6, 9)] == [0, 1, 1, 2, 2]


@torch.no_grad()
def test_padding_is_never_prime_and_counts_are_per_window():
    _, routing = tiny().encode(images(), true_sizes=[(100, 50)], keep_ratio=0.25)  # 7 x 4 tokens are real
    for stage in routing.stages:
        assert not stage.mask[0, 7:].any() and not stage.mask[0, :, 4:].any()
        assert stage.counts.tolist() == [[keep_count(28, 0.25), 0, 0, 0]]
        assert stage.mask.sum() == 7


@torch.no_grad()
def test_ties_go_to_the_lower_index():
    encoder = tiny()
    for predictor in encoder.predictors:
        predictor.linear.weight.zero_()
        predictor.linear.bias.zero_()
    _, routing = encoder.encode(images(), keep_ratio=0.25)
    mask = routing.stages[0].mask[0]
    assert mask[:7, :7].flatten().nonzero()[:, 0].tolist() == list(range(12))  # floor(49 / 4 + 0.5)
    assert mask[7:, 7:].flatten().nonzero()[:, 0].tolist() == [0, 1]  # 3 x 3
