"""The command on real photos, and SAM's script of the same options."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import segment_anything
from PIL import Image
from skimage import data

from blsam import SamAutomaticMaskGenerator, sam_model_registry
from blsam.cli import main
from blsam.config import THRESHOLDS
from blsam.options import shipped_checkpoint
from scripts import amg
from tests.helpers import ROOT

OPTIONS = {"points_per_side": 4, "pred_iou_thresh": 0.45, "stability_score_thresh": 0.65}
FLAGS = [text for name, value in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
MODEL = "vit_t"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, image in (("a", data.coffee()), ("b", data.chelsea()), ("c", data.astronaut())):
        Image.fromarray(image).resize((160, 120)).save(folder / f"{name}.png")
    return folder


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "given", [["points_per_side"], ["points_per_side", "pred_iou_thresh"], list(OPTIONS)], ids=len
)
def test_masks_are_the_generator_s(given, photos, tmp_path, capsys):
    flags = [text for name in given for text in (f"--{name.replace('_', '-')}", str(OPTIONS[name]))]
    assert main(["masks", str(photos), "--model", MODEL, "--dtype", "float32", *flags, "-o", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "masks of 3 photos" in said
    for name, value in THRESHOLDS[MODEL].items():
        assert (f"--{name.replace('_', '-')} {value:g}" in said) == (name not in given), said
    sam = sam_model_registry[MODEL](shipped_checkpoint(MODEL))
    options = THRESHOLDS[MODEL] | {name: OPTIONS[name] for name in given}
    generator = SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **options)
    total = 0
    for name in "abc":
        found = json.loads((tmp_path / "photos" / f"{name}.json").read_text())
        expected = json.loads(json.dumps(generator.generate(np.asarray(Image.open(photos / f"{name}.png")))))
        assert found == {"size": [120, 160], "masks": expected}
        total += len(expected)
    assert total and len(json.loads((tmp_path / "coco.json").read_text())["annotations"]) == total


def test_sam_s_script_keeps_sam_s_thresholds(photos, tmp_path, monkeypatch):
    made = []

    class Watched(SamAutomaticMaskGenerator):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr("blsam.automatic_mask_generator.SamAutomaticMaskGenerator", Watched)
    words = ["amg", "--input", photos, "--output", tmp_path / "out", "--checkpoint", shipped_checkpoint(MODEL)]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--model-type", MODEL, "--points-per-side", "2"])
    amg.main()
    plain = segment_anything.SamAutomaticMaskGenerator(made[0].predictor.model)
    for name in THRESHOLDS[MODEL]:
        assert getattr(made[0], name) == getattr(plain, name) > THRESHOLDS[MODEL][name]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--points-per-side", "0"], "--points-per-side is at least 1, is 0"),
        (["--min-mask-region-area", "-1"], "at least 0"),
        (["--pred-iou-thresh", "nan"], "at least 0"),
        (["--checkpoint", "no.pth"], "no checkpoint"),
    ],
)
def test_what_it_refuses(options, message, photos, tmp_path, capsys):
    assert main(["masks", str(photos), "--model", MODEL, "-o", str(tmp_path / "out"), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_none_can_be_read(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no photo")
    assert main(["masks", str(tmp_path / "a.png"), "--model", MODEL, "-o", str(tmp_path / "out")]) == 2
    assert "none of the photos can be read" in capsys.readouterr().err


def command(*arguments, processes=None):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "29533"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *(launcher if processes else []), "-m", "blsam", "masks", *map(str, arguments)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.e2e
def test_killed_resumed_and_by_two_processes(photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        for name in "abc":
            (folder / f"{name}{i}.png").write_bytes((photos / f"{name}.png").read_bytes())
    options = [folder, "--model", MODEL, "--dtype", "float32", *FLAGS, "--format", "rle", "-o"]
    whole = command(*options, tmp_path / "whole")
    assert whole.wait() == 0, whole.communicate()
    expected = files(tmp_path / "whole")
    assert len(expected) == 16

    killed = command(*options, tmp_path / "killed")
    while len(files(tmp_path / "killed")) < 4 and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 0 < len(files(tmp_path / "killed")) < 16
    again = command(*options, tmp_path / "killed")
    assert "were there" in again.communicate()[0]
    assert files(tmp_path / "killed") == expected

    two = command(*options, tmp_path / "two", processes=2)
    out, err = two.communicate()
    assert two.returncode == 0 and "masks of 15 photos" in out, err
    assert files(tmp_path / "two") == expected


@pytest.mark.e2e
def test_sam_s_command_line(photos, tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "amg.py"), "--input", str(photos), "--output"]
    model = ["--model-type", MODEL, "--checkpoint", str(shipped_checkpoint(MODEL)), "--device", "cpu", *FLAGS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for more in ([], ["--convert-to-rle"]):
        output = tmp_path / ("rle" if more else "png")
        done = subprocess.run([*script, str(output), *model, *more], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    for name in "abc":
        records = json.loads((tmp_path / "rle" / f"{name}.json").read_text())
        assert len(list((tmp_path / "png" / name).glob("*.png"))) == len(records)
        assert len((tmp_path / "png" / name / "metadata.csv").read_text().splitlines()) == 1 + len(records)
