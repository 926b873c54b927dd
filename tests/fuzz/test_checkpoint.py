"""Checkpoints of generated content: a state dict of tensors, or a CheckpointError."""

import argparse
import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from blsam import build_sam
from blsam import checkpoint as ckpt
from tests.fuzz.helpers import DAMAGE, damaged, damaged_files, few, many, outcome
from tests.helpers import TINY_EXACT

STATE = {
    "image_encoder.patch_embed.proj.weight": torch.ones(4, 3, 2, 2),
    "image_encoder.pos_embed": torch.ones(1, 2, 2, 4),
    "mask_decoder.iou_token.weight": torch.ones(1, 4),
}
CONTENT = {"model": STATE, "args": argparse.Namespace(lr=1e-4), "best": np.float64(1), "optimizer": {0: {"step": 1}}}


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


FILES = {
    "torch": saved(CONTENT),
    "legacy": saved(CONTENT, _use_new_zipfile_serialization=False),
    "safetensors": save(STATE, {"model": "x"}),
    "web page": b"<!DOCTYPE html><html></html>" * 10,
}


def check(data):
    """`read` keeps its promise; what it returns can be looked at and loaded, or is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        path.write_bytes(data)
        found = outcome(lambda: ckpt.read(path, TINY_EXACT), ckpt.CheckpointError)
    if found is not None:
        state, metadata = found
        assert all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in metadata.items())
        for value in state.values():
            value.sum()  # all of it is there
        outcome(lambda: ckpt.load(model(), TINY_EXACT, state, "it"), ckpt.CheckpointError)


def model(made=[]):  # noqa: B006  # once
    if not made:
        made.append(build_sam(TINY_EXACT, image_size=160))
    return made[0]


def repacked(damages):
    """torch's archive, whole, with damages to the pickle in it: past what guards the archive itself."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(FILES["torch"])) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, damaged(data, damages) if name.endswith("data.pkl") else data)
    return buffer.getvalue()


HEADS = [
    b"",
    b"PK\3\4",
    b"\x80\2",
    b"\x80\2}q\0",
    b"\x10\0\0\0\0\0\0\0{",
    b"<html",
    b"\x1f\x8b",
    b"version https://git-lfs",
]
PARTS = ["module", "model", "image_encoder", "mask_decoder", "prompt_encoder", "vision_encoder", "blocks", "0", "ema"]
KEYS = st.lists(st.sampled_from([*PARTS, "pos_embed", "weight", ""]), max_size=5).map(".".join)
KEYS |= st.sampled_from(sorted(STATE)) | st.integers(0, 3) | st.none() | st.text(max_size=5)
TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 4), max_size=5),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)
TENSORS |= st.sampled_from(
    [
        torch.zeros(1).expand(9, 9),
        torch.empty(2, device="meta"),
        torch.eye(2).to_sparse(),
        torch.nn.Parameter(torch.ones(2)),
    ]
)
LEAVES = TENSORS | st.just(STATE) | st.none() | st.integers() | st.text(max_size=3) | st.just(np.arange(2))
CONTENTS = st.recursive(
    LEAVES,
    lambda inner: st.dictionaries(KEYS, inner, max_size=5) | st.lists(inner, max_size=3),
    max_leaves=12,
)

CASES = {
    "checkpoint, any bytes": (st.tuples(st.sampled_from(HEADS), st.binary(max_size=300)).map(b"".join), 60),
    "checkpoint, damaged files": (damaged_files(FILES).map(lambda case: case[1]), 120),
    "checkpoint, damaged pickles": (st.lists(DAMAGE, min_size=1, max_size=3).map(repacked), 120),
    "checkpoint, any content": (CONTENTS.map(saved), 80),
}


@pytest.mark.parametrize("name", CASES)
def test_a_few(name):
    few(check, *CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many(name, capsys):
    with capsys.disabled():
        many(check, CASES[name][0], name)
