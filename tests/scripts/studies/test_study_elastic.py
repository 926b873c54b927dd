"""The picture of keep ratios, from rows made by hand."""

from scripts.studies import study_elastic


def test_a_picture_of_keep_ratios_marks_those_outside_the_trained_range(capsys):
    def row(model, keep, seconds):
        one = {"model": model, "keep_ratio": keep, "image_size": 512, "gmacs": 5.0, "seconds": seconds}
        one |= {"compiled_s": seconds / 2, "box": 50.0, "center": 30.0}
        return one | {
            f"{p}_minus_dense{s}": v for p in study_elastic.PROMPTS for s, v in (("", 1), ("_interval_95", [0, 2]))
        }

    rows = [row("vit_t", None, 0.1), row("blsam_vit_t", 0.25, 0.05), row("blsam_vit_t", 1.0, 0.2)]
    assert "2.00x" in study_elastic.table(rows)
    panel = study_elastic.draw(rows, [0.1, 0.5]).axes[0]
    hollow = [line for line in panel.lines if line.get_markerfacecolor() == "none"]
    assert [line.get_xdata()[0] for line in hollow] == [0.2, 0.1]
