"""Hands the passes of an image encoder over to another runtime, once their values were seen to be torch's."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import logging
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..encoded import fingerprint
from ..export.check import MOST, gap
from ..export.graphs import EncoderGraph
from ..modeling.attention import Attention
from ..modeling.image_encoder import ImageEncoder
from ..modeling.layers import input_dtype
from ..modeling.routing import Routing, Stage, TrueSizes
from ..options import one_line
from ..precision import processor
from . import cache
from .backends import BACKENDS, Options, Pass

HELD = 2  # compiled encoders in memory at a time: of keep ratios that alternate
LEAST_COSINE = 0.999  # of products in bfloat16, whose values cannot be torch's float32
SAME, SAME_ROUNDED = 0.99, 0.9  # least share of each stage's prime tokens that are torch's, on noise; in bfloat16
GRAPH = 1  # to be raised when other code makes another graph of the same model

logger = logging.getLogger("blsam")


class Engine:
    """Passes of one encoder, made anew when its weights, their dtype or the keep ratio change.

    name: "openvino" or "onnxruntime". folder: where what is compiled is kept; None: nowhere. only: keep ratios that are
    worth compiling for; others are torch's; None: all. A copy (`copy.deepcopy`, pickle) has nothing compiled. Values
    written behind torch's back (`parameter.data`) are not noticed: `forget` what was compiled then.
    """

    def __init__(self, name: str, folder: Path | None, only: frozenset[float] | None = None) -> None:
        self.name, self.folder, self.only = name, folder, only
        self._passes: OrderedDict[Hashable, Pass] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> tuple[Any, ...]:
        return self.name, self.folder, self.only

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def takes(self, encoder: ImageEncoder, x: torch.Tensor, keep_ratio: float) -> bool:
        """Whether this pass is for the runtime: training, gradients and encoders with hooks inside are torch's."""
        if encoder.training or not self.serves(keep_ratio):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in encoder.parameters())):
            return False
        inside = itertools.islice(encoder.modules(), 1, None)  # its own hooks are called where it is
        return not any(module._forward_hooks or module._forward_pre_hooks for module in inside)

    def serves(self, keep_ratio: float) -> bool:
        """Whether passes at this keep ratio are for the runtime at all."""
        return self.only is None or keep_ratio in self.only

    def forget(self) -> None:
        """Drop what is compiled and held in memory."""
        with self._lock:
            self._passes.clear()

    def encode(
        self, encoder: ImageEncoder, x: torch.Tensor, true_sizes: TrueSizes, keep_ratio: float
    ) -> tuple[torch.Tensor, Routing]:
        """As `ImageEncoder.encode`, image by image. Without gradients.

        ValueError, in one line, for an encoder that is not on the CPU, and where the runtime cannot compile it.
        """
        if x.device.type != "cpu":
            raise ValueError(f'{self.name} runs on the CPU, the image is on {x.device}; runtime="torch" runs there')
        if isinstance(true_sizes, torch.Tensor):
            true_sizes = true_sizes.tolist()
        extents = np.array(true_sizes or [tuple(x.shape[2:])] * len(x), np.int64)
        inputs = (x.detach().float().contiguous().numpy(), extents)[: inputs_of(encoder)]
        with self._lock:  # a pass has one set of buffers
            run = self._pass(encoder, keep_ratio)
            found = [run(*(one[i : i + 1] for one in inputs)) for i in range(len(x))]
            parts = [torch.from_numpy(np.concatenate(part)) for part in zip(*found)]
        return parts[0], routing_of(encoder, parts)

    def prepare(self, encoder: ImageEncoder) -> None:
        """Compile for the encoder's keep ratio now, rather than at the first image."""
        with self._lock:
            self._pass(encoder, encoder.keep_ratio)

    def _pass(self, encoder: ImageEncoder, keep_ratio: float) -> Pass:
        """The pass of this encoder as it is now."""
        ratio = min(keep_ratio, 1.0) if encoder.config.routed else 1.0
        key = (ratio, torch.get_num_threads(), *windows_of(encoder), *(_state(p) for p in encoder.parameters()))
        if key not in self._passes:
            while len(self._passes) >= HELD:
                self._passes.popitem(last=False)
            self._passes[key] = self._compiled(encoder, ratio)
        self._passes.move_to_end(key)
        return self._passes[key]

    def _compiled(self, encoder: ImageEncoder, keep_ratio: float) -> Pass:
        dtype, dtypes = input_dtype(encoder.patch_embed), BACKENDS[self.name].dtypes
        if dtype not in dtypes:
            names = " or ".join(str(one).removeprefix("torch.") for one in dtypes)
            raise ValueError(f"{self.name} multiplies in {names} on a CPU, the encoder was cast to {dtype}")
        if encoder.config.score == "random":
            raise ValueError(f'{self.name} cannot draw tokens at random, as this model does; runtime="torch" can')
        if self.folder is None:
            with tempfile.TemporaryDirectory(prefix="blsam-") as temporary:
                self._make(encoder, keep_ratio, Path(temporary))
                return self._read(Path(temporary), dtype, keep=False)
        facts = facts_of(encoder, keep_ratio) | {"runtime": f"{self.name} {BACKENDS[self.name].version()}"}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        name = f"{encoder.config.name}-{self.name}-{digest}"
        if (folder := cache.find(self.folder, name, facts)) is None:
            make = functools.partial(self._make, encoder, keep_ratio)
            folder = cache.store(self.folder, name, facts, make)
        return self._read(folder, dtype, keep=os.access(folder, os.W_OK))

    def _read(self, folder: Path, dtype: torch.dtype, keep: bool) -> Pass:
        try:
            return BACKENDS[self.name].read(folder, dtype, keep)
        except Exception as error:  # of the runtime's own kinds
            raise ValueError(f"{self.name} cannot read {folder}: {one_line(error)}") from error

    def _make(self, encoder: ImageEncoder, keep_ratio: float, folder: Path) -> None:
        """The backend's files, once: this is what takes time. ValueError where no way gives torch's values."""
        kept = "not kept" if self.folder is None else f"kept in {self.folder}"
        logger.warning("blsam: compiling %s for %s (%s) ...", encoder.config.name, self.name, kept)
        plain, dtype = in_torch(encoder), input_dtype(encoder.patch_embed)
        for way in BACKENDS[self.name].ways:
            try:
                with torch.no_grad(), torch.autocast("cpu", enabled=False):
                    found = self._try(plain, keep_ratio, dtype, way, folder)
            except OSError:
                raise
            except Exception as error:  # as above
                raise ValueError(
                    f"{encoder.config.name} cannot be compiled for {self.name}: {one_line(error)}"
                ) from error
            if found:
                return
        raise ValueError(
            f"{encoder.config.name} for {self.name} {BACKENDS[self.name].version()} does not give what torch gives; "
            'runtime="torch" does'
        )

    def _try(self, encoder: ImageEncoder, keep_ratio: float, dtype: torch.dtype, way: Options, folder: Path) -> bool:
        """Whether what one way makes holds, on noise with padding at the bottom."""
        backend, size = BACKENDS[self.name], encoder.img_size
        x, extents = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)), (size * 3 // 4, size)
        x[:, :, extents[0] :] = 0
        inputs = (x, torch.tensor([extents]))[: inputs_of(encoder)]
        backend.make(EncoderGraph(encoder, keep_ratio).eval(), inputs, way, folder)
        found = [torch.from_numpy(part) for part in backend.read(folder, dtype)(*(one.numpy() for one in inputs))]
        supplied, exact = routing_of(encoder, found) if encoder.config.routed else None, dtype == torch.float32
        _, own = encoder.encode(x, true_sizes=[extents], keep_ratio=keep_ratio)
        for stage, mask in zip(own.stages, found[1].unbind(1) if own.stages else ()):
            if (stage.mask & mask).sum() < (SAME if exact else SAME_ROUNDED) * stage.mask.sum():
                return False
        expected, _ = encoder.encode(x, true_sizes=[extents], keep_ratio=keep_ratio, routing=supplied)
        if exact:
            return gap(found[0], expected) <= MOST
        return bool(torch.cosine_similarity(found[0].flatten(), expected.flatten(), dim=0) >= LEAST_COSINE)


def in_torch(encoder: ImageEncoder) -> ImageEncoder:
    """The same encoder in float32, without an engine."""
    encoder = copy.copy(encoder)
    encoder.engine = None
    return encoder if input_dtype(encoder.patch_embed) == torch.float32 else copy.deepcopy(encoder).float()


def inputs_of(encoder: ImageEncoder) -> int:
    """Of image and extents, how many a graph takes: an exact model has no use for extents."""
    return 2 if encoder.config.routed else 1


def routing_of(encoder: ImageEncoder, parts: list[torch.Tensor]) -> Routing:
    """What the graph says of it: embedding, prime tokens bool and scores [B, stages, H, W]."""
    if not encoder.config.routed:
        return Routing()
    stages = zip(parts[1].unbind(1), parts[2].unbind(1))
    return Routing(tuple(Stage.from_mask(mask, encoder.config.window, scores) for mask, scores in stages))


def facts_of(encoder: ImageEncoder, keep_ratio: float) -> dict[str, Any]:
    """What a compiled encoder depends on, as json gives it back."""
    facts = {
        "model": asdict(encoder.config),
        "weights": fingerprint(encoder),
        "image_size": encoder.img_size,
        "keep_ratio": keep_ratio,
        "processor": processor(),
        "windows": windows_of(encoder),
        "torch": torch.__version__,
        "blsam": __version__,
        "graph": GRAPH,
    }
    return json.loads(json.dumps(facts))


def windows_of(encoder: ImageEncoder) -> list[int]:
    """Those of its layers, which may be set."""
    return [module.window for module in encoder.modules() if isinstance(module, Attention)]


def _state(parameter: torch.Tensor) -> tuple[int, int]:
    """Changes when somebody else's values are in a parameter, or others are written into it."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version
