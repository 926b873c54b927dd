"""Calibration on the small dense model that ships: does it help, does it resume, does it refuse."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data

from blsam import checkpoint as ckpt
from blsam import sam_model_registry
from blsam.build_classifier import build_classifier
from blsam.cli import main
from blsam.config import CLASSIFIERS, CONFIGS
from blsam.data.imagenet import classifier_input
from blsam.images import read_image
from blsam.modeling.classifier import BLVisionTransformer
from blsam.options import shipped_checkpoint
from blsam.training.calibrate import calibrate, choose_photos, prepare
from blsam.training.calibration import Settings
from tests.helpers import ROOT
from tests.training.helpers import random_vit_b

DENSE = shipped_checkpoint("vit_t")
QUICK = Settings(steps=12, stage_steps=12, batch_size=2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten photos: pieces of scikit-image's."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee", "chelsea", "rocket", "cat"):
        image = getattr(data, name)()
        for i, piece in enumerate((image[:220, :300], image[-200:, -260:])):
            Image.fromarray(piece).save(folder / f"{name}{i}.png")
    return folder


@pytest.fixture(scope="module")
def calibrated(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrated") / "small.safetensors"
    chosen = choose_photos(photos, 64, 0)
    settings = Settings(steps=60, stage_steps=60, batch_size=2)
    report = calibrate(CONFIGS["blsam_vit_t"], DENSE, chosen, path, image_size=128, settings=settings, quiet=True)
    return path, report


def test_the_embedding_comes_nearer_to_the_dense_one_at_every_keep_ratio(calibrated):
    _, report = calibrated
    for row in report["by_keep_ratio"]:
        before, after = row["cosine_before"], row["cosine_after"]
        assert 1 - after < 0.6 * (1 - before), row
    assert [row["keep_ratio"] for row in report["by_keep_ratio"]] == [0.1, 0.25, 0.5]
    assert len(report["explained"]) == 22 and np.mean(list(report["explained"].values())) > 0.8, report["explained"]


def test_the_stages_come_nearer_to_the_dense_stream_with_their_steps(photos, tmp_path):
    def errors(stage_steps):
        settings = Settings(steps=2, stage_steps=stage_steps, batch_size=2)
        chosen, path = choose_photos(photos, 6, 0), tmp_path / "a.safetensors"
        log = calibrate(CONFIGS["blsam_vit_t"], DENSE, chosen, path, image_size=128, settings=settings, quiet=True)[
            "log"
        ]
        return [float(line.split("error ")[1].split(",")[0]) for line in log if "error" in line]

    first, later = errors(0), errors(40)
    assert len(first) == 4 and later[0] < 0.9 * first[0] and later[-1] < 0.9 * first[-1], (first, later)


def test_a_time_limit_is_said_and_ends_with_fewer_steps(photos, tmp_path):
    settings = Settings(steps=10**6, stage_steps=10**6, minutes=0.02, batch_size=2)
    chosen, path = choose_photos(photos, 3, 0), tmp_path / "a.safetensors"
    report = calibrate(CONFIGS["blsam_vit_t"], DENSE, chosen, path, image_size=64, settings=settings, quiet=True)
    assert any("without the limit of 0.02" in line for line in report["log"])
    assert all(np.isfinite(value) for value in report["explained"].values())


def test_the_checkpoint_loads_keeps_sam_s_weights_and_carries_the_report(calibrated):
    path, report = calibrated
    state, metadata = ckpt.read(path)
    assert json.loads(metadata["calibration"])["by_keep_ratio"] == report["by_keep_ratio"]
    sam = sam_model_registry["blsam_vit_t"](path)
    dense = sam_model_registry["vit_t"](DENSE, image_size=128).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in dense.items())
    fusion = {key: value for key, value in sam.state_dict().items() if "fusion" in key}
    assert all((value == (1e-4 if key.endswith("gamma") else 0)).all() for key, value in fusion.items())
    assert not path.with_name(path.name + ".calibration").exists()


def test_choice_of_photos(photos, tmp_path):
    assert choose_photos(photos, 4, 0) == choose_photos(photos, 4, 0) != choose_photos(photos, 4, 1)
    with pytest.raises(FileNotFoundError, match="no folder"):
        choose_photos(tmp_path / "nowhere", 4, 0)
    with pytest.raises(ValueError, match="at least 2 photos"):
        choose_photos(tmp_path, 4, 0)
    for name in ("a.jpg", "b.JPEG", "c.png", "._a.jpg", "d.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in choose_photos(tmp_path, 4, 0)] == ["a.jpg", "b.JPEG", "c.png"]


def test_photos_of_any_format_and_depth_are_read(tmp_path):
    """A folder of other formats is found, and a scan of 12 bits enters the encoder as it looks."""
    sam = sam_model_registry["vit_t"](image_size=64)
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    Image.fromarray(np.rint(ramp / 4095 * 255).astype(np.uint8)).save(tmp_path / "b.webp", lossless=True)
    chosen = choose_photos(tmp_path, 4, 0)
    assert [path.name for path in chosen] == ["a.tif", "b.webp"]
    with pytest.warns(UserWarning, match="a.tif: values from 0 to 4095 are shown as 0 to 255"):
        (deep, _), (plain, _) = (prepare(sam, path) for path in chosen)
    assert (deep - plain).abs().max() < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--images", "/nowhere"), "no folder /nowhere"),
        (("--checkpoint", "/nowhere.pth"), "no checkpoint at"),
        (("-o", "out.txt"), "a checkpoint ends in"),
        (("--keep-ratio", "1"), "between 0 and 1"),
        (("--minutes", "0"), "above 0"),
        (("--limit", "0"), "--limit is at least 2"),
        (("--checkpoint", str(shipped_checkpoint("blsam_vit_t"))), "big.LITTLE model already"),
        (("--annotations", "a.json"), "go together"),
    ],
)
def test_bad_arguments_get_one_line(photos, changes, message, capsys):
    command = ["calibrate", "--model", "blsam_vit_t", "--checkpoint", str(DENSE), "--images", str(photos)]
    assert main([*command, "-o", "out.safetensors", *changes]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_another_run_s_folder_is_refused(photos, tmp_path, monkeypatch):
    from blsam.training import calibration

    chosen, path = choose_photos(photos, 3, 0), tmp_path / "a.safetensors"
    monkeypatch.setattr(
        calibration.Calibration, "_correct", lambda self, start: (_ for _ in ()).throw(OSError("stop"))
    )
    with pytest.raises(OSError, match="stop"):
        calibrate(CONFIGS["blsam_vit_t"], DENSE, chosen, path, image_size=64, settings=QUICK, quiet=True)
    with pytest.raises(ValueError, match="other settings"):
        calibrate(
            CONFIGS["blsam_vit_t"],
            DENSE,
            chosen,
            path,
            image_size=64,
            settings=Settings(steps=5, batch_size=2),
            quiet=True,
        )


@pytest.mark.parametrize("stopped_in", ["_fit_predictor", "_write_routed"], ids=["pass 1", "pass 3"])
def test_a_sample_of_large_photos_is_the_same_after_a_stop(photos, tmp_path, monkeypatch, stopped_in):
    """Photos of 64 tokens that are large to a step of 32, which is half of what is asked at 1024."""
    from blsam.training import calibration

    for name, value in {"TOKENS": 32, "START_QUERIES": 100, "START_ROWS": 150}.items():
        monkeypatch.setattr(calibration, name, value)
    chosen, settings, sampled = choose_photos(photos, 6, 0), Settings(steps=4), []
    original, sample = getattr(calibration.Calibration, stopped_in), calibration.Calibration._sample

    def stop_in_the_second(self, *args):
        if args[0] == 1:
            raise OSError("stop")
        return original(self, *args)

    def see(self, *args):
        sampled.append(sample(self, *args))
        return sampled[-1]

    def run(name):
        path = tmp_path / f"{name}.safetensors"
        calibrate(CONFIGS["blsam_vit_t"], DENSE, chosen, path, image_size=128, settings=settings, quiet=True)
        return ckpt.read(path)[0]

    monkeypatch.setattr(calibration.Calibration, "_sample", see)
    whole = run("whole")
    assert {int(stage.mask.sum()) for stage in sampled} == {32, 100, 150}
    with monkeypatch.context() as patch:
        patch.setattr(calibration.Calibration, stopped_in, stop_in_the_second)
        with pytest.raises(OSError, match="stop"):
            run("stopped")
    resumed = run("stopped")
    differing = [key for key in whole if not torch.equal(whole[key], resumed[key])]
    assert not differing, f"{len(differing)} tensors differ, the first is {differing[0]}"


@pytest.mark.e2e
def test_kill_and_resume_gives_the_same_checkpoint(photos, tmp_path):
    def command(name):
        arguments = ["--images", str(photos), "--image-size", "128", "--steps", "12", "-o", str(tmp_path / name)]
        return [
            sys.executable,
            "-m",
            "blsam",
            "calibrate",
            "--model",
            "blsam_vit_t",
            "--checkpoint",
            str(DENSE),
            *arguments,
        ]

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command("whole.safetensors"), check=True, capture_output=True, env=environment)
    for stop in ((1, 5), (3, 2)):  # in the middle of the first and of the third pass
        process = subprocess.Popen(command("killed.safetensors"), env=environment, stdout=subprocess.DEVNULL)
        state = tmp_path / "killed.safetensors.calibration" / "state.pt"
        began = time.monotonic()
        while True:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() - began < 300, f"never came to {stop}"
            if state.is_file():
                found = torch.load(state, weights_only=True)
                if (found["pass"], found["layer"]) >= stop:
                    break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command("killed.safetensors"), check=True, capture_output=True, env=environment)
    a, b = (ckpt.read(tmp_path / f"{name}.safetensors")[0] for name in ("whole", "killed"))
    differing = [key for key in a if not torch.equal(a[key], b[key])]
    assert not differing, f"{len(differing)} tensors differ, the first is {differing[0]}"


@pytest.mark.slow
def test_calibration_of_vit_b_at_1024(tmp_path):
    checkpoint = random_vit_b(tmp_path / "sam_vit_b.pth")
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        Image.fromarray(getattr(data, name)()).save(tmp_path / f"{name}.png")
    output, photos = tmp_path / "blsam_vit_b.safetensors", sorted(tmp_path.glob("*.png"))
    report = calibrate(CONFIGS["blsam_vit_b"], checkpoint, photos, output, settings=Settings(steps=4, stage_steps=2))
    print(f"\n{len(photos)} photos, {report['seconds']:.0f} s, peak {report['peak_gb']:.1f} GB")
    print("\n".join(report["log"]))
    for row in report["by_keep_ratio"]:
        print(row)
        assert row["cosine_after"] > row["cosine_before"], row
    assert sam_model_registry["blsam_vit_b"](output).image_encoder.img_size == 1024


def test_a_classifier_is_calibrated_by_the_same_command(photos, tmp_path, capsys):
    """From the weights of a plain ViT to a bLViT that answers as it does, more than one without narrow blocks."""
    torch.manual_seed(0)
    config = CLASSIFIERS["blvit_mini_patch4_32"]
    dense = BLVisionTransformer(config.dense).eval()
    with torch.no_grad():
        for name, p in dense.named_parameters():
            if name.startswith("blocks.") and p.dim() == 2:
                p *= 3  # fresh layers hardly add anything
    start, out, report = tmp_path / "dense.safetensors", tmp_path / "out.safetensors", tmp_path / "report.json"
    ckpt.save(start, dense.state_dict(), {"classes": list("abcdefghij"), "crop_ratio": "0.9"})
    command = ["calibrate", "--model", config.name, "--checkpoint", start, "--images", photos, "--steps", "6"]
    assert not main(
        [str(part) for part in (*command, "--limit", "6", "--dtype", "float32", "-o", out, "--json", report)]
    )
    assert "keep   cosine before   after" in capsys.readouterr().out
    for row in json.loads(report.read_text())["by_keep_ratio"]:
        assert 1 - row["cosine_after"] < 0.4 * (1 - row["cosine_before"]), row
    metadata = ckpt.read(out)[1]  # what the dense model's file says of its images still holds
    assert (
        metadata["image_size"] == "32"
        and metadata["crop_ratio"] == "0.9"
        and json.loads(metadata["classes"])[9] == "j"
    )
    model, photo = build_classifier(config, out), classifier_input(read_image(next(iter(photos.iterdir()))), 32)[None]
    with torch.no_grad():
        ours, theirs = model.encode(photo)[0], dense.encode(photo)[0]
    assert F.cosine_similarity(ours, theirs, dim=-1).mean() > 0.8
    with pytest.raises(ckpt.CheckpointError, match="big.LITTLE model already"):
        calibrate(config, out, choose_photos(photos, 4, 0), tmp_path / "again.safetensors", quiet=True)


def test_a_classifier_has_no_masks_to_be_measured_on(photos, tmp_path, capsys):
    start = tmp_path / "dense.pth"
    torch.save(BLVisionTransformer(CLASSIFIERS["vit_mini_patch4_32"]).state_dict(), start)
    command = ["calibrate", "--model", "blvit_mini_patch4_32", "--checkpoint", start, "--images", photos]
    more = ["--annotations", "a.json", "--annotation-images", photos, "-o", tmp_path / "out.pth"]
    assert main([str(part) for part in (*command, *more)]) == 2
    assert "a classifier is calibrated without" in capsys.readouterr().err
