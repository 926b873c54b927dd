"""Training: losses by hand, equal gradients however a step is cut up, and what a run leaves behind."""

import importlib.metadata
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from training import ROOT, STUDENT, TEACHER, column, rows, write_coco, write_photos, write_tars

from blsam import sam_model_registry
from blsam.checkpoint import read
from blsam.commands.train import add_arguments, settings_of
from blsam.data.sa1b import choose_photos, list_photos
from blsam.distributed import World
from blsam.options import Parser, UsageError
from blsam.training import run_folder
from blsam.training.embeddings import EmbeddingCache
from blsam.training.loop import set_up, train
from blsam.training.losses import balanced_mask_loss, cosine_loss, mask_iou, relative_mse_loss, sam_mask_loss
from blsam.training.prompts import corrective_clicks
from blsam.training.settings import TrainSettings, launcher

CACHE_SCRIPT = ROOT / "scripts" / "cache_embeddings.py"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 8)


@pytest.fixture
def settings(photos, tmp_path):
    """A run of 3 steps of the shipped student at 128."""
    return TrainSettings(
        model="blsam_vit_t",
        data=(photos,),
        output=tmp_path / "run",
        init=STUDENT,
        teacher="vit_t",
        teacher_checkpoint=TEACHER,
        image_size=128,
        keep_ratio=(0.25, 0.5),
        holdout=0,
        steps=3,
        batch_size=4,
        lr=2e-5,
        workers=0,
        log_every=1,
    )


def parsed(arguments):
    """The settings of a command line."""
    parser = Parser()
    add_arguments(parser)
    return settings_of(parser.parse_args(arguments))


# --- the objective ---------------------------------------------------------------------------------------------------


def test_losses_on_a_hand_computed_case():
    target = torch.zeros(1, 4, 4)
    target[0, :2, :2] = 1
    perfect = torch.where(target > 0, 50.0, -50.0)[:, None]
    half = perfect.clone()
    half[0, 0, 0, :2] = -50
    assert mask_iou(perfect, target).item() == 1 and mask_iou(half, target).item() == 0.5
    # the wrong half: focal 20 * 2 pixels * 0.25 * 50 / 16; dice 1 - (2 * 2 + 1) / (2 + 4 + 1)
    assert sam_mask_loss(perfect, target[:, None]).item() == pytest.approx(0, abs=1e-6)
    assert sam_mask_loss(half, target[:, None]).item() == pytest.approx(20 * 2 * 0.25 * 50 / 16 + 2 / 7, rel=1e-5)
    # 1.6 x the 2 x 2 box about (1, 1) reaches the pixel centres at 0.5, 1.5 and 2.5: 9 pixels, 2 of them wrong
    assert balanced_mask_loss(half, target[:, None]).item() == pytest.approx(2 * 50 / 9 + 2 / 7, rel=1e-5)


def test_distillation_losses_on_a_hand_computed_case():
    # two images of one or two real tokens; the token in the padding would be far off
    a = torch.tensor([[[1.0, 5.0]], [[0.0, 5.0]]])[None].movedim(2, 3)  # [1, 2, 2, 1]
    b = torch.tensor([[[1.0, -9.0]], [[1.0, 3.0]]])[None].movedim(2, 3)
    real = torch.tensor([True, False]).view(1, 2, 1)
    assert cosine_loss(a, b, real).tolist() == pytest.approx([1 - 0.5**0.5])
    # three tokens of one channel, the last one padding: errors 1 and 3, the teacher's deviations -2 and 2
    student, teacher = torch.tensor([2.0, 8.0, 99.0]), torch.tensor([1.0, 5.0, 0.0])
    real = torch.tensor([True, True, False]).view(1, 1, 3)
    found = relative_mse_loss(student.view(1, 1, 1, 3), teacher.view(1, 1, 1, 3), real)
    assert found.tolist() == pytest.approx([(1 + 9) / (4 + 4)])


def test_corrective_clicks_lie_in_the_error():
    target = torch.zeros(3, 4, 4)
    target[0, 1, 2] = 1  # missed: positive
    logits = torch.full((3, 4, 4), -1.0)
    logits[1, 3, 0] = 1  # extra: negative; the third is right: no point
    points, labels = corrective_clicks(logits, target, torch.Generator().manual_seed(0))
    assert labels[:, 0].tolist() == [1, 0, -1]
    assert points[0, 0].tolist() == [10, 6] and points[1, 0].tolist() == [2, 14]


# --- the loop --------------------------------------------------------------------------------------------------------


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


def test_a_run_folder_says_what_happened(settings):
    path = train(replace(settings, holdout=0.25, validate_every=2))
    folder = settings.output
    config = json.loads((folder / "config.json").read_text())
    assert config["photos"] == 6 and config["model"] == "blsam_vit_t" and "git_revision" in config
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    ids = {name: (folder / f"{name}.txt").read_text().split() for name in ("photos", "validation")}
    assert len(ids["photos"]) == 6 and len(ids["validation"]) == 2 and not set(ids["photos"]) & set(ids["validation"])
    steps = [row for row in rows(folder) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3] and all(row["sup"] > 0 and row["fd"] > 0 for row in steps)
    parts = {
        "s_data",
        "s_teacher",
        "s_student",
        "s_decoder",
        "s_decoder_backward",
        "s_student_backward",
        "s_optimiser",
    }
    assert parts <= set(steps[0]) and len(steps[0]["alpha"]) == len(steps[0]["gamma"]) == 22
    assert 0 < steps[0]["prime_moved"] < 1
    found = [row for row in rows(folder) if "val_box" in row]
    assert [row["step"] for row in found] == [0, 2, 3] and found[0]["prime_jaccard"] == 1
    assert found[0]["val_cosine"] > 0.9 and {"val_click"} <= set(found[0])
    for name in (path, folder / "best.safetensors"):
        sam = sam_model_registry["blsam_vit_t"](name)
        assert sam.image_encoder.img_size == 128


def test_the_decoder_alone(settings, photos, tmp_path):
    coco = write_coco(photos, tmp_path / "instances.json")
    path = train(
        replace(
            settings, train="decoder", data=(coco,), images=photos, teacher=None, teacher_checkpoint=None, clicks=2
        )
    )
    before, after = (read(name)[0] for name in (STUDENT, path))
    same = {key for key in before if torch.equal(before[key], after[key])}
    resampled = {key for key in before if before[key].shape != after[key].shape}
    changed = set(before) - same - resampled
    assert changed and all(key.startswith("mask_decoder.") for key in changed), sorted(changed)[:3]


def test_a_teacher_on_disk_teaches_the_same(settings, photos, tmp_path):
    made = subprocess.run(
        [sys.executable, str(CACHE_SCRIPT), "--teacher", "vit_t", "--teacher-checkpoint", str(TEACHER), "--data"]
        + [
            str(photos),
            "--image-size",
            "128",
            "--views",
            "1",
            "--part-size",
            "3",
            "--output",
            str(tmp_path / "cache"),
        ],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert len(list((tmp_path / "cache").glob("part-*.safetensors"))) == 3
    one_epoch = replace(settings, steps=2)  # the cache repeats its views, a live run does not
    train(one_epoch)
    train(replace(one_epoch, cache=tmp_path / "cache", output=tmp_path / "cached"))
    live, cached = column(tmp_path / "run", "loss"), column(tmp_path / "cached", "loss")
    assert (live - cached).abs().max() < 1e-3, (live, cached)

    cache, teacher = EmbeddingCache(tmp_path / "cache"), sam_model_registry["vit_t"](TEACHER, image_size=128)
    from blsam.data.views import Views, ViewSettings

    sample = Views(list_photos([photos]), ViewSettings(128, 8))[3]
    with torch.no_grad():
        expected = teacher.image_encoder(teacher.preprocess(sample.image.float())[None])[0]
    cosine = torch.cosine_similarity(cache(sample.id, 0).float(), expected, dim=0)
    assert cosine.min() >= 0.9999, cosine.min()

    with pytest.raises(ValueError, match="was made with image_size 128, this run has 192"):
        train(replace(one_epoch, cache=tmp_path / "cache", image_size=192, output=tmp_path / "other"))


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


def test_a_checkpoint_is_whole_or_not_there(settings, monkeypatch):
    train(replace(settings, steps=1, save_every=1))

    def dies(state, **more):  # as torch reports it
        (Path(more["checkpoint_id"]) / "half").write_text("")
        raise CheckpointException("save", {0: (OSError("no space left"), None)})

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.dcp, "save", dies)
        with pytest.raises(OSError, match="no space left"):
            train(replace(settings, save_every=1, resume=True))
    assert [path.name for path in (settings.output / "checkpoints").glob("step-*")] == ["step-1"]
    train(replace(settings, resume=True))
    assert [row["step"] for row in rows(settings.output) if "loss" in row] == [1, 2, 3]


def test_a_run_that_ended_and_goes_on_validates_each_step_once(settings):
    settings = replace(settings, holdout=0.25, steps=1, save_every=1)
    train(settings)
    train(replace(settings, resume=True))
    train(replace(settings, steps=2, resume=True))
    assert [row["step"] for row in rows(settings.output) if "val_box" in row] == [0, 1, 2]
    facts = json.loads((settings.output / "checkpoints" / "step-2" / "facts.json").read_text())
    assert facts["best"] == pytest.approx(column(settings.output, "val_box").max().item(), abs=1e-4)


def test_a_restart_goes_on_in_the_folder_that_it_began_alone(tmp_path, monkeypatch):
    command = ["--model", "vit_t", "--data", "photos", "--steps", "1", "--output", str(tmp_path)]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"launcher": launcher()}))
    assert parsed(command).resume
    for other in ({"launcher": "another 1"}, {}):
        config.write_text(json.dumps(other))
        with pytest.raises(UsageError, match="is not empty"):
            parsed(command)


def test_a_run_goes_on_as_it_was_begun_or_not_at_all(settings, tmp_path):
    train(replace(settings, steps=1))
    for more, error in (
        ({"batch_size": 2}, "was begun with batch_size 4, this command has 2"),
        ({"keep_ratio": (0.5,)}, "was begun with keep_ratio"),
        ({"data": (write_photos(tmp_path / "others", 5),)}, "photos.txt names other photos"),
    ):
        with pytest.raises(ValueError, match=error):
            train(replace(settings, resume=True, **more))


def test_a_gradient_that_is_not_finite_ends_the_run(settings):
    with pytest.raises(ValueError, match="step 1: the gradient is not finite"):
        train(replace(settings, lr=1e30, save_every=1))
    assert [path.name for path in (settings.output / "checkpoints").glob("step-*")] == ["step-1"]


@pytest.mark.parametrize(
    "more, error",
    (
        ([], "give one of --epochs, --steps and --minutes"),
        (["--steps", "1", "--epochs", "1"], "give one of"),
        (["--steps", "0"], "--steps must be above 0"),
        (["--steps", "1", "--teacher", "vit_t"], "go together"),
        (["--steps", "1", "--batch-size", "6", "--accumulate", "4"], "--batch-size 6 is not a multiple of 4 passes"),
        (["--steps", "1"], "blsam_vit_t starts from --init or from a dense --teacher"),
        (["--steps", "1", "--init", "a.pth", "--train", "decoder", "--cache", "c"], "has nothing to teach"),
        (["--steps", "1", "--init", "a.pth", "--stage", "encoder"], "learns from a --teacher or a --cache"),
        (["--steps", "1", "--keep-ratio", "0.5,2"], "keep ratios lie in"),
        (["--minutes", "inf"], "--minutes must be a finite number"),
        (["--epochs", "nan"], "--epochs must be a finite number"),
        (["--steps", "1", "--accumulate", "0"], "must be at least 1"),
        (["--steps", "1", "--keep-ratio", "half"], "keep ratios lie in"),
    ),
)
def test_options_that_do_not_go_together(more, error, tmp_path):
    arguments = ["--model", "blsam_vit_t", "--data", "photos", "--output", str(tmp_path / "run"), *more]
    with pytest.raises(UsageError, match=re.escape(error)):
        parsed(arguments)
