"""Masks of every kind: refused, or as pycocotools draws them; in a process of its own, since pycocotools may crash."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import strategies as st
from pycocotools import mask as rle_tools

from blsam.data.masks import BadMask, checked_mask, to_rle
from tests.fuzz.helpers import ODD, SECONDS, few, many, outcome
from tests.helpers import ROOT

SIDE = st.integers(1, 12)
NUMBER = st.integers(-3, 160) | st.floats(-20, 30) | ODD
RUNS = st.lists(st.integers(0, 40) | ODD, max_size=12)


@st.composite
def valid(draw):
    """Runs that fill their size, plain or compressed, perhaps with one changed."""
    height, width = draw(SIDE), draw(SIDE)
    cuts = sorted(draw(st.lists(st.integers(0, height * width), max_size=10)))
    runs = np.diff([0, *cuts, height * width]).tolist()
    if draw(st.booleans()):
        runs[draw(st.integers(0, len(runs) - 1))] += draw(st.integers(-2, 2))
    counts = runs
    if draw(st.booleans()) and min(runs) >= 0 and sum(runs) == height * width:
        counts = rle_tools.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"].decode()
        if draw(st.booleans()):
            counts = list(counts)
            counts[draw(st.integers(0, len(counts) - 1))] = draw(st.characters(min_codepoint=32, max_codepoint=127))
            counts = "".join(counts)
    return {"size": [height, width], "counts": counts}, height, width


POLYGONS = st.lists(st.lists(NUMBER, max_size=12) | st.lists(st.lists(NUMBER, max_size=3), max_size=5), max_size=3)
RLE = st.fixed_dictionaries(
    {
        "size": st.lists(SIDE | ODD, min_size=1, max_size=3),
        "counts": RUNS | st.text(max_size=20) | st.binary(max_size=20),
    }
)
CASES = valid() | st.tuples(POLYGONS | RLE | ODD, SIDE, SIDE)


def check(case):
    value, height, width = case
    if os.environ.get("BLSAM_FUZZ_LAST"):  # what a crash leaves behind
        with open(os.environ["BLSAM_FUZZ_LAST"], "w", errors="backslashreplace") as file:
            file.write(repr(case))
    mask = outcome(lambda: checked_mask(value, height, width), BadMask)
    if mask is None:
        return
    rle = to_rle(mask, height, width)
    pixels = rle_tools.decode(rle)
    assert pixels.shape == (height, width) and rle_tools.area(rle) == pixels.sum()
    assert rle_tools.iou([rle], [rle], [0])[0, 0] == bool(pixels.any())
    assert np.array_equal(rle_tools.decode(rle_tools.merge([rle, rle])), pixels)
    rle_tools.toBbox(rle)
    if isinstance(mask, dict) and isinstance(mask["counts"], list):
        flat = np.repeat(np.arange(len(mask["counts"])) % 2, mask["counts"])
        assert np.array_equal(flat, pixels.flatten("F"))


def test_a_few():
    few(check, CASES, 200)


@pytest.mark.slow
def test_many(tmp_path, capsys):
    last = tmp_path / "last.txt"
    command = [sys.executable, "-m", "tests.fuzz.test_masks"]
    environment = os.environ | {"BLSAM_FUZZ_LAST": str(last), "BLSAM_FUZZ_SECONDS": str(SECONDS)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS + 300)
    assert done.returncode == 0, f"{done.returncode} at {last.read_text()}\n{done.stderr[-3000:]}"
    with capsys.disabled():
        print(done.stdout, end="")


if __name__ == "__main__":
    many(check, CASES, "masks")
