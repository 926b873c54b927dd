"""The table of models, pinned layer by layer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from blsam.config import CONFIGS

GOLDEN = json.loads((Path(__file__).parent / "golden" / "layers.json").read_text())
# dim, heads, window; of the narrow blocks dim, heads, heads over the whole image, tokens along a cell of their keys there
SIZES = {
    "vit_h": (1280, 16, 14, 768, 12, 12, 1),
    "vit_l": (1024, 16, 14, 384, 6, 6, 1),
    "vit_b": (768, 12, 14, 192, 3, 3, 1),
    "vit_t": (192, 3, 8, 48, 3, 1, 1),
    "vit_t_fine": (192, 3, 8, 64, 2, 2, 2),
}


def test_the_table_is_complete():
    assert set(CONFIGS) == set(GOLDEN)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_layers(name):
    config = CONFIGS[name]
    layers = [
        ("G" if config.is_global(i) else "w")
        + ("F" if config.stage_of(i) is None else "R")
        + ("E" if config.has_e_block(i) else "-")
        + ("P" if i in config.predictor_layers else "-")
        for i in range(config.depth)
    ]
    assert " ".join(layers) == GOLDEN[name]
    dim, heads, window, e_dim, e_heads, over_image, cells = SIZES[name.removeprefix("blsam_")]
    assert (config.dim, config.heads, config.window) == (dim, heads, window)
    if config.routed:
        assert (config.e_dim, config.e_heads, config.e_pool) == (e_dim, e_heads, cells)
        assert {config.e_heads_of(i) for i in config.global_layers} == {over_image}
    assert config.dense == CONFIGS[name.removeprefix("blsam_")]
    stages = [None, *range(len(config.predictor_layers))]
    assert [i for stage in stages for i in config.layers_of(stage)] == list(range(config.depth))
    assert config.grow == (2 if name.endswith("_fine") else 1)
    assert (config.fuse, config.semi_cross, config.e_block, config.score) == ("sublayer", True, True, "predictor")


def test_impossible_rows_are_refused():
    config = CONFIGS["blsam_vit_t"]
    for change in (
        {"heads": 5},
        {"e_global_heads": 5},
        {"e_layers": (0,)},
        {"fuse": "never"},
        {"grow": 3},
        {"e_pool": 0},
        {"predictor_layers": (3, 0)},
    ):
        with pytest.raises(ValueError):
            replace(config, **change)


def test_a_configuration_of_one_s_own_has_a_dense_model_too():
    mine = replace(CONFIGS["blsam_vit_b"], name="mine", depth=6, global_layers=(2, 5))
    mine = replace(mine, e_layers=(1, 2), predictor_layers=(0, 3))
    assert mine.dense == replace(CONFIGS["vit_b"], name="mine", depth=6, global_layers=(2, 5))
    assert mine.dense.dense == mine.dense
