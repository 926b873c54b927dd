"""The command line on real pictures, good and bad, with the dense model that ships."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools
from skimage import data

from blsam.cli import main
from blsam.config import MODELS
from blsam.options import shipped_checkpoint
from blsam.precision import processor
from blsam.runtimes.choice import resolve_for


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "astronaut.png"
    Image.fromarray(data.astronaut()).save(path)
    return path


def test_segment_writes_overlay_mask_and_json(photo, tmp_path):
    out, mask, record = tmp_path / "o.png", tmp_path / "m.png", tmp_path / "r.json"
    command = ["segment", str(photo), "--model", "vit_t", "--box", "70,0,420,511"]
    assert main([*command, "-o", str(out), "--mask", str(mask), "--json", str(record)]) == 0
    result = json.loads(record.read_text())
    assert set(result) == {"segmentation", "score", "box", "area", "seconds", "candidates"}
    assert set(result["seconds"]) == {"encoder", "decoder"} and len(result["candidates"]) == 2
    decoded = rle_tools.decode(result["segmentation"]).astype(bool)
    pixels = np.asarray(Image.open(mask))
    assert np.array_equal(pixels > 0, decoded) and result["area"] == decoded.sum()
    assert all(result["score"] >= other["score"] for other in result["candidates"])
    assert decoded[150:300, 180:260].mean() > 0.9, "the mask misses the astronaut's face and chest"
    assert Image.open(out).size == (512, 512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to segment"),
        (["--point", "9999,3"], "outside the image"),
        (["--box", "5,5,1,1"], "x1 < x2"),
        (["--box", "600,600,700,700"], "misses the image"),
        (["--point", "1,1", "--model", "vit_b"], "no weights ship"),
        (["--point", "1,1", "--image-size", "500"], "multiple of 16"),
        (["--point", "1,1", "--keep-ratio", "0"], "keep ratio"),
        (["--point", "1,1", "--checkpoint", "nothing.pth"], "no checkpoint"),
        (["--point", "1,1", "-o", "out.txt"], "ends in .png"),
    ],
)
def test_bad_input_is_one_line_and_status_2(photo, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--model" not in arguments:
        arguments = [*arguments, "--model", "vit_t"]
    assert main(["segment", str(photo), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "arguments", [["--device", "nowhere"], ["--point", "1"], ["--box", "1,2,3"], ["--model", "x"]]
)
def test_arguments_that_cannot_be_read(photo, arguments, capsys):
    assert main(["segment", str(photo), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("blsam: argument ") and error.count("\n") == 1, error


def test_unreadable_images(tmp_path, capsys):
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    for path, message in ((text, "not an image"), (tmp_path / "none.jpg", "no image at")):
        assert main(["segment", str(path), "--point", "1,1", "--model", "vit_t"]) == 2
        assert message in capsys.readouterr().err


def test_models_lists_the_registry(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "blsam_vit_h" in out and "2144.4" in out and "486.0" in out
    rows = {line.split()[0]: line for line in out.splitlines()}
    for name in ("vit_b", "evit_vit_t"):
        runtime, dtype = resolve_for(MODELS[name], "auto", "auto")
        assert rows[name].endswith(f"{runtime}, {str(dtype).removeprefix('torch.')}"), rows[name]
    assert f"on this processor ({processor()})" in rows["auto:"]


@pytest.mark.parametrize("name", ["vit_t", "blsam_vit_t", "vit_t_fine", "blsam_vit_t_fine"])
def test_shipped_weights_are_there(name):
    path = shipped_checkpoint(name)
    assert path.is_file() and path.stat().st_size <= 32 * 2**20
