"""Names of runtimes to those that are meant."""

import argparse

import pytest
import torch

from blsam import precision
from blsam.config import MODELS
from blsam.options import computed_in
from blsam.runtimes import choice
from blsam.runtimes.choice import FASTEST, RUNTIMES, resolve, resolve_for


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    monkeypatch.delenv("BLSAM_RUNTIME", raising=False)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_a_name_is_taken_as_it_is(runtime):
    assert resolve(runtime, "float32", "cpu", 768) == (runtime, torch.float32)


def test_onnxruntime_is_float32_alone():
    assert resolve("onnxruntime", "auto", "cpu", 768) == ("onnxruntime", torch.float32)
    with pytest.raises(ValueError, match="onnxruntime multiplies in float32"):
        resolve("onnxruntime", "bfloat16", "cpu", 768)


@pytest.mark.parametrize("kind", FASTEST)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_takes_the_fastest_that_is_installed(kind, dtype, monkeypatch):
    monkeypatch.setattr(precision, "processor", lambda: kind)
    assert resolve("auto", dtype, "cpu", 768) == (FASTEST[kind], getattr(torch, dtype))
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert resolve("auto", dtype, "cpu", 768)[0] == "torch"


@pytest.mark.parametrize(("installed", "expected"), [(True, "openvino bfloat16"), (False, "torch float32")])
def test_auto_and_auto_choose_the_runtime_first(installed, expected, monkeypatch):
    """A narrow encoder where bfloat16 is faster in OpenVINO and slower in torch."""
    monkeypatch.setattr(precision, "processor", lambda: "avx512_bf16")
    if not installed:
        monkeypatch.setattr(choice, "find_spec", lambda name: None)
    runtime, dtype = resolve("auto", "auto", "cpu", 96)
    assert f"{runtime} {str(dtype).removeprefix('torch.')}" == expected


def test_auto_where_nothing_was_measured(monkeypatch):
    monkeypatch.setattr(precision, "processor", lambda: "a processor of tomorrow")
    assert resolve("auto", "float32", "cpu", 768)[0] == "torch"


def test_the_environment_says_what_auto_is(monkeypatch):
    monkeypatch.setenv("BLSAM_RUNTIME", "onnxruntime")
    assert resolve("auto", "auto", "cpu", 768) == ("onnxruntime", torch.float32)
    assert (
        resolve("auto", "float32", "cuda", 768)[0] == "torch"
        and resolve("openvino", "float32", "cpu", 768)[0] == "openvino"
    )
    monkeypatch.setenv("BLSAM_RUNTIME", "tensorrt")
    with pytest.raises(ValueError, match="BLSAM_RUNTIME must be one of"):
        resolve("auto", "auto", "cpu", 768)
    monkeypatch.setenv("BLSAM_RUNTIME", "")
    assert resolve("auto", "float32", "cpu", 768)[0] in RUNTIMES


def test_what_does_not_go_together(monkeypatch):
    with pytest.raises(ValueError, match=f"one of {', '.join(RUNTIMES)}"):
        resolve("tensorrt", "float32", "cpu", 768)
    with pytest.raises(ValueError, match="runs on the CPU, not on cuda"):
        resolve("openvino", "float32", "cuda", 768)
    assert resolve("auto", "float32", "cuda", 768)[0] == "torch"
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"openvino not installed; pip install 'blsam\[openvino\]'"):
        resolve("openvino", "float32", "cpu", 768)


def test_models_for_comparison_are_torch_s_and_said_to_be(monkeypatch):
    monkeypatch.setattr(precision, "processor", lambda: "avx512_bf16")
    rule = MODELS["evit_vit_t"]
    assert resolve_for(rule, "auto", "auto") == ("torch", torch.bfloat16)
    with pytest.raises(ValueError, match="runs in torch alone, not in openvino"):
        resolve_for(rule, "openvino", "float32")
    args = argparse.Namespace(model="evit_vit_t", runtime="auto", dtype="auto", device="cpu")
    assert computed_in(args) == {"runtime": "torch", "dtype": "bfloat16"}
