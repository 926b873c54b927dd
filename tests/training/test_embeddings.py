"""A teacher's embeddings on disk."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from blsam import sam_model_registry
from blsam.data.sa1b import list_photos
from blsam.data.views import Views, ViewSettings
from blsam.training.embeddings import EmbeddingCache, write_embeddings
from blsam.training.loop import train
from tests.helpers import ROOT
from tests.photos import write_photos
from tests.training.helpers import TEACHER, column

CACHE_SCRIPT = ROOT / "scripts" / "cache_embeddings.py"


def _cache(photos, folder, *more):
    command = [sys.executable, str(CACHE_SCRIPT), "--teacher", "vit_t", "--teacher-checkpoint", str(TEACHER)]
    command += ["--data", str(photos), "--image-size", "128", "--part-size", "3", "--output", str(folder), *more]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_a_teacher_on_disk_teaches_the_same(settings, photos, tmp_path):
    _cache(photos, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("part-*.safetensors"))) == 3
    one_epoch = replace(settings, steps=2)  # the cache repeats its views, a live run does not
    train(one_epoch)
    train(replace(one_epoch, cache=tmp_path / "cache", output=tmp_path / "cached"))
    live, cached = column(tmp_path / "run", "loss"), column(tmp_path / "cached", "loss")
    assert (live - cached).abs().max() < 1e-3, (live, cached)

    cache, teacher = EmbeddingCache(tmp_path / "cache"), sam_model_registry["vit_t"](TEACHER, image_size=128)
    sample = Views(list_photos([photos]), ViewSettings(128, 8))[3]
    with torch.no_grad():
        expected = teacher.image_encoder(teacher.preprocess(sample.image.float())[None])[0]
    cosine = torch.cosine_similarity(cache(sample.id, 0).float(), expected, dim=0)
    assert cosine.min() >= 0.9999, cosine.min()

    with pytest.raises(ValueError, match="was made with image_size 128, this run has 192"):
        train(replace(one_epoch, cache=tmp_path / "cache", image_size=192, output=tmp_path / "other"))


def test_a_teacher_may_see_more_than_its_student(settings, photos, tmp_path):
    alone = replace(settings, stage="encoder", distill_loss="mse", steps=2)
    train(replace(alone, teacher_size=256))
    _cache(photos, tmp_path / "cache", "--teacher-size", "256")
    assert EmbeddingCache(tmp_path / "cache")("sa_0", 0).shape == (256, 16, 16)
    train(replace(alone, cache=tmp_path / "cache", output=tmp_path / "cached"))
    train(replace(alone, output=tmp_path / "plain"))
    live, cached, plain = (column(tmp_path / name, "loss") for name in ("run", "cached", "plain"))
    assert (live - cached).abs().max() < 1e-2 and (live - plain).abs().min() > 0.01, (live, cached, plain)


def test_an_encoder_learns_from_plain_photos(settings, tmp_path):
    folder = write_photos(tmp_path / "some", 8)
    for i in range(1, 8):
        (folder / f"sa_{i}.json").unlink()
    alone = replace(settings, data=(folder,), stage="encoder", distill_loss="mse", steps=2)
    train(replace(alone, holdout=0.25, steps=1))
    assert len((settings.output / "photos.txt").read_text().split()) == 6
    assert len(column(settings.output, "val_error")) == 2 and (settings.output / "best.safetensors").is_file()
    _cache(folder, tmp_path / "cache", "--stage", "encoder")
    train(replace(alone, cache=tmp_path / "cache", output=tmp_path / "cached", precision="bf16", answers=2))
    assert len(column(tmp_path / "cached", "fd")) == 2


def test_more_views_are_added_to_those_that_are_there(photos, tmp_path):
    teacher, sam = torch.nn.Conv2d(3, 256, 16, 16, bias=False), sam_model_registry["vit_t"](image_size=64)

    def write(views, **other):
        settings = {"image_size": 64, "views": views} | other
        how = {"batch_size": 2, "part_size": 3, "device": torch.device("cpu")}
        known = list_photos([photos])[:4]
        list(write_embeddings(tmp_path, teacher, {}, sam, known, ViewSettings(64, 1, 0, views), settings, **how))
        return EmbeddingCache(tmp_path)

    write(1)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    cache = write(2)
    assert len(before) == 2 and len(list(tmp_path.glob("part-*"))) == 4
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in before.items())
    assert len(cache.parts) == 8 and not torch.equal(cache("sa_0", 0), cache("sa_0", 1))
    sample = Views(list_photos([photos])[:4], ViewSettings(64, 1, 0, 2, cache))[5]
    assert torch.equal(sample.target, cache(sample.id, 1))
    for other in ({"views": 1}, {"views": 2, "teacher_sha256": "other"}):
        with pytest.raises(ValueError, match="another teacher, other photos or other settings"):
            write(**other)
