"""Files: whole or not there, hashed without being held, and what a figure was made with."""

import hashlib
import json
import os
import stat
import tracemalloc

import numpy as np
import pytest

import blsam
from blsam.files import printable, provenance, sha256, write_atomically, write_bytes, write_json, write_text


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "ä\n")

    def half(temporary):
        with open(temporary, "w") as file:
            file.write("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert os.listdir(path.parent) == ["a.txt"] and path.read_bytes() == "ä\n".encode()


def test_files_have_the_rights_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_json_comes_back(tmp_path):
    content = {"a": [1, 2.5, None], "b": "ü"}
    for indent in (1, None):
        write_json(tmp_path / "a.json", content, indent=indent)
        text = (tmp_path / "a.json").read_text()
        assert json.loads(text) == content and text.endswith("}\n") and (text.count("\n") > 1) == (indent == 1)


def test_a_large_file_is_hashed_without_being_held(tmp_path):
    path = tmp_path / "large"
    np.random.default_rng(0).integers(0, 256, 2**25, np.uint8).tofile(path)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    tracemalloc.start()
    try:
        assert sha256(path) == expected
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**23, f"{peak >> 20} MB for a file of 32 MB"


def test_provenance_names_versions_and_revision():
    found = provenance()
    assert found["versions"]["blsam"] == blsam.__version__ and found["versions"]["numpy"] == np.__version__
    assert found["git_revision"] is None or len(found["git_revision"].removesuffix("-dirty")) == 40


def test_what_a_message_quotes_is_one_line():
    assert printable("a\nb\x1e\x1b[31mc\u2028d\ud800") == "a b ?[31mc d?"
    assert printable({"a": 1}) == "{'a': 1}" and printable("") == ""
    assert printable("x" * 100) == "x" * 77 + "..." and len(printable("y" * 10**6, 1000)) == 1000
