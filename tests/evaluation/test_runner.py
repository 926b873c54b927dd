"""Runs that are killed, resumed, and taken over by fewer processes."""

import json
import time
from pathlib import Path

import pytest
import torch

from blsam.data.annotations import Photo
from blsam.evaluation.report import speed
from blsam.evaluation.runner import predict_photos

PHOTOS = [Photo(i, Path(f"{i}.jpg"), 4, 4) for i in (3, 5, 8)]
CPU = torch.device("cpu")


def run(folder, predict=lambda photo, watch: [{"id": photo.id}], settings=None, **more):
    return predict_photos(PHOTOS, predict, folder, settings or {"seed": 0}, CPU, **more)


def test_lines_come_in_the_photos_order_with_their_seconds(tmp_path):
    def predict(photo, watch):
        with watch("encoder"):
            time.sleep(0.01)
        return [{"id": photo.id}]

    lines = run(tmp_path, predict)
    assert [line["image_id"] for line in lines] == [3, 5, 8] and lines[1]["rows"] == [{"id": 5}]
    rates = speed(lines)
    assert 0 < rates["encoder"] <= 100 and rates["decoder"] is None and rates["all"] < rates["encoder"]


def test_a_torn_line_is_predicted_again_and_the_others_are_not(tmp_path):
    run(tmp_path)
    part = tmp_path / "part-0.jsonl"
    whole = part.read_text().splitlines(keepends=True)
    part.write_text("".join(whole[:2]) + whole[2][:9])
    asked = []
    lines = run(tmp_path, lambda photo, watch: asked.append(photo.id) or [{"id": photo.id}], resume=True)
    assert asked == [8] and [line["rows"] for line in lines] == [[{"id": i}] for i in (3, 5, 8)]
    assert [json.loads(text)["image_id"] for text in part.read_text().splitlines()] == [3, 5, 8]


def test_parts_of_more_processes_are_taken_over(tmp_path):
    run(tmp_path)
    text = (tmp_path / "part-0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part-0.jsonl").write_text(text[0])
    (tmp_path / "part-1.jsonl").write_text(text[1])
    asked = []
    run(tmp_path, lambda photo, watch: asked.append(photo.id) or [], resume=True)
    assert asked == [8]


def test_without_resume_a_run_begins_anew_and_keeps_the_old_one_aside(tmp_path):
    run(tmp_path)
    (tmp_path / "part-1.jsonl").write_text((tmp_path / "part-0.jsonl").read_text())
    asked = []
    run(tmp_path, lambda photo, watch: asked.append(photo.id) or [])
    assert asked == [3, 5, 8] and not (tmp_path / "part-1.jsonl").exists()
    run(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("previous-*/*")) == ["part-0.jsonl"] * 2 + ["part-1.jsonl"]


def test_resuming_with_other_settings_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="other settings .seed 0 then, 1 now.*without --resume"):
        run(tmp_path, settings={"seed": 1}, resume=True)
