"""Training: losses by hand, equal gradients however a step is cut up, and the program as its users run it."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from training import write_coco, write_photos, write_tars

from blsam import sam_model_registry
from blsam.checkpoint import read
from blsam.data.sa1b import choose_photos, list_photos
from blsam.training import run_folder
from blsam.training.embeddings import EmbeddingCache
from blsam.training.loop import train
from blsam.training.losses import balanced_mask_loss, cosine_loss, mask_iou, relative_mse_loss, sam_mask_loss
from blsam.training.prompts import corrective_clicks
from blsam.training.settings import TrainSettings, build_parser, parse_settings

# sums over several threads depend on who is first: bit for bit is promised for one
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parent.parent
SCRIPT, CACHE_SCRIPT = ROOT / "scripts" / "train_sam.py", ROOT / "scripts" / "cache_embeddings.py"
TEACHER, STUDENT = (ROOT / "checkpoints" / f"{name}.safetensors" for name in ("vit_t", "blsam_vit_t"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 8)


@pytest.fixture
def settings(photos, tmp_path):
    """A run of 3 steps of the shipped student at 128."""
    return TrainSettings(
        model="blsam_vit_t",
        data=(photos,),
        output=tmp_path / "run",
        init=STUDENT,
        teacher="vit_t",
        teacher_checkpoint=TEACHER,
        image_size=128,
        keep_ratio=(0.25, 0.5),
        holdout=0,
        steps=3,
        batch_size=4,
        lr=2e-5,
        workers=0,
        log_every=1,
    )


def _rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _column(folder, name):
    return torch.tensor([row[name] for row in _rows(folder) if name in row])


def _losses(folder):
    return _column(folder, "loss")


# --- the objective ---------------------------------------------------------------------------------------------------


def test_losses_on_a_hand_computed_case():
    target = torch.zeros(1, 4, 4)
    target[0, :2, :2] = 1
    perfect = torch.where(target > 0, 50.0, -50.0)[:, None]
    half = perfect.clone()
    half[0, 0, 0, :2] = -50
    assert mask_iou(perfect, target).item() == 1 and mask_iou(half, target).item() == 0.5
    # the wrong half: focal 20 * 2 pixels * 0.25 * 50 / 16; dice 1 - (2 * 2 + 1) / (2 + 4 + 1)
    assert sam_mask_loss(perfect, target[:, None]).item() == pytest.approx(0, abs=1e-6)
    assert sam_mask_loss(half, target[:, None]).item() == pytest.approx(20 * 2 * 0.25 * 50 / 16 + 2 / 7, rel=1e-5)
    # 1.6 x the 2 x 2 box about (1, 1) reaches the pixel centres at 0.5, 1.5 and 2.5: 9 pixels, 2 of them wrong
    assert balanced_mask_loss(half, target[:, None]).item() == pytest.approx(2 * 50 / 9 + 2 / 7, rel=1e-5)


def test_distillation_losses_on_a_hand_computed_case():
    # two images of one or two real tokens; the token in the padding would be far off
    a = torch.tensor([[[1.0, 5.0]], [[0.0, 5.0]]])[None].movedim(2, 3)  # [1, 2, 2, 1]
    b = torch.tensor([[[1.0, -9.0]], [[1.0, 3.0]]])[None].movedim(2, 3)
    real = torch.tensor([True, False]).view(1, 2, 1)
    assert cosine_loss(a, b, real).tolist() == pytest.approx([1 - 0.5**0.5])
    # three tokens of one channel, the last one padding: errors 1 and 3, the teacher's deviations -2 and 2
    student, teacher = torch.tensor([2.0, 8.0, 99.0]), torch.tensor([1.0, 5.0, 0.0])
    real = torch.tensor([True, True, False]).view(1, 1, 3)
    found = relative_mse_loss(student.view(1, 1, 1, 3), teacher.view(1, 1, 1, 3), real)
    assert found.tolist() == pytest.approx([(1 + 9) / (4 + 4)])


def test_corrective_clicks_lie_in_the_error():
    target = torch.zeros(3, 4, 4)
    target[0, 1, 2] = 1  # missed: positive
    logits = torch.full((3, 4, 4), -1.0)
    logits[1, 3, 0] = 1  # extra: negative; the third is right: no point
    points, labels = corrective_clicks(logits, target, torch.Generator().manual_seed(0))
    assert labels[:, 0].tolist() == [1, 0, -1]
    assert points[0, 0].tolist() == [10, 6] and points[1, 0].tolist() == [2, 14]


# --- the loop --------------------------------------------------------------------------------------------------------


def test_passes_give_the_gradient_of_the_whole_batch(settings, tmp_path):
    train(settings)
    train(replace(settings, output=tmp_path / "passes", accumulate=4))
    whole, passes = _losses(tmp_path / "run"), _losses(tmp_path / "passes").view(3, -1).mean(1)
    assert torch.allclose(whole, passes, rtol=1e-4), (whole, passes)
    norms = [_column(tmp_path / name, "grad_norm")[0].item() for name in ("run", "passes")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    a, b = (read(folder / "model.safetensors")[0] for folder in (tmp_path / "run", tmp_path / "passes"))
    worst = max((a[k].float() - b[k].float()).abs().max().item() for k in a)
    assert worst < 1e-3, worst  # half precision


def test_a_run_folder_says_what_happened(settings):
    path = train(replace(settings, holdout=0.25, validate_every=2))
    folder = settings.output
    config = json.loads((folder / "config.json").read_text())
    assert config["photos"] == 6 and config["model"] == "blsam_vit_t" and "git_revision" in config
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    ids = {name: (folder / f"{name}.txt").read_text().split() for name in ("photos", "validation")}
    assert len(ids["photos"]) == 6 and len(ids["validation"]) == 2 and not set(ids["photos"]) & set(ids["validation"])
    steps = [row for row in _rows(folder) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3] and all(row["sup"] > 0 and row["fd"] > 0 for row in steps)
    parts = {
        "s_data",
        "s_teacher",
        "s_student",
        "s_decoder",
        "s_decoder_backward",
        "s_student_backward",
        "s_optimiser",
    }
    assert parts <= set(steps[0]) and len(steps[0]["alpha"]) == len(steps[0]["gamma"]) == 22
    assert 0 < steps[0]["prime_moved"] < 1
    found = [row for row in _rows(folder) if "val_box" in row]
    assert [row["step"] for row in found] == [0, 2, 3] and found[0]["prime_jaccard"] == 1
    assert found[0]["val_cosine"] > 0.9 and {"val_click"} <= set(found[0])
    for name in (path, folder / "best.safetensors"):
        sam = sam_model_registry["blsam_vit_t"](name)
        assert sam.image_encoder.img_size == 128


def test_the_decoder_alone(settings, photos, tmp_path):
    coco = write_coco(photos, tmp_path / "instances.json")
    path = train(
        replace(
            settings, train="decoder", data=(coco,), images=photos, teacher=None, teacher_checkpoint=None, clicks=2
        )
    )
    before, after = (read(name)[0] for name in (STUDENT, path))
    same = {key for key in before if torch.equal(before[key], after[key])}
    resampled = {key for key in before if before[key].shape != after[key].shape}
    changed = set(before) - same - resampled
    assert changed and all(key.startswith("mask_decoder.") for key in changed), sorted(changed)[:3]


def test_a_teacher_on_disk_teaches_the_same(settings, photos, tmp_path):
    made = subprocess.run(
        [sys.executable, str(CACHE_SCRIPT), "--teacher", "vit_t", "--teacher-checkpoint", str(TEACHER), "--data"]
        + [
            str(photos),
            "--image-size",
            "128",
            "--views",
            "1",
            "--part-size",
            "3",
            "--output",
            str(tmp_path / "cache"),
        ],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert len(list((tmp_path / "cache").glob("part-*.safetensors"))) == 3
    one_epoch = replace(settings, steps=2)  # the cache repeats its views, a live run does not
    train(one_epoch)
    train(replace(one_epoch, cache=tmp_path / "cache", output=tmp_path / "cached"))
    live, cached = _losses(tmp_path / "run"), _losses(tmp_path / "cached")
    assert (live - cached).abs().max() < 1e-3, (live, cached)

    cache, teacher = EmbeddingCache(tmp_path / "cache"), sam_model_registry["vit_t"](TEACHER, image_size=128)
    from blsam.data.views import Views, ViewSettings

    sample = Views(list_photos([photos]), ViewSettings(128, 8))[3]
    with torch.no_grad():
        expected = teacher.image_encoder(teacher.preprocess(sample.image.float())[None])[0]
    cosine = torch.cosine_similarity(cache(sample.id, 0).float(), expected, dim=0)
    assert cosine.min() >= 0.9999, cosine.min()

    with pytest.raises(ValueError, match="was made with image_size 128, this run has 192"):
        train(replace(one_epoch, cache=tmp_path / "cache", image_size=192, output=tmp_path / "other"))


def test_tars_are_streamed(settings, photos, tmp_path):
    tars = write_tars(photos, tmp_path / "tars", 2)
    train(replace(settings, data=(tars[0].parent,), stage="encoder"))
    assert sorted((settings.output / "photos.txt").read_text().split()) == [f"sa_{i}" for i in range(8)]
    assert len(_losses(settings.output)) == 3


def test_tars_beside_other_photos_are_refused(settings, photos, tmp_path):
    tars = write_tars(write_photos(tmp_path / "more", 9), tmp_path / "tars", 1)
    (tmp_path / "one").mkdir()
    for suffix in (".jpg", ".json"):
        (tmp_path / "more" / f"sa_8{suffix}").rename(tmp_path / "one" / f"other{suffix}")
    with pytest.raises(ValueError, match="tars are streamed, other photos are not"):
        train(replace(settings, data=(tars[0], tmp_path / "one")))


def test_too_many_damaged_photos_stop_the_run(settings, tmp_path):
    folder = write_photos(tmp_path / "some", 8)
    for i in (2, 5):
        (folder / f"sa_{i}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"[12] of 8 photos are damaged, all in .*damaged.txt; first sa_[25]"):
        train(replace(settings, data=(folder,), steps=8, stage="encoder"))
    assert (settings.output / "damaged.txt").read_text().startswith("sa_")


def test_a_damaged_photo_that_was_held_out_is_listed_too(settings, tmp_path):
    folder = write_photos(tmp_path / "some", 8)
    _, validation = choose_photos(list_photos([folder]), 1.0, 0.25, 0)
    (folder / f"{validation[0].id}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=f"1 of 8 photos are damaged, all in .*damaged.txt; first {validation[0].id}"):
        train(replace(settings, data=(folder,), holdout=0.25, steps=1, log_every=1))


def test_a_checkpoint_is_whole_or_not_there(settings, monkeypatch):
    train(replace(settings, steps=1, save_every=1))

    def dies(state, **more):  # as torch reports it
        (Path(more["checkpoint_id"]) / "half").write_text("")
        raise CheckpointException("save", {0: (OSError("no space left"), None)})

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.dcp, "save", dies)
        with pytest.raises(OSError, match="no space left"):
            train(replace(settings, save_every=1, resume=True))
    assert [path.name for path in (settings.output / "checkpoints").glob("step-*")] == ["step-1"]
    train(replace(settings, resume=True))
    assert [row["step"] for row in _rows(settings.output) if "loss" in row] == [1, 2, 3]


def test_a_run_goes_on_as_it_was_begun_or_not_at_all(settings, tmp_path):
    train(replace(settings, steps=1))
    for more, error in (
        ({"batch_size": 2}, "was begun with batch_size 4, this command has 2"),
        ({"keep_ratio": (0.5,)}, "was begun with keep_ratio"),
        ({"data": (write_photos(tmp_path / "others", 5),)}, "photos.txt names other photos"),
    ):
        with pytest.raises(ValueError, match=error):
            train(replace(settings, resume=True, **more))


def test_a_gradient_that_is_not_finite_ends_the_run(settings):
    with pytest.raises(ValueError, match="step 1: the gradient is not finite"):
        train(replace(settings, lr=1e30, save_every=1))
    assert [path.name for path in (settings.output / "checkpoints").glob("step-*")] == ["step-1"]


@pytest.mark.parametrize(
    "more, error",
    (
        ([], "give one of --epochs, --steps and --minutes"),
        (["--steps", "1", "--epochs", "1"], "give one of"),
        (["--steps", "0"], "--steps must be above 0"),
        (["--steps", "1", "--teacher", "vit_t"], "go together"),
        (["--steps", "1", "--batch-size", "6", "--accumulate", "4"], "--batch-size 6 is not a multiple of 4 passes"),
        (["--steps", "1"], "blsam_vit_t starts from --init or from a dense --teacher"),
        (["--steps", "1", "--init", "a.pth", "--train", "decoder", "--cache", "c"], "has nothing to teach"),
        (["--steps", "1", "--init", "a.pth", "--stage", "encoder"], "learns from a --teacher or a --cache"),
        (["--steps", "1", "--keep-ratio", "0.5,2"], "keep ratios lie in"),
        (["--minutes", "inf"], "--minutes must be a finite number"),
        (["--epochs", "nan"], "--epochs must be a finite number"),
        (["--steps", "1", "--accumulate", "0"], "must be at least 1"),
        (["--steps", "1", "--keep-ratio", "half"], "keep ratios lie in"),
    ),
)
def test_options_that_do_not_go_together(more, error, tmp_path, capsys):
    arguments = ["--model", "blsam_vit_t", "--data", "photos", "--output", str(tmp_path / "run"), *more]
    with pytest.raises(SystemExit) as end:
        parse_settings(build_parser(""), arguments)
    assert end.value.code == 2 and error in capsys.readouterr().err


# --- as programs -----------------------------------------------------------------------------------------------------


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


@pytest.mark.e2e
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
    norms = {name: _column(tmp_path / name, "grad_norm")[0].item() for name in runs}
    assert norms["ddp"] == pytest.approx(norms["one"], rel=1e-4), norms
    assert norms["fsdp"] == pytest.approx(norms["one"], rel=1e-4), norms
    losses = {name: _losses(tmp_path / name) for name in runs}
    for name in ("ddp", "fsdp"):
        worst = (losses[name] - losses["one"]).abs().max().item()
        print(f"{name}: losses of 20 steps differ by {worst:.1e}")
        assert worst < 1e-3, (name, worst, losses)


@pytest.mark.e2e
def test_processes_may_change_and_validation_need_not_improve(photos, tmp_path):
    """Two with FSDP2 and checkpointing, whose second validation is no better than the first; then one, plain."""
    more = ("--holdout", "0.25", "--validate-every", "1", "--lr", "1e-9")
    two = _run(*_command(photos, tmp_path / "run", 2, "--strategy", "fsdp", "--checkpointing", *more), processes=2)
    assert two.returncode == 0, two.stderr
    one = _run(*_command(photos, tmp_path / "run", 4, "--resume", *more))
    assert one.returncode == 0, one.stderr
    assert _column(tmp_path / "run", "loss").numel() == 4
    boxes = _column(tmp_path / "run", "val_box")
    assert len(boxes) == 5 and (boxes - boxes[0]).abs().max() < 1e-3, boxes


@pytest.mark.e2e
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
    assert [row["step"] for row in _rows(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.e2e
def test_what_torchrun_starts_again_goes_on(photos, tmp_path):
    """The first attempt kills itself after its third step."""
    script = tmp_path / "dies_once.py"
    script.write_text(
        "import os, sys\n"
        "from blsam.training import loop, settings\n"
        "step = loop.one_step\n"
        "def dies(run, *more):\n"
        "    step(run, *more)\n"
        "    if run.progress.step == 2 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os._exit(1)\n"
        "loop.one_step = dies\n"
        "loop.train(settings.parse_settings(settings.build_parser('')))\n"
    )
    command = [str(script), *_command(photos, tmp_path / "run", 4, "--save-every", "1")[1:]]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    environment = ONE_THREAD | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([*launch, *command], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in _rows(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.e2e
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
    row = _rows(tmp_path / "run")[0]
    assert row["fd"] < 0.05 and "sup" not in row  # the student is the teacher, and no prompt was decoded
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert re.fullmatch(r"step-\d+", saved.name) and int(saved.name[5:]) >= 2
    state, _ = read(tmp_path / "run" / "model.safetensors")
    decoder = read(TEACHER)[0]
    assert all(torch.equal(state[k], v.half()) for k, v in decoder.items() if k.startswith("mask_decoder."))


@pytest.mark.e2e
def test_bad_arguments_are_one_line(photos, tmp_path):
    for more in (["--data", str(tmp_path / "none")], ["--teacher-checkpoint", "none.pth"]):
        result = _run(*_command(photos, tmp_path / "run", 1, *more))
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
