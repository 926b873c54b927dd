"""The trainer as its users run it: as a program, on photos in SA-1B's layout."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from skimage import data

from blsam import sam_model_registry
from blsam.checkpoint import read
from blsam.data.sa1b import TrainingViews, list_photos
from blsam.training.losses import balanced_mask_loss, cosine_loss, mask_iou, relative_mse_loss, sam_mask_loss
from blsam.training.prompts import corrective_clicks

# sums over several threads depend on who is first: bit for bit is promised for one
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "train_sam.py"
TEACHER = SCRIPT.parent.parent / "checkpoints" / "vit_t.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos of scikit-image with made-up rectangular objects."""
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate((data.astronaut(), data.chelsea(), data.coffee())):
        h, w = image.shape[:2]
        Image.fromarray(image).save(folder / f"sa_{i}.jpg")
        annotations = []
        for top, left in ((h // 8, w // 8), (h // 3, w // 2)):
            mask = np.zeros((h, w), np.uint8, order="F")
            mask[top : top + h // 3, left : left + w // 3] = 1
            rle = rle_tools.encode(mask)
            rle["counts"] = rle["counts"].decode()
            annotations.append({"segmentation": rle, "area": int(mask.sum())})
        (folder / f"sa_{i}.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def test_views_depend_on_seed_and_number_alone(photos):
    paths = list_photos([photos])
    first, second = (TrainingViews(paths, 128, 4, seed=3, length=12) for _ in range(2))
    for i in (7, 2, 7):
        a, b = first[i], second[i]
        assert torch.equal(a.image, b.image) and torch.equal(a.masks, b.masks) and torch.equal(a.boxes, b.boxes)
    assert not torch.equal(first[0].masks, TrainingViews(paths, 128, 4, seed=4, length=12)[0].masks)


def test_boxes_enclose_their_masks(photos):
    for sample in (TrainingViews(list_photos([photos]), 128, 4, 0, 20)[i] for i in range(20)):
        for mask, box in zip(sample.masks, sample.boxes):
            ys, xs = np.nonzero(mask.numpy() > 0.5)
            tight = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * 4
            assert np.abs(tight - box.numpy()).max() <= 4, (tight, box)


def test_losses_on_a_hand_computed_case():
    target = torch.zeros(1, 4, 4)
    target[0, :2, :2] = 1
    perfect = torch.where(target > 0, 50.0, -50.0)[:, None]
    half = perfect.clone()
    half[0, 0, 0, :2] = -50
    assert mask_iou(perfect, target).item() == 1 and mask_iou(half, target).item() == 0.5
    # the wrong half: focal 20 * 2 pixels * 0.25 * 50 / 16; dice 1 - (2 * 2 + 1) / (2 + 4 + 1)
    assert sam_mask_loss(perfect, target[:, None]).item() == pytest.approx(0, abs=1e-6)
    assert sam_mask_loss(half, target[:, None]).item() == pytest.approx(20 * 2 * 0.25 * 50 / 16 + 2 / 7, rel=1e-5)
    # 1.6 x the 2 x 2 box about (1, 1) reaches the pixel centres at 0.5, 1.5 and 2.5: 9 pixels, 2 of them wrong
    assert balanced_mask_loss(half, target[:, None]).item() == pytest.approx(2 * 50 / 9 + 2 / 7, rel=1e-5)
    a, b = torch.tensor([1.0, 0]).view(1, 2, 1, 1), torch.tensor([1.0, 1]).view(1, 2, 1, 1)
    assert cosine_loss(a, b, torch.ones(1, 1, 1, dtype=torch.bool)).item() == pytest.approx(1 - 0.5**0.5)
    # three tokens of one channel, the last one padding: errors 1 and 3, the teacher's deviations -2 and 2
    student, teacher = torch.tensor([2.0, 8.0, 99.0]), torch.tensor([1.0, 5.0, 0.0])
    real = torch.tensor([True, True, False]).view(1, 1, 3)
    found = relative_mse_loss(student.view(1, 1, 1, 3), teacher.view(1, 1, 1, 3), real)
    assert found.item() == pytest.approx((1 + 9) / (4 + 4))


def test_corrective_clicks_lie_in_the_error():
    target = torch.zeros(3, 4, 4)
    target[0, 1, 2] = 1  # missed: positive
    logits = torch.full((3, 4, 4), -1.0)
    logits[1, 3, 0] = 1  # extra: negative; the third is right: no point
    points, labels = corrective_clicks(logits, target, torch.Generator().manual_seed(0))
    assert labels[:, 0].tolist() == [1, 0, -1]
    assert points[0, 0].tolist() == [10, 6] and points[1, 0].tolist() == [2, 14]


def _train(photos, output, steps, *more):
    command = [sys.executable, str(SCRIPT), "--model", "blsam_vit_t", "--teacher", "vit_t"]
    command += ["--teacher-checkpoint", str(TEACHER), "--data", str(photos), "--image-size", "128", "--holdout", "0"]
    command += ["--batch-size", "2", "--keep-ratio", "0.25,0.5", "--steps", str(steps), "--workers", "0"]
    return subprocess.run([*command, "--output", str(output), *more], capture_output=True, text=True, env=ONE_THREAD)


@pytest.mark.e2e
def test_a_resumed_run_equals_an_uninterrupted_one(photos, tmp_path):
    whole = _train(photos, tmp_path / "whole", 4)
    assert whole.returncode == 0, whole.stderr
    # stop after two of four steps: the schedule must stay that of four
    stopper = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import train_sam as t; real = t.AveragedModel; "
    )
    stopper += (
        "n = [0]\nclass Stop(real):\n def update_parameters(self, m):\n  super().update_parameters(m); n[0] += 1\n"
    )
    stopper += "  if n[0] == 2: import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n"
    stopper += "t.AveragedModel = Stop\nt.main(sys.argv[1:])"
    arguments = ["--model", "blsam_vit_t", "--teacher", "vit_t", "--teacher-checkpoint", str(TEACHER), "--data"]
    arguments += [
        str(photos),
        "--image-size",
        "128",
        "--holdout",
        "0",
        "--batch-size",
        "2",
        "--keep-ratio",
        "0.25,0.5",
    ]
    arguments += ["--steps", "4", "--workers", "0", "--output", str(tmp_path / "cut")]
    subprocess.run([sys.executable, "-c", stopper, *arguments], check=True, capture_output=True, env=ONE_THREAD)
    state = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    assert state["step"] == 2
    resumed = _train(photos, tmp_path / "cut", 4, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (read(tmp_path / run / "model.safetensors")[0] for run in ("whole", "cut"))
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"{len(different)} tensors differ, first {different[:3]}"
    sam_model_registry["blsam_vit_t"](tmp_path / "cut" / "model.safetensors")


@pytest.mark.e2e
def test_a_signal_to_the_whole_group_ends_with_a_checkpoint(photos, tmp_path):
    command = [sys.executable, str(SCRIPT), "--stage", "encoder", "--model", "vit_t", "--init", str(TEACHER)]
    command += ["--teacher", "vit_t", "--teacher-checkpoint", str(TEACHER), "--distill-loss", "mse"]
    command += ["--data", str(photos), "--image-size", "128", "--holdout", "0", "--batch-size", "2"]
    command += ["--steps", "100000", "--workers", "1", "--output", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD, start_new_session=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    row = json.loads(metrics.read_text().splitlines()[0])
    assert row["fd"] < 0.05 and "sup" not in row  # the student is the teacher, and no prompt was decoded
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] >= 20
    state, _ = read(tmp_path / "run" / "model.safetensors")
    decoder = read(TEACHER)[0]
    assert all(torch.equal(state[k], v.half()) for k, v in decoder.items() if k.startswith("mask_decoder."))


@pytest.mark.e2e
def test_bad_arguments_are_one_line(photos, tmp_path):
    for more in (["--data", str(tmp_path / "none")], ["--teacher-checkpoint", "none.pth"]):
        result = _train(photos, tmp_path / "run", 1, *more)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
