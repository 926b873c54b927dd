"""Tables."""

from blsam.evaluation.report import left_out_line, table


def test_tables():
    figures = {"miou": 50.0, "count": 3, "interval_95": [40.0, 60.0], "baseline_ellipse": 63.4}
    lines = table({**figures, "interval_95_large": None, "interval_95_medium": None, "interval_95_small": None}, "box")
    assert [line.split()[-4] for line in lines.splitlines()[1:2]] == ["50.0"] and "40.0 to 60.0" in lines
    assert left_out_line({"crowd": 12, "empty mask": 0}) == "left out: 12 crowd" and left_out_line({}).endswith(
        "nothing"
    )
