"""The options of the evaluation programs."""

import pytest

from blsam.evaluation.commands import prompted_arguments, protocol_of
from tests.helpers import COCO, ROOT, needs_data


def arguments(*more):
    return prompted_arguments(
        "", ["--model", "vit_t", "--annotations", "a", "--images", "b", "--prompt", "point", *more]
    )


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
    assert protocol_of(arguments(*flags))[1] == name


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
    from blsam.evaluation.commands import run_prompted, run_script

    command = ["--model", "vit_t", *map(str, COCO), *changes]
    with pytest.raises(SystemExit) as stopped:
        run_script("eval_coco", lambda: run_prompted("coco", "", command))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error
