"""One row: its operations, and what is put together where its maps do not fit."""

from dataclasses import replace

import pytest

from scripts.benchmarks import benchmark_row
from scripts.benchmarks.benchmark_row import Row, fits, time_from_parts

ROW = Row("vit_t", "float32", None, 64, 1, None, None, "cpu", 2, False)


def test_macs_are_those_of_the_row():
    routed = replace(ROW, model="blsam_vit_b", keep_ratio=0.25, image_size=1024)
    assert routed.gmacs == pytest.approx(265.7, abs=0.1)
    assert replace(routed, model="segment_anything:vit_b", keep_ratio=None).gmacs == pytest.approx(486.0, abs=0.1)
    assert replace(routed, true_size=(768, 1024)).gmacs < routed.gmacs


def test_maps_that_do_not_fit_are_noticed_and_put_together_from_parts(monkeypatch):
    assert fits(replace(ROW, model="segment_anything:vit_t")) and fits(replace(ROW, image_size=16384))
    assert not fits(replace(ROW, model="segment_anything:vit_b", image_size=16384))
    monkeypatch.setattr(benchmark_row, "_median", lambda f: (f(), 1.0)[1])  # every part runs and counts one second
    row = replace(ROW, model="segment_anything:vit_t", image_size=256, batch_size=2)
    layers = 8 * 1 + 4 * (1 + 3 * 1)  # window layers; global ones: linear parts and three heads
    assert time_from_parts(row) == 2 * (layers + 1)
