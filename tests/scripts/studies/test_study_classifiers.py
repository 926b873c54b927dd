"""The study of classifiers: names of runs, the picture."""

import json
from argparse import Namespace

import pytest

from scripts.studies import plot_classifiers
from scripts.studies.study_classifiers import TABLES, folder_of, key_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_run_has_a_folder_of_its_own(tmp_path):
    args, variants = Namespace(output=tmp_path), {key_of(v): v for table in TABLES.values() for v in table.values()}
    folders = {folder_of(args, variant, seed) for variant in variants.values() for seed in (0, 1)}
    assert len(folders) == 2 * len(variants)
    assert folder_of(args, TABLES["main"]["ToMe"], 1).name == "run-baseline-tome-keep-0.45-1"


def test_the_picture_shows_all_that_was_trained(tmp_path, monkeypatch):
    main = TABLES["main"]
    rows = [
        {"variant": key_of(main[label]), "seed": s, "top1": 60.0 + s} for label in ("ToMe", "EViT") for s in (0, 1)
    ]
    speeds = {key_of(variant): {"mmacs": 60.0, "batch 64": 1000.0, "batch 1": 100.0} for variant in main.values()}
    speeds["dense"] = {"mmacs": 96.0, "batch 64": 800.0, "batch 1": 80.0}
    found = plot_classifiers.points(rows, {"teacher": 62.8, "speeds": speeds})
    assert found == {
        "dense": (62.8, 96.0, 1.25, 12.5),
        "EViT": (60.5, 60.0, 1.0, 10.0),
        "ToMe": (60.5, 60.0, 1.0, 10.0),
    }
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "speeds.json").write_text(json.dumps({"teacher": 62.8, "speeds": speeds}))
    picture = tmp_path / "picture.png"
    monkeypatch.setattr("sys.argv", ["plot", "--results", str(tmp_path), "--output", str(picture)])
    assert plot_classifiers.main() == 0 and picture.stat().st_size > 10000
