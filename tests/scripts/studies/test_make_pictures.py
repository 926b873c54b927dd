"""The README's pictures."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from skimage import data

from tests.helpers import ROOT

CHROMIUM = shutil.which("chromium")


@pytest.mark.e2e
def test_the_readme_s_pictures_can_be_made(tmp_path):
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    command = [sys.executable, "-m", "scripts.studies.make_pictures", "-o", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert made.returncode == 0, made.stderr
    cup, routing, page = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int) for name in
                          ("cup", "routing", "demo"))  # fmt: skip
    assert page.shape == (840, 1180, 3) and routing.shape[1] > 2 * routing.shape[0]
    blue = (cup - data.coffee())[..., 2] > 40  # the mask, most of the box's upper half
    assert 0.2 < blue[10:245, 160:400].mean() < 0.9 and blue[:, :150].mean() < 0.01
