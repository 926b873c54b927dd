"""Methods at their settings: what is decided for given images, what the keep ratio saves, the table."""

import json

import pytest
import torch

from blsam.build_classifier import build_classifier
from blsam.checkpoint import save
from blsam.config import CLASSIFIERS
from blsam.evaluation.imagenet import counted_macs
from blsam.options import UsageError
from scripts.benchmarks import benchmark_baselines
from scripts.benchmarks.benchmark_baselines import SETTINGS, at_setting
from tests.helpers import images, randomize

pytestmark = pytest.mark.usefixtures("one_thread")
MINI = CLASSIFIERS["vit_mini_patch4_32"]


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "teacher.safetensors"
    save(path, randomize(build_classifier(MINI), 0.1).state_dict(), {})
    return path


@pytest.mark.parametrize("name", SETTINGS)
def test_a_lower_setting_computes_less(name, teacher):
    x = images(16, 32)
    counted = [counted_macs(at_setting(MINI, teacher, name, keep, x), x[:4]) for keep in SETTINGS[name]]
    whole = counted_macs(build_classifier(MINI), x[:1])
    assert counted[2] < 0.95 * counted[1] < 0.95**2 * counted[0] < 0.95**2 * whole, (counted, whole)


def test_settings_are_checked_before_work():
    with pytest.raises(UsageError, match="--rounds is at least 1"):
        benchmark_baselines.main(["--rounds", "0"])


def test_the_table_has_every_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_baselines, "SETTINGS", {"evit": (0.9, 0.5), "a_vit": (0.5,)})
    monkeypatch.setattr(benchmark_baselines, "SECONDS", 0.0)
    out = tmp_path / "speeds.json"
    assert benchmark_baselines.main(["--model", MINI.name, "--rounds", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["speeds"]
    assert list(found) == ["dense", "evit 0.9", "evit 0.5", "a_vit 0.5"]
    assert found["evit 0.5"]["mmacs"] < found["evit 0.9"]["mmacs"] < found["dense"]["mmacs"]
    assert all(one["batch 1"] > 0 and one["batch 64"] > 0 for one in found.values())
    printed = capsys.readouterr().out
    assert all(f"| {name} | {one['mmacs']:.1f} |" in printed for name, one in found.items())
