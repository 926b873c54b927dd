"""The command: what it refuses, and that a file which is not torch's is not left there."""

import json
import os
import subprocess
import sys

import onnx
import pytest

from blsam.cli import main
from blsam.export import check
from blsam.export.tools import TOOLS
from tests.helpers import ROOT

SHIPPED = ROOT / "checkpoints" / "vit_t.safetensors"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--for", "cvat", "--what", "encoder"], "its server encodes in torch"),
        (["--for", "cvat"], "embeddings of 64 x 64 cells, vit_t at 512 has 32 a side; give --image-size 1024"),
        (["--for", "labelme", "--format", "openvino"], "reads ONNX"),
        (["--checkpoint", "no.pth"], "no checkpoint at no.pth"),
        (["--model", "blsam_vit_b", "--checkpoint", str(SHIPPED)], "it fits vit_t"),
        (["--json", "out.txt"], "ends in .json"),
        (["--keep-ratio", "0"], "keep ratios lie in (0, 1]"),
    ],
)
def test_what_it_refuses(options, message, tmp_path, capsys):
    assert main(["export", "--model", "vit_t", "-o", str(tmp_path / "out"), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("blsam.runtimes.choice.find_spec", lambda name: None if name == "openvino" else name)
    assert main(["export", "--format", "openvino", "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "blsam: openvino not installed; pip install 'blsam[openvino]'\n"


def test_a_file_in_place_of_the_folder(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert main(["export", "-o", str(tmp_path / "out")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


@pytest.mark.e2e
def test_decoders_of_every_tool(tmp_path, capsys):
    for tool in TOOLS:
        size = ["--image-size", "1024"] if tool == "cvat" else []
        output = tmp_path / tool
        command = ["export", "--model", "vit_t", "--for", tool, "--what", "decoder", *size, "-o", str(output)]
        assert main([*command, "--json", str(tmp_path / "report.json")]) == 0
        assert [path.name for path in output.iterdir()] == ["vit_t.decoder.onnx"]
        report = json.loads((tmp_path / "report.json").read_text())["files"]["vit_t.decoder.onnx"]
        assert report["difference"] <= check.MOST and report["same"] >= check.SAME
        assert "torch's" in capsys.readouterr().out


@pytest.mark.e2e
def test_a_file_that_is_not_torch_s_is_not_left_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "MOST", 0.0)
    assert main(["export", "--model", "vit_t", "--what", "decoder", "-o", str(tmp_path / "out")]) == 1
    assert list((tmp_path / "out").iterdir()) == []
    found = capsys.readouterr()
    assert not found.out and "does not give what torch gives" in found.err and "nothing is written" in found.err


@pytest.mark.e2e
@pytest.mark.parametrize(
    "options, outputs",
    [
        (["--opset", "16"], ["masks", "iou_predictions", "low_res_masks"]),
        (
            ["--return-single-mask", "--use-stability-score", "--return-extra-metrics", "--gelu-approximate"],
            ["masks", "iou_predictions", "stability_scores", "areas", "low_res_masks"],
        ),
    ],
)
def test_sam_s_command_line(options, outputs, tmp_path):
    script, path = str(ROOT / "scripts" / "export_onnx_model.py"), tmp_path / "decoder.onnx"
    command = [sys.executable, script, "--checkpoint", str(SHIPPED), "--model-type", "vit_t", "--output", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    model = onnx.load(path)
    assert [one.name for one in model.graph.output] == outputs
    assert model.opset_import[0].version == (16 if "--opset" in options else 18)
    assert [one.name for one in tmp_path.iterdir()] == ["decoder.onnx"]
