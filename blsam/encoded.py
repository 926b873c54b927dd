"""An encoded photo as a value: what the decoder needs of it, in memory and on disk.

predictor.set_image(photo)
identity = Identity.of(predictor.model)
predictor.encoded.save("photo.safetensors", identity)
predictor.set_encoded(Encoded.load("photo.safetensors", identity))     # another day, without the encoder
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .files import write_atomically
from .modeling.routing import Routing, Stage
from .modeling.sam import Sam

KIND = "blsam encoded photo 1"  # what such a file says of itself


@dataclass(frozen=True)
class Identity:
    """What an embedding depends on beside the photo.

    model: the configuration, all its fields, as text. weights: SHA-256 over names, types and values of the image
    encoder, so that the same weights are the same in any file and on any device. keep_ratio: None for exact models.
    """

    model: str
    weights: str
    image_size: int
    keep_ratio: float | None
    dtype: str

    @classmethod
    def of(cls, sam: Sam, keep_ratio: float | None = None) -> Identity:
        """Of a `Sam` as it is now, or encoding at another keep ratio; reads all weights once.

        A photo that was encoded before the keep ratio changed wants the ratio that it was encoded with.
        """
        encoder = sam.image_encoder
        ratio = encoder.keep_ratio if keep_ratio is None else keep_ratio
        dtype = str(encoder.patch_embed.proj.weight.dtype).removeprefix("torch.")
        config = json.dumps(asdict(encoder.config), sort_keys=True)
        return cls(config, fingerprint(encoder), encoder.img_size, ratio if encoder.config.reduces else None, dtype)

    def differences(self, other: Identity) -> list[str]:
        """In words, what the other has that this one has not; of models of different names the names alone."""
        mine, theirs = self._facts(), other._facts()
        if mine["model"] != theirs["model"]:
            return [f"model {theirs['model']}, not {mine['model']}"]
        names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
        return [f"{name.replace('_', ' ')} {theirs.get(name)}, not {mine.get(name)}" for name in names]

    def _facts(self) -> dict[str, object]:
        """As people read them."""
        config = json.loads(self.model)
        rest = asdict(self) | {"model": config.pop("name"), "weights": self.weights[:12]}
        return {"model": rest.pop("model"), **config, **rest}


@dataclass(frozen=True)
class Encoded:
    """An encoded photo.

    features: the embedding, float32 [1, 256, h, w]. routing: which tokens were prime, without stages for an exact
    model. input_size (h, w): what the photo covers of the encoder's square, in pixels. original_size (H, W): the photo's.
    """

    features: torch.Tensor
    routing: Routing
    input_size: tuple[int, int]
    original_size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """What it holds, in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def to(self, device: torch.device | str) -> Encoded:
        """On another device."""
        stages = tuple(
            Stage(s.mask.to(device), None if s.scores is None else s.scores.to(device), s.counts.to(device))
            for s in self.routing.stages
        )
        return replace(self, features=self.features.to(device), routing=Routing(stages))

    def save(self, path: str | Path, identity: Identity) -> None:
        """Write it, with the model's identity and the photo's size beside it; the file is whole or not there at all."""
        facts = {"kind": KIND, "identity": json.dumps(asdict(identity))}
        facts |= {"input_size": json.dumps(self.input_size), "original_size": json.dumps(self.original_size)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, facts))

    @classmethod
    def load(cls, path: str | Path, identity: Identity, device: torch.device | str = "cpu") -> Encoded:
        """What `save` wrote, for the same model.

        FileNotFoundError, or ValueError in one line: not such a file, or of another model, with what differs.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no encoded photo at {path}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not an encoded photo ({error})") from None
        if facts.get("kind") != KIND:
            raise ValueError(f"{path} is not an encoded photo of this version of blsam; encode the photo again")
        differing = identity.differences(Identity(**json.loads(facts["identity"])))
        if differing:
            raise ValueError(f"{path} was encoded by another model ({'; '.join(differing)}); encode the photo again")
        count = sum(name.endswith(".mask") for name in tensors)
        stages = tuple(
            Stage(tensors[f"routing.{i}.mask"], tensors.get(f"routing.{i}.scores"), tensors[f"routing.{i}.counts"])
            for i in range(count)
        )
        sizes = (tuple(json.loads(facts[name])) for name in ("input_size", "original_size"))
        return cls(tensors["features"], Routing(stages), *sizes)

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {"features": self.features}
        for i, stage in enumerate(self.routing.stages):
            parts = {"mask": stage.mask, "scores": stage.scores, "counts": stage.counts}
            found |= {f"routing.{i}.{name}": tensor for name, tensor in parts.items() if tensor is not None}
        return found


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a module's state, in hexadecimal; tensor by tensor."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
