"""Files of every kind under the names of checkpoints: read by what they hold, or refused in one line with the cure."""

import argparse
import collections
import datetime
import gzip
import io
import os
import pathlib
import pickle
import re
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from blsam import checkpoint as ckpt
from blsam.checkpoint_files import STAND_INS

STATE = {"image_encoder.a": torch.arange(6.0).reshape(2, 3), "mask_decoder.b": torch.ones(2)}


def equal(found, state=STATE):
    assert list(found) == list(state)
    for key, value in state.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".tar", ".model", ""])
def test_the_content_decides_not_the_suffix(tmp_path, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    if kind == "safetensors":
        ckpt.save(tmp_path / "a.safetensors", STATE, {"model": "x"})
        (tmp_path / "a.safetensors").rename(path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "torch")
    found, metadata = ckpt.read(path)
    assert metadata.get("model") == ("x" if kind == "safetensors" else None)
    equal({key: found[key] for key in STATE})


class Attribute(dict):
    """As Lightning's hyperparameters are pickled."""


def pickled_as(name, content):
    """torch's older archive of a content, with another name for the classes of this file."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    module, _, cls = name.rpartition(".")
    mine = re.compile(rb"c%s\n(Config|Attribute)\n" % __name__.encode())
    data, count = mine.subn(b"c%s\n%s\n" % (module.encode(), cls.encode()), buffer.getvalue())
    assert count
    return data


class Config:
    def __init__(self):
        self.lr = 1


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=1e-4, path=pathlib.Path("a")),
        np.float64(0.5),
        np.arange(3),
        np.random.RandomState(0).get_state(),
        pathlib.PurePosixPath("a/b"),
        datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
        collections.defaultdict(list, a=[1]),
        collections.OrderedDict(a=1),
        torch.__version__,
        {1, 2},
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_data_beside_the_weights_is_not_in_the_way(tmp_path, beside, legacy):
    torch.save({"model": STATE, "x": beside}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    equal(ckpt.read(tmp_path / "a.pth")[0])


def test_hyperparameters_of_frameworks_are_not_in_the_way(tmp_path):
    content = {"state_dict": STATE, "x": Attribute(lr=1)}
    (tmp_path / "a.ckpt").write_bytes(pickled_as("pytorch_lightning.utilities.parsing.AttributeDict", content))
    equal(ckpt.read(tmp_path / "a.ckpt")[0])


def refused(path, *words):
    with pytest.raises(ckpt.CheckpointError) as caught:
        ckpt.read(path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(path)), text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("name", ["__main__.Config", "mypackage.config.Config", "segment_anything.modeling.sam.Sam"])
def test_the_first_object_that_is_not_read_is_named(tmp_path, name):
    path = tmp_path / "a.pth"
    path.write_bytes(pickled_as(name, {"model": STATE, "x": Config()}))
    refused(path, f"for safety: {name};", "torch.save(model.state_dict(), FILE)")


class Attack:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "name"),
    [(os.mkdir, "posix.mkdir"), (eval, "builtins.eval"), (subprocess.call, ".call"), (getattr, "getattr")],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_of_a_file_is_run(tmp_path, call, name, legacy):
    target = tmp_path / "ran"
    args = {eval: (f"__import__('os').mkdir({str(target)!r})",), subprocess.call: (["mkdir", str(target)],)}
    content = {"model": STATE, "x": Attack(call, *args.get(call, (str(target),)))}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "evil.pth", "for safety", name)
    assert not target.exists()


def test_what_stands_for_plain_data_does_nothing(tmp_path):
    """The names that are read as nothing call nothing, whatever they are called with."""
    target = tmp_path / "a.pth"
    torch.save({"model": STATE, "x": Attack(np.ndarray, (10**15,)), "y": Attack(pathlib.Path, 3)}, target)
    equal(ckpt.read(target)[0])
    assert not any(item in STAND_INS for item in torch.serialization.get_safe_globals())


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 375042383\n"


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name.replace("__", "/"))  # of 1980: every process collects the same bytes
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return buffer.getvalue()


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("is empty", "download it again")),
        (bytes(1000), ("is empty (zeros alone)",)),
        (b"<!DOCTYPE html><html>Sign in</html>", ("is a web page", "download it again")),
        (b"\xef\xbb\xbf\n  <html>", ("is a web page",)),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', ("is a web page",)),
        (LFS, ("pointer of Git LFS", "git lfs pull")),
        (b'{"error": "not found"}', ("is text", '{"error": "not found"}')),
        (b"Access denied", ('it begins "Access denied"',)),
        (zipped(data__a="1", b="2"), ("is a zip archive of other things (data/a, b)",)),
        (zipped(a__data__pkl=b"").replace(b"data/pkl", b"data.pkl"), ("damaged",)),
        (zipped(**{"a__data.pkl": b"0" * 10**6}), ("packed again",)),
        (b"PK\x03\x04" + bytes(100), ("is cut short or damaged; download it again",)),
        (gzip.compress(b"1", mtime=0), ("is compressed; unpack it",)),
        (tarred(), ("is a tar archive",)),
        (b"\x89HDF\r\n\x1a\n", ("HDF5",)),
        (pickle.dumps({"a": 1}, protocol=4), ("written by pickle and not by torch.save",)),
        (b"\x80\x02garbage", ("is damaged",)),
        (bytes(range(128, 256)), ("is damaged",)),
        (bytes(range(1, 32)) * 3, ("is damaged or not a checkpoint",)),
        ((10).to_bytes(8, "little") + b"{not json!" + bytes(10), ("no safetensors file",)),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else str(value),
)
def test_what_is_no_checkpoint_is_said(tmp_path, content, words, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    refused(path, *words)


def test_a_torchscript_archive_is_named(tmp_path):
    with pytest.warns(FutureWarning):
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "TorchScript", "state_dict()")


@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    if kind == "safetensors":
        ckpt.save(path, STATE, {})
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "torch")
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        refused(path)


@pytest.mark.parametrize(
    "content", [{}, [], 3, "text", None, {"epoch": 3, "name": "x"}, {"a": {}}, torch.zeros(2)], ids=str
)
def test_content_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "is not a state dict of tensors")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(1).expand(10**6, 10**6), "a few numbers repeated"),
        (torch.empty(3, device="meta"), "without values"),
        (torch.eye(3).to_sparse(), "sparse"),
    ],
)
def test_tensors_that_hold_no_numbers_are_refused(tmp_path, tensor, words):
    torch.save({**STATE, "image_encoder.odd": tensor}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "image_encoder.odd", words)
