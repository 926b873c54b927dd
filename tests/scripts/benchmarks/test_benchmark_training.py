"""A small run that times a training step."""

import json

from scripts.benchmarks import benchmark_training


def test_a_training_step_is_timed_by_part(annotated, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_training, "DATA_STEPS", 2)
    command = ["--model", "blsam_vit_t", "--init", str(weights["blsam_vit_t"]), "--teacher", "vit_t"]
    command += ["--teacher-checkpoint", str(weights["vit_t"]), "--data", str(annotated[0]), "--image-size", "64"]
    # no workers: forked from a test process that holds runtimes with threads of their own, they may take it down
    command += [
        "--holdout",
        "0",
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--workers",
        "0",
        "--json",
        str(tmp_path / "steps.jsonl"),
    ]
    assert benchmark_training.main(command) == 0
    row = json.loads((tmp_path / "steps.jsonl").read_text())
    assert all(row[f"s_{part}"] > 0 for part in benchmark_training.PARTS) and row["data_images_per_second"] > 0
    assert "data alone" in capsys.readouterr().out
