"""Packages that are called segment_anything and are not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import segment_anything

from blsam.upstream import check
from tests.helpers import ROOT

HERE = Path(segment_anything.__file__).parent


def test_the_real_one_is_taken():
    check()


def edited(folder, file, old, new):
    copy = shutil.copytree(HERE, folder / "segment_anything", ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))


def hq(folder):
    edited(
        folder,
        "predictor.py",
        "return_logits: bool = False,",
        "return_logits: bool = False, hq_token_only: bool = False,",
    )


def two_outputs(folder):
    edited(
        folder,
        "modeling/mask_decoder.py",
        "multimask_output: bool,\n",
        "multimask_output: bool, interm_embeddings=None,\n",
    )


def empty(folder):
    (folder / "segment_anything").mkdir()
    (folder / "segment_anything" / "__init__.py").touch()


def unrelated(folder):
    empty(folder)
    for name in ("predictor", "build_sam", "automatic_mask_generator"):
        (folder / "segment_anything" / f"{name}.py").touch()


@pytest.mark.parametrize(
    ("make", "says"),
    [(hq, "hq_token_only"), (two_outputs, "interm_embeddings"), (empty, "no module"), (unrelated, "another package")],
)
def test_others_are_refused_in_one_line(tmp_path, make, says):
    make(tmp_path)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    names = ("SamPredictor", "sam_model_registry", "install")
    code = "import blsam\n"
    code += "".join(f"try:\n    blsam.{name}\nexcept ImportError as error:\n    print(error)\n" for name in names)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(names) and all(says in n and "pip install segment-anything" in n for n in lines), lines
