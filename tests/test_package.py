"""What is packed, seen in the configuration; `make wheel` tries the wheel itself."""

import importlib.metadata
import re
import subprocess
import sys

import pytest

import blsam
from blsam.options import PACKAGE, WEIGHTS
from tests.helpers import ROOT


def test_the_version_is_written_once():
    text = (ROOT / "pyproject.toml").read_text() + (ROOT / "setup.py").read_text()
    assert not re.search(r'version\W+"\d', text)
    assert importlib.metadata.version("blsam") == blsam.__version__


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_no_second_copy_of_the_weights_lies_in_the_repository():
    assert not WEIGHTS[0].exists() and WEIGHTS[1] == ROOT / "checkpoints"


def test_every_extra_that_an_error_names_is_there():
    extras = set(importlib.metadata.metadata("blsam").get_all("Provides-Extra"))
    named = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r"pip install '(?:blsam)?\[(\w+)\]'", path.read_text())
    }
    assert named and named <= extras


def test_parts_of_the_package_are_there_after_importing_it():
    code = "import blsam; print(blsam.config.CONFIGS['vit_t'].dim, blsam.checkpoint.SUFFIXES[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["192", ".safetensors"], done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        blsam.nothing  # noqa: B018
