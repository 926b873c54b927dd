"""What a checkpoint is said to hold, and what becomes of it."""

import json

import pytest
import torch

from blsam import sam_model_registry
from blsam.checkpoint import read
from blsam.cli import main
from tests.helpers import ROOT

SHIPPED = ROOT / "checkpoints" / "vit_t.safetensors"
ROUTED = ROOT / "checkpoints" / "blsam_vit_t.safetensors"


def test_info(tmp_path, capsys):
    assert main(["convert", str(SHIPPED), "--info", "--json", str(tmp_path / "info.json")]) == 0
    out = capsys.readouterr().out
    assert "fits    vit_t\n" in out and "images of 512" in out and "starts  blsam_vit_t, then blsam calibrate" in out
    info = json.loads((tmp_path / "info.json").read_text())
    state, _ = read(SHIPPED)
    assert info["parameters"] == sum(value.numel() for value in state.values()) and info["tensors"] == len(state)
    assert info["fits"] == ["vit_t"] and info["dtypes"] == ["float16"] and info["image_size"] == 512
    new = len(sam_model_registry["blsam_vit_t"](SHIPPED).state_dict()) - len(state)
    assert info["is_a_start_for"] == {"vit_t_fine": 1, "blsam_vit_t": new, "blsam_vit_t_fine": new + 1}
    assert info["metadata"]["model"] == "vit_t"


def test_info_shows_what_calibration_reported(tmp_path, capsys):
    from blsam.checkpoint import save

    report = {"photos": 7, "by_keep_ratio": [{"keep_ratio": 0.25, "cosine_before": 0.5, "cosine_after": 0.75}]}
    state, _ = read(ROUTED)
    save(tmp_path / "m.safetensors", state, {"model": "blsam_vit_t", "calibration": report})
    assert main(["convert", str(tmp_path / "m.safetensors"), "--info"]) == 0
    out = capsys.readouterr().out
    assert "calibrated on 7 photos:" in out and "0.25          0.5000  0.7500" in out


@pytest.mark.parametrize("report", ["x", {"photos": 3}, {"photos": 3, "by_keep_ratio": []}, [1]])
def test_what_others_call_calibration(report, tmp_path, capsys):
    from blsam.checkpoint import save

    save(tmp_path / "m.safetensors", read(SHIPPED)[0], {"calibration": report, "note": "a\x1b[31m\nb"})
    assert main(["convert", str(tmp_path / "m.safetensors"), "--info"]) == 0
    out = capsys.readouterr().out
    assert "says    note a?[31m b" in out and "calibrated on" not in out


def test_a_start_for_a_routed_model(tmp_path, capsys):
    output = tmp_path / "start.safetensors"
    assert main(["convert", str(SHIPPED), "--model", "blsam_vit_t", "-o", str(output)]) == 0
    assert "a start, with" in capsys.readouterr().out
    state, metadata = read(output)
    assert metadata["model"] == "blsam_vit_t" and metadata["image_size"] == "512"
    sam, dense = (sam_model_registry[name](path) for name, path in (("blsam_vit_t", output), ("vit_t", SHIPPED)))
    x = torch.randn(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (sam.image_encoder(x, keep_ratio=1.0) - dense.image_encoder(x)).abs().max()
    assert difference == 0, difference


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_same_weights_in_another_file(suffix, tmp_path):
    output = tmp_path / f"half{suffix}"
    assert main(["convert", str(ROUTED), "-o", str(output)]) == 0  # which ships in half precision, and stays in it
    (state, _), (expected, _) = read(output), read(ROUTED)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) and state[key].dtype == expected[key].dtype for key in state)
    assert main(["convert", str(ROUTED), "--image-size", "256", "-o", str(tmp_path / "small.pth")]) == 0
    assert read(tmp_path / "small.pth")[0]["image_encoder.pos_embed"].shape == (1, 16, 16, 192)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--info", "-o", "x.pth"], "give --info, or -o FILE"),
        ([], "give --info, or -o FILE"),
        (["--info", "--half"], "--info only looks"),
        (["--json", "x.json", "-o", "x.pth"], "--json goes with --info"),
        (["-o", "x.onnx"], "a checkpoint ends in .safetensors, .pth, .pt"),
        (["--model", "vit_b", "-o", "x.pth"], "does not fit vit_b; it fits vit_t, vit_t_fine, blsam_vit_t"),
        (["-o", str(SHIPPED)], "would overwrite"),
    ],
)
def test_what_it_refuses(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(SHIPPED), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not list(tmp_path.iterdir())


def test_half_precision(tmp_path):
    save_as_float32 = {key: value.float() for key, value in read(SHIPPED)[0].items()}
    torch.save(save_as_float32, tmp_path / "whole.pth")
    for more, kind in (([], torch.float32), (["--half"], torch.float16)):
        assert main(["convert", str(tmp_path / "whole.pth"), *more, "-o", str(tmp_path / "out.pth")]) == 0
        assert {value.dtype for value in read(tmp_path / "out.pth")[0].values()} == {kind}


def test_a_file_that_is_no_sam(tmp_path, capsys):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), "--info"]) == 2
    assert "is not a SAM checkpoint" in capsys.readouterr().err
