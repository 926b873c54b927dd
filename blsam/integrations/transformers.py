"""SAM with our image encoder as a Hugging Face model: folders, `AutoModel`, the `mask-generation` pipeline.

    from blsam.integrations.transformers import BLSamModel, processor_of

    model = BLSamModel.from_sam(sam)                     # a `Sam` of `sam_model_registry`
    model.save_pretrained("folder")                      # config.json, model.safetensors
    processor_of(model).save_pretrained("folder")

    model = BLSamModel.from_pretrained("folder")         # or AutoModel, once this module is imported
    masks = pipeline("mask-generation", model=model, image_processor=processor_of(model).image_processor)(photo)

Prompt encoder and mask decoder are transformers' own `SamModel`'s. The folder's model.safetensors loads in our builders,
too. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForMaskGeneration,
        AutoProcessor,
        SamConfig,
        SamImageProcessor,
        SamModel,
        SamProcessor,
    )
    from transformers.models.sam.modeling_sam import (
        SamMaskDecoder,
        SamPositionalEmbedding,
        SamPreTrainedModel,
        SamPromptEncoder,
        SamVisionEncoderOutput,
    )
except ImportError as error:
    raise ImportError(f"Hugging Face's models need transformers: pip install 'blsam[hf]' ({error})") from None

from ..checkpoint_layouts import from_transformers
from ..config import EncoderConfig
from ..modeling.attention import Attention, offsets
from ..modeling.image_encoder import ImageEncoder
from ..modeling.layers import input_dtype
from ..modeling.sam import Sam
from ..modeling.windows import PATCH


class BLSamConfig(SamConfig):
    """`SamConfig` with our encoder: `encoder`, the fields of an `EncoderConfig`; `keep_ratio`."""

    model_type = "blsam"

    encoder: dict | None = None
    keep_ratio: float = 0.25
    encoder_dtype: str = "float32"

    @classmethod
    def of(cls, encoder: ImageEncoder) -> BLSamConfig:
        config, size = encoder.config, encoder.img_size
        vision = {
            "hidden_size": config.dim,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "image_size": size,
            "window_size": config.window,
            "global_attn_indexes": list(config.global_layers),
        }
        prompts = {"image_size": size, "patch_size": PATCH // config.grow}  # as coarse as the embedding
        return cls(
            vision_config=vision,
            prompt_encoder_config=prompts,
            mask_decoder_config={"layer_norm_eps": 1e-5},  # SAM's, in place of transformers' own 1e-6
            encoder=asdict(config),
            keep_ratio=encoder.keep_ratio,
            encoder_dtype=str(input_dtype(encoder.patch_embed)).removeprefix("torch."),
            architectures=[BLSamModel.__name__],
        )

    @property
    def encoder_config(self) -> EncoderConfig:
        fields: dict[str, Any] = dict(self.encoder or {})
        fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return EncoderConfig(**fields)


class VisionEncoder(ImageEncoder):
    """Our encoder with the results of transformers' one."""

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> SamVisionEncoderOutput:  # type: ignore[override]
        """pixel_values [B, 3, S, S], normalised and padded with zeros; options of outputs that it does not have (hidden
        states, attentions) change nothing."""
        return SamVisionEncoderOutput(last_hidden_state=super().forward(pixel_values))


class BLSamModel(SamModel):
    """`SamModel` whose image encoder is ours: `vision_encoder.keep_ratio` may be set."""

    config_class = BLSamConfig
    supports_gradient_checkpointing = False
    _no_split_modules = ["Block", "RoutedBlock"]  # noqa: RUF012 - as transformers has it

    def __init__(self, config: BLSamConfig) -> None:
        SamPreTrainedModel.__init__(self, config)  # SamModel's own would make an encoder that is thrown away
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
        self.vision_encoder = VisionEncoder(config.encoder_config, config.vision_config.image_size, config.keep_ratio)
        self.prompt_encoder = SamPromptEncoder(config)
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self.post_init()

    @classmethod
    def from_sam(cls, sam: Sam) -> BLSamModel:
        """The same model; its weights are copied, in the dtypes that they have."""
        model = cls(BLSamConfig.of(sam.image_encoder))
        state = sam.state_dict()
        model.load_state_dict({key: state[from_transformers(key)] for key in model.state_dict()})
        model.vision_encoder.use_dtype(getattr(torch, model.config.encoder_dtype))
        return model.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As transformers'; without a `dtype` the encoder multiplies in what it was saved with."""
        found = super().from_pretrained(*args, **options)
        model = found[0] if isinstance(found, tuple) else found  # with output_loading_info
        if "dtype" not in options:
            model.vision_encoder.use_dtype(getattr(torch, model.config.encoder_dtype))
        return found

    def save_pretrained(self, *args: Any, **options: Any) -> Any:
        """As transformers', with the keep ratio that is set."""
        self.config.keep_ratio = self.vision_encoder.keep_ratio
        return super().save_pretrained(*args, **options)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.vision_encoder.patch_embed

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Of what no checkpoint has; tables of places are in none."""
        if isinstance(module, Attention):
            for name in ("offsets_h", "offsets_w"):
                table = getattr(module, name)
                table.copy_(offsets(len(table)))
        elif not any(module is part for part in self.vision_encoder.modules()):  # which has begun its own weights
            super()._init_weights(module)


def processor_of(model: BLSamModel) -> SamProcessor:
    """Photos and prompts as this model takes them: longer side to its image size, zeros behind. Its own defaults are SAM's
    normalisation."""
    size = model.config.vision_config.image_size
    images = SamImageProcessor(
        size={"longest_edge": size},
        mask_size={"longest_edge": size // 4},
        pad_size={"height": size, "width": size},
        mask_pad_size={"height": size // 4, "width": size // 4},
    )
    return SamProcessor(images)


AutoConfig.register(BLSamConfig.model_type, BLSamConfig)
for _auto in (AutoModel, AutoModelForMaskGeneration):
    _auto.register(BLSamConfig, BLSamModel)
AutoProcessor.register(BLSamConfig, SamProcessor)
