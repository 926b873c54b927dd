"""What `blsam segment` writes over, how it takes the time, and what it says before work starts."""

import json
import time

import numpy as np
import pytest
from PIL import Image
from skimage import data

from blsam import distributed, predictor
from blsam.cli import main


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(data.coffee()).save("cup.jpg")
    return "cup.jpg"


@pytest.mark.parametrize("option", ["-o", "--mask", "--json"])
def test_the_photo_is_not_written_over(photo, option, capsys, tmp_path):
    name = photo
    if option == "--mask":
        Image.fromarray(data.coffee()).save("cup.png")
        name = "cup.png"
    before = (tmp_path / name).read_bytes()
    assert main(["segment", name, "--model", "vit_t", "--point", "270,60", option, name]) == 2
    error = capsys.readouterr().err
    assert f"would overwrite {name}" in error and "choose another name" in error and error.count("\n") == 1
    assert (tmp_path / name).read_bytes() == before


def test_two_outputs_are_two_files(photo, capsys):
    command = ["segment", photo, "--model", "vit_t", "--point", "270,60"]
    assert main([*command, "-o", "a.png", "--mask", "a.png"]) == 2
    assert "--mask a.png would overwrite a.png" in capsys.readouterr().err
    assert main([*command, "--mask", "cup_mask.png"]) == 2  # where the overlay goes when nobody says
    assert "--mask cup_mask.png would overwrite cup_mask.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mask", "m.jpg"], "a mask of 0 and 255 ends in .png"),
        (["--json", "cup.jpg/a.json"], "is a file, not a folder"),
        (["--json", "."], "is a folder; name a file in it"),
        (["--json", "other.jpg"], "its name ends in .json"),
        (["--checkpoint", "none.pth"], "no checkpoint at none.pth"),
    ],
)
def test_what_cannot_be_written_or_read_is_said_before_the_photo_is_opened(photo, more, message, capsys, monkeypatch):
    monkeypatch.setattr("blsam.images.decode_image", lambda *_, **__: pytest.fail("opened"))
    assert main(["segment", photo, "--model", "vit_t", "--point", "1,1", *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_a_mask_has_two_values(photo):
    assert main(["segment", photo, "--model", "vit_t", "--box", "160,10,400,245", "--mask", "m.png"]) == 0
    assert np.unique(np.asarray(Image.open("m.png"))).tolist() == [0, 255]


def test_seconds_wait_for_the_device(photo, monkeypatch):
    """A device that returns from the encoder at once, and works half a second more until somebody waits for it."""
    pending, set_image = [], predictor.SamPredictor.set_image

    def begun(self, image):
        set_image(self, image)
        pending.append(0.5)

    monkeypatch.setattr(predictor.SamPredictor, "set_image", begun)
    monkeypatch.setattr(distributed, "synchronize", lambda device: time.sleep(pending.pop() if pending else 0))
    command = ["segment", photo, "--model", "vit_t", "--image-size", "64", "--point", "270,60", "--json", "a.json"]
    assert main(command) == 0
    seconds = json.loads(open("a.json").read())["seconds"]
    assert seconds["encoder"] >= 0.5 and not pending, seconds


# --- photos as people have them --------------------------------------------------------------------------------------

SMALL = ["--model", "vit_t", "--image-size", "64"]


def test_coordinates_may_lie_left_of_the_photo(photo, capsys):
    assert main(["segment", photo, *SMALL, "--box", "-5,-5,99,99", "-o", "a.png"]) == 0
    assert main(["segment", photo, *SMALL, "--box=-5,-5,99,99", "-o", "b.png"]) == 0
    assert open("a.png", "rb").read() == open("b.png", "rb").read()
    for prompt, message in (
        (["--point", "-3,4"], "point -3,4 lies outside the image of 600 x 400 pixels"),
        (["--box", "-9,-9,-1,-1"], "misses the image"),
        (["--box", "-inf,0,4,4"], "four finite numbers"),
    ):
        capsys.readouterr()
        assert main(["segment", photo, *SMALL, *prompt]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_exif_is_followed_unless_told_otherwise(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).save("turned.jpg", exif=exif)
    for more, size in (([], (400, 600)), (["--no-exif"], (600, 400))):
        assert main(["segment", "turned.jpg", *SMALL, "--point", "270,60", "--mask", "m.png", *more]) == 0
        assert Image.open("m.png").size == size


def test_a_limit_of_one_s_own(photo, capsys):
    command = ["segment", photo, *SMALL, "--point", "270,60", "--max-megapixels"]
    assert main([*command, "0.2"]) == 2
    error = capsys.readouterr().err
    assert "cup.jpg is too large, 600 x 400 pixels: 0.2 megapixels" in error and error.count("\n") == 1
    assert main([*command, "0.24"]) == 0


def test_what_was_done_to_a_photo_is_said(photo, capsys):
    Image.fromarray(data.coffee()[..., 0].astype(np.uint16) * 16).save("deep.png")
    assert main(["segment", "deep.png", *SMALL, "--point", "270,60"]) == 0
    assert capsys.readouterr().err == "blsam: deep.png: values from 0 to 4080 are shown as 0 to 255\n"
    with open("scan.jpg", "wb") as file:
        file.write(bytes(128) + b"DICM")
    assert main(["segment", "scan.jpg", *SMALL, "--point", "270,60"]) == 2
    assert "scan.jpg is a DICOM file, which is not read here" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(2000, 1), (1, 1)], ids=str)
def test_photos_that_are_hardly_there(photo, size):
    Image.fromarray(data.coffee()).resize(size).save("thin.png")
    assert main(["segment", "thin.png", *SMALL, "--point", "0.5,0.5", "--mask", "m.png", "--json", "m.json"]) == 0
    assert Image.open("m.png").size == size and Image.open("thin_mask.png").size == size
