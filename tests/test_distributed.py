"""Seconds on a device that works behind one's back, memory, and processes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import blsam
from blsam import distributed
from blsam.distributed import CPU, Stopwatch, World, peak_gb, processes, synchronize


class Slow:
    """A device that returns at once and works until somebody waits for it."""

    def __init__(self, monkeypatch):
        self.left = 0.0
        monkeypatch.setattr(distributed, "synchronize", self.wait)

    def begin(self, seconds):
        self.left += seconds

    def wait(self, device):
        time.sleep(self.left)
        self.left = 0.0


def test_a_part_waits_for_what_it_began_and_not_for_what_others_began(monkeypatch):
    slow, watch = Slow(monkeypatch), Stopwatch(CPU)
    slow.begin(0.2)  # before any part
    with watch("encoder"):
        slow.begin(0.1)
    with watch("decoder"):
        time.sleep(0.03)
    with watch("encoder"):
        slow.begin(0.05)
        watch.split("first half")
    assert 0.1 <= watch.seconds["encoder"] < 0.15, watch.seconds
    assert 0.03 <= watch.seconds["decoder"] < 0.08 and 0.05 <= watch.seconds["first half"] < 0.1, watch.seconds


def test_each_kind_of_device_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(str(device)))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for name in ("cpu", "cuda:1", "mps", "meta"):
        synchronize(torch.device(name))
    assert waited == ["cuda:1", "mps"]


def test_the_peak_is_what_was_held_and_does_not_fall():
    before = peak_gb(CPU)
    held = torch.ones(int(before * 2**28) + 2**26)  # as much as there ever was, and a quarter of a GB
    after = peak_gb(CPU)
    assert before + 0.2 < after < 2 * before + 0.3, (before, after)
    del held
    assert peak_gb(CPU) == after


def test_one_process_is_a_world():
    with processes() as world:
        assert world == World(0, 1) and world.is_main
        assert world.agree(1, 2) == [1, 2] and world.gather("a") == world.gather_on_main("a") == ["a"]
        world.barrier()


@pytest.mark.e2e
def test_two_processes_exchange_values(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys\n"
        "from blsam.distributed import processes\n"
        "with processes() as world:\n"
        "    found = (world.agree(world.rank, -world.rank), world.gather('ab'[world.rank]))\n"
        "    assert found == ([1, 0], ['a', 'b']), found\n"
        "    assert world.gather_on_main(world.rank) == ([0, 1] if world.is_main else [])\n"
        "    world.barrier()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {"PYTHONPATH": str(Path(blsam.__file__).parents[1]), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
