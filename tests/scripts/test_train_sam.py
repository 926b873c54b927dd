"""Training as its users run it: several processes, kills, signals, restarts, bad arguments."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from blsam.checkpoint import read
from tests.helpers import ROOT
from tests.photos import write_photos
from tests.training.helpers import STUDENT, TEACHER, column, rows

pytestmark = pytest.mark.e2e

# sums over several threads depend on who is first: bit for bit is promised for one
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


SCRIPT = ROOT / "scripts" / "train_sam.py"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 8)


def _command(photos, output, steps, *more, start=("--init", str(STUDENT))):
    command = [str(SCRIPT), "--model", "blsam_vit_t", *start, "--teacher", "vit_t", "--teacher-checkpoint"]
    command += [str(TEACHER), "--data", str(photos), "--image-size", "128", "--holdout", "0", "--batch-size", "4"]
    command += ["--keep-ratio", "0.25,0.5", "--steps", str(steps), "--workers", "0", "--log-every", "1"]
    return [*command, "--output", str(output), *more]


def _run(*command, processes=1, environment=ONE_THREAD):
    head = [sys.executable]
    if processes > 1:
        head += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*head, *command], capture_output=True, text=True, env=environment)


def _same_way(one, other):
    """Cosine between what two runs made of the weights that both began with; the files are in half precision."""
    began, a, b = (read(path)[0] for path in (STUDENT, *(run / "model.safetensors" for run in (one, other))))
    assert a.keys() == b.keys()
    same_shape = [k for k in a if a[k].shape == began[k].shape]
    a, b = (torch.cat([(state[k].double() - began[k].double()).flatten() for k in same_shape]) for state in (a, b))
    return torch.cosine_similarity(a, b, dim=0).item()


def test_processes_equal_one(photos, tmp_path):
    runs = {"one": (1, ()), "ddp": (2, ()), "fsdp": (2, ("--strategy", "fsdp", "--checkpointing"))}
    for name, (processes, more) in runs.items():
        # a small rate: rounding grows with every step, and routing, best masks and clicks turn on it
        command = _command(photos, tmp_path / name, 20, "--accumulate", "2", "--lr", "2e-5", *more)
        result = _run(*command, processes=processes)
        assert result.returncode == 0, result.stderr
    weights = {name: read(tmp_path / name / "model.safetensors")[0] for name in runs}
    for name in ("ddp", "fsdp"):
        assert weights[name].keys() == weights["one"].keys()
        gaps = [(weights[name][k].float() - v.float()).abs().max().item() for k, v in weights["one"].items()]
        assert max(gaps) < 2e-3, (name, max(gaps))
        cosine = _same_way(tmp_path / "one", tmp_path / name)
        print(f"{name}: cosine of what 20 steps changed {cosine:.4f}")
        assert cosine > 0.95, (name, cosine)
    norms = {name: column(tmp_path / name, "grad_norm")[0].item() for name in runs}
    assert norms["ddp"] == pytest.approx(norms["one"], rel=1e-4), norms
    assert norms["fsdp"] == pytest.approx(norms["one"], rel=1e-4), norms
    losses = {name: column(tmp_path / name, "loss") for name in runs}
    for name in ("ddp", "fsdp"):
        worst = (losses[name] - losses["one"]).abs().max().item()
        print(f"{name}: losses of 20 steps differ by {worst:.1e}")
        assert worst < 1e-3, (name, worst, losses)


def test_two_processes_become_one(photos, tmp_path):
    """Two are asked to stop after the third of six steps; one goes on, with the moments and from the place in the data."""
    script = tmp_path / "stops.py"
    script.write_text(
        "import signal, sys\n"
        "from blsam.cli import main\n"
        "from blsam.training import loop\n"
        "step = loop.one_step\n"
        "def stops(run, *more):\n"
        "    step(run, *more)\n"
        "    if run.progress.step == 2:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "loop.one_step = stops\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    whole, command = (_command(photos, tmp_path / name, 6, "--lr", "2e-5") for name in ("whole", "run"))
    two = _run(str(script), *command[1:], processes=2, environment=ONE_THREAD | {"PYTHONPATH": str(ROOT)})
    assert two.returncode == 0 and (tmp_path / "run" / "checkpoints" / "step-3").is_dir(), two.stderr
    for one in (_run(*command, "--resume"), _run(*whole)):
        assert one.returncode == 0, one.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    losses = [column(tmp_path / name, "loss") for name in ("whole", "run")]
    assert (losses[0] - losses[1]).abs().max() < 1e-3, losses
    cosine = _same_way(tmp_path / "whole", tmp_path / "run")
    print(f"cosine of what 6 steps changed {cosine:.4f}")
    assert cosine > 0.95, cosine


def test_processes_may_change_and_validation_need_not_improve(photos, tmp_path):
    """Two with FSDP2 and checkpointing, whose second validation is no better than the first; then one, plain."""
    more = ("--holdout", "0.25", "--validate-every", "1", "--lr", "1e-9")
    two = _run(*_command(photos, tmp_path / "run", 2, "--strategy", "fsdp", "--checkpointing", *more), processes=2)
    assert two.returncode == 0, two.stderr
    one = _run(*_command(photos, tmp_path / "run", 4, "--resume", *more))
    assert one.returncode == 0, one.stderr
    assert column(tmp_path / "run", "loss").numel() == 4
    boxes = column(tmp_path / "run", "val_box")
    assert len(boxes) == 5 and (boxes - boxes[0]).abs().max() < 1e-3, boxes


def test_a_killed_run_goes_on_bit_for_bit(photos, tmp_path):
    whole = _run(*_command(photos, tmp_path / "whole", 6, "--save-every", "2"))
    assert whole.returncode == 0, whole.stderr
    command = _command(photos, tmp_path / "cut", 6, "--save-every", "2")
    process = subprocess.Popen([sys.executable, *command], env=ONE_THREAD, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "cut" / "checkpoints").glob("step-2")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "cut" / "model.safetensors").exists()
    resumed = _run(*command, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (read(tmp_path / run / "model.safetensors")[0] for run in ("whole", "cut"))
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"{len(different)} tensors differ, first {different[:3]}"
    assert [row["step"] for row in rows(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]


def test_what_torchrun_starts_again_goes_on(photos, tmp_path):
    """The first attempt kills itself after its third step."""
    script = tmp_path / "dies_once.py"
    script.write_text(
        "import os, sys\n"
        "from blsam.cli import main\n"
        "from blsam.training import loop\n"
        "step = loop.one_step\n"
        "def dies(run, *more):\n"
        "    step(run, *more)\n"
        "    if run.progress.step == 2 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os._exit(1)\n"
        "loop.one_step = dies\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    command = [str(script), *_command(photos, tmp_path / "run", 4, "--save-every", "1")[1:]]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    environment = ONE_THREAD | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([*launch, *command], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_signal_to_the_whole_group_ends_with_a_checkpoint(photos, tmp_path):
    command = [str(SCRIPT), "--stage", "encoder", "--model", "vit_t", "--init", str(TEACHER)]
    command += ["--teacher", "vit_t", "--teacher-checkpoint", str(TEACHER), "--distill-loss", "mse"]
    command += ["--data", str(photos), "--image-size", "128", "--holdout", "0", "--batch-size", "2"]
    command += ["--steps", "100000", "--workers", "1", "--log-every", "2", "--output", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    row = rows(tmp_path / "run")[0]
    assert row["fd"] < 0.05 and "sup" not in row  # the student is the teacher, and no prompt was decoded
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert re.fullmatch(r"step-\d+", saved.name) and int(saved.name[5:]) >= 2
    state, _ = read(tmp_path / "run" / "model.safetensors")
    decoder = read(TEACHER)[0]
    assert all(torch.equal(state[k], v.half()) for k, v in decoder.items() if k.startswith("mask_decoder."))


def test_bad_arguments_are_one_line(photos, tmp_path):
    for more in (["--data", str(tmp_path / "none")], ["--teacher-checkpoint", "none.pth"]):
        result = _run(*_command(photos, tmp_path / "run", 1, *more))
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
