"""What holds for every baseline, generated from the registry; the builder and its errors."""

import pytest
import timm
import torch

from blsam.baselines import BASELINES, build_baseline
from blsam.checkpoint import save
from blsam.config import CLASSIFIERS
from blsam.evaluation.imagenet import counted_macs
from blsam.modeling.macs import classifier_macs
from tests.baselines.models import (
    ADDED,
    BY_IMAGE,
    FIXED,
    MINI,
    NOTHING_REMOVED,
    VARIANTS,
    build,
    counted,
    dense,
    photos,
    plain_state,
    sizes,
)
from tests.helpers import gap

TINY = CLASSIFIERS["vit_tiny_patch16_224"]


def test_the_tables_of_these_tests_are_complete():
    assert set(NOTHING_REMOVED) == set(BASELINES) == {name for name, _ in VARIANTS}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BASELINES)
def test_with_nothing_removed_it_is_the_dense_model_bit_for_bit(name, training):
    model, plain = build(name, **NOTHING_REMOVED[name]).train(training), dense().train(training)
    plain.load_state_dict(plain_state(model))
    x = photos()
    found = model.classify(x)
    assert torch.equal(found.tokens, plain.encode(x)[0])
    assert torch.equal(found.places, torch.arange(65).expand(2, -1))
    assert torch.equal(model.encode(x)[0], found.tokens) and not model.encode(x)[1].stages
    if not hasattr(model, "head_cls"):  # which does not read the class token
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("name, options", VARIANTS, ids=str)
def test_it_differs_from_the_dense_model_and_answers_alike_in_every_way(name, options):
    model, x = build(name, **options), photos()
    found = model.classify(x)
    assert torch.equal(found.logits, model(x)) and torch.isfinite(found.logits).all()
    assert gap(found.logits, dense()(x)) > 1e-3
    assert torch.equal(model.forward_head(model.forward_features(x)), found.logits)
    assert found.places.dtype == torch.int64 and found.places.shape == found.tokens.shape[:2]
    for places in found.places.tolist():  # the class token first, none twice
        real = [place for place in places if place >= 0]
        assert places[0] == 0 and len(set(real)) == len(real) and max(real) <= 64


@pytest.mark.parametrize(
    "name, options, training",
    [(*one, True) for one in VARIANTS] + [(*one, False) for one in FIXED],  # an image may have whole blocks left out
    ids=str,
)
def test_every_parameter_gets_a_gradient(name, options, training):
    model = build(name, **options).train(training)
    found = model.classify(photos(6))
    loss = sum(weight * logits.square().mean() for weight, logits in found.heads) + sum(found.losses.values())
    loss.backward()
    unused = ADDED if not training else ()
    for key, parameter in model.named_parameters():
        if not key.startswith(unused):
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize("name, options", VARIANTS, ids=str)
def test_one_image_never_changes_another(name, options):
    model, x = build(name, **options), photos(3)
    other = torch.cat([x[:1], 5 * x[1:].flip(-1)])
    both, changed = model.classify(x), model.classify(other)
    if model.by_image:  # what fills up an image may be more or less, which sums are rounded by
        assert gap(both.logits[:1], changed.logits[:1]) < 1e-4
        left = [found.places[0][found.places[0] >= 0].tolist() for found in (both, changed)]
        assert left[0] == left[1]
    else:
        assert torch.equal(both.logits[0], changed.logits[0]) and torch.equal(both.places[0], changed.places[0])
    assert gap(model(x[:1]), both.logits[:1]) < 1e-4


@pytest.mark.parametrize("name, options", FIXED, ids=str)
def test_what_is_removed_is_not_computed(name, options):
    with torch.device("meta"):
        model, whole = build_baseline(name, MINI, **options), build_baseline(name, MINI, **NOTHING_REMOVED[name])
    assert model.macs() == counted(model, 32) < counted(whole, 32) == whole.macs()
    model = build(name, **options)
    assert sizes(model, photos()) == [(layer.attention, layer.feed_forward) for layer in model.layer_tokens()]


@pytest.mark.parametrize("name, options", BY_IMAGE, ids=str)
def test_what_is_removed_of_an_image_is_not_computed(name, options):
    """The model's own count, of a batch, is torch's of single images, and images differ."""
    model, whole, x = build(name, **options), build(name, **NOTHING_REMOVED[name]), photos(3)
    each = [counted_macs(model, one[None]) for one in x]
    assert model.classify(x).macs.tolist() == each and len(set(each)) > 1
    assert model.macs(x) == sum(each) / 3 < whole.macs(x) == classifier_macs(MINI)
    with pytest.raises(ValueError, match="depends on the image: give images"):
        model.macs()


@pytest.mark.parametrize("name, options", VARIANTS, ids=str)
def test_half_precision(name, options):
    model, x = build(name, **options), photos()
    exact = model.classify(x)
    with torch.autocast("cpu", torch.bfloat16):
        loose = model.classify(x)
    low = model.use_dtype(torch.bfloat16).classify(x)
    assert low.logits.dtype == torch.float32
    for found in (loose, low):
        assert model.by_image or found.tokens.shape == exact.tokens.shape
        least = 0.9 if model.by_image else 0.97  # a decision at its threshold may turn
        assert torch.nn.functional.cosine_similarity(found.logits.float(), exact.logits).min() > least


@pytest.fixture(scope="module")
def deit(tmp_path_factory):
    """timm's DeiT-T for 64 pixels, and its file."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=64).eval()
    path = tmp_path_factory.mktemp("weights") / "deit.safetensors"
    save(path, model.state_dict(), {})
    return model, path


@pytest.mark.parametrize("name", BASELINES)
@torch.no_grad()
def test_deit_loads(name, deit, tmp_path):
    theirs, path = deit
    x = torch.randn(1, 3, 64, 64)
    model = build_baseline(name, TINY, path, image_size=64, **NOTHING_REMOVED[name])
    assert gap(model.encode(x)[0], theirs.forward_features(x)) < 1e-4
    model.load_state_dict(theirs.state_dict(), strict=True)
    fresh = build_baseline(name, TINY, path, num_classes=7, image_size=64)
    assert fresh(x).shape == (1, 7) and torch.equal(fresh.norm.weight, theirs.norm.weight)

    path = tmp_path / "own.safetensors"
    save(path, fresh.state_dict(), {})
    again = build_baseline(name, TINY, path)
    assert again.img_size == (64, 64) and torch.equal(again(x), fresh(x))
    assert build_baseline(name, TINY, path, num_classes=5)(x).shape == (1, 5)


@pytest.mark.parametrize("name", BASELINES)
def test_what_does_not_fit_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match="routed, take its dense model"):
        build_baseline(name, CLASSIFIERS["blvit_mini_patch4_32"])
    with pytest.raises(ValueError, match="has no option 'keep'; it has keep_ratio"):
        build_baseline(name, MINI, keep=0.5)
    for ratio in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="keep_ratio must be above 0"):
            build_baseline(name, MINI, keep_ratio=ratio)
    model = build_baseline(name, MINI)
    with pytest.raises(ValueError, match="by its options"):
        model(photos(), keep_ratio=0.5)
    with pytest.raises(ValueError, match="x must be"):
        model(torch.zeros(1, 3, 16, 16))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="baselines are evit, evo_vit, .*tome; there is no 'dyvit'"):
        build_baseline("dyvit", MINI)
