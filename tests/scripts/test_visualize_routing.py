"""The picture of a photo's routing, as its users make it."""

import subprocess
import sys

import pytest
from PIL import Image
from skimage import data

from blsam.checkpoint import save
from blsam.config import CLASSIFIERS
from blsam.modeling.classifier import BLVisionTransformer
from tests.helpers import ROOT


@pytest.mark.e2e
def test_the_script_on_a_photo(tmp_path):
    Image.fromarray(data.chelsea()).save(tmp_path / "cat.png")
    script = ROOT / "scripts" / "visualize_routing.py"
    command = [sys.executable, str(script), str(tmp_path / "cat.png"), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    picture = Image.open(tmp_path / "out" / "cat.png")
    assert picture.width > 1000
    done = subprocess.run([*command[:2], str(tmp_path / "none.png")], capture_output=True, text=True)
    assert done.returncode == 2 and "no image at" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.e2e
def test_the_script_on_a_classifier(tmp_path):
    config = CLASSIFIERS["blvit_mini_patch4_32"]
    save(tmp_path / "mini.safetensors", BLVisionTransformer(config).state_dict(), {"model": config.name})
    Image.fromarray(data.chelsea()).save(tmp_path / "cat.png")
    script = ROOT / "scripts" / "visualize_routing.py"
    command = [sys.executable, script, tmp_path / "cat.png", "--model", config.name, "-o", tmp_path / "out"]
    done = subprocess.run([*command, "--checkpoint", tmp_path / "mini.safetensors"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out" / "cat.png").width > 1000
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no weights ship for" in done.stderr
