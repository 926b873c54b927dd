"""Whether the installed `segment_anything` is the one that this package builds on.

Several works are published as a package of that name with another interface (HQ-SAM, Grounded-SAM's copy of it).
"""

from __future__ import annotations

import functools
import inspect
from importlib import import_module
from typing import Any

# What we call or override, and the arguments that it takes.
EXPECTED = {
    "predictor.SamPredictor.predict": "point_coords point_labels box mask_input multimask_output return_logits",
    "predictor.SamPredictor.predict_torch": "point_coords point_labels boxes mask_input multimask_output return_logits",
    "predictor.SamPredictor.set_image": "image image_format",
    "modeling.prompt_encoder.PromptEncoder.forward": "points boxes masks",
    "modeling.mask_decoder.MaskDecoder.forward": (
        "image_embeddings image_pe sparse_prompt_embeddings dense_prompt_embeddings multimask_output"
    ),
    "modeling.image_encoder.ImageEncoderViT.forward": "x",
    "automatic_mask_generator.SamAutomaticMaskGenerator.generate": "image",
}
CURE = "install segment-anything in this environment (pip install segment-anything), and the other in one of its own"


@functools.cache
def check() -> None:
    """ImportError, in one line, unless `segment_anything` is there and has the interface that we know."""
    for name, expected in EXPECTED.items():
        module, owner, function = name.rsplit(".", 2)
        try:
            method: Any = getattr(getattr(import_module(f"segment_anything.{module}"), owner), function)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("segment_anything"):
                raise ImportError(f"no module {error.name} here: {CURE}") from None
            raise
        except AttributeError:
            raise ImportError(f"the installed segment_anything is another package, without {name}: {CURE}") from None
        found = [argument for argument in inspect.signature(method).parameters if argument != "self"]
        if found != expected.split():
            raise ImportError(
                f"the installed segment_anything is a fork, whose {name} takes {', '.join(found)}: {CURE}"
            )
