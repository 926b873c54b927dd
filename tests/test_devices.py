"""The same on every device that there is: `pytest tests/test_devices.py` takes two minutes on a machine with a GPU.

Encoders and their gradients are compared with double precision on the CPU, so that the CPU's own single precision is
under test too; prompts and everything-mode on a GPU with the CPU; calibration and training run, and bring what they should.
"""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from blsam import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from blsam.checkpoint import save
from blsam.config import CONFIGS
from blsam.modeling.image_encoder import ImageEncoder
from blsam.training.calibrate import calibrate
from tests.helpers import ROOT, TINY, TINY_EXACT, images, randomize, tiny
from tests.photos import write_photos

GPUS = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
SINGLE = {"cpu": 1e-5, "cuda": 5e-3, "mps": 5e-3}  # convolutions on a GPU are in tf32 unless one says otherwise
HALF = 0.06

everywhere = pytest.mark.parametrize("device", ["cpu", *GPUS])
on_gpus = pytest.mark.parametrize("device", GPUS)


def error(found, expected):
    """Distance over the norm of what is expected."""
    found, expected = found.detach().cpu().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    return randomize(sam_model_registry["blsam_vit_t"](image_size=256), std=0.02)


@pytest.fixture(scope="module")
def photo():
    y, x = np.mgrid[:192, :256]
    disc = ((x - 100) ** 2 + (y - 90) ** 2 < 50**2)[..., None]
    return np.where(disc, [200, 60, 40], [30, 90, 160]).astype(np.uint8) + (x % 16).astype(np.uint8)[..., None]


@everywhere
@pytest.mark.parametrize("config", [TINY_EXACT, TINY], ids=lambda config: config.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_encoder_gives_the_values_of_double_precision(device, config, dtype):
    encoder, x = tiny(config), images(2)
    with torch.no_grad():
        expected, stages = copy.deepcopy(encoder).double().encode(x.double(), keep_ratio=0.5)
        # the choice is that of double precision: rounding may tip a token that is in between
        routing = replace(
            stages, stages=[replace(one, mask=one.mask.to(device), scores=None) for one in stages.stages]
        )
        on = encoder.to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            found, _ = on.encode(x.to(device), keep_ratio=0.5, routing=routing if config.routed else None)
    assert error(found, expected) < (SINGLE[device] if dtype == torch.float32 else HALF)


@everywhere
def test_a_gradient_is_that_of_double_precision(device):
    encoder, x = tiny(TINY).train(), images(1)
    exact = copy.deepcopy(encoder).double()
    exact.encode(x.double(), keep_ratio=1)[0].square().mean().backward()
    on = encoder.to(device)
    on.encode(x.to(device), keep_ratio=1)[0].square().mean().backward()
    for (name, found), expected in zip(on.named_parameters(), exact.parameters()):
        if expected.grad is not None:
            assert error(found.grad, expected.grad) < 10 * SINGLE[device], name


@on_gpus
def test_prompts_give_the_masks_of_the_cpu(device, sam, photo):
    masks = []
    for place in ("cpu", device):
        predictor = SamPredictor(copy.deepcopy(sam).to(place))
        predictor.model.image_encoder.keep_ratio = 1.0
        predictor.set_image(photo)
        low = predictor.predict(np.array([[100, 90]]), np.array([1]), multimask_output=True, return_logits=True)[0]
        masks.append(torch.from_numpy(low))
    assert error(masks[1], masks[0]) < 2 * SINGLE[device]


@on_gpus
def test_everything_mode_runs_and_agrees(device, sam, photo):
    found = []
    for place in ("cpu", device):
        settings = {"points_per_side": 4, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0}
        model = copy.deepcopy(sam).to(place)
        model.image_encoder.keep_ratio = 1.0
        found.append(SamAutomaticMaskGenerator(model, **settings).generate(photo))
    counts = [len(masks) for masks in found]
    assert counts[0] and abs(counts[0] - counts[1]) <= max(1, counts[0] // 10), counts


@everywhere
def test_a_calibration_brings_a_model_nearer_to_the_dense_one(device, tmp_path):
    torch.manual_seed(0)
    dense = randomize(ImageEncoder(CONFIGS["vit_t"], 64), std=0.02)
    whole = sam_model_registry["vit_t"](image_size=64)
    whole.image_encoder.load_state_dict(dense.state_dict())
    save(tmp_path / "dense.safetensors", whole.state_dict(), {"model": "vit_t", "image_size": "64"})
    photos = sorted(write_photos(tmp_path / "photos", 6).glob("*.jpg"))
    report = calibrate(
        CONFIGS["blsam_vit_t"], tmp_path / "dense.safetensors", photos, tmp_path / "out.safetensors",
        image_size=64, device=device, quiet=True,
    )  # fmt: skip
    row = report["by_keep_ratio"][0]
    assert row["cosine_after"] > row["cosine_before"], row


@everywhere
@pytest.mark.parametrize("stage", ["encoder", "masks"])
def test_a_training_step_on_the_device(device, stage, tmp_path):
    photos = write_photos(tmp_path / "photos", 4)
    sam = sam_model_registry["vit_t"](image_size=64)
    save(tmp_path / "start.safetensors", sam.state_dict(), {"model": "vit_t", "image_size": "64"})
    command = [
        sys.executable, ROOT / "scripts" / "train_sam.py", "--model", "vit_t", "--init", tmp_path / "start.safetensors",
        "--teacher", "vit_t", "--teacher-checkpoint", tmp_path / "start.safetensors", "--data", photos, "--image-size", 64,
        "--batch-size", 2, "--steps", 2, "--device", device, "--workers", 1, "--precision", "bf16", "--log-every", 1,
        "--holdout", 0.25, "--output", tmp_path / "run", *(["--stage", "encoder"] if stage == "encoder" else []),
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in row and np.isfinite(row["loss"]) for row in rows)
