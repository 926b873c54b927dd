"""PEFT: LoRA in SAM's attention, a few steps towards a mask, saved and put into another model."""

import numpy as np
import torch
import torch.nn.functional as F

PACKAGE = "peft"


def run(photo, checkpoint, folder):
    import peft
    from segment_anything import SamPredictor, sam_model_registry

    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "lin1"], lora_dropout=0.0)
    model = peft.get_peft_model(sam_model_registry["vit_b"](checkpoint), settings)
    sam = model.base_model.model
    predictor = SamPredictor(sam)
    resized = torch.as_tensor(predictor.transform.apply_image(photo)).permute(2, 0, 1)[None]
    x, wanted = sam.preprocess(resized), torch.zeros(1, 1, 128, 128)
    wanted[..., 5:70, 30:75] = 1
    box = torch.tensor([[120.0, 20, 300, 280]])
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), []
    for _ in range(2):
        sparse, dense = sam.prompt_encoder(points=None, boxes=box, masks=None)
        logits, _ = sam.mask_decoder(
            image_embeddings=sam.image_encoder(x),
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        loss = F.binary_cross_entropy_with_logits(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(folder / "lora")
    other = peft.PeftModel.from_pretrained(sam_model_registry["vit_b"](checkpoint), folder / "lora")
    predictor = SamPredictor(other.merge_and_unload())
    predictor.set_image(photo)
    masks, _, _ = predictor.predict(box=np.array([120, 20, 300, 280]), multimask_output=False)
    return {"losses": np.array(losses), "features": predictor.features.numpy(), "masks": masks}
