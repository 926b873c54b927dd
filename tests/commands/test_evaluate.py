"""What `blsam evaluate` checks before it starts, and what it reads of a checkpoint."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from blsam.cli import main
from blsam.commands import evaluate
from blsam.data.annotations import Photo
from blsam.distributed import Stopwatch
from blsam.evaluation.models import load_subject
from blsam.options import Parser, shipped_checkpoint
from tests.helpers import COCO, ROOT, needs_data


def parsed(*arguments):
    parser = Parser()
    evaluate.add_arguments(parser)
    return parser.parse_args([*arguments, "--model", "vit_t", "--annotations", "a.json", "--images", "photos"])


def test_a_checkpoint_is_hashed_without_being_held(monkeypatch):
    path = shipped_checkpoint("vit_t")
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"all of {self} at once"))
    subject = load_subject(parsed("coco", "--image-size", "64"))
    assert subject.identity["sha256"] == expected and subject.identity["image_size"] == 64


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("coco", ["--json", "a.json"], "--json a.json would overwrite a.json"),
        ("zero-shot", ["--boxes", "b.json", "--json", "b.json"], "--json b.json would overwrite b.json"),
        ("zero-shot", ["--boxes", "b.json", "--results", "b.json"], "--results b.json would overwrite b.json"),
        ("zero-shot", ["--boxes", "gt", "--results", "r.json", "--json", "r.json"], "would overwrite r.json"),
        ("coco", ["--output", "a.json"], "a.json is a file, not a folder"),
        ("lvis", ["--seed", "-1"], "--seed is at least 0"),
        ("lvis", ["--prompt", "point", "--num-points", "0"], "--num-points is at least 1"),
        ("everything", ["--points-per-side", "0"], "--points-per-side is at least 1"),
        ("everything", ["--found-at", "1.5"], "--found-at lies in (0, 1]"),
    ],
)
def test_outputs_and_numbers_are_checked_first(task, more, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        Path(name).write_text("{}")
    more += ["--dataset", "coco"] if task == "zero-shot" else []
    common = ["--model", "vit_t", "--annotations", "a.json", "--images", "photos"]
    assert main(["evaluate", task, *common, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert Path("a.json").read_text() == Path("b.json").read_text() == "{}"


def test_a_task_must_be_named(capsys):
    assert main(["evaluate"]) == 2 and "coco|lvis|zero-shot|everything" in capsys.readouterr().err


def arguments(*more):
    parser = Parser()
    evaluate.add_prompted_arguments(parser)
    return parser.parse_args(["--model", "vit_t", "--annotations", "a", "--images", "b", "--prompt", "point", *more])


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ((), "paper"),
        (("--num-points", "3"), "paper"),
        (("--point-sampling", "center"), "paper, modified: --point-sampling center"),
        (("--point-sampling", "random"), "paper"),
        (("--protocol", "efficientvit", "--no-crowd"), "efficientvit, modified: --no-crowd"),
        (("--select", "oracle", "--single-mask"), "paper, modified: --select oracle --single-mask"),
        (("--protocol", "sam", "--crowd"), "sam, modified: --crowd"),
    ],
)
def test_an_explicit_flag_overrides_the_protocol_and_is_named(flags, name):
    assert evaluate.protocol_of(arguments(*flags))[1] == name


def test_a_photo_that_exif_turns_is_encoded_as_stored_or_named(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    seen = []
    subject = SimpleNamespace(predictor=SimpleNamespace(set_image=lambda image: seen.append(image.shape)))
    watch = Stopwatch(torch.device("cpu"))
    evaluate.set_image(subject, Photo(1, tmp_path / "turned.jpg", height=40, width=60), watch)
    with pytest.raises(ValueError, match="60 x 40 pixels, its annotations 40 x 60: EXIF turns it"):
        evaluate.set_image(subject, Photo(1, tmp_path / "turned.jpg", height=60, width=40), watch)
    assert seen == [(40, 60, 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--model", "vit_q"), "no model 'vit_q'"),
        (("--model", "vit_b"), "give --checkpoint"),
        (("--model", "nowhere:vit_b"), "no package 'nowhere'"),
        (("--model", "json:vit_b"), "no SamPredictor"),
        (("--model", "segment_anything:vit_q"), "no model 'vit_q'"),
        (("--model", "segment_anything:vit_b"), "needs --checkpoint"),
        (("--images", "/nowhere"), "no folder"),
        (("--annotations", "/nowhere.json"), "no annotations"),
        (("--limit", "0"), "at least 1 image"),
        (("--num-points", "3"), "goes with --prompt point"),
        (("--point-sampling", "center"), "goes with --prompt point"),
        (("--model", "segment_anything:vit_b", "--checkpoint", str(ROOT / "setup.py")), "does not load"),
    ],
)
@needs_data
def test_bad_arguments_get_one_line(changes, message, capsys):
    assert main(["evaluate", "coco", "--model", "vit_t", *map(str, COCO), *changes]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
