"""`--runtime` and `--no-cache` of the commands: the same masks, a second start that compiles nothing, one-line errors."""

import json

import pytest
from PIL import Image
from skimage import data

from blsam.cli import main
from blsam.options import DEFAULT_MODEL
from blsam.runtimes import choice


@pytest.fixture
def segment(tmp_path, monkeypatch, capfd, caplog):
    """Runs the command on a cup; gives exit status, the report, and what it said on stderr or logged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLSAM_CACHE", str(tmp_path / "compiled"))
    Image.fromarray(data.coffee()).save("cup.jpg")

    def run(*more):
        command = ["segment", "cup.jpg", "--box", "70,20,560,380", "--image-size", "256", "--dtype", "float32"]
        status = main([*command, "--json", "cup.json", *more])
        error = "".join(record.getMessage() + "\n" for record in caplog.records) + capfd.readouterr().err
        caplog.clear()
        report = json.loads((tmp_path / "cup.json").read_text()) if status == 0 else None
        return status, report, error

    return run


def test_the_same_mask_and_a_second_start_that_compiles_nothing(segment, tmp_path):
    _, expected, said = segment("--runtime", "torch")
    assert "compiling" not in said and not (tmp_path / "compiled").exists()
    _, first, said = segment("--runtime", "openvino")
    assert said == f"blsam: compiling {DEFAULT_MODEL} for openvino (kept in {tmp_path / 'compiled'}) ...\n"
    _, second, said = segment("--runtime", "openvino")
    assert said == ""
    for found in (first, second):
        assert found["score"] == pytest.approx(expected["score"], abs=1e-4)
        assert found["area"] == pytest.approx(expected["area"], rel=1e-3)


def test_no_cache_keeps_nothing(segment, tmp_path):
    status, _, said = segment("--runtime", "openvino", "--no-cache")
    assert status == 0 and "(not kept)" in said
    assert not (tmp_path / "compiled").exists()


def test_what_is_wrong_with_the_cache_is_one_line(segment, tmp_path, monkeypatch):
    segment("--runtime", "openvino")
    (entry,) = (tmp_path / "compiled").iterdir()
    with (entry / "encoder.bin").open("ab") as file:
        file.write(b"more")
    status, _, said = segment("--runtime", "openvino")
    assert status == 2 and said == f"blsam: {entry} is damaged or of another model; remove it (it is made again), " + (
        "or give --no-cache\n"
    )
    monkeypatch.setenv("BLSAM_CACHE", "cup.jpg/compiled")
    status, _, said = segment("--runtime", "openvino")
    assert status == 2 and said.count("\n") == 1
    assert said.startswith(f"blsam: compiled encoders cannot be kept in {tmp_path / 'cup.jpg' / 'compiled'}")


def test_what_is_not_installed_or_does_not_go_together_is_one_line(segment, monkeypatch):
    status, _, said = segment("--runtime", "onnxruntime", "--dtype", "bfloat16")
    assert status == 2 and "onnxruntime multiplies in float32 on a CPU" in said and said.count("\n") == 1
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    status, _, said = segment("--runtime", "openvino")
    assert status == 2 and said == "blsam: openvino not installed; pip install 'blsam[openvino]'\n"
    monkeypatch.delenv("BLSAM_RUNTIME")
    assert segment("--runtime", "auto")[0] == 0  # in torch
    monkeypatch.setenv("BLSAM_RUNTIME", "tensorrt")
    status, _, said = segment("--runtime", "auto")
    assert status == 2 and said.startswith("blsam: BLSAM_RUNTIME must be one of torch, openvino")


def test_evaluate_names_the_runtime(annotated, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, annotations = annotated
    command = ["evaluate", "coco", "--model", "vit_t", "--image-size", "256", "--limit", "1"]
    command += ["--annotations", str(annotations), "--images", str(folder)]
    figures = {}
    for runtime in ("torch", "openvino"):
        assert main([*command, "--runtime", runtime, "--json", f"{runtime}.json"]) == 0
        assert f"runtime {runtime}" in capsys.readouterr().out
        figures[runtime] = json.loads((tmp_path / f"{runtime}.json").read_text())
    (one, other), keys = figures.values(), figures["torch"].keys() - {"runtime"}
    assert other["runtime"] == "openvino" and one["count"] == other["count"] > 0 and keys == other.keys() - {"runtime"}
