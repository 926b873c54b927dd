"""Arrays and tensors of any type and layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blsam.pixels import as_array, channels_last, to_rgb, to_uint8

PHOTO = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
PHOTO[0, 0], PHOTO[0, 1] = 0, 255
GREY = PHOTO[..., 0]


@pytest.mark.parametrize(
    "values",
    [
        PHOTO.astype(np.int32),
        PHOTO.astype(np.int64),
        PHOTO.astype(np.uint16),
        PHOTO.astype(np.uint16) * 257,
        (PHOTO.astype(">u2") * 257).astype(">u2"),
        PHOTO.astype(np.float16),
        PHOTO.astype(np.float32),
        PHOTO.astype(np.float64),
        (PHOTO / 255).astype(np.float16),
        (PHOTO / 255).astype(np.float32),
        PHOTO / 255,
        PHOTO / 255 * 1.001 - 0.0005,  # as interpolation overshoots
        PHOTO + 0.3,
    ],
    ids=lambda values: f"{values.dtype} to {values.max():.4g}",
)
def test_values_that_mean_one_thing(values):
    pixels, notes = to_uint8(values)
    assert pixels.dtype == np.uint8 and not notes
    assert np.array_equal(pixels, PHOTO), np.abs(pixels.astype(int) - PHOTO).max()


def test_masks_are_black_and_white():
    pixels, notes = to_uint8(GREY > 100)
    assert set(np.unique(pixels)) == {0, 255} and not notes
    assert np.array_equal(pixels, to_uint8((GREY > 100).astype(float))[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (PHOTO.astype(int) + 1, r"int64 values run from 1 to 256, not from 0 to 255: convert"),
        (PHOTO.astype(np.int16) - 1024, "run from -1024 to -769"),
        (PHOTO / 127.5 - 1, "run from -1 to 1, not from 0 to 1"),
        (PHOTO / 170, "run from 0 to 1.5, not from 0 to 1, or from 0 to 255 with one of 2 at least"),
        (PHOTO * 257.0, "run from 0 to 65535"),
        (np.where(PHOTO > 250, np.nan, PHOTO), "not finite"),
        (np.where(PHOTO > 250, np.inf, PHOTO), "not finite"),
        (PHOTO * 1j, "of type complex128"),
        (PHOTO.astype(str), "of type str"),
        (PHOTO.astype(object), "of type object"),
        (PHOTO.astype("M8[s]"), "of type datetime64"),
    ],
)
def test_values_that_may_mean_anything_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        to_uint8(values)


def test_what_uses_a_small_part_of_its_range_is_stretched():
    ramp = np.arange(4096).reshape(64, 64)
    for values, low, high in (
        (ramp.astype(np.uint16), 0, 4095),
        (ramp.astype(np.int16) - 1024, -1024, 3071),
        (ramp.astype(np.int32) * 1000, 0, 4095000),
        (ramp.astype(np.float32) - 0.5, -0.5, 4094.5),
    ):
        pixels, notes = to_uint8(values, stretch=True)
        assert np.array_equal(pixels, np.rint(ramp / 4095 * 255)), values.dtype
        assert notes == [f"values from {low:.6g} to {high:.6g} are shown as 0 to 255"]
    assert to_uint8(ramp.astype(np.uint16))[1]  # 16 bits in memory too
    full = np.linspace(0, 65535, 64).astype(np.uint16)
    assert np.array_equal(to_uint8(full, stretch=True)[0], full // 257) and not to_uint8(full)[1]


def test_values_that_are_not_finite_in_a_file_are_the_smallest():
    values = np.array([[np.nan, 10.0, 20.0, 500.0, np.inf]])
    pixels, notes = to_uint8(values, stretch=True)
    assert pixels.tolist() == [[0, 0, 5, 255, 0]] and "2 values" in notes[0] and "from 10 to 500" in notes[1]
    with pytest.raises(ValueError, match="4 of its values"):
        to_uint8(np.full((2, 2), np.nan), stretch=True)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["int8", "uint16", "int16", "uint32", "int64", "float16", "float32", "float64"]),
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=6),
    st.booleans(),
)
def test_any_values_make_a_picture_or_one_line(kind, numbers, stretch):
    with np.errstate(all="ignore"):
        values = np.array(numbers).astype(kind)
    try:
        pixels, notes = to_uint8(values, stretch)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.shape == values.shape
        order = np.argsort(np.where(np.isfinite(values), values, values[np.isfinite(values)].min()), kind="stable")
        assert (np.diff(pixels[order].astype(int)) >= 0).all(), "a larger value is darker"


# --- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((6, 8), (6, 8, 1)),
        ((6, 8, 1), (6, 8, 1)),
        ((6, 8, 3), (6, 8, 3)),
        ((6, 8, 4), (6, 8, 4)),
        ((3, 6, 8), (6, 8, 3)),
        ((1, 6, 8), (6, 8, 1)),
        ((4, 6, 8), (6, 8, 4)),
        ((1, 3, 6, 8), (6, 8, 3)),
        ((1, 6, 8, 3), (6, 8, 3)),
        ((3, 3, 3), (3, 3, 3)),
        ((3, 9, 3), (3, 9, 3)),
        ((1, 9, 3), (1, 9, 3)),
        ((3, 2000, 1), (2000, 1, 3)),
        ((2000, 1, 3), (2000, 1, 3)),
        ((1, 1, 3), (1, 1, 3)),
    ],
    ids=str,
)
def test_channels_come_last(shape, wanted):
    values = np.arange(np.prod(shape)).reshape(shape)
    found = channels_last(values)
    assert found.shape == wanted and np.shares_memory(found, values)
    if wanted == shape:
        assert np.array_equal(found, values), "turned, though it lay as in SAM"


@pytest.mark.parametrize(
    "shape", [(), (9,), (6, 8, 2), (5, 6, 8), (2, 6, 8, 3), (2, 3, 6, 8), (1, 2, 6, 8, 3)], ids=str
)
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="its shape is"):
        channels_last(np.zeros(shape))


def test_colours_transparency_and_grey():
    alpha = np.full_like(GREY, 255)
    for values, bgr in (
        (np.dstack([PHOTO, alpha]), False),
        (PHOTO[..., ::-1], True),
        (np.dstack([PHOTO[..., ::-1], alpha]), True),
        (PHOTO[..., ::-1].transpose(2, 0, 1) / 255, True),
    ):
        assert np.array_equal(to_rgb(values, bgr)[0], PHOTO), (values.shape, bgr)
    for values in (GREY, GREY[..., None], GREY[None], GREY / 255):
        assert np.array_equal(to_rgb(values, bgr=True)[0], np.repeat(GREY[..., None], 3, 2)), values.shape
    clear = np.zeros((2, 2, 4))
    clear[0, 0] = (1, 0.2, 0, 1)
    assert to_rgb(clear)[0].tolist() == [[[255, 51, 0], [255] * 3], [[255] * 3] * 2]


@pytest.mark.parametrize("shape", [(0,), (0, 0), (0, 5, 3), (5, 0, 3)], ids=str)
def test_empty_arrays(shape):
    with pytest.raises(ValueError, match="it is empty"):
        to_rgb(np.empty(shape, np.uint8))


# --- what makes an array ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        torch.from_numpy(PHOTO),
        torch.from_numpy(PHOTO).permute(2, 0, 1)[None],
        (torch.from_numpy(PHOTO) / 255).requires_grad_(),
        (torch.from_numpy(PHOTO) / 255).bfloat16(),
        torch.from_numpy(PHOTO).double(),
        PHOTO.tolist(),
    ],
    ids=lambda image: str(getattr(image, "dtype", "list")),
)
def test_tensors_and_lists(image):
    assert np.array_equal(to_rgb(as_array(image))[0], PHOTO)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "it is None, which is what cv2.imread gives"),
        ([[1], [1, 2]], "a list that makes no array"),
        (torch.zeros(3, 4, 4, device="meta"), "a Tensor that makes no array"),
        (torch.zeros(4, 4).to_sparse(), "a Tensor that makes no array"),
    ],
)
def test_what_makes_none(image, message):
    with pytest.raises(ValueError, match=message) as caught:
        as_array(image)
    assert "\n" not in str(caught.value)
