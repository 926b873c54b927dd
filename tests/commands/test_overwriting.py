"""No command writes over what it reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

import blsam
from blsam.cli import main
from blsam.options import shipped_checkpoint

ROOT = Path(blsam.__file__).parents[1]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("coffee", "astronaut"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(
    "outputs",
    [
        ["-o", "mine.pth"],
        ["-o", "b.pth", "--json", "mine.pth"],
        ["-o", "b.pth", "--json", "b.pth"],
        ["-o", "b.pth", "--json", "photos/coffee.png"],
    ],
)
def test_calibrate(photos, outputs, capsys, tmp_path):
    (tmp_path / "mine.pth").write_bytes(shipped_checkpoint("vit_t").read_bytes())
    before = (tmp_path / "mine.pth").read_bytes()
    command = ["calibrate", "--model", "blsam_vit_t", "--checkpoint", "mine.pth", "--images", str(photos)]
    assert main([*command, *outputs]) == 2
    error = capsys.readouterr().err
    assert "would overwrite" in error and error.count("\n") == 1, error
    assert (tmp_path / "mine.pth").read_bytes() == before and not (tmp_path / "b.pth").exists()


def test_routing_beside_the_photos(photos):
    before = (photos / "coffee.png").read_bytes()
    command = [sys.executable, str(ROOT / "scripts" / "visualize_routing.py"), str(photos / "coffee.png")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "-o", str(photos)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "would overwrite" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert (photos / "coffee.png").read_bytes() == before
