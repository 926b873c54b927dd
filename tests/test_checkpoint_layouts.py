"""The same weights in other people's wrappers, under other people's keys."""

import pytest
import torch

from blsam import build_sam, sam_model_registry
from blsam import checkpoint as ckpt
from blsam.checkpoint_layouts import from_transformers
from tests.helpers import TINY_EXACT, randomize


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    return randomize(build_sam(TINY_EXACT, image_size=160))


@pytest.fixture(scope="module")
def state(sam):
    """What a model is known by, without the megabytes of neck and decoder."""
    large = ("image_encoder.neck", "mask_decoder.transformer", "mask_decoder.output")
    return {key: value for key, value in sam.state_dict().items() if not key.startswith(large)}


def other(state):
    return {key: value + 1 for key, value in state.items()}


def comes_back(state, content, path):
    torch.save(content, path)
    found, _ = ckpt.read(path, TINY_EXACT)
    assert set(found) == set(state)
    for key, value in state.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "model.",
        "_orig_mod.",
        "sam.",
        "net.",
        "module.model.",
        "model._orig_mod.module.sam.",
        "my_net.0.",
    ],
)
@pytest.mark.parametrize("inside", ["", "_orig_mod.", "module.", "_fsdp_wrapped_module._orig_mod."])
def test_prefixes_are_taken_off(state, tmp_path, prefix, inside):
    def name(key):
        part, _, rest = key.partition(".")
        return f"{prefix}{part}.{inside}{rest}"

    comes_back(state, {name(key): value for key, value in state.items()}, tmp_path / "a.pth")


def test_an_average_of_torch_counts_beside_its_weights(sam, tmp_path):
    comes_back(sam.state_dict(), torch.optim.swa_utils.AveragedModel(sam).state_dict(), tmp_path / "a.pth")


def test_keys_that_frameworks_really_write(sam, tmp_path):
    """Wrapped modules of torch themselves, and as a child of another module."""
    outer = torch.nn.ModuleDict({"sam": torch.compile(sam)})
    comes_back(sam.state_dict(), outer.state_dict(), tmp_path / "a.pth")
    block, sam.image_encoder.blocks[1] = (
        sam.image_encoder.blocks[1],
        torch.nn.DataParallel(sam.image_encoder.blocks[1]),
    )
    wrapped = torch.nn.DataParallel(sam).state_dict()
    sam.image_encoder.blocks[1] = block
    assert any(key.startswith("module.image_encoder.blocks.1.module.") for key in wrapped)
    torch.save(wrapped, tmp_path / "b.pth")
    for key, value in build_sam(TINY_EXACT, tmp_path / "b.pth").state_dict().items():
        assert torch.equal(value, sam.state_dict()[key]), key


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s},
        lambda s: {"state_dict": s, "epoch": 3, "pytorch-lightning_version": "2.0"},
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda s: {"ema": s, "loss": torch.tensor(0.1), "step": torch.tensor(3)},
        lambda s: {"anything": {"you": {"like": s}}},
        lambda s: {"epoch": 1, "ema": {"module": {f"module.{k}": v for k, v in s.items()}, "updates": 7}},
        lambda s: s | {"epoch": 3, "args": None},
        lambda s: [s, 3],
        lambda s: {"model": s, "state_dict": s},
        lambda s: {"model": s, "copy": dict(s)},
        lambda s: {"model": s, "optimizer": {"exp_avg": dict(s.items()) | {"a": torch.ones(1)}}},
        lambda s: {"model": s, "discriminator": {"main.0.weight": torch.ones(2)}},
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrappers_are_opened(state, tmp_path, wrap, prefix):
    comes_back(state, wrap({prefix + k: v for k, v in state.items()}), tmp_path / "a.pth")


def test_a_model_in_three_parts_is_put_together(state, tmp_path):
    parts = {
        part: {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(part)}
        for part in ("image_encoder", "prompt_encoder", "mask_decoder")
    }
    comes_back(state, parts, tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (lambda a, b: {"model": a, "ema": b}, "ema and model"),
        (lambda a, b: {"x": {"model": a, "ema": b}}, "x.ema and x.model"),
        (lambda a, b: {f"student.{k}": v for k, v in a.items()} | {f"teacher.{k}": v for k, v in b.items()},
         "student and teacher"),
        (lambda a, b: a | {"ema": b}, r"\(outermost\) and ema"),
    ],
)  # fmt: skip
def test_two_models_are_refused_by_name(state, tmp_path, content, names):
    torch.save(content(state, other(state)), tmp_path / "a.pth")
    with pytest.raises(ckpt.CheckpointError, match=f"holds several models, {names}; save the one you want"):
        ckpt.read(tmp_path / "a.pth", TINY_EXACT)


def test_of_several_models_the_one_that_fits_is_taken(state, tmp_path):
    larger = sam_model_registry["vit_t"](image_size=64).state_dict()
    comes_back(state, {"student": state, "teacher": larger}, tmp_path / "a.pth")
    encoder = {key: value for key, value in other(state).items() if key.startswith("image_encoder.")}
    comes_back(state, {"model": state, "encoder": encoder}, tmp_path / "b.pth")
    mixed = {f"sam.{k}": v for k, v in state.items()} | {f"teacher.{k}": v for k, v in larger.items()}
    comes_back(state, mixed, tmp_path / "c.pth")


def test_what_holds_itself_is_looked_at_once(state, tmp_path):
    circle = {"model": state, "sparse": {"x": torch.eye(2).to_sparse(), "y": torch.zeros(1).expand(9, 9)}}
    circle |= {str(i): circle for i in range(1000)} | {"list": [circle] * 1000}
    comes_back(state, circle, tmp_path / "a.pth")


def test_what_is_beside_the_model_is_refused_by_name(sam, tmp_path):
    named = {f"model.{k}": v for k, v in sam.state_dict().items()}
    torch.save(named | {"criterion.weight": torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(ckpt.CheckpointError, match="does not know: criterion.weight"):
        build_sam(TINY_EXACT, tmp_path / "a.pth")
    first = next(iter(sam.state_dict()))
    torch.save(sam.state_dict() | {f"module.{first}": torch.ones(2)}, tmp_path / "b.pth")
    with pytest.raises(ckpt.CheckpointError, match="with and without module"):
        build_sam(TINY_EXACT, tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["image_encoder.trunk.pos_embed", "sam_mask_decoder.a"], "SAM 2"),
        (["image_encoder.patch_embed.seq.0.c.weight", "mask_decoder.a"], "MobileSAM"),
        (["model.0.conv.weight"], "YOLO"),
        (["patch_embed.proj.weight", "pos_embed"], "an image encoder alone"),
        (["base_model.model.q.lora_A.weight"], "LoRA"),
        (["layer1.0.conv1.weight", "fc.bias"], "its keys begin with layer1.0.conv1.weight, fc.bias"),
    ],
)
def test_other_models_are_named(tmp_path, keys, words):
    torch.save({key: torch.ones(1) for key in keys}, tmp_path / "a.pth")
    with pytest.raises(ckpt.CheckpointError, match=words):
        build_sam(TINY_EXACT, tmp_path / "a.pth")


def test_names_in_a_file_do_not_write_on_the_terminal(tmp_path):
    torch.save({"\x1b[2J\nroot:": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ckpt.CheckpointError, match=r"its keys begin with \?\[2J root:$"):
        build_sam(TINY_EXACT, tmp_path / "a.pth")


# --- Hugging Face ----------------------------------------------------------------------------------------------------

LINEAR = ("weight", "bias")
ATTENTION = [f"{name}.{end}" for name in ("q_proj", "k_proj", "v_proj", "out_proj") for end in LINEAR]


def both(*names):
    return [f"{name}.{end}" for name in names for end in LINEAR]


def under(prefix, names):
    return [f"{prefix}.{name}" for name in names]


def keys_of_transformers(layers):
    """Of `transformers.SamModel`, by its documentation: written out, not made from the mapping."""
    block = both("layer_norm1", "layer_norm2", "attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
    vision = ["pos_embed", *both("patch_embed.projection", "neck.layer_norm1", "neck.layer_norm2")]
    vision += ["neck.conv1.weight", "neck.conv2.weight"]
    for i in range(layers):
        vision += under(f"layers.{i}", [*block, "attn.rel_pos_h", "attn.rel_pos_w"])
    prompt = ["shared_embedding.positional_embedding", "no_mask_embed.weight", "not_a_point_embed.weight"]
    prompt += [f"point_embed.{i}.weight" for i in range(4)]
    prompt += both(*under("mask_embed", ["conv1", "conv2", "conv3", "layer_norm1", "layer_norm2"]))
    decoder = ["iou_token.weight", "mask_tokens.weight"]
    for i in range(2):
        two_way = both("mlp.lin1", "mlp.lin2", *(f"layer_norm{n}" for n in (1, 2, 3, 4)))
        for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
            two_way += under(name, ATTENTION)
        decoder += under(f"transformer.layers.{i}", two_way)
    decoder += under("transformer.final_attn_token_to_image", ATTENTION)
    decoder += both("transformer.layer_norm_final_attn", "upscale_conv1", "upscale_conv2", "upscale_layer_norm")
    for mlp in (*(f"output_hypernetworks_mlps.{i}" for i in range(4)), "iou_prediction_head"):
        decoder += under(mlp, both("proj_in", "layers.0", "proj_out"))
    parts = under("vision_encoder", vision), under("prompt_encoder", prompt), under("mask_decoder", decoder)
    return ["shared_image_embedding.positional_embedding", *sum(parts, [])]


def test_keys_of_transformers_become_sams(sam):
    renamed = [from_transformers(key) for key in keys_of_transformers(4)]
    assert set(renamed) == set(sam.state_dict())
    assert len(renamed) == len(set(renamed)) + 1  # the positional embedding is there twice, shared
    assert [from_transformers(key) for key in sam.state_dict() if not key.startswith("mask_decoder.")] == [
        key for key in sam.state_dict() if not key.startswith("mask_decoder.")
    ]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_model_of_transformers_gives_the_same_masks(tmp_path, suffix):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 160, "window_size": 7}
    vision |= {"global_attn_indexes": [1, 3], "mlp_dim": 256}
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config={"image_size": 160})
    theirs = randomize(transformers.SamModel(config))
    assert set(theirs.state_dict()) == set(keys_of_transformers(4))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if suffix == "bin":
        path = tmp_path / "pytorch_model.bin"
        torch.save(theirs.state_dict(), path)
    ours = build_sam(TINY_EXACT, path)
    image = torch.randn(1, 3, 160, 160)
    gap = (ours.image_encoder(image) - theirs.get_image_embeddings(image)).abs().max().item()
    assert gap < 1e-4, f"embeddings differ by {gap:.2g}"
    points, labels = torch.tensor([[[40.0, 60.0], [90.0, 20.0]]]), torch.tensor([[1, 0]])
    with torch.no_grad():  # the decoder, of random weights, amplifies what the embeddings differ by
        expected = theirs(pixel_values=image, input_points=points[:, None], input_labels=labels[:, None])
        sparse, dense = ours.prompt_encoder(points=(points, labels), boxes=None, masks=None)
        masks, scores = ours.mask_decoder(
            image_embeddings=ours.image_encoder(image),
            image_pe=ours.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
    for mine, other in ((masks, expected.pred_masks[0]), (scores, expected.iou_scores[0])):
        gap = (mine - other).abs().max() / other.std()
        assert gap < 1e-3, f"differs by {gap:.2g} standard deviations"
