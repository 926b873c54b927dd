"""The command line on real pictures, good and bad, with the dense model that ships."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools
from skimage import data

from blsam.cli import main
from blsam.images import read_image
from blsam.options import shipped_checkpoint


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


def test_images_are_read_as_a_person_sees_them(tmp_path):
    grey = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    rgb = np.repeat(grey[..., None], 3, 2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(rgb).quantize(256).save(tmp_path / "palette.png")
    for name, tolerance in (("grey.png", 0), ("16.png", 0), ("palette.png", 3)):
        gap = np.abs(read_image(tmp_path / name).astype(int) - rgb).max()
        assert gap <= tolerance, f"{name}: off by {gap}"

    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "rgba.png")
    seen = read_image(tmp_path / "rgba.png")
    assert seen[0, 0].tolist() == [10, 20, 30] and seen[1, 1].tolist() == [255, 255, 255]

    upright = Image.fromarray(np.zeros((10, 20, 3), np.uint8))
    exif = upright.getexif()
    exif[0x0112] = 6  # turned a quarter
    upright.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (20, 10, 3)


def test_models_lists_the_registry(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "blsam_vit_h" in out and "2144.4" in out and "486.0" in out


@pytest.mark.parametrize("name", ["vit_t", "blsam_vit_t"])
def test_shipped_weights_are_there(name):
    path = shipped_checkpoint(name)
    assert path.is_file() and path.stat().st_size <= 32 * 2**20
