"""The studies' arithmetic on rows made by hand, and one small run of each that trains or evaluates."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from training import write_coco, write_photos

from blsam import sam_model_registry
from blsam.checkpoint import save
from blsam.config import CONFIGS
from blsam.data.annotations import Annotations
from blsam.evaluation.prompted import PromptedIoU, object_ious, predict_objects
from blsam.evaluation.protocols import PROTOCOLS
from blsam.images import read_image
from blsam.predictor import SamPredictor
from scripts import plot_training
from scripts.benchmarks import benchmark_training
from scripts.studies import study_elastic, study_training
from scripts.studies.routing_on_objects import coverage, figures


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = write_photos(tmp_path_factory.mktemp("photos"))
    return folder, write_coco(folder, folder.parent / "annotations.json")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the dense and the routed model at 64, the latter warm-started from the former."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    paths = {name: folder / f"{name}.safetensors" for name in ("vit_t", "blsam_vit_t")}
    for name, start in (("vit_t", None), ("blsam_vit_t", paths["vit_t"])):
        sam = sam_model_registry[name](start, image_size=64)
        save(paths[name], sam.state_dict(), {"model": name, "image_size": "64"})
    return paths


def test_object_ious_are_those_of_the_evaluator(photos, weights):
    folder, json_path = photos
    annotations = Annotations(json_path, folder, "coco")
    sam = sam_model_registry["blsam_vit_t"](weights["blsam_vit_t"], keep_ratio=0.25)
    ious, images = object_ious(sam, annotations, 0.5, ("box", "center"))
    assert sam.image_encoder.keep_ratio == 0.25
    sam.image_encoder.keep_ratio = 0.5
    predictor, protocol = SamPredictor(sam), replace(PROTOCOLS["paper"], sampling="center")
    evaluators = {
        "box": PromptedIoU(annotations, protocol, "box"),
        "center": PromptedIoU(annotations, protocol, "point"),
    }
    for photo in annotations.photos:
        predictor.set_image(read_image(photo.path, upright=False))
        targets, _ = annotations.targets(photo, crowd=False)
        for evaluator in evaluators.values():
            evaluator.process(photo, predict_objects(predictor, targets, protocol, evaluator.prompt, 1, seed=0))
    for name, evaluator in evaluators.items():
        assert ious[name] == pytest.approx([100 * row["iou"] for row in evaluator.rows])
        assert ious[name].mean() == pytest.approx(evaluator.evaluate()["miou"])
    assert images.tolist() == [row["image"] for row in evaluators["box"].rows]


def test_coverage_of_a_quarter_of_a_token():
    mask = np.zeros((16, 32), bool)
    mask[:4, :4] = True  # a photo of 16 x 32 that fills 32 x 64 of the frame: 8 x 8 pixels of the first token
    found = coverage(mask, (32, 64), 64)
    expected = torch.zeros(1, 4, 4)
    expected[0, 0, 0] = 0.25
    torch.testing.assert_close(found, expected)


def test_gain_lies_between_area_and_best():
    # one stage; real tokens: 2 of 10 covered, prime: 1 of 2, best: 2 of 2
    photo = np.array([[[2.0, 10], [1, 2], [2, 2]]])
    row = figures(np.stack([photo, photo]))[0]
    assert (row["area"], row["prime"], row["best"]) == (20, 50, 100)
    assert row["gain"] == pytest.approx(100 * 30 / 80) and row["gain_interval_95"] == [37.5, 37.5]


def test_leads_of_the_student_are_means_over_seeds_weighted_by_objects(capsys):
    end = {"step": 3, "val_cosine": 0.9, "val_box": 0.5, "val_click": 0.3, "prime_jaccard": 0.8}

    def row(name, seed, first, second):
        photos = {prompt: [first, second] for prompt in study_training.PROMPTS}
        return {"variant": name, "seed": seed, "curve": [end], "objects": [1, 3], "photos": photos}

    rows = [row("student", 0, 50, 60), row("student", 1, 54, 64), row("random routing", 0, 50, 60)]
    rows.append(row("random routing", 1, 50, 60))
    study_training.report(rows)
    text = capsys.readouterr().out
    assert "box mIoU 59.50," in text  # (52 + 3 * 62) / 4
    assert "box mIoU 57.50 (student +2.00, +2.00 to +2.00)" in text
    assert study_training.draw(rows).axes


def test_a_picture_of_keep_ratios_marks_those_outside_the_trained_range(capsys):
    def row(model, keep, seconds):
        one = {"model": model, "keep_ratio": keep, "image_size": 512, "gmacs": 5.0, "seconds": seconds}
        one |= {"compiled_s": seconds / 2, "box": 50.0, "center": 30.0}
        return one | {
            f"{p}_minus_dense{s}": v for p in study_elastic.PROMPTS for s, v in (("", 1), ("_interval_95", [0, 2]))
        }

    rows = [row("vit_t", None, 0.1), row("blsam_vit_t", 0.25, 0.05), row("blsam_vit_t", 1.0, 0.2)]
    assert "2.00x" in study_elastic.table(rows)
    panel = study_elastic.draw(rows, [0.1, 0.5]).axes[0]
    hollow = [line for line in panel.lines if line.get_markerfacecolor() == "none"]
    assert [line.get_xdata()[0] for line in hollow] == [0.2, 0.1]


@pytest.mark.e2e
def test_a_study_of_training_measures_a_variant_once(photos, weights, tmp_path, capsys):
    folder, json_path = photos
    results = tmp_path / "controls.jsonl"
    argv = ["--teacher-checkpoint", weights["vit_t"], "--init", weights["blsam_vit_t"], "--data", folder]
    argv += ["--annotations", json_path, "--annotation-images", folder, "--image-size", 64, "--steps", 3, "--seeds", 0]
    argv += [
        "--holdout",
        0.4,
        "--variants",
        "student,no E-block,random routing",
        "--results",
        results,
        "--picture",
        tmp_path / "a.png",
    ]
    preset = CONFIGS["blsam_vit_t"]
    for _ in range(2):
        assert study_training.main([str(part) for part in argv]) == 0
        assert CONFIGS["blsam_vit_t"] == preset
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["student", "no E-block", "random routing"]
    assert all(len(row["photos"]["box"]) == len(row["objects"]) == 3 for row in rows)
    assert "(student" in capsys.readouterr().out and (tmp_path / "a.png").is_file()


def test_a_training_step_is_timed_by_part(photos, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_training, "DATA_STEPS", 2)
    command = ["--model", "blsam_vit_t", "--init", str(weights["blsam_vit_t"]), "--teacher", "vit_t"]
    command += ["--teacher-checkpoint", str(weights["vit_t"]), "--data", str(photos[0]), "--image-size", "64"]
    command += ["--holdout", "0", "--batch-size", "2", "--steps", "2", "--json", str(tmp_path / "steps.jsonl")]
    assert benchmark_training.main(command) == 0
    row = json.loads((tmp_path / "steps.jsonl").read_text())
    assert all(row[f"s_{part}"] > 0 for part in benchmark_training.PARTS) and row["data_images_per_second"] > 0
    assert "data alone" in capsys.readouterr().out


def test_runs_that_follow_one_another_share_a_clock(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text('{"step": 20, "minutes": 2, "sup": 1.0}\n{"step": 20, "val_box": 0.5}\n')
    second.write_text('{"step": 0, "val_box": 0.5}\n{"step": 20, "minutes": 3, "sup": 0.5}\n')
    rows = plot_training.read(first, 0)
    assert [row["at"] for row in rows] == [2, 2]
    assert [row["at"] for row in plot_training.read(second, rows[-1]["at"])] == [2, 5]
    losses, measured = plot_training.draw({"first": rows}).axes
    assert losses.lines[0].get_xydata().tolist() == [[2, 1]] and measured.lines[0].get_xydata().tolist() == [[2, 0.5]]
