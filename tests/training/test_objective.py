import torch

from blsam import sam_model_registry
from blsam.training.objective import decode


def test_prompts_keep_their_places_while_training_in_bfloat16(monkeypatch):
    sam = sam_model_registry["vit_t"](image_size=64)
    given = []
    monkeypatch.setattr(
        sam.mask_decoder, "predict_masks", lambda *args: given.append([arg.float() for arg in args]) or (None, None)
    )
    boxes = torch.tensor([[3.0, 5, 40, 60]])
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            decode(sam, torch.zeros(1, 256, 4, 4), boxes=boxes)
    for exact, found in zip(*given, strict=True):
        assert torch.equal(exact, found)
