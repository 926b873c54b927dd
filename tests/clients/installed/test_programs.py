"""Each program on `segment_anything`, on our exact model, which must find the same, and on a routed one."""

import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import blsam
from blsam.options import shipped_checkpoint
from tests.clients.installed.run import IMAGE_SIZE, STOCK
from tests.clients.replay import differing
from tests.helpers import ROOT
from tests.photos import PHOTOS

pytestmark = pytest.mark.clients
PROGRAMS = {  # the module that shows whether it is installed
    "cellpose": "cellpose",
    "isat": "ISAT",
    "micro_sam": "micro_sam",
    "napari_sam": "napari_sam",
    "napari_segment_anything": "napari_segment_anything",
    "peft": "peft",
    "samexporter": "samexporter",
    "samgeo": "samgeo",
    "supervision": "supervision",
}
EXACT_ONLY = {"cellpose": "which runs blocks by hand, where nothing is routed"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights that ship at an image size, as a file of SAM's kind."""
    folder = tmp_path_factory.mktemp("weights")

    @cache
    def make(name, size):
        sam = blsam.sam_model_registry[name](shipped_checkpoint(name), image_size=size)
        torch.save(sam.state_dict(), folder / f"{name}_{size}.pth")
        return folder / f"{name}_{size}.pth"

    return make


def result_of(program, side, checkpoint, folder):
    """What the program found on one side: arrays by name."""
    folder.mkdir()
    Image.fromarray(PHOTOS["landscape"]).save(folder / "photo.png")
    work = folder / "work"
    work.mkdir()
    command = [sys.executable, "-m", "tests.clients.installed.run", program, side]
    done = subprocess.run(
        [*command, folder / "photo.png", checkpoint, work], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert not done.returncode, f"{program} on {side}:\n{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    with np.load(work / "found.npz") as file:
        return dict(file)


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program, weights, tmp_path, request):
    module = import_module(f"tests.clients.installed.{program}")
    if not find_spec(PROGRAMS[program]):
        pytest.skip(f"{module.PACKAGE} is not installed")
    size = getattr(module, "IMAGE_SIZE", IMAGE_SIZE)
    sides = {STOCK: "vit_t", "vit_t": "vit_t"} | ({} if program in EXACT_ONLY else {"blsam_vit_t": "blsam_vit_t"})
    found = {side: result_of(program, side, weights(name, size), tmp_path / side) for side, name in sides.items()}
    pictures = request.config.getoption("--pictures", None)
    if pictures:
        Path(pictures).mkdir(parents=True, exist_ok=True)
        columns = [picture(side, one) for side, one in found.items()]
        Image.fromarray(np.concatenate(columns, 1)).save(Path(pictures) / f"{program}.png")
    differences = differing(found["vit_t"], found[STOCK], exact=True)
    assert not differences, "\n".join(differences)
    assert list(found.get("blsam_vit_t", found[STOCK])) == list(found[STOCK])


def picture(title, found):
    """The image with what was found in it, and the side's name above: uint8 [h, w, 3]."""
    drawn = found.get("image", PHOTOS["landscape"]).copy()
    for number, mask in enumerate(sorted(found["masks"], key=np.sum, reverse=True)):
        colour = cv2.cvtColor(np.uint8([[[number * 47 % 180, 220, 255]]]), cv2.COLOR_HSV2RGB)[0, 0]
        drawn[mask] = drawn[mask] // 2 + colour // 2
        outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outline, -1, colour.tolist(), 2)
    bar = np.full((28, drawn.shape[1], 3), 255, np.uint8)
    cv2.putText(
        bar, f"{title}: {len(found['masks'])}", (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA
    )
    return np.pad(np.concatenate([bar, drawn]), ((0, 0), (0, 6), (0, 0)), constant_values=255)
