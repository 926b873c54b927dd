"""SAM's mask decoder on one photo, beside `segment_anything`'s."""

import pytest
import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from torch import nn

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
    found = ours.prompted(sparse, three)
    count = scores.shape[1]
    prompts, candidates = torch.arange(5).repeat_interleave(count), torch.arange(count).repeat(5)
    masks = ours.masks(found, prompts, candidates).view_as(expected)
    assert found.scores.shape == scores.shape
    for name, a, b in (("scores", found.scores, scores), ("masks", masks, expected)):
        gap = ((a - b).abs().max() / b.std()).item()
        assert gap < 1e-4, f"{name} differ by {gap:.1e} of their standard deviation"


@pytest.mark.parametrize("prompts", [1, 5])
@pytest.mark.parametrize("own_masks", [True, False], ids=["masks", "no masks"])
@pytest.mark.parametrize("three", [True, False])
@torch.no_grad()
def test_prompts_with_and_without_masks_as_segment_anything_decodes_them(monkeypatch, prompts, own_masks, three):
    decoder, (embedding, positions, dense, sparse) = random_decoder(), photo()
    monkeypatch.setattr(mask_decoder, "CELLS", 72)  # two prompts at a time
    assert is_sams(decoder)
    dense = torch.randn(prompts, *dense.shape[1:]) if own_masks else dense.expand(prompts, -1, -1, -1)
    expected = decoder(embedding, positions, sparse[:prompts], dense, three)
    found = decode_photo(decoder, embedding, positions, sparse[:prompts], dense, three)
    for name, a, b in zip(("masks", "scores"), found, expected):
        assert a.shape == b.shape, name
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), f"{name} differ by {(a - b).abs().max()}"


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
