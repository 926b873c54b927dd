"""`blsam train-imagenet` and `blsam evaluate-imagenet` as users type them."""

import json
import re

import pytest
import torch

from blsam.baselines import build_baseline
from blsam.build_classifier import build_classifier
from blsam.checkpoint import save
from blsam.cli import main
from blsam.commands import train_imagenet
from blsam.config import CLASSIFIERS
from blsam.data.imagenet import EvaluationTransform, open_images
from tests.labelled import write_folder

pytestmark = pytest.mark.usefixtures("one_thread")

MINI = "vit_mini_patch4_32"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("set"), {"train": 4, "test": 3}, size=32)


@pytest.fixture(scope="module")
def deit(tmp_path_factory):
    """A file with other widths."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save(path, build_classifier(CLASSIFIERS["vit_tiny_patch16_224"]).state_dict(), {})
    return path


def one_line_of(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("blsam: "), error
    return error


def test_trained_then_resumed_then_measured(data, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train-imagenet", "--model", "blvit_mini_patch4_32", "--data", data, "--batch-size", 4, "--workers", 0]
    command += ["--output", run, "--device", "cpu", "--keep-ratio", "0.25,0.5"]
    assert main([*map(str, command), "--steps", "1"]) == 0
    capsys.readouterr()
    assert "not empty" in one_line_of(capsys, *command, "--steps", 2)
    assert main([*map(str, command), "--steps", "2", "--resume"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "model.safetensors")
    figures = tmp_path / "figures.json"
    measure = ["evaluate-imagenet", "--model", "blvit_mini_patch4_32", "--checkpoint", run / "model.safetensors"]
    measure += ["--data", data, "--workers", 0, "--seconds", 0.01, "--json", figures, "--device", "cpu"]
    assert main([*map(str, measure)]) == 0
    out, found = capsys.readouterr().out, json.loads(figures.read_text())
    assert found["images"] == 6 and found["crop_ratio"] == 1 and found["keep_ratio"] == 0.25
    assert f"top-1 {found['top1']:.2f} %" in out and "of 6 images" in out and "crop ratio 1" in out
    assert set(found["images_per_second"]) == {"1", "64"} and 0.02 < found["gmacs"] < 0.09
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["top1"] == pytest.approx(last["val_top1"], abs=0.01)


@pytest.mark.parametrize(
    "more, error",
    (
        ([], "give one of --epochs and --steps"),
        (["--steps", "1", "--epochs", "1"], "give one of"),
        (["--steps", "0"], "--steps must be above 0, is 0"),
        (["--epochs", "nan"], "--epochs must be above 0"),
        (["--steps", "1", "--mixup", "-1"], "--mixup must be 0 or more"),
        (["--steps", "1", "--ema", "1"], "--ema must be at least 0 and below 1"),
        (["--steps", "1", "--teacher", MINI], "go together"),
        (["--steps", "1", "--batch-size", "6", "--accumulate", "4"], "--batch-size 6 is not a multiple of 4 passes"),
        (["--steps", "1", "--batch-size", "3"], "images are mixed in pairs, and 3 a pass are not even"),
        (["--steps", "1", "--image-size", "30"], "image size must be multiples of 4"),
        (["--steps", "1", "--init", "none.pth"], "no checkpoint at none.pth"),
        (["--steps", "1", "--data", "nowhere"], "no images at nowhere"),
        (["--steps", "1", "--keep-ratio", "2"], "keep ratios lie in"),
        (["--steps", "1", "--baseline", "evit", "--model", "blvit_mini_patch4_32"], "runs on a plain model, such as"),
        (["--steps", "1", "--baseline", "evit", "--keep-ratio", "0.5,0.6"], "takes one --keep-ratio"),
        (["--steps", "1", "--crop-ratio", "0"], "crop ratios lie in"),
        (["--steps", "1", "--seed", "-1"], "--seed is at least 0"),
        (["--steps", "1", "--model", "vit_huge"], "invalid choice: 'vit_huge'"),
    ),
)
def test_a_training_that_cannot_be(more, error, data, tmp_path, capsys):
    command = ["train-imagenet", "--model", MINI, "--data", data, "--output", tmp_path / "run", "--device", "cpu"]
    assert error in one_line_of(capsys, *command, "--workers", 0, *more)


def test_weights_of_another_model(data, deit, tmp_path, capsys):
    command = ["train-imagenet", "--model", MINI, "--data", data, "--output", tmp_path / "run", "--steps", 1]
    assert "has patches of [192, 3, 16, 16]" in one_line_of(capsys, *command, "--init", deit, "--workers", 0)


def test_timm_is_asked_for(data, tmp_path, capsys, monkeypatch):
    def missing():
        raise ImportError("this needs timm: pip install 'blsam[classify]'")

    monkeypatch.setattr(train_imagenet, "require_timm", missing)
    command = ["train-imagenet", "--model", MINI, "--data", data, "--output", tmp_path / "run", "--steps", 1]
    assert "pip install 'blsam[classify]'" in one_line_of(capsys, *command)


@pytest.mark.parametrize(
    "arguments, error",
    (
        (["--model", "vit_huge"], "no classifier 'vit_huge'; there are vit_base_patch16_224, "),
        (["--model", "timm:deit_giant"], "has no model 'deit_giant'.*such as deit"),
        (["--model", "timm:deit_tiny_patch16_224", "--checkpoint", "none.pth"], "no checkpoint at none.pth"),
        (["--model", "timm:levit_128s", "--baseline", "evit"], "--baseline is for our own plain models"),
        (["--model", "blvit_mini_patch4_32", "--baseline", "evit"], "runs on a plain ViT"),
        (["--model", MINI, "--image-size", "30"], "image size must be multiples of 4"),
        (["--model", MINI, "--data", "."], "give --checkpoint, or --random-weights"),
        (["--model", MINI, "--data", "nowhere", "--random-weights"], "no images at nowhere"),
        (["--model", MINI, "--json", "a.txt"], "ends in .json"),
        (["--model", MINI, "--batch-size", "0"], "--batch-size is at least 1"),
    ),
)
def test_a_measurement_that_cannot_be(arguments, error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = one_line_of(capsys, "evaluate-imagenet", *arguments, "--seconds", 0, "--device", "cpu")
    assert re.search(error, found), found


def test_classes_must_be_the_models(data, deit, capsys):
    command = ["evaluate-imagenet", "--model", MINI, "--data", data, "--random-weights", "--device", "cpu"]
    assert "the images are of 2 classes, " + MINI + " answers 10" in one_line_of(capsys, *command)
    other = ["evaluate-imagenet", "--model", "timm:deit_small_patch16_224", "--checkpoint", deit, "--device", "cpu"]
    assert "does not fit timm:deit_small_patch16_224" in one_line_of(capsys, *other)


@pytest.mark.parametrize("more, keep", (([], 0.7), (["--keep-ratio", "0.5"], 0.5)))
def test_a_baselines_cost(more, keep, tmp_path):
    figures = tmp_path / "figures.json"
    command = ["evaluate-imagenet", "--model", MINI, "--baseline", "evit", "--seconds", "0", "--device", "cpu"]
    assert main([*command, *more, "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    method = build_baseline("evit", CLASSIFIERS[MINI], keep_ratio=keep)
    assert found["keep_ratio"] == keep and found["gmacs"] == pytest.approx(method.macs() / 1e9, abs=1e-5)
    assert found["model"] == f"evit on {MINI}"


def test_the_cost_of_a_method_that_depends_on_images(data, tmp_path):
    """Is a mean over all of --data, not over the few that are timed."""
    figures = tmp_path / "figures.json"
    command = ["evaluate-imagenet", "--model", MINI, "--baseline", "ats", "--seconds", "0", "--device", "cpu"]
    state = build_classifier(CLASSIFIERS[MINI], num_classes=2).state_dict()
    save(tmp_path / "two.safetensors", state, {})
    command += ["--data", str(data), "--workers", "0", "--checkpoint", str(tmp_path / "two.safetensors")]
    assert main([*command, "--json", str(figures)]) == 0
    method = build_baseline("ats", CLASSIFIERS[MINI], tmp_path / "two.safetensors")
    images, transform = open_images((data,), "val"), EvaluationTransform(32, 1.0)
    macs = method.macs(torch.stack([transform(images.read(i)) for i in range(len(images))]))
    assert json.loads(figures.read_text())["gmacs"] == pytest.approx(macs / 1e9, abs=1e-5)


def test_the_cost_alone(capsys):
    command = ["evaluate-imagenet", "--model", MINI, "--seconds", "0", "--device", "cpu"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "top-1" not in out and "GMACs an image" in out
