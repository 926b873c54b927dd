"""How long a calibration takes, by a clock of the test's own."""

import pytest
import torch

from blsam.training import estimate
from blsam.training.estimate import minutes_in_all


class Block:
    """Takes so many seconds of the clock, with gradients twice as many."""

    def __init__(self, clock, window_size, seconds, narrow=True):
        self.clock, self.window_size, self.seconds, self.e_block = clock, window_size, seconds, narrow or None

    def dense(self, x):
        self.clock[0] += self.seconds * (2 if x.requires_grad and torch.is_grad_enabled() else 1)
        return x


@torch.no_grad()
def test_minutes_are_those_of_layers_stages_and_the_students_stream(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock[0])
    # two window layers of 3 s a photo, one of them without narrow blocks, a layer over the whole image of 6 s
    blocks = {2: Block(clock, 7, 3), 3: Block(clock, 7, 3, narrow=False), 4: Block(clock, 0, 6)}
    found = minutes_in_all(blocks, torch.zeros(1, 4, 4, 8), 2, 60.0, torch.float32, in_stages=10, count=5)
    # 60 s a layer of 3 s: 60 + 120; steps: 10 photos of 2 * 12 s; the stream: 5 photos of 12 s
    assert found == pytest.approx((180 + 240 + 60) / 60)
