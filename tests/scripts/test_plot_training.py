"""The curves of runs, from rows made by hand."""

from scripts import plot_training


def test_runs_that_follow_one_another_share_a_clock(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text('{"step": 20, "minutes": 2, "sup": 1.0}\n{"step": 20, "val_box": 0.5}\n')
    second.write_text('{"step": 0, "val_box": 0.5}\n{"step": 20, "minutes": 3, "sup": 0.5}\n')
    rows = plot_training.read(first, 0)
    assert [row["at"] for row in rows] == [2, 2]
    assert [row["at"] for row in plot_training.read(second, rows[-1]["at"])] == [2, 5]
    losses, measured = plot_training.draw({"first": rows}).axes
    assert losses.lines[0].get_xydata().tolist() == [[2, 1]] and measured.lines[0].get_xydata().tolist() == [[2, 0.5]]
