"""Leads over variants on rows made by hand, and one small run."""

import json

import pytest

from scripts.studies import study_training


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


@pytest.mark.e2e
def test_a_study_of_training_measures_a_variant_once(annotated, weights, tmp_path, capsys):
    folder, json_path = annotated
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
    for _ in range(2):
        assert study_training.main([str(part) for part in argv]) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["student", "no E-block", "random routing"]
    assert all(len(row["photos"]["box"]) == len(row["objects"]) == 3 for row in rows)
    assert "(student" in capsys.readouterr().out and (tmp_path / "a.png").is_file()
