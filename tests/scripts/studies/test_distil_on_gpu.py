import argparse
import json
import sys

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blsam import sam_model_registry
from blsam.checkpoint import save
from blsam.data.sa1b import list_photos
from scripts.studies import device_prompts, distil_on_gpu
from scripts.studies.device_views import (
    CANVAS,
    Photos,
    Ring,
    Zoom,
    boxes_of,
    draw_windows,
    images_of,
    mosaics,
    objects_of,
    reached,
    read_photos,
)
from tests.helpers import gap, randomize
from tests.photos import write_photos

WHOLE = Zoom(fitted=1.0)


@pytest.fixture
def photos():
    """Two photos of noise, h x w 256 x 512 and 512 x 512; the first has a rectangle, x 64 ... 192, y 32 ... 96."""
    pixels = torch.randint(
        0, 256, (2, 3, CANVAS, CANVAS), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mask = np.zeros((CANVAS, CANVAS), np.uint8)
    mask[32:96, 64:192] = 1
    packed = torch.from_numpy(np.packbits(mask)[None])
    sizes = np.array([[256, 512], [512, 512]])
    return Photos(pixels, sizes, packed, np.array([mask.sum()]), np.array([0, 1, 1]))


def test_a_whole_photo_is_its_own_view_and_mirrored_its_mirror_image(photos):
    zero, one = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    seen = set()
    for seed in range(8):
        windows = draw_windows(photos, np.array([0, 1]), WHOLE, np.random.default_rng(seed))
        found = images_of(photos, windows, CANVAS, None, zero, one)
        assert found[0, :, 256:].abs().max() == 0, "padding"
        for i, height in enumerate((256, 512)):
            plain = photos.pixels[i, :, :height].float()
            gaps = [(found[i, :, :height] - image).abs().max().item() for image in (plain, plain.flip(2))]
            assert min(gaps) < 0.05, gaps
            seen.add(gaps[0] < gaps[1])
    assert seen == {True, False}


def test_a_window_never_leaves_its_photo(photos):
    zoom, rng = Zoom(0.5, 3.0, 0.0), np.random.default_rng(0)
    for cover in (False, True):
        windows = draw_windows(photos, np.zeros(200, int), zoom, rng, cover=cover)
        corners = torch.tensor([[-1.0, -1], [1, 1]])
        shown = windows.shown.flip(1)[:, None]  # x, y
        ends = torch.stack([corners[0].expand(200, 2), 2 * shown[:, 0] - 1], dim=1)  # of what is not padding
        places = torch.einsum("nij,nkj->nki", windows.theta[:, :, :2], ends) + windows.theta[:, None, :, 2]
        pixels = (places + 1) * CANVAS / 2
        assert pixels.min() > -0.01 and pixels[..., 0].max() < 512.01 and pixels[..., 1].max() < 256.01
        assert not cover or (windows.shown > 0.9999).all()


def test_masks_and_boxes_lie_where_the_object_is(photos):
    windows = draw_windows(photos, np.array([0, 1]), WHOLE, np.random.default_rng(0), mirror=False)
    found = objects_of(photos, windows, 128, 3, np.random.default_rng(0))
    assert found.there.tolist() == [[True, False, False], [False] * 3]
    assert gap(found.boxes[0, 0] * CANVAS, torch.tensor([64.0, 32, 192, 96])) < 1e-6
    expected = torch.zeros(128, 128)
    expected[8:24, 16:48] = 255
    assert torch.equal(found.masks[0, 0].float(), expected)


def test_boxes_are_those_of_the_hit_cells():
    hit = torch.zeros(2, 8, 8, dtype=torch.bool)
    hit[0, 2, 3:5] = True
    assert (boxes_of(hit)[0] * 8).tolist() == [3, 2, 5, 3]
    assert boxes_of(hit)[1, 2] < boxes_of(hit)[1, 0]


def test_cells_that_any_real_pixel_reaches_are_real():
    assert reached(torch.tensor([[0.5, 0.26]]), 4)[0].tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2


def test_mosaics_are_two_by_two():
    tiles = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 3, 3)
    found = mosaics(tiles)
    assert found.shape == (2, 1, 6, 6)
    assert found[1, 0, ::3, ::3].tolist() == [[4, 5], [6, 7]] and found[0, 0, 2, 3] == 1


def test_a_ring_gives_the_newest_and_forgets_the_oldest():
    ring = Ring(5)
    for start in (0, 3, 6):
        ring.add({"x": torch.arange(start, start + 3)})
    found = ring.draw(200, fresh=3)["x"]
    assert set(found[:3].tolist()) == {6, 7, 8}
    assert set(found.tolist()) == {4, 5, 6, 7, 8}


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    return randomize(sam_model_registry["vit_t_fine"](image_size=64))


def test_prompts_on_several_photos_are_decoded_as_sam_decodes_those_of_each(sam):
    embedding = torch.randn(2, 256, 8, 8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[4.0, 8, 40, 50], [1, 1, 9, 9]])
    points = torch.tensor([[[30.0, 20]], [[9, 60]]]), torch.ones(2, 1)
    with torch.no_grad():
        given = device_prompts.joined(device_prompts.prompts(sam, boxes=boxes), device_prompts.prompts(sam, points))
        logits, scores = device_prompts.decode(sam, embedding, torch.tensor([1, 0, 0, 1]), given)
        for i, photo in enumerate((1, 0, 0, 1)):
            one = {"boxes": boxes[i : i + 1]} if i < 2 else {"points": tuple(t[i - 2 : i - 1] for t in points)}
            sparse, dense = sam.prompt_encoder(**{"points": None, "boxes": None, "masks": None} | one)
            expected = sam.mask_decoder.predict_masks(
                embedding[photo][None], sam.prompt_encoder.get_dense_pe(), sparse, dense
            )
            assert gap(logits[i], expected[0][0]) < 1e-4 and gap(scores[i], expected[1][0]) < 1e-4


def test_clicks_lie_in_their_region_and_in_its_middle_where_they_are_to():
    region = torch.zeros(2, 64, 64, dtype=torch.bool)
    region[:, 10:41, 20:51] = True  # a square with its centre at 25, 35
    torch.manual_seed(0)
    for _ in range(20):
        x, y = (device_prompts.clicks(region, torch.tensor([False, True])) * 64).floor().long().unbind(1)
        assert region[[0, 1], y, x].all()
        assert abs(x[1] - 35) <= 7 and abs(y[1] - 25) <= 7, (x[1], y[1])  # eight cells and more from the edge


def test_a_correction_says_whether_the_object_was_missed():
    target = torch.zeros(3, 16, 16)
    target[0, 2:4, 2:4] = 1  # missed
    logits = torch.full((3, 16, 16), -1.0)
    logits[1, 8:10, 8:10] = 1  # too much
    points, labels = device_prompts.correction(logits, target, 64)
    assert labels[:, 0].tolist() == [1, 0, -1]
    assert ((points[0, 0] >= 8) & (points[0, 0] < 16)).all() and ((points[1, 0] >= 32) & (points[1, 0] < 40)).all()


# --- a run -----------------------------------------------------------------------------------------------------------


def test_photos_are_read_with_their_masks_larger_ones_made_smaller(tmp_path):
    listed = list_photos([write_photos(tmp_path / "photos", 3)])
    found = read_photos(listed, 1)
    for i, photo in enumerate(listed):
        pixels, annotations = photo.read()
        scale = min(1, CANVAS / max(pixels.shape[:2]))
        h, w = found.sizes[i]
        assert [h, w] == [round(n * scale) for n in pixels.shape[:2]]
        expected = cv2.resize(pixels, (int(w), int(h)), interpolation=cv2.INTER_AREA)
        assert np.array_equal(found.pixels[i, :, :h, :w].permute(1, 2, 0).numpy(), expected)
        for area, annotation in zip(found.areas[found.masks_of(i)], annotations, strict=True):
            assert abs(area / annotation["area"] - scale**2) < 0.03, (area, annotation["area"])


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_losses_are_finite_however_few_objects_there_are(sam, count):
    torch.manual_seed(0)
    there = torch.zeros(2, 4, dtype=torch.bool)
    there.view(-1)[:count] = True
    masks = torch.zeros(2, 4, 32, 32, dtype=torch.uint8)
    masks[:, :, 4:12, 6:20] = 255
    boxes = torch.tensor([6.0, 4, 20, 12]).div(32).expand(2, 4, 4)
    batch = {"there": there, "masks": masks, "boxes": boxes, "asked": torch.rand(2, 3, 2), "sure": torch.rand(2, 3, 3)}
    batch["told"] = torch.rand(2, 3, 3, 32, 32) > 0.5
    embedding = torch.randn(2, 256, 8, 8, requires_grad=True)
    for found in (device_prompts.prompted(sam, embedding, batch, 2), device_prompts.tuned(sam, embedding, batch)):
        assert bool(found) == (count > 1)
        for name, value in found.items():
            assert torch.isfinite(value), name
        if found:
            (grad,) = torch.autograd.grad(found["sup"], embedding)
            assert torch.isfinite(grad).all() and grad.abs().sum() > 0


def test_three_phases_one_after_the_other_each_from_where_it_was(tmp_path, monkeypatch, capsys):
    photos = write_photos(tmp_path / "photos", 12)
    for path in sorted(photos.glob("*.json"))[:4]:
        path.unlink()  # in these the teacher is asked for objects of its own
    torch.manual_seed(0)
    save(tmp_path / "teacher.safetensors", randomize(sam_model_registry["vit_t"](image_size=128)).state_dict(), {})
    student = randomize(sam_model_registry["vit_t_fine"](image_size=64), seed=1)
    save(tmp_path / "start.safetensors", student.state_dict(), {"model": "vit_t_fine", "image_size": "64"})
    out = tmp_path / "out"
    monkeypatch.setattr(distil_on_gpu, "SAY_EVERY", 0.5)
    monkeypatch.setattr(distil_on_gpu, "SAVE_EVERY", 0.0)

    def run(*minutes, **changes):
        command = ["distil", "--teacher", "vit_t", "--teacher-checkpoint", tmp_path / "teacher.safetensors", "--init"]
        command += [
            tmp_path / "start.safetensors",
            "--data",
            photos,
            "--output",
            out,
            "--image-size",
            64,
            "--finer",
            2,
        ]
        command += [
            "--batch-size",
            4,
            4,
            4,
            "--ring",
            16,
            8,
            "--filled",
            1,
            "--readers",
            1,
            "--device",
            "cpu",
            "--watch",
        ]
        command += ["--lr", 1e-3, changes.get("lr", 1e-4), 1e-4, "--minutes", *minutes]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        if distil_on_gpu.main():
            return capsys.readouterr().err, {}
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found = load_file(out / "model.safetensors")
        assert all(torch.isfinite(value).all() for value in found.values())
        return [row for row in rows if "val_error" in row], found

    rows, one = run(0.03, 0, 0)
    assert [row["phase"] for row in rows] == ["encoder"]
    teachers = load_file(tmp_path / "teacher.safetensors")
    parts = [key for key in one if key.startswith(("mask_decoder.", "prompt_encoder."))]
    assert parts and all(
        torch.allclose(one[key].float(), teachers[key], 1e-3, 1e-3) for key in parts
    )  # in half precision
    rows, _ = run(0.06, 0, 0)  # longer: it goes on
    assert len(rows) == 2 and rows[1]["step"] > rows[0]["step"] > 0
    rows, two = run(0.06, 0.06, 0)
    assert [row["phase"] for row in rows] == ["encoder", "encoder", "masks"], "the first is over"
    rows, three = run(0.06, 0.06, 0.06)
    assert [row["phase"] for row in rows][2:] == ["masks", "decoder"]
    moved = {key.split(".")[0] for key in two if not torch.equal(two[key], three[key])}
    assert moved == {"mask_decoder"}
    rows, four = run(0.5, 0.5, 0.06)  # longer ones of phases that are over change nothing
    assert all(torch.equal(three[key], four[key]) for key in three)
    assert sam_model_registry["vit_t_fine"](out / "model.safetensors").image_encoder.img_size == 64
    error, _ = run(0.06, 0.06, 0.1, lr=5e-4)
    assert error.count("\n") == 1 and "was begun with lr" in error


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    sam = sam_model_registry["vit_t_fine"](image_size=64)
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight[0, 0] = float("nan")
    args = argparse.Namespace(output=tmp_path, model="vit_t_fine", image_size=64)
    with pytest.raises(ValueError, match="step 7: the weights are not finite"):
        distil_on_gpu.save(args, sam, torch.optim.AdamW(sam.parameters()), 0, 7, 1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--init", "nothing.pt"], "no file nothing.pt"),
        (["--finer", 1], "answers in 2 cells"),
        (["--ring", 100, 100], "--ring 100 does not hold a batch of 128"),
        (["--objects", 0], "at least 1"),
    ],
)
def test_what_is_wrong_with_the_options_is_said_in_a_line(tmp_path, monkeypatch, capsys, options, message):
    for name in ("a", "b"):
        (tmp_path / name).touch()
    command = [
        "distil",
        "--teacher-checkpoint",
        tmp_path / "a",
        "--init",
        tmp_path / "b",
        "--data",
        tmp_path,
        "--output",
    ]
    monkeypatch.setattr(sys, "argv", [str(part) for part in [*command, tmp_path / "out", "--device", "cpu", *options]])
    assert distil_on_gpu.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error
