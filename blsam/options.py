"""What the command line and every script share: the options that say which model runs where, and how errors end.

Nothing here imports torch before a device is asked for, so that help is there at once.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .config import CLASSIFIERS, CONFIGS, MODELS, REDUCED
from .precision import DTYPES, WIDE
from .runtimes.choice import RUNTIMES, resolve, resolve_for

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "blsam_vit_t_fine"
ROUTED = tuple(name for name, config in CONFIGS.items() if config.routed)
SIGPIPE_STATUS = 141  # as shells say it of a program that this signal ended
MOST_PIXELS = 8192  # along a side of a model's input
PICTURES = (".png", ".jpg", ".jpeg")
PACKAGE = Path(__file__).resolve().parent
WEIGHTS = (PACKAGE / "weights", PACKAGE.parent / "checkpoints")  # of an installed package, of the repository


# --- errors ----------------------------------------------------------------------------------------------------------


class UsageError(ValueError):
    """Something the user can put right; printed in one line, exit status 2."""


class Parser(argparse.ArgumentParser):
    """Keeps the line breaks of its description, and says in one line what is wrong with the options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter} | kwargs)

        # "-5,-5,99,99" is a box, not an option
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help)")


def exit_status(name: str, work: Callable[[], int | None]) -> int:
    """Run a command: the status that it returns (None: 0), or 2 after one line on what the user can put right.

    Under torchrun each process says its own line: the first that fails takes the others with it before they can speak.
    """
    try:
        status = int(work() or 0)
        sys.stdout.flush()  # here, where the answer to an error is
        return status
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return SIGPIPE_STATUS
        rank = os.environ.get("RANK", "0")
        # in one piece with its end, or lines of several processes run into each other
        sys.stderr.write(f"{name}{'' if rank == '0' else f', process {rank}'}: {one_line(error)}\n")
        return 2


def _reader_has_left() -> bool:
    """Whether what is printed goes into a pipe that nobody reads any longer, as behind `head`; then it goes nowhere."""
    output = 1  # sys.stdout, whatever stands in its place
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    left = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return left


def one_line(error: BaseException) -> str:
    """The first line of what an exception says, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- options ---------------------------------------------------------------------------------------------------------


def parse_device(text: str) -> torch.device:
    """A device that is there: cpu, cuda, cuda:1, mps; auto: a GPU where there is one.

    "cuda" is this process's own GPU under torchrun.
    """
    import torch

    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cuda":
        text = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here ({one_line(error)})") from None
    return device


def parse_ratio(text: str) -> float:
    """A keep ratio: above 0, at most 1."""
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio <= 1:
        raise argparse.ArgumentTypeError(f"keep ratios lie in (0, 1], got {text!r}")
    return ratio


def parse_crop(text: str) -> float:
    """The share of an image's short side that is seen: above 0, at most 1."""
    try:
        return parse_ratio(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"crop ratios lie in (0, 1], got {text!r}") from None


def parse_ratios(text: str) -> tuple[float, ...]:
    """R[,R...]."""
    return tuple(parse_ratio(part) for part in text.split(","))


def parse_image_size(text: str) -> int:
    """The side of a model's input in pixels."""
    if not text.isdecimal() or not 16 <= int(text) <= MOST_PIXELS or int(text) % 16:
        raise argparse.ArgumentTypeError(f"an image size is a multiple of 16 up to {MOST_PIXELS}, got {text!r}")
    return int(text)


OPTIONS: dict[str, dict[str, Any]] = {
    "--model": {"choices": sorted(CONFIGS), "default": DEFAULT_MODEL},
    "--checkpoint": {"type": Path, "metavar": "FILE", "help": "default: the one that ships"},
    "--keep-ratio": {
        "type": parse_ratio,
        "default": 0.25,
        "metavar": "R",
        "help": "share of tokens that run through the wide blocks; default 0.25",
    },
    "--image-size": {
        "type": parse_image_size,
        "metavar": "S",
        "help": "side of the model's input, a multiple of 16; default: the checkpoint's",
    },
    "--device": {"type": parse_device, "default": "auto", "help": "cpu, cuda, cuda:1, mps; default: a GPU if any"},
    "--dtype": {
        "choices": DTYPES,
        "default": "auto",
        "help": "of the encoder; auto: bfloat16 where that is faster (blsam models)",
    },
    "--runtime": {
        "choices": RUNTIMES,
        "default": "auto",
        "help": "what computes the encoder; auto: the fastest on this kind of processor that is installed",
    },
    "--no-cache": {"action": "store_true", "help": "do not keep what is compiled for another runtime"},
}


def add_option(parser: Any, name: str, **changes: Any) -> None:
    """Add one of `OPTIONS` to a parser or a group, with what is otherwise for this command."""
    parser.add_argument(name, **OPTIONS[name] | changes)


def add_model_options(parser: Any) -> None:
    """All of `OPTIONS`, as they are."""
    for name in OPTIONS:
        add_option(parser, name)


def builder_options(args: argparse.Namespace) -> dict[str, Any]:
    """What a builder takes of them."""
    found = {name: getattr(args, name) for name in ("image_size", "keep_ratio", "dtype", "device")}
    return found | ({"runtime": args.runtime, "cache": not args.no_cache} if "runtime" in args else {})


def computed_in(args: argparse.Namespace) -> dict[str, str]:
    """The --runtime and the --dtype asked for, "auto" decided for this machine and the --device."""
    runtime = getattr(args, "runtime", "torch")
    if args.model in MODELS:
        runtime, dtype = resolve_for(MODELS[args.model], runtime, args.dtype, args.device)
    else:  # a classifier, or somebody's own: torch's
        width = CLASSIFIERS[args.model].dim if args.model in CLASSIFIERS else WIDE
        runtime, dtype = resolve(runtime, args.dtype, args.device, width)
    return {"runtime": runtime, "dtype": str(dtype).removeprefix("torch.")}


# --- files -----------------------------------------------------------------------------------------------------------


def shipped_checkpoint(model: str) -> Path | None:
    """The weights that ship with the package or lie in its repository; None where a model has none.

    Those of a model of `REDUCED` are its dense model's.
    """
    model = REDUCED[model].dense.name if model in REDUCED else model
    found = (folder / f"{model}.safetensors" for folder in WEIGHTS)
    return next((path for path in found if path.is_file()), None)


def find_checkpoint(model: str, given: Path | None) -> Path:
    """The checkpoint asked for, or the one that ships; UsageError says where weights come from."""
    path = given or shipped_checkpoint(model)
    if path is None and model.endswith(("vit_t", "vit_t_fine")):
        name = f"{model}.safetensors"
        raise UsageError(
            f"{name} is not here; take it from checkpoints/ of the blsam repository and give --checkpoint"
        )
    if path is None:
        fit = " (SAM's weights fit, see checkpoints/README.md)" if model.endswith(("vit_h", "vit_l", "vit_b")) else ""
        raise UsageError(f"no weights ship for {model}; give --checkpoint{fit}")
    if not path.exists():  # what it is, reading it says
        raise FileNotFoundError(f"no checkpoint at {path}")
    return path


def check_output(
    option: str,
    path: Path | None,
    *,
    taken: Iterable[Path | None] = (),
    what: str = "its name",
    suffixes: Sequence[str] = (),
) -> None:
    """UsageError unless the file that an option names can be written; called before work starts.

    taken: what the command reads, or writes besides. what: a word for such a file, with its suffixes.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; name a file in it")
    for other in taken:
        if other is not None and _same_file(path, other):
            raise UsageError(f"{option} {path} would overwrite {other}, which is needed; choose another name")
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{option} {path}: {what} ends in {', '.join(suffixes)}")
    check_folder(option, path.absolute().parent)


def check_folder(option: str, folder: Path) -> None:
    """UsageError unless files can be written in a folder, which need not be there yet."""
    nearest = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not nearest.is_dir():
        raise UsageError(f"{option}: {nearest} is a file, not a folder; choose another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{option}: nothing can be written in {nearest}; choose another place")


def _same_file(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)  # links too
    return one.resolve() == other.resolve()
