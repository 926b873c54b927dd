"""Average precision as users run it: several processes, files of results."""

import json

import pytest

from tests.helpers import DATA, needs_data
from tests.scripts.helpers import script, unspeedy


@needs_data
@pytest.mark.e2e
def test_zero_shot_of_two_processes_and_its_results_file(tmp_path):
    pytest.importorskip("lvis")
    data = ("--dataset", "lvis", "--annotations", DATA / "lvis" / "lvis_v0.5_val.json", "--images", DATA / "lvis")
    common = ("--model", "blsam_vit_t", *data, "--limit", 4, "--boxes", "gt", "--results", tmp_path / "r.json")
    outputs = []
    for processes in (None, 2):
        done = script("eval_zero_shot", *common, "--output", tmp_path / f"{processes}", processes=processes)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert unspeedy(outputs[0]) == unspeedy(outputs[1])
    rows = json.loads((tmp_path / "r.json").read_text())
    assert rows and set(rows[0]) == {"image_id", "category_id", "segmentation", "score"}
    # the same masks as a detector's boxes
    boxes = [
        {"image_id": r["image_id"], "category_id": r["category_id"], "bbox": b, "score": 1.0} for r, b in true(rows)
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    done = script("eval_zero_shot", *common[:-3], tmp_path / "boxes.json", "--output", tmp_path / "detector")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "@[" in line] == [
        line for line in outputs[0].splitlines() if "@[" in line
    ]


def true(rows):
    """The annotations' own boxes, in the order of the results."""
    dataset = json.loads((DATA / "lvis" / "lvis_v0.5_val.json").read_text())
    images = {row["image_id"] for row in rows}
    annotations = sorted((a for a in dataset["annotations"] if a["image_id"] in images), key=lambda a: a["image_id"])
    return zip(rows, [a["bbox"] for a in annotations])
