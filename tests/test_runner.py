"""Runs that are killed, resumed, and shared out among processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DATA

from blsam.cli import main
from blsam.commands import evaluate
from blsam.data.annotations import Photo
from blsam.evaluation.report import left_out_line, speed, table
from blsam.evaluation.runner import predict_photos
from blsam.options import Parser

PHOTOS = [Photo(i, Path(f"{i}.jpg"), 4, 4) for i in (3, 5, 8)]
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


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


# --- the scripts -----------------------------------------------------------------------------------------------------


def arguments(*more):
    parser = Parser()
    evaluate.add_prompted_arguments(parser)
    return parser.parse_args(["--model", "vit_t", "--annotations", "a", "--images", "b", "--prompt", "point", *more])


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ((), "paper"),
        (("--num-points", "3"), "paper"),
        (("--point-sampling", "center"), "paper, modified: --point-sampling center"),
        (("--point-sampling", "random"), "paper"),
        (("--protocol", "efficientvit", "--no-crowd"), "efficientvit, modified: --no-crowd"),
        (("--select", "oracle", "--single-mask"), "paper, modified: --select oracle --single-mask"),
        (("--protocol", "sam", "--crowd"), "sam, modified: --crowd"),
    ],
)
def test_an_explicit_flag_overrides_the_protocol_and_is_named(flags, name):
    assert evaluate.protocol_of(arguments(*flags))[1] == name


def test_tables():
    figures = {"miou": 50.0, "count": 3, "interval_95": [40.0, 60.0], "baseline_ellipse": 63.4}
    lines = table({**figures, "interval_95_large": None, "interval_95_medium": None, "interval_95_small": None}, "box")
    assert [line.split()[-4] for line in lines.splitlines()[1:2]] == ["50.0"] and "40.0 to 60.0" in lines
    assert left_out_line({"crowd": 12, "empty mask": 0}) == "left out: 12 crowd" and left_out_line({}).endswith(
        "nothing"
    )


def script(name, *arguments, processes=None, threads=1, **more):
    """A script as users start it, on two COCO or LVIS photos a process."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "29511"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **more)


COCO = ("--annotations", DATA / "coco" / "instances_val2017.json", "--images", DATA / "coco" / "val2017")
needs_data = pytest.mark.skipif(not (DATA / "coco").is_dir(), reason="no coco photos (BLSAM_DATA)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--model", "vit_q"), "no model 'vit_q'"),
        (("--model", "vit_b"), "give --checkpoint"),
        (("--model", "nowhere:vit_b"), "no package 'nowhere'"),
        (("--model", "json:vit_b"), "no SamPredictor"),
        (("--model", "segment_anything:vit_q"), "no model 'vit_q'"),
        (("--model", "segment_anything:vit_b"), "needs --checkpoint"),
        (("--images", "/nowhere"), "no folder"),
        (("--annotations", "/nowhere.json"), "no annotations"),
        (("--limit", "0"), "at least 1 image"),
        (("--num-points", "3"), "goes with --prompt point"),
        (("--point-sampling", "center"), "goes with --prompt point"),
        (("--model", "segment_anything:vit_b", "--checkpoint", str(ROOT / "setup.py")), "does not load"),
    ],
)
@needs_data
def test_bad_arguments_get_one_line(changes, message, capsys):
    assert main(["evaluate", "coco", "--model", "vit_t", *map(str, COCO), *changes]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def unspeedy(text):
    """The table without the line on speed."""
    return [line for line in text.splitlines() if not line.startswith("images a second")]


@needs_data
@pytest.mark.e2e
def test_two_processes_print_what_one_prints(tmp_path):
    common = (
        "--model",
        "blsam_vit_t",
        *COCO,
        "--limit",
        7,
        "--prompt",
        "point",
        "--protocol",
        "sam",
        "--num-points",
        2,
    )
    outputs = []
    for processes in (None, 2):
        place = tmp_path / f"{processes}"
        done = script("eval_coco", *common, "--output", place, "--json", place / "out.json", processes=processes)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert unspeedy(outputs[0]) == unspeedy(outputs[1]), "\n".join(outputs)
    one, two = (json.loads((tmp_path / name / "ious.json").read_text()) for name in ("None", "2"))
    assert [row["annotation"] for row in one] == [row["annotation"] for row in two]
    gap = max(abs(a["iou"] - b["iou"]) for a, b in zip(one, two))
    assert gap <= 1e-4, f"per-annotation IoU differs by {gap}"
    parts = [(tmp_path / "2" / f"part-{i}.jsonl").read_text().splitlines() for i in range(2)]
    assert sorted(map(len, parts)) == [3, 4]  # none twice, none lost


@needs_data
@pytest.mark.e2e
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    common = [*map(str, ("--model", "blsam_vit_t", *COCO, "--limit", 8))]
    whole = script("eval_coco", *common, "--output", tmp_path / "whole", "--json", tmp_path / "whole.json")
    assert whole.returncode == 0, whole.stderr

    place = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "scripts" / "eval_coco.py"), *common, "--output", str(place)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = place / "part-0.jsonl"
    while not part.is_file() or part.read_text().count("\n") < 3:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = part.read_text().count("\n")
    assert 3 <= before < 8
    resumed = script("eval_coco", *common, "--output", place, "--resume", "--json", tmp_path / "resumed.json")
    assert resumed.returncode == 0, resumed.stderr
    assert unspeedy(resumed.stdout) == unspeedy(whole.stdout)
    figures = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "resumed")]
    for one in figures:
        del one["images_per_second"]
    assert figures[0] == figures[1]  # to the last digit

    expected = tmp_path / "whole.json"
    same = script("check_results", tmp_path / "resumed.json", expected)
    assert same.returncode == 0 and "agrees" in same.stdout
    expected.write_text(json.dumps(json.loads(expected.read_text()) | {"miou": 1.0, "count": 2}))
    other = script("check_results", tmp_path / "resumed.json", expected)
    assert other.returncode == 1 and "miou: " in other.stdout and "count: " in other.stdout


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
