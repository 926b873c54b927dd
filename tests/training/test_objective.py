import pytest
import torch

from blsam import sam_model_registry
from blsam.training import objective
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


@pytest.fixture
def sam():
    torch.manual_seed(0)
    return sam_model_registry["vit_t"](image_size=64).requires_grad_(False)


def batch_of(sam, keys):
    """Images without an object, the second half of each is padding, and their own embedding as the teacher's."""
    images = torch.randn(len(keys), 3, 64, 64)
    nothing = (torch.zeros(0, 16, 16), torch.zeros(0, 4))
    target = sam.image_encoder(images)
    return Batch(images, [(32, 64)] * len(keys), [nothing] * len(keys), keys, torch.ones(len(keys)), target)


ALONE = Objective(distill_weight=0, supervised=False, answers=8)


def test_the_teachers_answers_are_learnt(sam):
    batch, model = batch_of(sam, [3, 4]), TrainedSam(sam, ALONE)
    same = model(batch, 0.25).loss
    assert torch.equal(model(batch, 0.25).loss, same)  # the same prompts
    embedding = (batch.target + 0.3 * torch.randn_like(batch.target)).requires_grad_()
    distances = model._answered(batch, embedding)
    assert distances.shape == (2,) and distances.mean() > same, (distances, same)
    distances.sum().backward()
    assert (embedding.grad.flatten(1).norm(dim=1) > 0).all()
    step = embedding.detach() - 0.3 * embedding.grad / embedding.grad.std()
    assert model._answered(batch, step).mean() < distances.mean()


def test_answers_are_asked_for_in_every_way_and_where_the_image_is(sam, monkeypatch):
    asked, compared, forward = [], [], sam.prompt_encoder.forward
    monkeypatch.setattr(sam.prompt_encoder, "forward", lambda *given: asked.append(given[:2]) or forward(*given))
    monkeypatch.setattr(
        "blsam.training.objective.answer_loss", lambda logits, *more: compared.append(logits.shape) or logits.sum()
    )
    TrainedSam(sam, ALONE)(batch_of(sam, list(range(12))), 0.25)
    clicks = torch.cat([points[0] for points, boxes in asked if boxes is None])
    boxes = torch.cat([boxes for points, boxes in asked if boxes is not None])
    for y in (clicks[..., 1], boxes[:, 1::2]):
        assert y.min() >= 0 and 24 < y.max() <= 32, y
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert set(compared) == {(8, 3, 8, 16), (8, 1, 8, 16)}


def test_a_decoder_that_learns_gives_no_answers_to_learn():
    with pytest.raises(ValueError, match="no longer the teacher's"):
        Objective(answers=1)


@pytest.mark.parametrize("key", range(4))  # boxes and clicks, asked for one mask or three
def test_scores_alone_are_those_of_all_masks_and_nothing_else(key, sam, monkeypatch):
    masks = torch.zeros(2, 16, 16)
    masks[:, 4:8, 4:8] = 1
    logits = torch.where(masks > 0, 1.0, -1.0)[:, None] * torch.tensor([1.0, 1, 1, -1]).view(1, 4, 1, 1)
    scores = torch.tensor([[0.8, 1, 1, 0], [1, 1, 0.4, 0]])  # true ones: 1, 1, 1, 0
    monkeypatch.setattr(objective, "decode", lambda *given: (logits, scores))
    model = TrainedSam(sam, Objective(scores_alone=True, clicks=2))
    boxes = torch.tensor([[16.0, 16, 32, 32]] * 2)
    loss, iou = model._prompted(torch.zeros(1, 256, 4, 4), masks, boxes, key)
    assert loss.item() == pytest.approx((0.2**2 + 0.6**2) / 8) and iou.item() == 1
