"""What a checkpoint file holds, whatever its suffix: torch's archives, old and new, and safetensors.

Nothing that a file contains is ever executed. What it is instead of a checkpoint (a web page, a pointer of Git LFS, a
TorchScript archive ...) is said in one line with the cure.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .files import printable
from .options import one_line

AGAIN = "download it again"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what would help, in one line."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text, 1000))  # it may quote what the file holds


def read_content(path: Path) -> tuple[Any, dict[str, str]]:
    """What a file holds, tensors on the CPU, and the metadata of safetensors (empty for torch's archives)."""
    with path.open("rb") as file:
        head = file.read(512)
    if is_safetensors(head, path.stat().st_size):
        try:
            with safe_open(path, framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})
        except Exception as error:  # whatever damaged bytes make the reader raise
            raise CheckpointError(f"{path} is damaged, or no safetensors file ({one_line(error)}); {AGAIN}") from None
    if wrong := what_instead(path, head):
        raise CheckpointError(f"{path} {wrong}")
    return read_torch(path), {}


# --- which kind it is ------------------------------------------------------------------------------------------------


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file begins with the length of a json header, and with that header."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def what_instead(path: Path, head: bytes) -> str | None:
    """What a file is if it cannot be one of torch's archives, and what to do about it; None if it may be one."""
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if not head.strip(b"\0"):
        return f"is empty{' (zeros alone)' if head else ''}; {AGAIN}"
    if text.startswith("version https://git-lfs"):
        return "is a pointer of Git LFS, not the weights; get them with: git lfs pull"
    if re.match(r"<(!doctype|!--|html|head|body|\?xml)", text, re.IGNORECASE):
        return f"is a web page, not a checkpoint; {AGAIN}, from the link to the file itself"
    if head.startswith(b"PK"):
        return _zip_instead(path)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")):
        return "is compressed; unpack it first"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it and give the checkpoint in it"
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file (TensorFlow's or Keras'); weights come as PyTorch's .pth or as .safetensors"
    if not head.startswith(b"\x80"):  # how every pickle begins, those of torch too
        if text.isprintable() or all(c.isprintable() or c.isspace() for c in text):
            return f'is text, not a checkpoint (it begins "{" ".join(text[:40].split())}"); {AGAIN}'
        return f"is damaged or not a checkpoint: neither PyTorch's nor safetensors; {AGAIN}"
    return None


def _zip_instead(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:  # whatever damaged bytes make the reader raise
        return f"is cut short or damaged; {AGAIN}"
    names = [member.filename for member in members]
    if any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names):
        return "is a TorchScript archive, a program; save the model's state_dict() instead"
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return f"is a zip archive of other things ({', '.join(names[:2]) or 'nothing'}); unpack it, or {AGAIN}"
    if sum(member.file_size for member in members) > path.stat().st_size:  # torch never compresses; a bomb does
        return "is a zip archive that was packed again; save the weights with torch.save"
    return None


# --- torch's archives ------------------------------------------------------------------------------------------------


class Inert:
    """What stands for an object beside the weights that is not read: it takes every argument and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _empty(*args: object) -> dict:
    return {}


# Data that is often beside the weights. torch's unpickler takes ours for them by name: none of it is imported or called.
_INERT = """
    argparse.Namespace types.SimpleNamespace pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePosixPath
    pathlib.PureWindowsPath pathlib._local.PosixPath pathlib._local.WindowsPath datetime.datetime datetime.date
    datetime.timedelta datetime.timezone uuid.UUID decimal.Decimal torch.torch_version.TorchVersion typing.Any
    numpy.dtype numpy.ndarray numpy.core.multiarray.scalar numpy._core.multiarray.scalar
    numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
    builtins.int builtins.float builtins.str builtins.bool builtins.list builtins.dict builtins.tuple
    builtins.range builtins.slice builtins.frozenset
    omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.base.Metadata
    omegaconf.base.ContainerMetadata omegaconf.nodes.AnyNode omegaconf.nodes.StringNode omegaconf.nodes.IntegerNode
    omegaconf.nodes.FloatNode omegaconf.nodes.BooleanNode omegaconf.nodes.PathNode
""".split()
_DICTS = """
    pytorch_lightning.utilities.parsing.AttributeDict lightning.pytorch.utilities.parsing.AttributeDict
    lightning_fabric.utilities.data.AttributeDict lightning.fabric.utilities.data.AttributeDict
    yacs.config.CfgNode easydict.EasyDict mmengine.config.config.ConfigDict mmcv.utils.config.ConfigDict
    addict.addict.Dict munch.Munch
""".split()
STAND_INS: list[Any] = [
    *((Inert, name) for name in _INERT),
    *((OrderedDict, name) for name in _DICTS),
    (_empty, "collections.defaultdict"),
]


def read_torch(path: Path) -> Any:
    """The content of torch's archive; CheckpointError names the first object in it that is no tensor or plain data."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(STAND_INS), path.open("rb") as file:
            warnings.simplefilter("ignore")  # of how the file was pickled
            # by its name, which is quicker, unless torch would take the name for the content
            source = file if path.suffix == ".safetensors" else path
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} {_refused(str(error))}") from None
    except Exception as error:  # whatever damaged bytes make the unpickler raise
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({one_line(error)}); {AGAIN}") from None


def _refused(text: str) -> str:
    """Of torch's paragraphs, what the file holds and the cure."""
    cure = "where it was made, save the weights alone: torch.save(model.state_dict(), FILE)"
    if found := re.search(r"GLOBAL ([\w.<>]+)", text):
        name = found[1] if "." in found[1] else f"builtins.{found[1]}"
        return f"holds more than tensors and was not opened, for safety: {name}; {cure}"
    if re.search(r"Can only|unrecognized function|persistent", text):
        return f"holds more than tensors and was not opened, for safety; {cure}"
    if "Unsupported operand" in text:
        return f"is damaged, or was written by pickle and not by torch.save; {AGAIN}, or {cure}"
    return f"is damaged or not a checkpoint; {AGAIN}"
