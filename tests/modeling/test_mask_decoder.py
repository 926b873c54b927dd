"""SAM's mask decoder on one photo, beside `segment_anything`'s."""

import subprocess
import sys
import warnings

import pytest
import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from blsam.modeling import mask_decoder
from blsam.modeling.mask_decoder import PhotoDecoder, decode_photo, is_sams


def random_decoder(dim=32, depth=2):
    """SAM's decoder, small, with weights that make every part matter."""
    torch.manual_seed(0)
    transformer = TwoWayTransformer(depth=depth, embedding_dim=dim, num_heads=4, mlp_dim=48)
    decoder = MaskDecoder(transformer_dim=dim, transformer=transformer).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return decoder


def photo(dim=32, height=6, width=6):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(1, dim, height, width), draw(1, dim, height, width), draw(1, dim, height, width), draw(5, 2, dim)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("three", [True, False])
@torch.no_grad()
def test_all_masks_equal_segment_anything_s(depth, three):
    decoder, (embedding, positions, dense, sparse) = random_decoder(depth=depth), photo()
    expected, scores = decoder(embedding, positions, sparse, dense.expand(5, -1, -1, -1), three)
    ours = PhotoDecoder(decoder, embedding, positions, dense)
    found = ours.prompted(sparse, three=three)
    masks = ours.all_masks(found)
    assert found.scores.shape == scores.shape
    for name, a, b in (("scores", found.scores, scores), ("masks", masks, expected)):
        gap = ((a - b).abs().max() / b.std()).item()
        assert gap < 1e-4, f"{name} differ by {gap:.1e} of their standard deviation"


class Convolutions(TorchDispatchMode):
    """How many were computed: SAM's decoder has two for the upscaling, the one taken apart none."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "convolution" in str(function)
        return function(*args, **kwargs or {})


def both(decoder, prompts, masks, own=True, three=True, of=(lambda x: x)):
    """What SAM's decoder gives for so many prompts and masks, what ours does, and whether ours was taken apart."""
    embedding, positions, dense, sparse = photo()
    generator = torch.Generator().manual_seed(2)
    sparse = torch.randn(prompts, 2, 32, generator=generator)
    dense = torch.randn(masks, 32, 6, 6, generator=generator) if own else dense.expand(masks, -1, -1, -1)
    given = [of(x) for x in (embedding, positions, sparse, dense)]
    with Convolutions() as convolutions:
        found = decode_photo(decoder, *given, three)
    return decoder(*given, three), found, convolutions.count == 0


def agree(found, expected, gap=1e-4):
    for name, a, b in zip(("masks", "scores"), found, expected):
        assert a.shape == b.shape, name
        assert torch.allclose(a, b, rtol=gap, atol=gap), f"{name} differ by {(a - b).abs().max()}"


@pytest.mark.parametrize("prompts", [1, 5])
@pytest.mark.parametrize("own", [True, False], ids=["masks", "no masks"])
@pytest.mark.parametrize("three", [True, False])
@torch.no_grad()
def test_prompts_with_and_without_masks_as_segment_anything_decodes_them(monkeypatch, prompts, own, three):
    monkeypatch.setattr(mask_decoder, "CELLS", 72)  # two prompts at a time
    expected, found, apart = both(random_decoder(), prompts, prompts, own, three)
    assert apart
    agree(found, expected)


@pytest.mark.parametrize(("prompts", "masks"), [(5, 1), (1, 5)])
@torch.no_grad()
def test_what_segment_anything_broadcasts_is_broadcast(monkeypatch, prompts, masks):
    monkeypatch.setattr(mask_decoder, "CELLS", 72)
    expected, found, apart = both(random_decoder(), prompts, masks)
    assert not apart and len(found[0]) == 5
    agree(found, expected)


@torch.no_grad()
def test_no_prompts_have_no_masks():
    embedding, positions, dense, sparse = photo()
    masks, scores = decode_photo(random_decoder(), embedding, positions, sparse[:0], dense.expand(0, -1, -1, -1))
    assert masks.shape == (0, 3, 24, 24) and scores.shape == (0, 3)


@torch.no_grad()
def test_graphs_are_made_of_segment_anything_s_decoder():
    """When it is traced, and where tensors have no values."""
    decoder, (embedding, positions, dense, sparse) = random_decoder().requires_grad_(False), photo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated; programs use it
        traced = torch.jit.trace(
            lambda s: decode_photo(decoder, embedding, positions, s, dense.expand(2, -1, -1, -1)), sparse[:2]
        )
    assert "convolution" in str(traced.graph)  # SAM's
    agree(traced(sparse[:2]), decoder(embedding, positions, sparse[:2], dense.expand(2, -1, -1, -1), True))
    _, found, apart = both(decoder.to("meta"), 5, 5, of=lambda x: x.to("meta"))
    assert not apart and found[0].shape == (5, 3, 24, 24)


@torch.no_grad()
def test_under_autocast_the_values_are_nearly_the_same():
    with torch.autocast("cpu", torch.bfloat16):
        expected, found, apart = both(random_decoder(), 5, 5)
    assert apart
    for a, b in zip(found, expected):
        assert torch.nn.functional.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0) > 0.99


@pytest.mark.parametrize("wraps", [False, True])
def test_a_method_that_was_replaced_before_us_is_noticed(wraps):
    """In a process of its own, in which a program comes first."""
    code = f"""
import functools
from segment_anything.modeling.transformer import Attention
original = Attention.forward
def mine(self, q, k, v):
    return original(self, q, k, v)
Attention.forward = functools.wraps(original)(mine) if {wraps} else mine
from blsam.modeling.mask_decoder import is_sams
from tests.modeling.test_mask_decoder import random_decoder
assert not is_sams(random_decoder())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@torch.no_grad()
def test_a_decoder_that_somebody_hooked_is_called_as_segment_anything_calls_it():
    decoder, (embedding, positions, dense, sparse), seen = random_decoder(), photo(), []
    decoder.register_forward_hook(lambda _, args, kwargs, __: seen.append((args, set(kwargs))), with_kwargs=True)
    expected = decoder(embedding, positions, sparse, dense.expand(5, -1, -1, -1), True)
    found = decode_photo(decoder, embedding, positions, sparse, dense.expand(5, -1, -1, -1))
    names = {"image_embeddings", "image_pe", "sparse_prompt_embeddings", "dense_prompt_embeddings", "multimask_output"}
    assert seen[1:] == [((), names)] and all(map(torch.equal, found, expected))


@torch.no_grad()
def test_some_masks_are_those_of_all():
    decoder, (embedding, positions, dense, sparse) = random_decoder(), photo(height=4, width=6)
    ours = PhotoDecoder(decoder, embedding, positions, dense)
    expected, _ = decoder(embedding, positions, sparse, dense.expand(5, -1, -1, -1), True)
    found = ours.prompted(sparse)
    prompts, candidates = torch.tensor([0, 2, 2, 4]), torch.tensor([1, 0, 2, 2])
    assert torch.allclose(ours.masks(found, prompts, candidates), expected[prompts, candidates], rtol=1e-4, atol=1e-3)
    none = torch.zeros(0, dtype=torch.int64)
    assert ours.masks(found, none, none).shape == (0, 16, 24)


def hook(decoder):
    decoder.transformer.layers[0].mlp.register_forward_hook(lambda *_: None)


def wrap(decoder):
    decoder.transformer.final_attn_token_to_image.q_proj = nn.Sequential(nn.Linear(32, 16))


def subclass(decoder):
    decoder.__class__ = type("Another", (MaskDecoder,), {})


def replace_a_method(decoder):
    decoder.predict_masks = lambda *args: None


def replace_a_part(decoder):
    decoder.iou_prediction_head = nn.Sequential(nn.Linear(32, 4))


def widen_a_kernel(decoder):
    decoder.output_upscaling[0] = nn.ConvTranspose2d(32, 8, kernel_size=4, stride=2, padding=1)


def compile_a_part(decoder):
    decoder.transformer.compile()


CHANGES = (hook, wrap, subclass, replace_a_method, replace_a_part, widen_a_kernel, compile_a_part)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_decoder_that_somebody_changed_is_not_taken_apart(change):
    decoder = random_decoder()
    assert is_sams(decoder)
    change(decoder)
    assert not is_sams(decoder)


def test_a_method_replaced_in_the_class_is_noticed(monkeypatch):
    monkeypatch.setattr(TwoWayTransformer, "forward", lambda *args: None)
    assert not is_sams(random_decoder())
