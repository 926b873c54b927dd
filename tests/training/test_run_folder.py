"""What a run leaves behind, and who may go on with it."""

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from blsam import sam_model_registry
from blsam.training import run_folder
from blsam.training.loop import train
from tests.photos import write_photos
from tests.training.helpers import rows


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
    assert found[0]["val_cosine"] > 0.9 and 0 < found[0]["val_score_error"] < 1
    assert {"val_click"} <= set(found[0])
    # of embeddings as long as the teacher's: |s - t|^2 = 2 (1 - cosine) |t|^2, of which the variance is a share
    assert 1 - found[0]["val_cosine"] < found[0]["val_error"] < 0.5, found[0]
    for name in (path, folder / "best.safetensors"):
        sam = sam_model_registry["blsam_vit_t"](name)
        assert sam.image_encoder.img_size == 128


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


def test_a_run_goes_on_as_it_was_begun_or_not_at_all(settings, tmp_path):
    train(replace(settings, steps=1))
    for more, error in (
        ({"batch_size": 2}, "was begun with batch_size 4, this command has 2"),
        ({"keep_ratio": (0.5,)}, "was begun with keep_ratio"),
        ({"data": (write_photos(tmp_path / "others", 5),)}, "photos.txt names other photos"),
    ):
        with pytest.raises(ValueError, match=error):
            train(replace(settings, resume=True, **more))


def test_a_run_goes_on_that_was_begun_before_a_setting_was_there(settings):
    train(replace(settings, steps=1))
    path = settings.output / "config.json"
    written = json.loads(path.read_text())
    del written["clicks"]
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="was begun with clicks 1, this command has 2"):
        train(replace(settings, resume=True, clicks=2))
    train(replace(settings, resume=True))
    assert [row["step"] for row in rows(settings.output) if "loss" in row] == [1, 2, 3]
