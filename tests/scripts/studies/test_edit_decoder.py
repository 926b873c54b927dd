"""Changed decoders: what they answer, and which tensors are whose."""

from pathlib import Path

import pytest
import torch

from blsam import sam_model_registry
from blsam.checkpoint import read, save
from blsam.options import shipped_checkpoint
from blsam.training.objective import decode
from scripts.studies.edit_decoder import main


def test_the_second_mask_is_the_single_one(tmp_path):
    path = tmp_path / "changed.safetensors"
    assert main(["single", str(shipped_checkpoint("vit_t")), "-o", str(path), "--below", "0.25"]) == 0
    torch.manual_seed(0)
    embedding, boxes = torch.randn(1, 256, 4, 4), torch.tensor([[3.0, 5, 40, 60]])
    with torch.no_grad():
        before, after = (
            decode(sam_model_registry["vit_t"](name, image_size=64), embedding, boxes=boxes)
            for name in (shipped_checkpoint("vit_t"), path)
        )
    for one, other in zip(before, after, strict=True):  # logits and scores
        assert not torch.allclose(one[:, 0], one[:, 2], atol=1e-2)
        torch.testing.assert_close(other[:, 2], other[:, 0], rtol=1e-4, atol=1e-4)
    biases = [
        read(name)[0]["mask_decoder.iou_prediction_head.layers.2.bias"] for name in (shipped_checkpoint("vit_t"), path)
    ]
    assert (biases[0] - biases[1])[3].item() == pytest.approx(0.25, abs=1e-3)


def test_the_decoder_of_another(tmp_path):
    dense, routed = (shipped_checkpoint(name) for name in ("vit_t", "blsam_vit_t"))
    assert main(["from", str(dense), str(routed), "-o", str(tmp_path / "changed.safetensors")]) == 0
    (found, facts), (theirs, _), (own, known) = map(read, (tmp_path / "changed.safetensors", dense, routed))
    assert facts == known and found.keys() == own.keys()
    for key, value in found.items():
        assert torch.equal(value, (theirs if key.startswith("mask_decoder.") else own)[key]), key


def test_decoders_that_do_not_fit_and_files_that_are_needed(tmp_path):
    state, facts = read(shipped_checkpoint("blsam_vit_t"))
    encoder = {key: value for key, value in state.items() if not key.startswith("mask_decoder.")}
    token = "mask_decoder.mask_tokens.weight"
    for name, content in (("encoder", encoder), ("narrow", state | {token: state[token][:, :8]}), ("sam", state)):
        save(tmp_path / f"{name}.safetensors", content, facts)
    refused = {
        "from encoder sam -o out": "encoder.safetensors has no mask decoder",
        "from sam encoder -o out": "encoder.safetensors has no mask decoder",
        "single encoder -o out": "encoder.safetensors has no mask decoder",
        "from narrow sam -o out": "different shapes",
        "from narrow sam -o narrow": "would overwrite",
        "single sam -o sam": "would overwrite",
        "single sam --below nan -o out": "--below lies in",
    }
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("encoder", "narrow", "sam", "out")}
    for words, error in refused.items():
        first, *rest = words.split()
        with pytest.raises(ValueError, match=error):
            main([first, *(files.get(word, word) for word in rest)])
        assert not Path(files["out"]).exists()
