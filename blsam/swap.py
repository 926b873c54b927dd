"""Ours in the place of `segment_anything`'s, for programs that import it themselves.

import blsam

blsam.install()                           # before the program is imported; uninstall() takes it back
with blsam.install(dtype="auto"): ...     # for a while; options of the builders
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import sys
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any

import segment_anything

from .automatic_mask_generator import SamAutomaticMaskGenerator
from .build_sam import Builder, build_sam_vit_h, sam_model_registry
from .config import MODELS
from .predictor import SamPredictor
from .runtimes.choice import resolve_for

_replaced: list[tuple[dict[str, Any], str, Any]] = []  # where, the name, what was there


class Installed:
    """What `install` returns: as a context, it takes ours out again at its end."""

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        uninstall()


def install(*, routed: bool = False, **options: Any) -> Installed:
    """Put our predictor, mask generator, builders and registry into every module of `segment_anything`.

    Programs that import `segment_anything` afterwards, from whichever of its modules, get ours; so does who holds its
    registry already. What a program has imported by name before (`from segment_anything import SamPredictor`) stays.

    Args:
        routed: under SAM's names ("vit_b") are the big.LITTLE models ("blsam_vit_b"), not the exact ones.
        options: of the builders, for every model that is built: `dtype="auto"`, `keep_ratio`, `image_size`, `device`,
            `runtime`.

    Once is enough; a second call replaces the first. TypeError or ValueError for options that no builder takes,
    ImportError for a runtime that is not installed.
    """
    inspect.signature(build_sam_vit_h).bind_partial(**options)  # TypeError here, and not inside somebody's program
    resolve_for(MODELS["vit_h"], options.get("runtime", "torch"), options.get("dtype", "float32"))
    uninstall()
    builders: dict[str, Builder] = {}
    for name, builder in sam_model_registry.items():
        ours = sam_model_registry[f"blsam_{name}"] if routed and f"blsam_{name}" in sam_model_registry else builder
        builders[name] = functools.partial(ours, **options) if options else ours
    if routed:
        builders["default"] = builders["vit_h"]

    stock = _modules()
    predictor, generator = stock["predictor"].SamPredictor, stock["automatic_mask_generator"].SamAutomaticMaskGenerator
    registry = stock["build_sam"].sam_model_registry
    replacements: list[tuple[Any, Any]] = [(predictor, SamPredictor), (generator, SamAutomaticMaskGenerator)]
    replacements += [(of_sam, builders[name]) for name, of_sam in registry.items() if name in builders]
    for module in stock.values():
        for name, value in list(vars(module).items()):
            for theirs, ours in replacements:
                if value is theirs:
                    _replace(vars(module), name, ours)
    for name, ours in builders.items():  # in the dictionary itself, which programs hold
        _replace(registry, name, ours)
    return Installed()


def uninstall() -> None:
    """Put everything back that `install` replaced."""
    while _replaced:
        place, name, value = _replaced.pop()
        if value is _MISSING:
            del place[name]
        else:
            place[name] = value


_MISSING = object()


def _replace(place: dict[str, Any], name: str, value: Any) -> None:
    _replaced.append((place, name, place.get(name, _MISSING)))
    place[name] = value


def _modules() -> dict[str, ModuleType]:
    """Every module of `segment_anything` that can be imported here, by the last part of its name; "" the package.

    Those for export need packages that may not be there; none of them holds what is replaced.
    """
    found = {"": segment_anything}
    for name in ("automatic_mask_generator", "build_sam", "predictor"):
        import_module(f"segment_anything.{name}")
    for info in pkgutil.walk_packages(segment_anything.__path__, "segment_anything."):
        if info.name in sys.modules:
            found[info.name.removeprefix("segment_anything.")] = sys.modules[info.name]
    return found
