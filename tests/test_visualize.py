"""Pictures of the routing, pixel by pixel where that can be said."""

import numpy as np
import pytest
import torch

from blsam.modeling.routing import Routing, Stage
from blsam.visualize import class_routing_figure, draw_heat, draw_prime, routing_figure, to_photo


def test_tokens_lie_on_their_pixels_and_padding_is_cut_off():
    tokens = np.arange(16).reshape(4, 4).astype(np.uint8)  # a frame of 64 x 64
    pixels = to_photo(tokens, (40, 64), (20, 32))  # half size: 8 pixels a token
    assert pixels.shape == (20, 32)
    assert np.array_equal(pixels[:8, :8], np.zeros((8, 8))) and pixels[8, 8] == 5 and pixels[19, 31] == 11


def test_prime_tokens_show_the_photo_and_the_others_its_shadow():
    image = np.full((4, 4, 3), (200, 100, 0), np.uint8)
    prime = np.zeros((4, 4), bool)
    prime[:2] = True
    picture = draw_prime(image, prime)
    assert np.array_equal(picture[:2], image[:2]) and (picture[2:] == 25).all()
    heat = draw_heat(image, np.linspace(0, 1, 16).reshape(4, 4))
    assert heat.dtype == np.uint8 and heat[3, 3].sum() > heat[0, 0].sum()


def test_figure_has_a_panel_for_every_stage():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :2, :2] = True
    stage = Stage.from_mask(mask, 4, torch.rand(1, 4, 4))
    figure = routing_figure(np.zeros((64, 64, 3), np.uint8), Routing((stage, stage)), (64, 64), (0, 3))
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 6 and titles[1] == "after layer 0: 25 % prime" and titles[2] == "after layer 3: 25 % prime"
    with pytest.raises(ValueError, match="no routing"):
        routing_figure(np.zeros((64, 64, 3), np.uint8), Routing(), (64, 64), ())
    bare = Routing((Stage.from_mask(mask, 4),))
    with pytest.raises(ValueError, match="without scores"):
        routing_figure(np.zeros((64, 64, 3), np.uint8), bare, (64, 64), (0,))


def test_figure_of_a_classifier_shows_what_was_prime_in_every_layer():
    """The class token is none of the pixels; 2 of 4 patches are prime in the first stage, 1 of them in the second."""
    masks = [torch.tensor([[True, True, True, False, False]]), torch.tensor([[True, True, False, False, True]])]
    stages = tuple(Stage(mask, torch.rand(1, 5), mask.sum(1, keepdim=True) - 1) for mask in masks)
    image = np.full((8, 8, 3), 200, np.uint8)
    figure = class_routing_figure(image, Routing(stages), (2, 2), (0, 3))
    panels = {axis.get_title(): axis.images[0].get_array() for axis in figure.axes}
    assert len(panels) == 8 and "after layer 0: 50 % prime" in panels
    bright = (panels["prime in every layer"] == 200).all(-1)
    assert bright[:4, :4].all() and not bright[4:].any() and not bright[:, 4:].any()
    assert (panels["in none"] == 200).all(-1).sum() == 16 and (panels["in none"][4:, :4] == 200).all()
    with pytest.raises(ValueError, match="no routing"):
        class_routing_figure(image, Routing(), (2, 2), ())
