"""Options, where weights lie, what may be written, and how an error ends a command."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blsam import options
from blsam.modeling.windows import PATCH
from blsam.options import OPTIONS, Parser, UsageError, add_option, check_output, exit_status, find_checkpoint

ROOT = Path(options.__file__).parents[1]


# --- errors ----------------------------------------------------------------------------------------------------------


def fails(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("give --point"), "it: give --point"),
        (FileNotFoundError("no image\nat a.jpg"), "it: no image"),
        (ImportError(""), "it: ImportError"),
        (ValueError(" \n "), "it: ValueError"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(error, line, capsys):
    assert exit_status("it", fails(error)) == 2
    assert capsys.readouterr().err == line + "\n"


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_status("it", fails(ZeroDivisionError("ours")))
    assert exit_status("it", lambda: None) == 0 and exit_status("it", lambda: True) == 1


def test_a_reader_that_leaves_is_no_error_and_a_broken_pipe_elsewhere_is(capsys):
    program = (
        "import sys; from blsam.options import exit_status; sys.exit(exit_status('it', lambda: print('x' * 2**20)))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()  # as `head` does
    assert (process.stderr.read(), process.wait()) == (b"", 141)
    process.stderr.close()
    assert exit_status("it", fails(BrokenPipeError(32, "Broken pipe"))) == 2
    assert capsys.readouterr().err == "it: [Errno 32] Broken pipe\n"


def test_a_parser_says_what_is_wrong_in_one_line():
    parser = Parser(prog="it", description="one\n  two")
    parser.add_argument("--number", type=int)
    with pytest.raises(UsageError, match=r"^argument --number: invalid int value: 'x' \(it --help\)$"):
        parser.parse_args(["--number", "x"])
    assert "one\n  two" in parser.format_help()


@pytest.mark.parametrize("value", ["-5,-5,99,99", "-3,4", "-.5,1", "-1e3", "-inf,0", "-nan,0", "7"])
def test_a_value_may_begin_with_a_minus(value):
    parser = Parser(prog="it")
    parser.add_argument("--box")
    parser.add_argument("--point", action="append")
    group = parser.add_argument_group("more")
    group.add_argument("--shift", nargs="+")
    args = parser.parse_args(["--box", value, "--point", value, "--point", value, "--shift", value, value])
    assert (args.box, args.point, args.shift) == (value, [value] * 2, [value] * 2)
    with pytest.raises(UsageError, match="unrecognized arguments: -x"):
        parser.parse_args(["--box", value, "-x"])


@pytest.mark.e2e
def test_under_torchrun_each_process_says_its_line(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "blsam"]
    command += ["train", "--model", "vit_t", "--data", str(tmp_path), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "give one of --epochs, --steps and --minutes" in line]
    assert said and set(said) <= {
        f"blsam{who}: give one of --epochs, --steps and --minutes" for who in ("", ", process 1")
    }
    assert "blsam/cli.py" not in done.stderr, done.stderr  # the one traceback is torchrun's own


# --- options ---------------------------------------------------------------------------------------------------------


def parsed(*arguments, **changes):
    parser = Parser()
    for name in OPTIONS:
        add_option(parser, name, **changes.get(name, {}))
    return parser.parse_args(list(arguments))


def test_defaults():
    args = parsed()
    assert (args.model, args.checkpoint, args.keep_ratio, args.image_size) == ("blsam_vit_t_fine", None, 0.25, None)
    assert args.device.type == ("cuda" if torch.cuda.is_available() else "cpu") and args.dtype == "auto"
    assert parsed(**{"--dtype": {"default": "float32"}}).dtype == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-ratio", "0"], "keep ratios lie in"),
        (["--keep-ratio", "1.01"], "keep ratios lie in"),
        (["--keep-ratio", "nan"], "keep ratios lie in"),
        (["--image-size", "500"], "a multiple of 16"),
        (["--image-size", "0"], "a multiple of 16"),
        (["--image-size", "-16"], "a multiple of 16"),
        (["--device", "nowhere"], "no device 'nowhere' here"),
        (["--device", "cuda:99"], "no device 'cuda:99' here"),
        (["--dtype", "float16"], "invalid choice"),
        (["--model", "vit_q"], "invalid choice"),
    ],
)
def test_values_that_make_no_sense(arguments, message):
    with pytest.raises(UsageError, match=message):
        parsed(*arguments)


def test_values_that_make_sense():
    args = parsed("--keep-ratio", "1", "--image-size", "16", "--device", "cpu")
    assert (args.keep_ratio, args.image_size, args.device) == (1.0, 16, torch.device("cpu"))
    assert options.parse_ratios("0.1,1") == (0.1, 1.0) and PATCH == 16
    with pytest.raises(argparse.ArgumentTypeError, match="got ''"):
        options.parse_ratios("0.1,")


def test_cuda_is_the_process_s_own_under_torchrun(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    asked = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: asked.append(str(device)))
    options.parse_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options.parse_device("auto")
    options.parse_device("cuda:1")
    assert asked == ["cuda:3", "cuda:3", "cuda:1"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_weights_of_an_installed_package_and_of_the_repository(tmp_path, monkeypatch):
    installed, repository = tmp_path / "weights", tmp_path / "checkpoints"
    monkeypatch.setattr(options, "WEIGHTS", (installed, repository))
    with pytest.raises(UsageError, match="vit_t.safetensors is not here.*give --checkpoint"):
        find_checkpoint("vit_t", None)
    with pytest.raises(UsageError, match="no weights ship for vit_b; give --checkpoint"):
        find_checkpoint("vit_b", None)
    for folder in (repository, installed):
        folder.mkdir()
        (folder / "vit_t.safetensors").touch()
        assert find_checkpoint("vit_t", None) == folder / "vit_t.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        find_checkpoint("vit_t", tmp_path / "mine.pth")


@pytest.mark.parametrize("name", ["vit_t", "blsam_vit_t", "vit_t_fine", "blsam_vit_t_fine"])
def test_shipped_weights_are_found_from_elsewhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(name, None).is_file()


def test_outputs_are_checked_before_work_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").touch()
    Path("folder").mkdir()
    Path("link.jpg").symlink_to("photo.jpg")
    os.link("photo.jpg", "hard.jpg")
    photo = Path("photo.jpg")
    for name, message in (
        ("photo.jpg", "--json photo.jpg would overwrite photo.jpg.*choose another name"),
        ("folder/../photo.jpg", "would overwrite photo.jpg"),
        ("link.jpg", "would overwrite photo.jpg"),
        ("hard.jpg", "would overwrite photo.jpg"),
        (str(tmp_path / "photo.jpg"), "would overwrite photo.jpg"),
        ("folder", "is a folder; name a file in it"),
        ("photo.jpg/out.json", "photo.jpg is a file, not a folder"),
        ("photo.jpg/deep/out.json", "photo.jpg is a file, not a folder"),
    ):
        with pytest.raises(UsageError, match=message):
            check_output("--json", Path(name), taken=(photo, None))
    with pytest.raises(UsageError, match="--json out.txt: a picture ends in .png, .jpg"):
        check_output("--json", Path("out.txt"), what="a picture", suffixes=(".png", ".jpg"))
    with pytest.raises(UsageError, match="would overwrite .*new.json"):  # which is not there yet
        check_output("--json", Path("new.json"), taken=[Path("folder/../new.json")])
    check_output("--json", None)
    check_output("--json", Path("none/deep/out.PNG"), suffixes=(".png",), taken=(photo,))
    assert not Path("none").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_nothing_can_be_written_in(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="nothing can be written in"):
        check_output("--json", tmp_path / "out.json")
