"""The options of a run."""

import json
import re

import pytest

from blsam.commands.train import add_arguments, settings_of
from blsam.options import Parser, UsageError
from blsam.training.settings import launcher


def parsed(arguments):
    """The settings of a command line."""
    parser = Parser()
    add_arguments(parser)
    return settings_of(parser.parse_args(arguments))


def test_a_restart_goes_on_in_the_folder_that_it_began_alone(tmp_path, monkeypatch):
    command = ["--model", "vit_t", "--data", "photos", "--steps", "1", "--output", str(tmp_path)]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"launcher": launcher()}))
    assert parsed(command).resume
    for other in ({"launcher": "another 1"}, {}):
        config.write_text(json.dumps(other))
        with pytest.raises(UsageError, match="is not empty"):
            parsed(command)


@pytest.mark.parametrize(
    "more, error",
    (
        ([], "give one of --epochs, --steps and --minutes"),
        (["--steps", "1", "--epochs", "1"], "give one of"),
        (["--steps", "0"], "--steps must be above 0"),
        (["--steps", "1", "--teacher", "vit_t"], "go together"),
        (["--steps", "1", "--batch-size", "6", "--accumulate", "4"], "--batch-size 6 is not a multiple of 4 passes"),
        (["--steps", "1"], "blsam_vit_t starts from --init or from a dense --teacher"),
        (["--steps", "1", "--init", "a.pth", "--train", "decoder", "--cache", "c"], "has nothing to teach"),
        (["--steps", "1", "--init", "a.pth", "--train", "scores", "--cache", "c"], "has nothing to teach"),
        (["--steps", "1", "--init", "a.pth", "--train", "scores", "--stage", "encoder", "--cache", "c"], "nothing to"),
        (["--steps", "1", "--init", "a.pth", "--train", "scores", "--mask-loss", "balanced"], "learns no masks"),
        (["--steps", "1", "--init", "a.pth", "--answers", "4"], "which only --stage encoder keeps"),
        (["--steps", "1", "--init", "a.pth", "--answers", "-1"], "--answers and --workers are not negative"),
        (["--steps", "1", "--init", "a.pth", "--stage", "encoder"], "learns from a --teacher or a --cache"),
        (["--steps", "1", "--cache", "c", "--teacher-size", "2048"], "a --cache knows its own"),
        (["--steps", "1", "--keep-ratio", "0.5,2"], "keep ratios lie in"),
        (["--minutes", "inf"], "--minutes must be a finite number"),
        (["--epochs", "nan"], "--epochs must be a finite number"),
        (["--steps", "1", "--accumulate", "0"], "must be at least 1"),
        (["--steps", "1", "--keep-ratio", "half"], "keep ratios lie in"),
    ),
)
def test_options_that_do_not_go_together(more, error, tmp_path):
    arguments = ["--model", "blsam_vit_t", "--data", "photos", "--output", str(tmp_path / "run"), *more]
    with pytest.raises(UsageError, match=re.escape(error)):
        parsed(arguments)
