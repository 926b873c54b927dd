"""What holds for every method."""

from dataclasses import replace

import pytest
import torch

from blsam import SamAutomaticMaskGenerator, SamPredictor, build_sam, sam_model_registry
from blsam.baselines.sam.base import restored, window_means
from blsam.cli import main
from blsam.config import MODELS, REDUCED
from blsam.modeling.image_encoder import ImageEncoder
from blsam.modeling.routing import Routing
from blsam.options import shipped_checkpoint
from scripts.benchmarks.benchmark_row import reference_encoder
from tests.baselines.sam.models import RULES, SMALL, largest, small
from tests.helpers import TINY_SIZE, gap, images, randomize

EACH = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@EACH
@pytest.mark.parametrize("size", [TINY_SIZE, 224])
@torch.no_grad()
def test_at_keep_1_it_is_segment_anything(rule, size):
    reference, encoder = randomize(reference_encoder(SMALL, size), 0.02), small(rule, size)
    encoder.load_state_dict(reference.state_dict())
    x = images(2, size)
    difference = gap(encoder(x, keep_ratio=1.0, true_sizes=[(100, size)] * 2), reference(x))
    assert difference <= 1e-5, f"{difference:.1e} of the standard deviation"


@EACH
@torch.no_grad()
def test_a_batch_equals_one_by_one_and_the_grid_need_not_divide(rule):
    encoder, x, sizes = small(rule), images(2), [(120, 160), (160, 100)]
    both, routing = encoder.encode(x, true_sizes=sizes)
    assert both.shape == (2, 256, 10, 10) and torch.isfinite(both).all()
    for i in range(2):
        alone, of_one = encoder.encode(x[i : i + 1], true_sizes=sizes[i : i + 1])
        for a, b in zip(routing.stages, of_one.stages):
            assert torch.equal(a.mask[i], b.mask[0]), f"{(a.mask[i] != b.mask[0]).sum()} tokens are chosen otherwise"
        difference = gap(both[i : i + 1], alone)
        assert difference <= 1e-5, f"image {i}: {difference:.1e}"


@EACH
@torch.no_grad()
def test_padding_of_the_image_comes_last(rule):
    _, routing = small(rule, keep_ratio=0.5).encode(images(), true_sizes=[(96, 160)])  # 60 of 100 tokens
    for stage in routing.stages:
        assert stage.mask.any() and not stage.mask[:, 6:].any(), stage.mask.long()


@EACH
def test_every_parameter_has_a_finite_gradient(rule):
    encoder = small(rule).train()
    encoder(images(2)).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), f"{name} gets none"


@EACH
@torch.no_grad()
def test_in_bfloat16_and_under_autocast(rule):
    encoder, x = small(rule), images()
    exact = encoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = {"autocast": encoder(x)}
    found["weights"] = encoder.use_dtype(torch.bfloat16)(x)
    for name, half in found.items():
        cosine = torch.cosine_similarity(half, exact, dim=1).mean().item()
        assert half.dtype == torch.float32 and cosine > 0.98, f"{name}: {half.dtype}, cosine {cosine:.4f}"


@EACH
def test_what_it_does_not_do_is_said_in_a_line(rule):
    encoder, x = small(rule), images()
    with pytest.raises(ValueError, match="no routing can be supplied"):
        encoder.encode(x, routing=Routing())
    with pytest.raises(ValueError, match="two global layers"):
        small(rule, config=replace(SMALL, global_layers=(5,)))
    with pytest.raises(ValueError, match="baselines.sam.build"):
        ImageEncoder(replace(SMALL, rule=rule), TINY_SIZE)
    with pytest.raises(ValueError, match="in torch alone, not in openvino"):
        build_sam(replace(SMALL, rule=rule), image_size=TINY_SIZE, runtime="openvino")
    with pytest.raises(Exception, match="it has no export"):
        torch.export.export(encoder, (x,))


def test_the_command_line_says_what_they_are_not_for(capsys, tmp_path):
    assert main(["export", "--model", "evit_vit_t", "-o", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "invalid choice: 'evit_vit_t'" in said and said.count("\n") == 1, said
    run = ["train", "--model", "evo_vit_t", "--init", str(tmp_path), "--data", str(tmp_path), "--steps", "1"]
    assert main([*run, "--output", str(tmp_path / "run"), "--checkpointing"]) == 2
    said = capsys.readouterr().err
    assert "does not run its blocks whole" in said and said.count("\n") == 1, said


def test_the_registry_has_them_with_the_dense_models_weights():
    assert set(REDUCED) == {f"{m}_vit_{s}" for m in ("evit", "evo", "sparse", "strided") for s in "hlbt"}
    for name, config in REDUCED.items():
        assert config.dense == MODELS[name.partition("_")[2]] and config.identity == name and config.reduces
        assert not config.routed and sam_model_registry[name].__name__ == f"build_sam_{name}"
    assert shipped_checkpoint("evit_vit_t") == shipped_checkpoint("vit_t")
    with pytest.raises(ValueError, match="a rule is for a dense encoder"):
        replace(MODELS["blsam_vit_t"], rule=RULES["evit"])


@pytest.mark.parametrize("method", ["evit", "evo", "sparse", "strided"])
def test_predictor_and_everything_mode_take_them(method):
    sam = sam_model_registry[f"{method}_vit_t"](shipped_checkpoint("vit_t"), image_size=128)
    assert sam.image_encoder.keep_ratio == REDUCED[f"{method}_vit_t"].rule.keep_ratio
    predictor, photo = SamPredictor(sam), torch.randint(256, (60, 80, 3), dtype=torch.uint8).numpy()
    predictor.set_image(photo)
    masks, scores, _ = predictor.predict(box=torch.tensor([10, 10, 50, 40]).numpy())
    assert masks.shape == (3, 60, 80) and predictor.routing.stages
    generator = SamAutomaticMaskGenerator(sam, points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0)
    assert generator.generate(photo)


def test_restored_and_window_means_by_hand():
    pieces = [torch.tensor([[[3.0], [1.0]]]), torch.tensor([[[0.0], [2.0]]])]
    found = restored(pieces, [torch.tensor([[3, 1]]), torch.tensor([[0, 2]])])
    assert found.flatten().tolist() == [0, 1, 2, 3]
    x, weights, windows = torch.tensor([[[2.0, 0], [0, 4.0], [1, 1]]]), torch.tensor([[0.1, 0.3, 0.2]]), [[0, 0, 2]]
    means, totals = window_means(x, weights, torch.tensor(windows), 3)
    assert largest(means, torch.tensor([[[0.5, 3], [0, 0], [1, 1]]])) < 1e-6
    assert largest(totals, torch.tensor([[0.4, 0, 0.2]])) < 1e-6
    before = torch.tensor([[[1.0, 1], [7, 7], [3, 1]]]), torch.tensor([[0.4, 0, 0.2]])
    means, totals = window_means(x, weights, torch.tensor(windows), 3, before)
    assert largest(means, torch.tensor([[[0.75, 2], [0, 0], [2, 1]]])) < 1e-6
    assert largest(totals, torch.tensor([[0.8, 0, 0.4]])) < 1e-6
