import torch

from blsam import sam_model_registry
from blsam.training.objective import Batch, Objective, TrainedSam, decode


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


def test_the_teachers_answers_are_learnt_where_it_is_the_image():
    """Of two images without an object the second is half padding, where no prompt lies."""
    torch.manual_seed(0)
    sam = sam_model_registry["vit_t"](image_size=64).requires_grad_(False)
    images, sizes = torch.randn(2, 3, 64, 64), [(64, 64), (32, 64)]
    target = sam.image_encoder(images)
    nothing = (torch.zeros(0, 16, 16), torch.zeros(0, 4))
    batch = Batch(images, sizes, [nothing, nothing], [3, 4], torch.ones(2), target)
    model = TrainedSam(sam, Objective(distill_weight=0, supervised=False, answers=8))
    asked = []
    forward = sam.prompt_encoder.forward
    sam.prompt_encoder.forward = lambda points, *more: asked.append(points) or forward(points, *more)
    same = model(batch, 0.25).loss
    assert max(points[0][..., 1].max() for points in asked[len(asked) // 2 :] if points is not None) < 32
    assert torch.equal(model(batch, 0.25).loss, same)  # the same prompts

    embedding = (target + 0.3 * torch.randn_like(target)).requires_grad_()
    distances = model._answered(batch, embedding)
    assert distances.shape == (2,) and distances.mean() > same, (distances, same)
    distances.sum().backward()
    assert (embedding.grad.flatten(1).norm(dim=1) > 0).all()
    step = embedding.detach() - 0.3 * embedding.grad / embedding.grad.std()
    assert model._answered(batch, step).mean() < distances.mean()
