"""Training classifiers: what is learnt, that runs go on to the bit, and what cannot be trained."""

import json
import math
import os
import socket
from dataclasses import replace

import pytest
import timm
import torch
import torch.multiprocessing as mp
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from blsam.baselines import BASELINES, build_baseline
from blsam.build_classifier import build_classifier, read_classifier
from blsam.checkpoint import save
from blsam.config import ClassifierConfig
from blsam.distributed import World
from blsam.modeling.classifier import Classified
from blsam.training import imagenet
from blsam.training.imagenet import TrainedClassifier, optimizer_of, schedule_of, set_up, train
from blsam.training.imagenet_settings import ClassifierSettings
from blsam.training.losses import token_cosine_loss
from blsam.training.run import loop
from tests.helpers import randomize
from tests.labelled import write_folder
from tests.training.helpers import column, rows

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = ClassifierConfig(name="plain", dim=32, depth=4, heads=2, patch=4, image_size=16, classes=2)
ROUTED = replace(PLAIN, name="routed", e_dim=8, e_heads=2, e_layers=(1, 2, 3), predictor_layers=(0, 2))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("set"), {"train": 12, "val": 6})


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(imagenet.CLASSIFIERS, "plain", PLAIN)


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(3)
    path = tmp_path / "teacher.safetensors"
    save(path, randomize(build_classifier(PLAIN), 0.05).state_dict(), {})
    return path


@pytest.fixture
def settings(data, tmp_path):
    """Six steps of a routed model with everything that is drawn."""
    return ClassifierSettings(
        model=ROUTED,
        data=(data,),
        output=tmp_path / "run",
        keep_ratio=(0.25, 0.5),
        erasing=0.5,
        drop_path=0.3,
        steps=6,
        batch_size=8,
        workers=0,
        log_every=1,
        save_every=100,
        lr=1e-2,
    )


def weights(folder, name="model"):
    return read_classifier(folder / f"{name}.safetensors")


# --- what is minimised -----------------------------------------------------------------------------------------------


def test_distillation_by_hand():
    student = torch.tensor([[[1.0, 0], [0, 2], [3, 4]], [[1, 0], [1, 0], [1, 0]]])
    teacher = torch.tensor([[[2.0, 0], [5, 0], [0, 1], [4, 3]], [[1, 0], [-1, 0], [0, 1], [1, 0]]])
    # image 0: class token alike (0), its second token at place 3: (0, 2) and (4, 3) -> 1 - 0.6; the third does not count
    # image 1: places 0, 1, 2: 0, 2 and 1
    places = torch.tensor([[0, 3, -1], [0, 1, 2]])
    assert token_cosine_loss(student, teacher, places).tolist() == pytest.approx([0.2, 1.0])
    # in order: 0, 1, 1 - 4/5; 0, 2, 1
    assert token_cosine_loss(student, teacher[:, :3]).tolist() == pytest.approx([1.2 / 3, 1.0])


class Answers(torch.nn.Module):
    """A method with two heads and a loss of its own, as baselines may have."""

    def classify(self, x, keep_ratio=None):
        first, second = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        own = {"halting": torch.tensor(0.5)}
        return Classified(first, tokens, torch.tensor([[0, -1]]), ((0.5, first), (0.25, second)), own)


def test_the_loss_is_the_sum_of_its_terms():
    target, taught = torch.tensor([[0.9, 0.1]]), torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    losses = TrainedClassifier(Answers(), 2.5)(torch.zeros(1, 3, 4, 4), target, 0.25, taught)
    entropies = [-0.9 * math.log(p) - 0.1 * math.log(1 - p) for p in (1 / (1 + math.exp(-2)), 1 / (1 + math.e))]
    classes, distilled = 0.5 * entropies[0] + 0.25 * entropies[1], 1 - math.sqrt(0.5)
    terms = {name: value.item() for name, value in losses.terms.items()}
    assert terms == pytest.approx({"class": classes, "fd": distilled, "halting": 0.5})
    assert losses.loss.item() == pytest.approx(classes + 2.5 * distilled + 0.5)


def test_rates_and_decay_are_timms(settings):
    settings = replace(settings, lr=5e-4, batch_size=1024, weight_decay=0.05)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    ours, theirs = optimizer_of(model, settings), create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    for a, b in zip(ours.param_groups, theirs.param_groups):
        assert a["weight_decay"] == b["weight_decay"] and list(map(id, a["params"])) == list(map(id, b["params"]))
    schedule = schedule_of(ours, settings, steps=1000, an_epoch=10)
    more = {"num_epochs": 100, "warmup_epochs": 5, "min_lr": 1e-5, "warmup_lr": 1e-6}
    reference, _ = create_scheduler_v2(theirs, "cosine", step_on_epochs=False, updates_per_epoch=10, **more)
    for step in (0, 1, 49, 50, 500, 999):
        schedule.step_update(step), reference.step_update(step)
        assert ours.param_groups[1]["lr"] == theirs.param_groups[1]["lr"]
    assert schedule_of(ours, settings, steps=100, an_epoch=100).warmup_t == 10


# --- runs ------------------------------------------------------------------------------------------------------------


def test_two_classes_are_learnt(settings):
    plain = replace(settings, model=PLAIN, augment="light", mixup=0, cutmix=0, drop_path=0, steps=30, lr=0.2)
    path = train(replace(plain, batch_size=16))
    found = rows(settings.output)[-1]
    assert found["val_top1"] == 100 and found["val_images"] == 12, found
    assert column(settings.output, "loss")[-5:].mean() < 0.35 < 0.6 < column(settings.output, "loss")[0]
    model = build_classifier(PLAIN, path)
    assert model.num_classes == 2 and weights(settings.output, "best").keys() == model.state_dict().keys()
    config = json.loads((settings.output / "config.json").read_text())
    assert (config["images"], config["validated on"], config["classes"], config["crop"]) == (24, 12, 2, 1.0)
    assert (settings.output / "classes.txt").read_text().split() == ["blue", "red"]


def test_a_student_learns_its_teachers_tokens(settings, teacher):
    torch.manual_seed(4)
    other = teacher.with_name("other.safetensors")
    save(other, randomize(build_classifier(PLAIN), 0.05, seed=1).state_dict(), {})
    taught = replace(settings, teacher="plain", teacher_checkpoint=teacher, augment="light", drop_path=0, steps=15)
    train(replace(taught, lr=0.1, keep_ratio=(0.25,), init=other))
    fd = column(settings.output, "fd")
    assert 0 < fd[-3:].mean() < 0.8 * fd[0], fd
    row = rows(settings.output)[1]
    assert row["loss"] == pytest.approx(row["class"] + 2.5 * row["fd"], abs=1e-4)
    assert {"alpha", "gamma", "prime_moved", "epoch"} <= row.keys()


def test_it_starts_from_its_teacher(settings, teacher):
    run = set_up(replace(settings, teacher="plain", teacher_checkpoint=teacher), World())
    state, own = read_classifier(teacher), run.classifier.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items())
    assert run.classifier.drop_path_rate == 0.3 and not any(p.requires_grad for p in run.teacher.parameters())


def stop_after(monkeypatch, step):
    """A run that stops as if a signal had come after its n-th step."""
    original = imagenet.one_step

    def one_step(run, samples, rows):
        original(run, samples, rows)
        if run.progress.step == step - 1:
            imagenet.signals.append(15)

    monkeypatch.setattr(imagenet, "one_step", one_step)
    monkeypatch.setattr(imagenet, "signals", [], raising=False)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_goes_on_bit_for_bit(settings, teacher, tmp_path, monkeypatch, accumulate):
    settings = replace(settings, accumulate=accumulate, teacher="plain", teacher_checkpoint=teacher)
    whole = train(replace(settings, output=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run = set_up(settings, World())
        loop(run, imagenet.signals)
        run.folder.close()
    assert [path.name for path in (settings.output / "checkpoints").iterdir()] == ["step-3"]
    torch.manual_seed(99)  # what was drawn elsewhere does not matter
    cut = train(replace(settings, resume=True))
    a, b = read_classifier(whole), read_classifier(cut)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    losses = [column(folder, "loss").tolist() for folder in (tmp_path / "whole", settings.output)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_passes_give_the_gradient_of_the_whole_batch(settings, tmp_path):
    settings = replace(settings, mixup=0, cutmix=0, drop_path=0, steps=1)
    for passes in (1, 4):
        train(replace(settings, accumulate=passes, output=tmp_path / str(passes)))
    norms = [column(tmp_path / str(passes), "grad_norm").item() for passes in (1, 4)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def _process(rank, port, settings):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    imagenet.CLASSIFIERS["plain"] = PLAIN
    train(settings)


@pytest.mark.e2e
def test_two_processes_equal_two_passes_of_one(settings, teacher, tmp_path):
    settings = replace(settings, teacher="plain", teacher_checkpoint=teacher, lr=1e-3)
    train(replace(settings, accumulate=2, output=tmp_path / "one"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (port, settings), nprocs=2)
    losses = [column(folder, "loss") for folder in (tmp_path / "one", settings.output)]
    assert len(losses[1]) == 6 and (losses[0] - losses[1]).abs().max() < 1e-4, losses
    a, b = weights(tmp_path / "one"), weights(settings.output)
    assert max((a[key].float() - b[key].float()).abs().max().item() for key in a) < 2e-3
    assert [rows(folder)[0]["val_images"] for folder in (tmp_path / "one", settings.output)] == [12, 12]


def test_the_average_does_not_ship_its_start(settings):
    run = set_up(replace(settings, model=PLAIN, augment="none", steps=20, lr=0.1), World())
    start = {key: value.clone() for key, value in run.averaged.items()}
    loop(run, [])
    run.folder.close()
    now = run.classifier.state_dict()
    gaps = [sum((state[key] - now[key]).norm() ** 2 for key in now) ** 0.5 for state in (run.averaged, start)]
    assert gaps[0] < 0.3 * gaps[1]


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_trained_alike(settings, teacher, name, monkeypatch):
    deep = replace(PLAIN, depth=10)  # EViT drops before blocks 3, 6 and 9
    torch.manual_seed(5)
    save(teacher, randomize(build_classifier(deep), 0.05).state_dict(), {})
    monkeypatch.setitem(imagenet.CLASSIFIERS, "plain", deep)
    plain = replace(settings, model=deep, baseline=name, keep_ratio=(0.5,), steps=2)
    path = train(replace(plain, teacher="plain", teacher_checkpoint=teacher))
    assert (column(settings.output, "fd") > 0).tolist() == [True, True]
    model = build_baseline(name, deep, path, keep_ratio=0.5)
    found = model.classify(torch.randn(2, 3, 16, 16))
    assert found.logits.shape == (2, 2) and torch.isfinite(found.logits).all()
    assert (len(column(settings.output, "val_gmacs")) > 0) == model.by_image
    own = {"dynamic_vit": ["ratio"], "a_vit": ["ponder", "prior"], "ada_vit": ["usage"]}.get(name, [])
    assert all(column(settings.output, term).isfinite().tolist() == [True, True] for term in own)


# --- what cannot be trained ------------------------------------------------------------------------------------------


def test_data_that_cannot_be_trained_on(settings, tmp_path):
    one = write_folder(tmp_path / "one", {"train": 4, "val": 2}, ("red",))
    unsplit = write_folder(tmp_path / "unsplit", {"train": 4}) / "train"
    more = write_folder(tmp_path / "more", {"train": 1, "val": 1}, ("blue", "green"))
    for changes, error in (
        ({"data": (tmp_path / "none",)}, "no images at"),
        ({"data": (one,)}, "all images are of one class, red"),
        ({"data": (unsplit,)}, "no val images in .*unsplit"),
        ({"val_data": (more,)}, "a class green, which is none of the 2 known ones"),
    ):
        with pytest.raises((ValueError, OSError), match=error):
            train(replace(settings, **changes))
    damaged = write_folder(tmp_path / "damaged", {"train": 2, "val": 1})
    next((damaged / "train" / "red").iterdir()).write_bytes(b"not an image")
    with pytest.raises(ValueError, match="red/000.*png is not an image that can be read"):
        train(replace(settings, data=(damaged,), output=tmp_path / "damaged_run"))


def test_weights_that_do_not_fit(settings, teacher, monkeypatch):
    with pytest.raises(ValueError, match="patches of"):
        train(replace(settings, model=replace(ROUTED, dim=64, e_dim=16), init=teacher))
    monkeypatch.setitem(imagenet.CLASSIFIERS, "wide", replace(PLAIN, name="wide", dim=64))
    path = teacher.with_name("wide.safetensors")
    save(path, build_classifier(replace(PLAIN, name="wide", dim=64)).state_dict(), {})
    with pytest.raises(ValueError, match="learns from a teacher of width 32 and patch 4; wide has 64 and 4"):
        train(replace(settings, teacher="wide", teacher_checkpoint=path))


def test_a_run_goes_on_as_it_was_begun_or_not_at_all(settings, tmp_path):
    train(replace(settings, steps=1))
    others = write_folder(tmp_path / "others", {"train": 13, "val": 6})
    for changes, error in (
        ({"mixup": 0.5}, "was begun with mixup 0.8, this command has 0.5"),
        ({"data": (others,)}, "images.txt names other"),
    ):
        with pytest.raises(ValueError, match=error):
            train(replace(settings, resume=True, **changes))


def test_a_gradient_that_is_not_finite(settings, monkeypatch):
    monkeypatch.setattr(imagenet, "token_cosine_loss", None)
    run = set_up(settings, World())
    with torch.no_grad():
        run.classifier.blocks[1].mlp.fc1.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="step 0: the gradient is not finite"):
        loop(run, [])
