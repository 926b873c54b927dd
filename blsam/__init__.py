"""Segment Anything with a big.LITTLE image encoder.

Names are imported when they are first asked for: torch and SAM take seconds, and `blsam --help` needs neither.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .automatic_mask_generator import SamAutomaticMaskGenerator
    from .build_sam import (
        build_blsam_vit_b,
        build_blsam_vit_h,
        build_blsam_vit_l,
        build_blsam_vit_t,
        build_blsam_vit_t_fine,
        build_sam,
        build_sam_vit_b,
        build_sam_vit_h,
        build_sam_vit_l,
        build_sam_vit_t,
        build_sam_vit_t_fine,
        sam_model_registry,
    )
    from .predictor import SamPredictor
    from .swap import install, uninstall

__version__ = "0.1.0"

_HOMES = {
    "SamAutomaticMaskGenerator": "automatic_mask_generator",
    "SamPredictor": "predictor",
    "build_blsam_vit_b": "build_sam",
    "build_blsam_vit_h": "build_sam",
    "build_blsam_vit_l": "build_sam",
    "build_blsam_vit_t": "build_sam",
    "build_blsam_vit_t_fine": "build_sam",
    "build_sam": "build_sam",
    "build_sam_vit_b": "build_sam",
    "build_sam_vit_h": "build_sam",
    "build_sam_vit_l": "build_sam",
    "build_sam_vit_t": "build_sam",
    "build_sam_vit_t_fine": "build_sam",
    "install": "swap",
    "sam_model_registry": "build_sam",
    "uninstall": "swap",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import_module(".upstream", __name__).check()
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):  # blsam.modeling, as after an import of it
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`blsam.build_sam` is the function, as in SAM, although importing the module of that name would put it there."""

    @property
    def build_sam(self) -> Any:
        return __getattr__("build_sam")

    @build_sam.setter
    def build_sam(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
