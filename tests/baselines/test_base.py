"""The walk and its hooks, by methods made up here; class attention against the whole map."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from blsam.baselines.base import Baseline, BaselineOptions, gather, project, weighted_sum
from blsam.modeling.macs import classifier_macs
from tests.baselines.models import MINI, dense, full_attention, photos, timms
from tests.helpers import gap, randomize

STEPS = ("before_block", "attention", "between", "feed_forward", "after_block")


def made(method, **options):
    torch.manual_seed(0)
    return randomize(method(MINI, method.Options(**options)), std=0.25)


def test_without_a_method_it_is_the_dense_model():
    model, x = made(Baseline), photos()
    assert torch.equal(model(x), dense()(x))
    assert model.macs() == classifier_macs(MINI)


def test_steps_come_in_order():
    called = []

    class Recorder(Baseline):
        pass

    for step in ("begin", *STEPS, "finish"):

        def record(self, *args, step=step):
            called.append(step)
            return getattr(Baseline, step)(self, *args)

        setattr(Recorder, step, record)
    made(Recorder)(photos(1))
    assert called == ["begin", *STEPS * 12, "finish"]


def test_class_attention_is_the_first_row_of_the_map():
    model, x = made(Baseline), photos()
    twin, tokens = timms(model), model.stem(x)
    for i in (0, 7):
        row = project(model.block(i).attn, model.block(i).norm1(tokens)).class_attention()
        expected = full_attention(twin.blocks[i], tokens)[1][:, :, 0]
        assert row.shape == (2, 3, 65) and (row - expected).abs().max() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        projected = project(model.block(0).attn, model.block(0).norm1(tokens))
        assert projected.k.dtype == torch.bfloat16 and projected.class_attention().dtype == torch.float32
        assert (projected.class_attention().sum(-1) - 1).abs().max() < 1e-6  # not rounded


def test_tokens_are_gathered_and_summed_image_by_image():
    x = torch.arange(12.0).view(2, 3, 2)
    assert gather(x, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]
    assert weighted_sum(x, torch.tensor([[1.0, 0, 2], [0, 0.5, 0]])).tolist() == [[[8, 11]], [[4, 4.5]]]


@dataclass(frozen=True)
class DropOptions(BaselineOptions):
    """Every second patch goes before block 5, `real` or by a mask over keys."""

    real: bool = True


class Drop(Baseline):
    """As DynamicViT and A-ViT work: masked where shapes must stay, removed where time counts."""

    Options = DropOptions
    stay = torch.tensor([0, *range(1, 65, 2)])

    def before_block(self, i, tokens):
        if i == 5 and self.options.real:
            index = self.stay.expand(len(tokens.x), -1)
            return replace(tokens, x=gather(tokens.x, index), places=tokens.places.gather(1, index))
        return replace(tokens, carried=i >= 5 and not self.options.real)

    def attend(self, i, tokens, projected):
        if not tokens.carried:
            return super().attend(i, tokens, projected)
        mask = torch.zeros(65, dtype=torch.bool)
        mask[self.stay] = True
        return F.scaled_dot_product_attention(*projected, attn_mask=mask.expand(1, 1, 65, 65))

    def after_block(self, i, tokens):
        return replace(tokens, losses=tokens.losses | {f"of block {i}": tokens.x.square().mean()})

    def finish(self, tokens):
        return replace(super().finish(tokens), logits=self.head(self.norm(tokens.x[:, 1])))


def test_masked_is_removed():
    x = photos()
    real, masked = (made(Drop, real=real).classify(x) for real in (True, False))
    assert real.tokens.shape == (2, 33, MINI.dim) and masked.tokens.shape == (2, 65, MINI.dim)
    assert torch.equal(real.places[0], Drop.stay)
    assert gap(masked.tokens[:, Drop.stay], real.tokens) < 1e-5 and gap(masked.logits, real.logits) < 1e-5


def test_losses_and_the_last_step_arrive():
    found = made(Drop).classify(photos())
    assert list(found.losses) == [f"of block {i}" for i in range(12)] and found.losses["of block 0"] > 0
    assert gap(found.logits, found.heads[0][1]) > 1e-4  # the one that is read and the one that is trained


def test_stochastic_depth_is_of_whole_images():
    model, added = made(Baseline), torch.ones(64, 5, 3)
    model.drop_path_rate = 0.5
    assert torch.equal(model.drop_path(11, added), added)  # in evaluation
    model.train()
    assert torch.equal(model.drop_path(0, added), added)
    found = model.drop_path(11, added)
    assert all(one.unique().tolist() in ([0.0], [2.0]) for one in found)
    assert 16 < (found[:, 0, 0] > 0).sum() < 48
    assert torch.isfinite(model(photos())).all()
    model.drop_path_rate = 1.0
    assert not model.drop_path(11, added).any()


def test_a_wrong_patch_size_is_the_models_own_error():
    with pytest.raises(ValueError, match="multiples of 4"):
        Baseline(MINI, img_size=30)
