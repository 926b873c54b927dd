"""The encoder against segment_anything's, and the facts that make routing safe."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from blsam.config import CONFIGS
from blsam.modeling.blocks import Block
from blsam.modeling.image_encoder import ImageEncoder
from blsam.modeling.routing import Routing, Stage
from scripts.benchmarks.benchmark_row import reference_encoder
from tests.helpers import TINY, TINY_EXACT, TINY_SIZE, gap, images, randomize, tiny

SIZES = [(120, 160), (160, 100)]


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (TINY_EXACT, TINY_SIZE),
        (CONFIGS["vit_t"], 208),
        (CONFIGS["vit_b"], 320),
        (replace(CONFIGS["vit_l"], depth=4, global_layers=(1, 3)), 320),
        (replace(CONFIGS["vit_h"], depth=4, global_layers=(1, 3)), 320),
    ],
    ids=lambda value: getattr(value, "name", value),
)
@torch.no_grad()
def test_exact_equals_segment_anything(config, size):
    reference = randomize(reference_encoder(config, size), 0.02)
    ours = ImageEncoder(config, size).eval()
    ours.load_state_dict(reference.state_dict())
    x = images(2 if config.dim <= 192 else 1, size)
    difference = gap(ours(x, true_sizes=[(size // 2, size)] * len(x)), reference(x))
    assert difference <= 1e-4, f"{difference:.1e} of the standard deviation"


@torch.no_grad()
def test_keep_1_is_the_exact_model_of_the_same_checkpoint():
    exact = randomize(ImageEncoder(TINY_EXACT, TINY_SIZE))
    routed = ImageEncoder(TINY, TINY_SIZE).eval()
    routed.load_state_dict(exact.state_dict(), strict=False)
    x = images()
    for sizes in (None, [(120, 160)]):
        difference = gap(routed(x, true_sizes=sizes, keep_ratio=1.0), exact(x))
        assert difference <= 1e-4, f"{difference:.1e} with true_sizes {sizes}"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), [("vit_b", 2), ("vit_l", 1), ("vit_h", 1)])
@torch.no_grad()
def test_exact_equals_segment_anything_at_1024(name, batch):
    reference = randomize(reference_encoder(CONFIGS[name], 1024), 0.02)
    ours, routed = (ImageEncoder(CONFIGS[n]).eval() for n in (name, f"blsam_{name}"))
    ours.load_state_dict(reference.state_dict())
    routed.load_state_dict(reference.state_dict(), strict=False)
    x = torch.randn(batch, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    expected = reference(x)
    del reference
    for what, embedding in (("exact", ours(x)), ("keep 1", routed(x, true_sizes=[(768, 1024)] * batch, keep_ratio=1))):
        difference = gap(embedding, expected)
        print(f"{name} {what}: {difference:.1e} of the standard deviation")
        assert difference <= 1e-4, f"{what}: {difference:.1e}"
    _, routing = routed.encode(x, true_sizes=[(768, 1024)] * batch)
    for stage in routing.stages:
        assert not stage.mask[:, 48:].any() and stage.mask.sum() == batch * 768  # a quarter of 48 x 64


@torch.no_grad()
def test_supplied_routing():
    encoder, x = tiny(), images(2)
    embedding, routing = encoder.encode(x, keep_ratio=0.25)
    again = encoder.encode(x, routing=routing)[0]
    assert gap(again, embedding) <= 1e-4
    ones = Routing(tuple(Stage.from_mask(torch.ones_like(s.mask), 7) for s in routing.stages))
    assert gap(encoder.encode(x, routing=ones)[0], encoder(x, keep_ratio=1.0)) <= 1e-4
    none = Routing(tuple(Stage.from_mask(torch.zeros_like(s.mask), 7) for s in routing.stages))
    assert torch.isfinite(encoder.encode(x, routing=none)[0]).all()
    wrong = Routing((replace(routing.stages[0], counts=routing.stages[0].counts + 1), routing.stages[1]))
    with pytest.raises(ValueError, match=r"routing.stages\[0\].counts"):
        encoder.encode(x, routing=wrong)


@pytest.mark.parametrize("change", [{}, {"semi_cross": False}, {"fuse": "block"}, {"e_block": False}], ids=str)
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
@torch.no_grad()
def test_static_form_equals_eager(change, keep):
    encoder, x = tiny(replace(TINY, **change)), images(2)
    eager, by_hand = encoder.encode(x, true_sizes=SIZES, keep_ratio=keep)
    static, by_table = encoder.encode(x, true_sizes=torch.tensor(SIZES), keep_ratio=keep)
    for a, b in zip(by_hand.stages, by_table.stages):
        assert torch.equal(a.mask, b.mask) and torch.equal(a.counts, b.counts)
    assert gap(static, eager) <= 1e-4, gap(static, eager)


@torch.no_grad()
def test_a_batch_equals_one_by_one():
    encoder, x = tiny(), images(2)
    both = encoder(x, true_sizes=SIZES)
    for i in range(2):
        alone = encoder(x[i : i + 1], true_sizes=SIZES[i : i + 1])
        assert gap(both[i : i + 1], alone) <= 1e-4
    other = torch.stack([x[0], -x[1]])
    assert gap(encoder(other, true_sizes=SIZES)[:1], both[:1]) <= 1e-6


@pytest.mark.parametrize("score", ["norm", "random"])
@torch.no_grad()
def test_scores_of_ablations_do_not_depend_on_the_batch(score):
    encoder, x = randomize(ImageEncoder(replace(TINY, score=score), TINY_SIZE)), images(2)
    both = encoder.encode(x)[1].stages
    for i in range(2):
        for stage, alone in zip(both, encoder.encode(x[i : i + 1])[1].stages):
            assert torch.equal(stage.mask[i], alone.mask[0]), f"{score}: image {i} is routed otherwise in a batch"


@pytest.mark.parametrize(
    "change",
    [{}, {"semi_cross": False}, {"fuse": "block"}, {"e_block": False}, {"score": "norm"}, {"score": "random"}]
    + [{"grow": 2}],
    ids=str,
)
def test_every_parameter_has_a_finite_gradient(change):
    encoder = tiny(replace(TINY, **change))
    encoder(images(2), true_sizes=SIZES).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    for predictor in encoder.predictors:
        assert predictor.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("config", [TINY_EXACT, TINY], ids=lambda config: config.name)
@torch.no_grad()
def test_a_finer_embedding_starts_as_that_of_the_tokens(config):
    plain, fine = tiny(config), ImageEncoder(replace(config, grow=2), TINY_SIZE).eval()
    fine.load_state_dict(plain.state_dict())  # what `grow` adds stays as it is
    one, two = plain(images()), fine(images())
    difference = gap(two, one.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert two.shape == (1, 256, 20, 20) and difference < 1e-5, difference
    half = copy.deepcopy(fine).use_dtype(torch.bfloat16)
    assert half.neck.grow.weight.dtype == torch.bfloat16 and half(images()).dtype == torch.float32


@torch.no_grad()
def test_copies_and_bfloat16():
    encoder, x = tiny(), images()
    whole = encoder(x)
    buffer = io.BytesIO()
    torch.save(encoder, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(encoder), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), whole)
    _, routing = encoder.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder.encode(x, routing=routing)[0]
    cosine = torch.cosine_similarity(half, whole, dim=1).mean().item()
    assert half.dtype == torch.float32 and cosine > 0.999, cosine


def test_compiled_static_form_equals_eager():
    encoder, x = tiny(), images(2)
    compiled = torch.compile(encoder.encode, fullgraph=True)
    with torch.no_grad():
        for keep in (0.25, 0.5):
            a, b = (
                compiled(x, true_sizes=torch.tensor(SIZES), keep_ratio=keep),
                encoder.encode(x, true_sizes=SIZES, keep_ratio=keep),
            )
            assert all(torch.equal(s.mask, t.mask) for s, t in zip(a[1].stages, b[1].stages))
            assert gap(a[0], b[0]) <= 1e-4, gap(a[0], b[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"x": torch.zeros(1, 3, 64, 64)}, "x must be"),
        ({"true_sizes": [(1, 1), (2, 2)]}, "one \\(h, w\\) an image"),
        ({"true_sizes": [(0, 160)]}, "within 1"),
        ({"keep_ratio": 0.0}, "keep ratio"),
        ({"routing": Routing()}, "2 stages"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    x = call.pop("x", images())
    with pytest.raises(ValueError, match=message):
        tiny().encode(x, **call)


def test_the_keep_ratio_is_checked_when_it_is_set():
    encoder = tiny()
    for wrong in (-3, 0, float("nan")):
        with pytest.raises(ValueError, match="keep ratio"):
            encoder.keep_ratio = wrong
    encoder.keep_ratio = 0.5
    assert encoder.encode(images())[1].stages[0].counts[0, 0] == 25  # of 49


@torch.no_grad()
def test_stem_stages_and_neck_are_the_encoder():
    encoder, x = tiny(), images(2)
    embedding, routing = encoder.encode(x, true_sizes=SIZES)
    tokens = encoder.run_stage(encoder.stem(x), None)
    for number, stage in enumerate(routing.stages):
        tokens = encoder.run_stage(tokens, number, stage)
    assert torch.equal(encoder.neck(tokens.permute(0, 3, 1, 2)), embedding)


@torch.no_grad()
def test_stages_without_a_routing_are_the_dense_model():
    encoder, x = tiny(), images(2)
    exact = ImageEncoder(TINY.dense, TINY_SIZE).eval()
    exact.load_state_dict({k: v for k, v in encoder.state_dict().items() if k in exact.state_dict()})
    tokens = encoder.stem(x)
    for number in (None, 0, 1):
        tokens = encoder.run_stage(tokens, number)
    assert torch.equal(encoder.neck(tokens.permute(0, 3, 1, 2)), exact(x))


@pytest.mark.parametrize("config", [TINY_EXACT, TINY], ids=lambda config: config.name)
@torch.no_grad()
def test_every_block_is_called_as_a_module(config):
    """So that hooks, activation checkpointing and sharding see it."""
    encoder, called = tiny(config), []
    for i, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *_, i=i: called.append(i))
    encoder(images())
    assert called == [0, 1, 2, 3]


def test_activation_checkpointing_reaches_every_block():
    encoder, x = tiny(TINY_EXACT), images()
    apply_activation_checkpointing(encoder, check_fn=lambda module: isinstance(module, Block))
    runs = []
    for block in encoder.blocks:
        block.norm1.register_forward_hook(lambda *_: runs.append(1))
    encoder(x).square().mean().backward()
    assert len(runs) == 8, "four layers, each of them a second time for the gradient"
