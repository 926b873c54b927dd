"""Which tokens are prime."""

import torch

from blsam.modeling.routing import keep_count
from tests.helpers import images, tiny


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
