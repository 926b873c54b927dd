"""The benchmark's arithmetic, and one small run of it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from scripts.benchmarks.benchmark import agreement, parse_args, rows_of, statistics_of
from scripts.benchmarks.benchmark_row import Row, build
from tests.helpers import ROOT

ROW = Row("vit_t", "float32", None, 64, 1, None, None, "cpu", 2, False)


def test_rows_are_the_product_of_what_makes_sense():
    args = parse_args("--models segment_anything:vit_t,vit_t,blsam_vit_t --keep-ratios 0.1,0.5".split())
    names = [row.name for row in rows_of(args, 64, 1)]
    assert names == [
        "segment_anything:vit_t float32",
        "vit_t float32",
        "vit_t bfloat16",
        *(f"blsam_vit_t keep {keep} {dtype}" for dtype in ("float32", "bfloat16") for keep in ("0.1", "0.5")),
    ]


def test_statistics():
    found = statistics_of([4.0, 1.0, 2.0, 3.0, 100.0])
    assert found["median_s"] == 3.0 and found["quartiles_s"] == [2.0, 4.0] and found["p95_s"] == pytest.approx(80.8)


def test_same_weights_in_every_row_and_what_is_compared():
    rows = [replace(ROW, model="segment_anything:vit_t"), ROW, replace(ROW, dtype="bfloat16")]
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeddings = {row: build(row)(x) for row in rows}
    assert agreement(rows[0], embeddings) == {}
    exact, half = (agreement(row, embeddings) for row in rows[1:])
    assert exact["agrees_with"] == half["agrees_with"] == "segment_anything:vit_t float32"
    assert exact["largest_gap_in_std"] <= 1e-4 and 0.999 < half["cosine"] < 1


@pytest.mark.e2e
def test_a_run(tmp_path):
    models = "segment_anything:vit_t,vit_t,blsam_vit_t"
    command = [
        sys.executable,
        "-m",
        "scripts.benchmarks.benchmark",
        "--models",
        models,
        "--image-sizes",
        "64",
        "--rounds",
        "2",
    ]
    done = subprocess.run(
        [*command, "--profile", "-o", tmp_path / "rows.jsonl"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(row["median_s"] > 0 and row["processor"] for row in rows)
    assert rows[1]["largest_gap_in_std"] <= 1e-4
    assert sum(rows[1]["profile"].values()) == pytest.approx(1)
    done = subprocess.run([*command, "--dtypes", "float8"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "no dtype 'float8'" in done.stderr
