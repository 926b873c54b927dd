"""Training: equal gradients however a step is cut up, tars, damaged photos, validation."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from blsam import sam_model_registry
from blsam.checkpoint import read
from blsam.config import CONFIGS
from blsam.data.sa1b import choose_photos, list_photos
from blsam.distributed import World
from blsam.training.loop import set_up, train
from blsam.training.settings import TrainSettings
from tests.photos import write_coco, write_photos, write_tars
from tests.training.helpers import STUDENT, TEACHER, column, random_vit_b, rows


def test_passes_give_the_gradient_of_the_whole_batch(settings, tmp_path, monkeypatch):
    gradients, clip = [], torch.nn.utils.clip_grad_norm_

    def look(parameters, most):
        parameters = list(parameters)
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    train(settings)
    train(replace(settings, output=tmp_path / "passes", accumulate=4))
    ours, theirs = gradients[0], gradients[3]  # of the first steps: the weights are still the same
    assert len(ours) == len(theirs) > 300
    scale = max(g.norm().item() for g in ours)
    worst = max((a - b).norm().item() / (a.norm().item() + 1e-4 * scale) for a, b in zip(ours, theirs))
    assert worst < 1e-3, worst
    whole, passes = column(tmp_path / "run", "loss"), column(tmp_path / "passes", "loss").view(3, -1).mean(1)
    assert torch.allclose(whole, passes, rtol=1e-4), (whole, passes)
    norms = [column(tmp_path / name, "grad_norm")[0].item() for name in ("run", "passes")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    a, b = (read(folder / "model.safetensors")[0] for folder in (tmp_path / "run", tmp_path / "passes"))
    worst = max((a[k].float() - b[k].float()).abs().max().item() for k in a)
    assert worst < 1e-3, worst  # half precision


@pytest.mark.parametrize("what, part", [("decoder", ""), ("scores", "iou_prediction_head.")])
def test_the_decoder_alone(what, part, settings, photos, tmp_path):
    coco = write_coco(photos, tmp_path / "instances.json")
    path = train(
        replace(settings, train=what, data=(coco,), images=photos, teacher=None, teacher_checkpoint=None, clicks=2)
    )
    before, after = (read(name)[0] for name in (STUDENT, path))
    same = {key for key in before if torch.equal(before[key], after[key])}
    resampled = {key for key in before if before[key].shape != after[key].shape}
    changed = set(before) - same - resampled
    assert changed and all(key.startswith(f"mask_decoder.{part}") for key in changed), sorted(changed)[:3]


@pytest.mark.parametrize("what, best", [("all", 2), ("scores", 1)])
def test_the_best_weights_are_the_best_in_what_is_learnt(what, best, settings, monkeypatch):
    found = iter([(0.5, 0.3), (0.6, 0.1), (0.7, 0.2), (0.6, 0.2)])  # before, and after each step: box, error of scores
    monkeypatch.setattr(
        "blsam.training.loop.measure", lambda run: (dict(zip(("val_box", "val_score_error"), next(found))), [])
    )
    train(replace(settings, train=what, teacher=None, teacher_checkpoint=None, holdout=0.3, validate_every=1))
    assert read(settings.output / "best.safetensors")[1]["step"] == str(best)


def test_a_student_with_a_finer_embedding(settings, tmp_path):
    fine = replace(settings, model=CONFIGS["vit_t_fine"], init=TEACHER, holdout=0.25, steps=1)
    with pytest.raises(ValueError, match="--teacher-size must be 2 times --image-size"):
        train(fine)
    fine = replace(fine, teacher_size=256)
    path = train(replace(fine, stage="encoder", distill_loss="mse", answers=2))
    assert column(settings.output, "answers")[0] > 0
    assert column(settings.output, "val_error")[0] < 1 and column(settings.output, "val_box")[0] > 0.2
    sam = sam_model_registry["vit_t_fine"](path)
    assert sam.image_encoder.img_size == 128 and sam.prompt_encoder.mask_input_size == (64, 64)
    train(replace(fine, init=Path(path), output=tmp_path / "masks"))  # the masks are as fine
    assert column(tmp_path / "masks", "val_box")[0] > 0.2


def test_tars_are_streamed(settings, photos, tmp_path):
    tars = write_tars(photos, tmp_path / "tars", 2)
    train(replace(settings, data=(tars[0].parent,), stage="encoder"))
    assert sorted((settings.output / "photos.txt").read_text().split()) == [f"sa_{i}" for i in range(8)]
    assert len(column(settings.output, "loss")) == 3


def test_tars_need_a_reader_each_and_the_same_readers_again(settings, photos, tmp_path):
    tars = write_tars(photos, tmp_path / "tars", 2)
    of_tars = replace(settings, data=(tars[0].parent,), stage="encoder", steps=1)
    with pytest.raises(ValueError, match="3 readers .* need as many tars, there are 2"):
        train(replace(of_tars, workers=3))
    with pytest.raises(ValueError, match="6 readers"):
        set_up(replace(of_tars, workers=3), World(rank=0, size=2))
    assert not settings.output.exists()  # the command put right can begin
    train(of_tars)
    with pytest.raises(ValueError, match="reads tars with 1 processes x 1 workers, this command has 1 x 2"):
        train(replace(of_tars, steps=2, workers=2, resume=True))


def test_tars_beside_other_photos_are_refused(settings, photos, tmp_path):
    tars = write_tars(write_photos(tmp_path / "more", 9), tmp_path / "tars", 1)
    (tmp_path / "one").mkdir()
    for suffix in (".jpg", ".json"):
        (tmp_path / "more" / f"sa_8{suffix}").rename(tmp_path / "one" / f"other{suffix}")
    with pytest.raises(ValueError, match="tars are streamed, other photos are not"):
        train(replace(settings, data=(tars[0], tmp_path / "one")))


def test_too_many_damaged_photos_stop_the_run(settings, tmp_path):
    folder = write_photos(tmp_path / "some", 8)
    for i in (2, 5):
        (folder / f"sa_{i}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"[12] of 8 photos are damaged, all in .*damaged.txt; first sa_[25]"):
        train(replace(settings, data=(folder,), steps=8, stage="encoder"))
    assert (settings.output / "damaged.txt").read_text().startswith("sa_")


def test_a_damaged_photo_that_was_held_out_is_listed_too(settings, tmp_path):
    folder = write_photos(tmp_path / "some", 8)
    _, validation = choose_photos(list_photos([folder]), 1.0, 0.25, 0)
    (folder / f"{validation[0].id}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=f"1 of 8 photos are damaged, all in .*damaged.txt; first {validation[0].id}"):
        train(replace(settings, data=(folder,), holdout=0.25, steps=1, log_every=1))


def test_a_run_that_ended_and_goes_on_validates_each_step_once(settings):
    settings = replace(settings, holdout=0.25, steps=1, save_every=1)
    train(settings)
    train(replace(settings, resume=True))
    train(replace(settings, steps=2, resume=True))
    assert [row["step"] for row in rows(settings.output) if "val_box" in row] == [0, 1, 2]
    facts = json.loads((settings.output / "checkpoints" / "step-2" / "facts.json").read_text())
    assert facts["best"] == pytest.approx(column(settings.output, "val_box").max().item(), abs=1e-4)


def test_a_configuration_of_one_s_own_is_trained_and_written_down(settings):
    mine = replace(settings.model, score="norm")
    train(replace(settings, model=mine, steps=1))
    stored = json.loads((settings.output / "config.json").read_text())
    assert stored["model"] == json.loads(json.dumps(asdict(mine)))
    with pytest.raises(ValueError, match="was begun with model"):
        train(replace(settings, steps=2, resume=True))
    train(replace(settings, model=mine, steps=2, resume=True))
    assert [row["step"] for row in rows(settings.output) if "loss" in row] == [1, 2]


def test_a_gradient_that_is_not_finite_ends_the_run(settings):
    with pytest.raises(ValueError, match="step 1: the gradient is not finite"):
        train(replace(settings, lr=1e30, save_every=1))
    assert [path.name for path in (settings.output / "checkpoints").glob("step-*")] == ["step-1"]


@pytest.mark.slow
def test_a_training_step_of_blsam_vit_b_at_1024(tmp_path):
    checkpoint = random_vit_b(tmp_path / "sam_vit_b.pth")
    settings = TrainSettings(
        model=CONFIGS["blsam_vit_b"],
        data=(write_photos(tmp_path / "photos", 2),),
        output=tmp_path / "run",
        teacher="vit_b",
        teacher_checkpoint=checkpoint,
        holdout=0,
        steps=1,
        batch_size=1,
        log_every=1,
    )
    trained, _ = read(train(settings))
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    print("\n" + ", ".join(f"{k} {v}" for k, v in row.items() if k.startswith("s_") or k in ("sup", "fd", "peak_gb")))
    start, _ = read(checkpoint)
    same = [k for k, v in start.items() if torch.equal(v.half(), trained[k]) and not k.startswith("prompt_encoder")]
    assert len(same) < 20, same  # biases that start at zero may stay there in half precision
