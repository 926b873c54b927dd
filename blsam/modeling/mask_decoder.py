"""SAM's mask decoder for prompts on one photo: the same values from a third of the multiply-adds up to the scores,
and from a good half where every prompt wants its masks (ours).

SAM repeats the photo's tokens for every prompt and projects them anew in every layer. But a prompt has few tokens, T
(seven for a click), and a photo many, n; so what projects the photo's tokens is moved to the other side of the product,
where it costs T rows instead of n:

    logits = q (x Wk)^T = (q Wk^T) x^T          softmax(logits) (x Wv) = (softmax(logits) x) Wv        a prompt looks
    logits = (x Wq) k^T = x (k Wq^T)^T          softmax(logits) v Wo   = softmax(logits) (v Wo)        the photo looks

Masks are made afterwards, of the candidates that are asked for: a filter on the predicted IoU may leave most of them out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .layers import is_plain

CELLS, CELLS_ON_GPU = 2**13, 2**17  # tokens of the photo, for all prompts that are decoded at a time

METHODS = [
    (kind, name, vars(kind)[name])
    for kind, names in {
        MaskDecoder: ("forward", "predict_masks"),
        TwoWayTransformer: ("forward",),
        TwoWayAttentionBlock: ("forward",),
        Attention: ("forward", "_separate_heads", "_recombine_heads"),
        MLP: ("forward",),
        LayerNorm2d: ("forward",),
    }.items()
    for name in names
]
# a program may have put others in their place before this module was imported
AS_RELEASED = all(method.__code__.co_filename == inspect.getfile(kind) for kind, _, method in METHODS)


def is_sams(decoder: Any) -> bool:
    """Whether this is SAM's decoder as released, with nothing wrapped, hooked, compiled or put in another's place."""
    if type(decoder) is not MaskDecoder or type(decoder.transformer) is not TwoWayTransformer:
        return False
    layers, masks, head = (
        decoder.transformer.layers, decoder.output_hypernetworks_mlps, decoder.iou_prediction_head
    )  # fmt: skip
    if (type(layers), type(masks), type(head)) != (nn.ModuleList, nn.ModuleList, MLP):
        return False
    parts = [(name, type(part)) for name, part in decoder.named_modules()]
    if parts != _parts(len(layers), len(masks), head.num_layers):
        return False
    same = AS_RELEASED and all(vars(kind)[name] is method for kind, name, method in METHODS)
    return same and all(map(_untouched, decoder.modules()))


def _untouched(module: nn.Module) -> bool:
    """Whether a module does what its class says, and a layer nothing but a product with its weight and its bias."""
    if module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl is not None:
        return False
    if any(callable(value) and callable(getattr(type(module), name, None)) for name, value in vars(module).items()):
        return False  # a method of this one alone
    if isinstance(module, nn.ConvTranspose2d):
        weight: object = module.weight  # quantised or sharded values are of another type
        shape = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
        plain = not is_traceable_wrapper_subclass(weight) and module.bias is not None
        return plain and shape == ((2, 2), (2, 2), (0, 0), (1, 1), 1)
    return is_plain(module) or not isinstance(module, nn.Linear)


@functools.cache
def _parts(depth: int, masks: int, iou_depth: int) -> list[tuple[str, type]]:
    """Names and types of a decoder's modules."""
    with torch.device("meta"):
        transformer = TwoWayTransformer(depth, embedding_dim=16, num_heads=2, mlp_dim=16)
        kwargs = {"num_multimask_outputs": masks - 1, "iou_head_depth": iou_depth}
        decoder = MaskDecoder(transformer_dim=16, transformer=transformer, **kwargs)
    return [(name, type(part)) for name, part in decoder.named_modules()]


@dataclass(frozen=True)
class Prompted:
    """P prompts, decoded up to their masks.

    scores [P, M]: predicted IoU of the candidates. hyper [P, M, 32]: what the mask of each is read out by. tokens
    [P, n, C]: the photo's tokens as each prompt left them.
    """

    scores: torch.Tensor
    hyper: torch.Tensor
    tokens: torch.Tensor


def decode_photo(
    decoder: Any,
    embedding: torch.Tensor,
    positions: torch.Tensor,
    sparse: torch.Tensor,
    dense: torch.Tensor,
    three: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `decoder` makes of P prompts: logits [P, M, 4h, 4w] and scores [P, M], M 3 or 1; any decoder with SAM's call.

    embedding, positions [1, C, h, w], sparse [P, N, C] and dense [P, C, h, w] as SAM's encoders give them. Where it can
    be done as above the values are the same but for rounding (and a parameter without influence has no gradient, where
    SAM's is 0).
    """
    photo = take_apart(decoder, embedding, positions, sparse, dense)
    if photo is None:
        logits, scores = decoder(
            image_embeddings=embedding,
            image_pe=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=three,
        )
        return logits, scores
    found = []
    for part in photo.parts(len(sparse)):
        some = photo.prompted(sparse, part, three)
        found.append((photo.all_masks(some), some.scores))  # while the tokens are at hand
    logits, scores = (torch.cat(column) for column in zip(*found))
    return logits, scores


def take_apart(
    decoder: Any, embedding: torch.Tensor, positions: torch.Tensor, sparse: torch.Tensor, dense: torch.Tensor
) -> PhotoDecoder | None:
    """A decoder on its photo, arguments as of `decode_photo`; None where it has to be called as SAM calls it: one that is
    not `is_sams`, several photos, prompts that SAM would broadcast, graphs that are traced or compiled, no values."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or embedding.is_meta
    if traced or len(embedding) != 1 or len(sparse) != len(dense) or not is_sams(decoder):
        return None
    return PhotoDecoder(decoder, embedding, positions, dense[:1] if dense.stride(0) == 0 else dense)


class PhotoDecoder:
    """SAM's mask decoder on one photo.

    decoder: one that `is_sams`. embedding, positions: [1, C, h, w]. dense: of all prompts [1, C, h, w], as where none has
    a mask, or of each [P, C, h, w].
    """

    def __init__(
        self, decoder: MaskDecoder, embedding: torch.Tensor, positions: torch.Tensor, dense: torch.Tensor
    ) -> None:
        self.decoder, self.grid = decoder, embedding.shape[2:]
        self.photo = (embedding + dense).flatten(2).mT.contiguous()  # [P or 1, C, h, w] -> [P or 1, n, C]
        self.positions = positions[0].flatten(1).T.contiguous()

    def parts(self, prompts: int) -> Iterator[slice]:
        """Of so many prompts, a few at a time, so that their tokens stay in a processor's caches or fill a GPU."""
        cells = CELLS if self.photo.device.type == "cpu" else CELLS_ON_GPU
        size = max(1, cells // len(self.positions))
        yield from (slice(start, start + size) for start in range(0, max(1, prompts), size))

    def prompted(self, sparse: torch.Tensor, part: slice = slice(None), three: bool = True) -> Prompted:
        """A part of the prompts [P, N, C] of the prompt encoder -> three candidates each, or the single one."""
        d, sparse = self.decoder, sparse[part]
        output = torch.cat([d.iou_token.weight, d.mask_tokens.weight]).expand(len(sparse), -1, -1)
        photo = self.photo[0] if len(self.photo) == 1 else self.photo[part]
        hidden, tokens = self._transformed(torch.cat([output, sparse], dim=1), photo)
        wanted = range(1, d.num_mask_tokens) if three else range(1)
        hyper = [d.output_hypernetworks_mlps[i](hidden[:, 1 + i]) for i in wanted]
        return Prompted(
            d.iou_prediction_head(hidden[:, 0])[:, wanted.start : wanted.stop], torch.stack(hyper, dim=1), tokens
        )

    def all_masks(self, prompted: Prompted) -> torch.Tensor:
        """Logits [P, M, 4h, 4w] of all candidates."""
        return self._laid_out(prompted.hyper @ self._upscaled(prompted.tokens).mT)

    def masks(self, prompted: Prompted, prompts: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Logits [K, 4h, 4w] of the masks (prompt, candidate), int64 [K] each, the prompts rising."""
        needed, counts = prompts.unique_consecutive(return_counts=True)
        x = self._upscaled(prompted.tokens[needed])
        hyper = prompted.hyper[prompts, candidates].split(counts.tolist())  # [K, C2], prompt by prompt
        found = [of_one @ grid.T for of_one, grid in zip(hyper, x)] or [x.new_zeros(0, len(self.positions) * 16)]
        return self._laid_out(torch.cat(found))

    def _upscaled(self, tokens: torch.Tensor) -> torch.Tensor:
        """[P, n, C] -> [P, n * 16, C2], the 4 x 4 pixels of a token one after the other, as 2 x 2 of 2 x 2."""
        wide = self.decoder.output_upscaling
        x = _twice(wide[0], tokens)  # [P, n, 2 * 2, C1]
        x = wide[2](F.layer_norm(x, x.shape[-1:], wide[1].weight, wide[1].bias, wide[1].eps))
        return wide[4](_twice(wide[3], x)).flatten(1, 3)  # [P, n, 4, 4, C2] -> [P, n * 16, C2]

    def _laid_out(self, masks: torch.Tensor) -> torch.Tensor:
        """[..., n * 16] in that order -> [..., 4h, 4w]."""
        (h, w), lead = self.grid, masks.shape[:-1]
        masks = masks.reshape(-1, h, w, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)  # [*, h, 2, 2, w, 2, 2]
        return masks.reshape(*lead, 4 * h, 4 * w)

    def _transformed(self, queries: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """SAM's two-way transformer: prompts' tokens [P, T, C] and the photo's, [n, C] or [P, n, C] -> themselves and the
        photo's [P, n, C]."""
        of_prompt, transformer = queries, self.decoder.transformer
        placed = x + self.positions  # [n, C] or [P, n, C], from the first layer on the latter
        for layer in transformer.layers:
            if layer.skip_first_layer_pe:
                queries = layer.self_attn(q=queries, k=queries, v=queries)
            else:
                q = queries + of_prompt
                queries = queries + layer.self_attn(q=q, k=q, v=queries)
            queries = layer.norm1(queries)
            queries = queries + look(layer.cross_attn_token_to_image, queries + of_prompt, placed, x)
            queries = layer.norm2(queries)
            queries = layer.norm3(queries + layer.mlp(queries))
            x = layer.norm4(look_back(layer.cross_attn_image_to_token, x, placed, queries + of_prompt, queries))
            placed = x + self.positions
        queries = queries + look(transformer.final_attn_token_to_image, queries + of_prompt, placed, x)
        return transformer.norm_final_attn(queries), x


def look(attn: Any, queries: torch.Tensor, placed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a prompt's tokens [P, T, C] see of the photo's, with their positions and as they are, [n, C] or [P, n, C] each.

    -> [P, T, C]. The bias of the keys adds the same to all logits of a row, and is left out.
    """
    q, (wk, wv) = by_head(attn, attn.q_proj(queries)), (of_heads(attn, attn.k_proj), of_heads(attn, attn.v_proj))
    asked = torch.einsum("phtd,hdc->phtc", q * q.shape[-1] ** -0.5, wk).flatten(1, 2)  # [P, heads * T, C]
    seen = (asked @ placed.mT).softmax(dim=-1) @ x  # [P, heads * T, n] -> [P, heads * T, C]
    values = torch.einsum("phtc,hdc->pthd", seen.unflatten(1, q.shape[1:3]), wv).flatten(2)
    return attn.out_proj(values + attn.v_proj.bias)


def look_back(
    attn: Any, x: torch.Tensor, placed: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """The photo's tokens x, [n, C] or [P, n, C], with what they see of a prompt's, [P, T, C]: -> [P, n, C].

    A row's weights add up to 1 in each head, so that the bias of the last layer can be given to what is weighed.
    """
    k, v = by_head(attn, attn.k_proj(keys)), by_head(attn, attn.v_proj(values))
    k = k * k.shape[-1] ** -0.5
    asked = torch.einsum("phtd,hdc->phtc", k, of_heads(attn, attn.q_proj)).flatten(1, 2)  # [P, heads * T, C]
    bias = (k * attn.q_proj.bias.view(attn.num_heads, 1, -1)).sum(-1).flatten(1)  # [P, heads * T]
    logits = (asked @ placed.mT).add_(bias[..., None])  # [P, heads * T, n]
    weights = logits.unflatten(1, k.shape[1:3]).softmax(dim=2).flatten(1, 2)  # over T
    wo = attn.out_proj.weight.unflatten(1, (attn.num_heads, -1))  # [C, heads, d]
    weighed = torch.einsum("phtd,chd->phtc", v, wo).flatten(1, 2) + attn.out_proj.bias / attn.num_heads
    return torch.baddbmm(x.expand(len(k), -1, -1), weights.mT, weighed)


def of_heads(attn: Any, layer: nn.Linear) -> torch.Tensor:
    """A projection's weight, [heads * d, C] -> [heads, d, C]."""
    return layer.weight.unflatten(0, (attn.num_heads, -1))


def by_head(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """[P, T, heads * d] -> [P, heads, T, d]."""
    return x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


def _twice(layer: nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
    """A transposed convolution whose kernel is its stride, on pixels one by one: [..., C] -> [..., 2 * 2, C']."""
    weight = layer.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [C, C', 2, 2] -> [2 * 2 * C', C]
    assert layer.bias is not None
    return F.linear(x, weight, layer.bias.repeat(4)).unflatten(-1, (4, -1))
