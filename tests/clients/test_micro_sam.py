"""micro-sam: batches encoded by hand, LoRA, blocks and windows read or wrapped, tracing."""

import warnings

import numpy as np
import pytest
import torch
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import nn

from tests.clients.conftest import SIZE
from tests.photos import PHOTOS


def test_a_batch_is_encoded_by_hand(sides):
    def program(side):
        predictor = side.predictor()
        predictor.reset_image()
        tensors, sizes = [], []
        for image in PHOTOS.values():
            tensor = predictor.transform.apply_image(image)
            tensor = torch.as_tensor(tensor, device=predictor.device).permute(2, 0, 1).contiguous()[None]
            sizes.append((image.shape[:2], tuple(tensor.shape[-2:])))
            tensors.append(predictor.model.preprocess(tensor))
        with torch.no_grad():
            features = predictor.model.image_encoder(torch.cat(tensors))
        results = []
        for i, (original_size, input_size) in enumerate(sizes):
            predictor.original_size, predictor.input_size = original_size, input_size
            predictor.features = features[i : i + 1]
            predictor.is_image_set = True
            results.append(predictor.predict(np.array([[150, 120]]), np.array([1])))
        return features, results

    sides.compare(program)


@pytest.mark.parametrize("photo", PHOTOS)
def test_what_is_encoded_by_hand_is_what_set_image_encodes(both, photo):
    """Padding is never prime, whichever way an image comes to the encoder."""
    predictor, image = both("blsam_vit_t").ours.predictor(PHOTOS[photo]), PHOTOS[photo]
    tensor = torch.as_tensor(predictor.transform.apply_image(image)).permute(2, 0, 1)[None]
    with torch.no_grad():
        found = predictor.model.image_encoder(predictor.model.preprocess(tensor))
    gap = (found - predictor.features).abs().max() / predictor.features.std()
    assert gap <= 1e-4, f"{gap:.1e}"


def test_embeddings_that_were_saved_are_set_again(sides):
    def program(side):
        first, image = side.predictor(PHOTOS["landscape"]), PHOTOS["landscape"]
        saved = first.get_image_embedding().cpu().numpy(), first.original_size, first.input_size
        predictor = side.predictor()
        predictor.model_type = side.model_type  # its own attributes
        predictor._hash = "xxh128:0"
        predictor.features = torch.from_numpy(saved[0]).to(predictor.device)
        predictor.original_size, predictor.input_size = saved[1:]
        predictor.is_image_set = True
        assert predictor.original_size == image.shape[:2]
        return saved, predictor.predict(box=np.array([120, 20, 300, 280]), multimask_output=False)

    sides.compare(program)


def test_the_type_is_told_by_the_state(sides):
    def program(side):
        state = side.build().state_dict()
        shape = list(state["image_encoder.patch_embed.proj.weight"].shape)
        return shape, state["image_encoder.pos_embed"].shape[1] * 16

    sides.compare(program)


class AttentionLora(nn.Module):
    """Low-rank changes of queries and values, as micro-sam puts them round `attn.qkv`."""

    def __init__(self, qkv, rank=4):
        super().__init__()
        self.qkv, self.dim = qkv, qkv.in_features
        generator = torch.Generator().manual_seed(rank)
        for part in "qv":
            down, up = nn.Linear(self.dim, rank, bias=False), nn.Linear(rank, self.dim, bias=False)
            for linear in (down, up):
                linear.weight.data = 0.1 * torch.randn(linear.weight.shape, generator=generator)
            self.add_module(part, nn.Sequential(down, up))

    def forward(self, x):
        qkv, d = self.qkv(x), self.dim
        parts = [qkv[:, :, :, :d] + self.q(x), qkv[:, :, :, d:-d], qkv[:, :, :, -d:] + self.v(x)]
        return torch.cat(parts, dim=-1)


class MlpLora(nn.Module):
    """Takes apart the layer that it replaces, as micro-sam's does."""

    def __init__(self, mlp, rank=4):
        super().__init__()
        self.mlp = mlp
        generator = torch.Generator().manual_seed(rank)
        sizes = (mlp.lin1.in_features, rank), (rank, mlp.lin1.out_features)
        self.low = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes))
        for linear in self.low:
            linear.weight.data = 0.1 * torch.randn(linear.weight.shape, generator=generator)

    def forward(self, x):
        return self.mlp.lin2(self.mlp.act(self.mlp.lin1(x) + self.low(x)))


@pytest.mark.parametrize("parts", ["qkv", "qkv and mlp"])
def test_low_rank_adaptation(sides, parts):
    def program(side):
        predictor = side.predictor()
        encoder = predictor.model.image_encoder
        for parameter in encoder.parameters():
            parameter.requires_grad = False
        for block in encoder.blocks:
            block.attn.qkv = AttentionLora(block.attn.qkv)
            if "mlp" in parts:
                block.mlp = MlpLora(block.mlp)
        predictor.set_image(PHOTOS["landscape"])
        changed = predictor.features
        x = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        encoder(x).square().mean().backward()
        gradients = [(name, p.grad.abs().sum() > 0) for name, p in encoder.named_parameters() if p.requires_grad]
        wrapped = [pair for pair in gradients if ".qkv.q." in pair[0] or ".qkv.v." in pair[0] or ".low." in pair[0]]
        assert len(wrapped) == 12 * (6 if "mlp" in parts else 4)
        assert all(moved for _, moved in wrapped), wrapped
        return changed

    sides.compare(program)


def test_parts_of_blocks_are_read(sides):
    def program(side):
        encoder = side.build().image_encoder
        block = encoder.blocks[0]
        x = torch.rand(1, 20, 20, encoder.neck[0].in_channels, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            windows, padded = window_partition(block.norm1(x), block.window_size)
            x = block.norm2(window_unpartition(windows, block.window_size, padded, (20, 20)))
            features = block.mlp.lin2(block.mlp.act(block.mlp.lin1(x)))
        sizes = [one.window_size for one in encoder.blocks]
        proj = block.attn.proj.weight.shape
        return features, sizes, list(proj), encoder.neck[2].out_channels, encoder.img_size

    sides.compare(program)


def test_attention_called_on_windows(exact):
    """The 3-D wrapper puts an adapter between `norm1` and the windows, and calls `attn` on the windows itself."""

    def program(side):
        results = []
        for block in side.build().image_encoder.blocks[1:3]:  # one of windows, one of the whole image
            x = torch.rand(2, 20, 20, 192, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                shortcut, x = x, block.norm1(x)
                if block.window_size > 0:
                    x, padded = window_partition(x, block.window_size)
                x = block.attn(x)
                if block.window_size > 0:
                    x = window_unpartition(x, block.window_size, padded, (20, 20))
                x = shortcut + x
                results.append(x + block.mlp(block.norm2(x)))
        return results

    exact.compare(program)


def test_the_encoder_is_traced(exact):
    def program(side):
        encoder = side.build().image_encoder
        x = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is a constant of the graph
            traced = torch.jit.trace(encoder, x, check_trace=False)  # which would trace it again, twice
        with torch.no_grad():
            return traced(x.flip(-1)), encoder(x.flip(-1))

    traced, called = exact.compare(program)
    assert (traced - called).abs().max() <= 1e-4 * called.std()
