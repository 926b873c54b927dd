"""Photos as they come from files and out of memory."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, features
from segment_anything.utils.transforms import ResizeLongestSide
from skimage import data

from blsam import images
from blsam.images import as_photo, as_photos, decode_image, read_annotated, read_image
from tests.demo.helpers import JPEG, png_header

CUP = data.coffee()
SMALL = np.ascontiguousarray(CUP[100:140, 200:260])  # 40 x 60


def file_of(pixels, kind="PNG", **options):
    """An array or a picture as the bytes of a file."""
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# --- files -----------------------------------------------------------------------------------------------------------


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
    seen = read_image(file_of(clear))
    assert seen[0, 0].tolist() == [10, 20, 30] and seen[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(9))
def test_exif_turns_a_photo_unless_its_pixels_are_wanted_as_stored(kind, orientation):
    """Against cv2, which turns JPEG; Pillow turns TIFF by itself, which is turned back here."""
    options = {"lossless": True} if kind == "WEBP" else {}
    plain = read_image(file_of(SMALL, kind, **options))
    found = file_of(SMALL, kind, exif=turned(orientation), **options)
    assert np.array_equal(read_image(found, upright=False), plain)
    jpeg = np.frombuffer(file_of(SMALL, "JPEG", exif=turned(orientation), quality=100), np.uint8)
    expected = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[..., ::-1]
    upright = read_image(found)
    assert upright.shape == expected.shape
    assert np.abs(upright.astype(int) - expected).mean() < 12, "turned another way"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_is_broken_is_left_alone():
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        assert decode_image(file_of(SMALL, "JPEG", exif=exif))[0].shape == SMALL.shape


@pytest.mark.parametrize("stored", ["PNG", "TIFF", "JPEG2000"])
def test_twelve_bits_are_not_black(stored):
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    with pytest.warns(UserWarning, match="the photo: values from 0 to 4095 are shown as 0 to 255") as caught:
        pixels = read_image(file_of(ramp, stored))
    assert len(caught) == 1
    assert np.array_equal(pixels[..., 1], np.rint(ramp / 4095 * 255))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_twelve_bits_of_colours_are_not_black(suffix):
    values = SMALL.astype(np.uint16) * 16
    for deep, tolerance in ((values, 1), (SMALL.astype(np.uint16) * 257, 1)):
        pixels, notes = decode_image(cv2.imencode(suffix, deep[..., ::-1])[1].tobytes())
        expected = (deep - deep.min()) * (255 / np.ptp(deep)) if deep is values else SMALL
        assert np.abs(pixels - expected).max() <= tolerance and len(notes) == (deep is values)
    assert decode_image(file_of(SMALL // 8))[0].max() < 32, "dark, but all of it is there"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.arange(600, dtype=np.int32).reshape(20, 30) - 300, "from -300 to 299"),
        (np.arange(600, dtype=np.int32).reshape(20, 30) * 10**6, "from 0 to 5.99e+08"),
        (np.arange(600, dtype=np.float32).reshape(20, 30) - 0.5, "from -0.5 to 598.5"),
        (np.arange(600, dtype=np.float32).reshape(20, 30) / 599, ""),
        (np.arange(256, dtype=np.int32).reshape(16, 16), ""),
        (np.arange(256, dtype=np.float32).reshape(16, 16), ""),
    ],
)
def test_grey_of_32_bits(values, words):
    pixels, notes = decode_image(file_of(values, "TIFF"))
    expected = np.rint((values.astype(float) - values.min()) * (255 / np.ptp(values.astype(float))))
    assert np.abs(pixels[..., 0] - expected).max() <= 1 and words in " ".join(notes) and len(notes) == bool(words)


def frames_of(kind):
    return file_of(SMALL, kind, save_all=True, append_images=[Image.fromarray(255 - SMALL)])


def test_of_several_frames_the_first():
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        pixels, notes = decode_image(frames_of(kind))
        assert notes == ["of several frames or pages the first is taken"]
        assert np.abs(pixels.astype(int) - SMALL).mean() < 12
    assert not decode_image(frames_of("MPO"))[1]  # as phones make them
    chosen = Image.open(io.BytesIO(frames_of("TIFF")))
    chosen.seek(1)
    assert np.array_equal(as_photo(chosen), 255 - SMALL)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "AVIF"])
def test_files_cut_short_are_refused(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    whole = file_of(CUP, kind)
    assert read_image(whole).shape == CUP.shape
    for cut in (len(whole) // 2, len(whole) - 60):
        with pytest.raises(ValueError, match=r"^the photo is damaged or not an image \(.+\)$"):
            read_image(whole[:cut])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is empty"),
        (b"a text", "no format that is known here"),
        (bytes(128) + b"DICM", "is a DICOM file, which is not read here; convert it"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "is a video"),
        (b"<html>", "is a web page"),
        (b"MM\0*\0\0\0\x08", "a TIFF of a kind that is not read here"),
        (file_of(SMALL, "TIFF", tiffinfo={50706: b"\1\4\0\0"}), "is a RAW photo"),
        (file_of(SMALL, "TIFF", tiffinfo={254: 1, 330: 8}), "is a RAW photo"),
        (file_of(np.full((4, 4), np.nan, np.float32), "TIFF"), "16 of its values are not finite"),
    ],
)
def test_what_is_no_photo_is_named_in_one_line(contents, message, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(contents)
    for source, name in ((contents, "the photo"), (path, str(path)), (str(path), str(path))):
        with pytest.raises(ValueError, match=message) as caught:
            read_image(source)
        assert str(caught.value).startswith(name) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there():
    for source in ("none.jpg", Path("none.jpg"), "."):
        with pytest.raises(FileNotFoundError, match="no image at"):
            as_photo(source)


def test_heic_asks_for_pillow_heif_and_is_read_with_it(monkeypatch):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # importing it fails
    images.read_heic.cache_clear()
    with pytest.raises(ValueError, match="a HEIC photo, which is not read here; pip install pillow-heif, or convert"):
        read_image(heic)

    opened, opener = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: opener(io.BytesIO(file_of(SMALL)) if opened else file))
    fake = SimpleNamespace(register_heif_opener=lambda: opened.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    images.read_heic.cache_clear()
    assert np.array_equal(read_image(heic), SMALL) and opened == [1]
    images.read_heic.cache_clear()


def test_too_large_is_seen_in_the_header(monkeypatch, recwarn):
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match="too large, 14000 x 13000 pixels: 178.957 megapixels .* --max-megapixels"):
        read_image(png_header(14_000, 13_000))
    with pytest.raises(ValueError, match="too large, 40 x 25 pixels: 0.0009 megapixels"):
        read_image(png_header(40, 25), max_megapixels=0.0009)
    for size, limit in (((14_000, 13_000), 182), ((12_000, 10_000), None)):
        with pytest.raises(ValueError, match="damaged"):  # such a header has no pixels
            read_image(png_header(*size), max_megapixels=limit)
    for limit in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            read_image(JPEG, max_megapixels=limit)
    assert not recwarn.list and Image.MAX_IMAGE_PIXELS == before
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # which somebody has done who knows
    with pytest.raises(ValueError, match="damaged"):
        read_image(png_header(30_000, 30_000))


def test_annotations_name_exif_where_it_is_why_they_do_not_fit(tmp_path):
    path = tmp_path / "turned.jpg"
    for kind in ("JPEG", "TIFF"):
        path.write_bytes(file_of(SMALL, kind, exif=turned(6)))
        assert read_annotated(path, (40, 60)).shape == SMALL.shape
        with pytest.raises(ValueError, match=r"turned.jpg has 60 x 40 pixels, its annotations 40 x 60: EXIF turns it"):
            read_annotated(path, [60, 40])
    for photo, size in ((SMALL, (60, 40)), (SMALL, (40, 61))):
        with pytest.raises(ValueError, match=rf"60 x 40 pixels, its annotations {size[1]} x {size[0]}$"):
            read_annotated(file_of(photo), size)


# --- in memory -------------------------------------------------------------------------------------------------------


def test_what_sam_takes_is_not_touched():
    assert as_photo(SMALL) is SMALL
    flipped = as_photo(SMALL, "BGR")
    assert np.shares_memory(flipped, SMALL) and np.array_equal(flipped, SMALL[..., ::-1])
    read_only = SMALL.copy()
    read_only.flags.writeable = False
    for image in (SMALL[::-1, ::-1], SMALL[::2], np.asfortranarray(SMALL), read_only):
        assert as_photo(image) is image


def test_memory_of_a_file(tmp_path):
    mapped = np.memmap(tmp_path / "photo", "uint8", "w+", shape=SMALL.shape)
    mapped[:] = SMALL
    assert as_photo(mapped) is mapped


def test_floats_from_0_to_1_are_sam_s_to_a_step():
    """torchvision, which SAM asks, cuts off where we round."""
    values = np.random.default_rng(0).random((30, 40, 3))
    transform = ResizeLongestSide(40)
    ours, theirs = transform.apply_image(as_photo(values)), transform.apply_image(values)
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_paths_bytes_and_pictures(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(file_of(SMALL))
    opened = Image.open(path)  # and not read yet
    for image in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), Image.fromarray(SMALL), opened):
        assert np.array_equal(as_photo(image), SMALL)
        with pytest.raises(ValueError, match="image_format is for arrays"):
            as_photo(image, "BGR")


def test_a_path_is_upright_and_a_picture_of_pillow_as_it_lies(tmp_path):
    path = tmp_path / "turned.jpg"
    path.write_bytes(file_of(SMALL, "JPEG", exif=turned(6)))
    assert as_photo(path).shape == (60, 40, 3) and as_photo(Image.open(path)).shape == (40, 60, 3)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_pictures_of_every_mode(mode):
    picture = Image.fromarray(SMALL)
    steps = {"La": ("LA", "La"), "PA": ("P", "PA"), "RGBa": ("RGBA", "RGBa")}.get(mode, (mode,))
    for step in steps:
        picture = picture.convert(step)
    alike = {"LA": "L", "La": "L", "PA": "P", "YCbCr": "RGB", "HSV": "RGB"}.get(mode, mode)
    expected = np.asarray(Image.fromarray(SMALL).convert(alike if alike in ("1", "L", "P") else "RGB").convert("RGB"))
    found = as_photo(picture)
    assert found.shape == SMALL.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).mean() <= 2, "YCbCr and HSV are rounded"


def test_lab_and_deep_grey_pictures():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.fromarray(SMALL), *profiles, outputMode="LAB")
    assert np.abs(as_photo(lab).astype(int) - SMALL).mean() < 2
    grey = np.asarray(Image.fromarray(SMALL).convert("L"))
    full = grey.astype(np.uint16) * 257
    pictures = {
        "I": Image.fromarray(grey).convert("I"),
        "F": Image.fromarray(grey).convert("F"),
        "I;16": Image.fromarray(full),
        "I;16B": Image.frombytes("I;16B", (60, 40), full.astype(">u2").tobytes()),
    }
    for mode, picture in pictures.items():
        assert picture.mode == mode and np.array_equal(as_photo(picture)[..., 0], grey), mode


@pytest.mark.parametrize(
    "image", [None, 5, "", {}, [], object(), [[1], [1, 2]], ["a.jpg"], np.empty((0, 0, 3), np.uint8)]
)
def test_what_is_no_photo_is_one_line(image):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        as_photo(image)
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 10
    with pytest.raises(ValueError, match="image_format must be RGB or BGR"):
        as_photo(SMALL, "GBR")


def test_pictures_without_pixels(tmp_path):
    Image.fromarray(SMALL).save(tmp_path / "photo.jpg")
    with Image.open(tmp_path / "photo.jpg") as closed:
        pass
    for picture, message in ((Image.new("RGB", (0, 5)), "it is empty, 0 x 5"), (closed, "an image must be uint8")):
        with pytest.raises(ValueError, match=message) as caught:
            as_photo(picture)
        assert "\n" not in str(caught.value)


def test_a_picture_of_a_damaged_file_is_a_value_error():
    with pytest.raises(ValueError, match="an image must be uint8.*truncated"):
        as_photo(Image.open(io.BytesIO(JPEG[: len(JPEG) // 2])))


def test_several_photos():
    found = as_photos(iter([SMALL, SMALL / 255, Image.fromarray(SMALL)]))
    assert len(found) == 3 and all(np.array_equal(one, SMALL) for one in found)
    assert len(as_photos(np.stack([SMALL, SMALL]))) == 2 and as_photos([]) == []
    with pytest.raises(ValueError, match="^image 1: an image must be uint8"):
        as_photos([SMALL, None])
    for single in (SMALL, SMALL[..., 0], "photo.jpg", JPEG, Path("photo.jpg"), Image.fromarray(SMALL), None, 5):
        with pytest.raises(ValueError, match="one image as a list of one"):
            as_photos(single)


def test_open_files_are_read(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(SMALL).save(path)
    with path.open("rb") as file:
        assert np.array_equal(as_photo(file), SMALL)
    assert np.array_equal(as_photo(io.BytesIO(path.read_bytes())), SMALL)


def test_text_that_is_no_path():
    with pytest.raises(FileNotFoundError, match="no image at AAAA"):
        as_photo("A" * 10000)


def test_a_deep_dark_picture_keeps_its_transparency(tmp_path):
    values = np.full((8, 8, 4), 4000, np.uint16)
    values[:4, :, :3], values[..., 3] = 100, 65535
    values[:, :2, 3] = 0
    cv2.imwrite(str(tmp_path / "deep.png"), values)
    with pytest.warns(UserWarning, match="shown as 0 to 255"):
        pixels = read_image(tmp_path / "deep.png")
    assert (pixels[:, :2] == 255).all() and (pixels[:4, 2:] == 0).all() and (pixels[4:, 2:] == 255).all()
