"""The classifier against timm's ViT, and its routing against itself, one image and one token at a time."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from blsam.config import CLASSIFIERS, ClassifierConfig
from blsam.modeling.classifier import BLVisionTransformer, TokenAttention, resample_positions
from blsam.modeling.routing import Group, Queries, Routing, Stage, keep_count
from tests.helpers import randomize

timm = pytest.importorskip("timm")

SMALL = ClassifierConfig(
    name="small",
    dim=32,
    depth=4,
    heads=4,
    e_dim=8,
    e_heads=2,
    e_layers=(1, 2),  # the class token alone reads the last layer, and is prime there
    predictor_layers=(0, 1),  # for the same reason a predictor of the last layer alone would learn nothing
    patch=4,
    image_size=24,
    classes=5,
)
PLAIN = SMALL.dense
N = 36


def small(config=SMALL, **options):
    torch.manual_seed(0)
    return randomize(BLVisionTransformer(config, **options)).eval()


def images(n=3, side=24):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def timms(config, img_size=None, classes=None):
    torch.manual_seed(1)
    return timm.models.VisionTransformer(
        img_size=img_size or config.image_size,
        patch_size=config.patch,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        num_classes=classes or config.classes,
    ).eval()


@pytest.mark.parametrize("name", [n for n, c in CLASSIFIERS.items() if c.dim <= 192])
def test_with_a_plain_vits_weights_every_model_is_that_vit_at_keep_one(name):
    config = CLASSIFIERS[name]
    theirs = timms(config)
    model = BLVisionTransformer(config).eval()
    model.load_state_dict(theirs.state_dict())  # strictly
    x = images(2, config.image_size)
    with torch.no_grad():
        assert (model(x, keep_ratio=1.0) - theirs(x)).abs().max() == 0
        assert (model.encode(x, keep_ratio=1.0)[0] - theirs.forward_features(x)).abs().max() == 0


@pytest.mark.parametrize("config", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_the_plain_models_have_timms_parameters(config):
    with torch.device("meta"):
        theirs, ours = timms(config), BLVisionTransformer(config.dense)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_fresh_weights_are_drawn_as_timms():
    torch.manual_seed(0)
    ours, theirs = BLVisionTransformer(CLASSIFIERS["vit_tiny_patch16_224"]), timms(CLASSIFIERS["vit_tiny_patch16_224"])
    for key, value in theirs.state_dict().items():
        assert abs(ours.state_dict()[key].std().nan_to_num() - value.std().nan_to_num()) < 0.003, key


def test_the_class_token_is_always_prime_and_nobody_counts_it():
    model, x = small(), images()
    _, routing = model.encode(x)
    for stage in routing.stages:
        assert stage.mask[:, 0].all() and (stage.scores[:, 0] == 1).all()
        assert stage.counts.tolist() == [[keep_count(N, 0.25)]] * 3 == [[9]] * 3
        assert stage.mask.sum(1).tolist() == [10] * 3
        order = stage.scores[:, 1:].sort(descending=True, stable=True).indices[:, :9]
        assert torch.equal(order.sort().values, stage.mask[:, 1:].nonzero()[:, 1].view(3, 9))


def test_a_routing_is_a_value():
    """Supplied again it changes nothing; images may have different counts, and none prime but the class token."""
    model, x = small(), images()
    tokens, routing = model.encode(x)
    again, _ = model.encode(x, routing=routing)
    assert torch.equal(again, tokens)
    masks = [stage.mask.clone() for stage in routing.stages]
    masks[0][0, 1:] = False
    masks[1][2] = True
    uneven = Routing(tuple(Stage(mask, None, mask.sum(1, keepdim=True) - 1) for mask in masks))
    together, found = model.encode(x, routing=uneven)
    assert [stage.counts.flatten().tolist() for stage in found.stages] == [[0, 9, 9], [9, 9, N]]
    for i in range(3):
        alone, _ = model.encode(x[i : i + 1], routing=uneven.of_image(i))
        assert (together[i] - alone[0]).abs().max() < 1e-5


def test_a_routing_of_all_is_keep_one():
    model, x = small(), images()
    mask = torch.ones(3, N + 1, dtype=torch.bool)
    everything = Routing((Stage(mask, None, mask.sum(1, keepdim=True) - 1),) * 2)
    assert (model.encode(x, routing=everything)[0] - model.encode(x, keep_ratio=1.0)[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda mask: mask[:, :-1], r"stages\[0\].mask must be bool \[3, 37\], is torch.bool \[3, 36\]"),
        (lambda mask: mask.float(), "must be bool"),
        (lambda mask: mask & (torch.arange(N + 1) > 0), r"must be True at the class token"),
    ],
)
def test_a_routing_that_does_not_fit_is_named(change, words):
    model, x = small(), images()
    stages = model.encode(x)[1].stages
    wrong = Stage(change(stages[0].mask), None, stages[0].counts)
    with pytest.raises(ValueError, match=words):
        model.encode(x, routing=Routing((wrong, stages[1])))


def test_images_of_a_batch_do_not_know_of_each_other():
    model, x = small(), images()
    other = x.clone()
    other[1] = torch.randn_like(other[1])
    with torch.no_grad():
        assert torch.equal(model(x)[[0, 2]], model(other)[[0, 2]])


@pytest.mark.parametrize("semi_cross", [True, False])
def test_attention_by_hand(semi_cross):
    """Two of five tokens ask; all answer, or those two alone."""
    torch.manual_seed(0)
    attention = TokenAttention(8, 8, 2, semi_cross)
    x, asking = torch.randn(1, 5, 8), torch.tensor([1, 3])
    found = attention(x, Queries(asking, (Group(0, slice(0, 1), 1, 2),), asking[:0], asking[:0]))
    q, k, v = attention.qkv(x[0]).view(5, 3, 2, 4).permute(1, 2, 0, 3)  # [3, heads, 5, d]
    answering = slice(None) if semi_cross else asking
    weights = (q[:, asking] @ k[:, answering].mT / 2).softmax(-1)
    by_hand = attention.proj((weights @ v[:, answering]).transpose(0, 1).flatten(1))
    assert (found - by_hand).abs().max() < 1e-6
    if semi_cross:
        assert (found - attention(x)[0, asking]).abs().max() < 1e-6


@pytest.mark.parametrize(
    "change", [{}, {"fuse": "block"}, {"semi_cross": False}, {"e_block": False}, {"score": "norm"}, {"gamma": False}]
)
def test_every_parameter_learns(change):
    model = small(replace(SMALL, **change)).train()
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2])).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    without = [name for name, g in grads.items() if g is None or not g.isfinite().all() or not g.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("routed", [False, True])
def test_a_wrapped_projection_is_called(routed):
    """As LoRA wraps it: the split weights are for the plain layer."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model, x = small(), images()
    keep = 0.25 if routed else 1.0
    before = model(x, keep_ratio=keep)
    model.blocks[1].attn.qkv = Wrapped(model.blocks[1].attn.qkv)
    after = model(x, keep_ratio=keep)
    with torch.no_grad():
        for p in model.blocks[1].attn.qkv.inner.parameters():
            p *= 2
    model.blocks[1].attn.qkv = model.blocks[1].attn.qkv.inner
    assert (after - before).abs().max() > 1e-4
    assert (after - model(x, keep_ratio=keep)).abs().max() < 1e-5


def test_whole_layers_are_dropped_in_training_alone():
    model, x = small(drop_path_rate=0.5), images(64)
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        tokens = model.stem(x)
        after = model.run_layer(0, tokens, None)
        assert (after == BLVisionTransformer.__mro__[1].run_layer(model, 0, tokens, None)).all()  # the first: rate 0
        stage = model.choose(model.scores(0, tokens), model.scores(0, tokens), 0.25)
        out = model.run_layer(3, tokens, stage)
        kept = (out != tokens).flatten(1).any(1)
        assert 16 < kept.sum() < 48  # half of 64
        model.eval()
        whole = model.run_layer(3, tokens, stage)
        assert (out[kept] - tokens[kept] - 2 * (whole - tokens)[kept]).abs().max() < 1e-5


@pytest.mark.parametrize("grid", [(6, 6), (8, 8), (4, 5)])
def test_positions_are_resampled_as_timm_does(grid):
    positions = torch.randn(1, N + 1, 32, generator=torch.Generator().manual_seed(0))
    theirs = timm.layers.resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=1)
    assert (resample_positions(positions, grid) - theirs).abs().max() < 1e-6


def test_positions_of_an_oblong_grid_come_back():
    """Those of 4 x 9 patches are as many as a square's; they are taken for the model's own."""
    model, again = small(img_size=(16, 36)), small(img_size=(16, 36))
    state = {key: value + 1 for key, value in model.state_dict().items()}
    again.load_state_dict(state)
    assert torch.equal(again.pos_embed, model.pos_embed + 1)


def test_weights_load_at_another_image_size():
    theirs, model = timms(PLAIN), BLVisionTransformer(SMALL, img_size=(32, 40)).eval()
    model.load_state_dict(theirs.state_dict())
    assert model(torch.randn(1, 3, 32, 40)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"x must be \[B, 3, 32, 40\], is \[1, 3, 24, 24\]"):
        model(images(1))


def test_in_bfloat16_scores_and_answer_stay_float32():
    model, x = small().use_dtype(torch.bfloat16), images()
    logits, (_, routing) = model(x), model.encode(x)
    assert logits.dtype == torch.float32 == routing.stages[0].scores.dtype
    assert model.blocks[1].attn.qkv.weight.dtype == torch.bfloat16
    assert (logits - small()(x)).abs().max() < 0.1 * logits.std()


@pytest.mark.parametrize(
    "options, words",
    [({"img_size": 30}, "multiples of 4"), ({"keep_ratio": 0}, "above 0"), ({"global_pool": "avg"}, "must be token")],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        BLVisionTransformer(SMALL, **options)


def test_compiled_and_exported_it_says_the_same():
    model, x = small(), images(2)
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    assert (exported(x) - expected).abs().max() < 1e-5
    traced = torch.jit.trace(model, (x,))
    assert (traced(x) - expected).abs().max() < 1e-5


def test_heads_come_and_go():
    model = small()
    model.reset_classifier(7)
    assert model(images()).shape == (3, 7) and model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert torch.equal(model(images()), model.encode(images())[0][:, 0])
