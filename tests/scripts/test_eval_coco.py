"""Evaluation on COCO as users run it: several processes, kills, results compared."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import COCO, ROOT, needs_data
from tests.scripts.helpers import script, unspeedy


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
