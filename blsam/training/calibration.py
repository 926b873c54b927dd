"""A usable big.LITTLE model from a dense checkpoint and a few photos, without labels and without training end to end
(ours): a bLSAM from SAM's, a bLViT from a plain ViT's.

1. *Fit* each E-branch, layer by layer, to what the P-branch adds to all tokens of the dense model's own stream.
2. *Choose*: fit each importance predictor to where the E-branches of its stage are worst.
3. *Correct*, stage by stage: run the routed model's own stream, and fit the stage's E-branches together so that it
   comes out of the stage where the dense one does (out of the last: to the dense embedding, or normalised tokens), at
   several keep ratios.
   Kept only if held-out photos say that it helps.

No gradient passes through more than one stage. The streams lie on disk, so memory does not grow with the number of
photos. After every layer and stage the state is written; a run that was killed goes on from there and ends with the
same weights, bit for bit on a CPU (torch's deterministic algorithms are asked for).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..files import write_atomically
from ..modeling.blocks import EBlock, RoutedBlock, take
from ..modeling.routing import ImportancePredictor, Stage
from ..modeling.staged import Staged
from .descent import Descent
from .estimate import minutes_in_all
from .losses import cosine_distance
from .starts import start_attention, start_feed_forward
from .streams import Streams

HELD_OUT = 5  # every fifth photo is not fitted to: it is for the report, and decides whether the third pass is kept
STEPS = 100  # of a fit
TOKENS = 2**11  # of a step; larger photos are taken one by one, in fewer steps
WEIGHTS = {"attention": 2, "feed_forward": 1, "predictor": 1, "stage": 16}  # of the fits in a limited run's time
STARTS = 32  # photos that the closed-form starts look at, more where that many hold few tokens
START_ROWS = 2**15  # tokens of theirs that are regressed on
START_QUERIES = 2**13  # of larger photos, for attention, which costs most
KEEP_RATIOS = (0.1, 0.25, 0.5)  # the third pass draws from them, the report is about them


@dataclass(frozen=True)
class Settings:
    """steps: AdamW steps for each E-branch and predictor; stage_steps: for each stage in the third pass. batch_size: photos
    of a step of attention, or of a stage. None: what `of_tokens` says.

    minutes: wall time for `run`, without what is measured before and after; it cuts the steps of all fits evenly (and
    gives up exact repeatability). The photos still go through every layer: with many of them that alone may take longer.
    """

    steps: int | None = None
    stage_steps: int | None = None
    minutes: float | None = None
    batch_size: int | None = None
    lr: float = 2e-3
    stage_lr: float = 1e-3
    keep_ratio: float = 0.25
    seed: int = 0
    dtype: str = "auto"  # of the fits' products; weights and streams are float32

    def of_tokens(self, tokens: int) -> tuple[int, int, int]:
        """steps, stage_steps and batch_size for photos of so many tokens.

        A fit passes over about `STEPS` times `TOKENS` of them, a stage over twice as many. Of larger photos, one of which
        is more than a step holds, a stage passes over as many, and attention is fitted to `TOKENS` of each.
        """
        batch = self.batch_size or max(1, TOKENS // tokens)
        steps = min(STEPS, -(-STEPS * TOKENS // (batch * tokens))) if self.steps is None else self.steps
        of_stage = 2 * steps if tokens <= TOKENS else steps
        return steps, of_stage if self.stage_steps is None else self.stage_steps, batch


class Calibration:
    """One run: `run()` fits a model in place and returns what it found.

    model: image encoder or classifier, big.LITTLE, warm-started from a dense checkpoint, in float32. inputs: preprocessed
    photos [3, S, S] on its device, with their true sizes (h, w). folder: the run's files. identity: what else must be
    the same when a run goes on. progress: called after every layer and stage with a line and the share of the whole
    that is done. note: called once, with an estimate.
    """

    def __init__(
        self,
        model: Staged,
        inputs: Callable[[int], tuple[torch.Tensor, tuple[int, int]]],
        count: int,
        settings: Settings,
        folder: Path,
        identity: str = "",
        progress: Callable[[str, float], None] = lambda text, done: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.inputs, self.count, self.settings = model, inputs, count, settings
        self.folder, self.progress, self.note = folder, progress, note
        self.held_out = np.arange(count)[HELD_OUT - 1 :: HELD_OUT] if count >= HELD_OUT else np.array([count - 1])
        self.fitted = np.setdiff1d(np.arange(count), self.held_out)
        folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            tokens = model.stem(inputs(0)[0][None])
        self.device = tokens.device
        self.streams = Streams(folder, count, tokens.shape[1:-1], tokens.shape[-1], self.device)
        self.steps, self.stage_steps, self.batch_size = settings.of_tokens(self.streams.tokens)
        self.sizes = [inputs(i)[1] for i in range(count)]
        self.ratios = sorted({*KEEP_RATIOS, settings.keep_ratio})
        self.blocks = {i: block for i, block in enumerate(self.model.blocks) if isinstance(block, RoutedBlock)}
        self.layers, self.stages = list(self.blocks), len(self.model.predictors)
        self.fits: dict[str, float] = {}
        self.through = False  # whether the dense stream has been made to its end
        self.branches = branches = sum(block.e_block is not None for block in self.blocks.values())
        weight = branches * (WEIGHTS["attention"] + WEIGHTS["feed_forward"])
        weight += self.stages * (WEIGHTS["predictor"] + (WEIGHTS["stage"] if branches else 0))
        self.descent = Descent(settings.minutes, weight, settings.dtype, self.device, tokens.shape[-1])
        decided: dict[str, Any] = {"steps": self.steps, "stage_steps": self.stage_steps, "batch_size": self.batch_size}
        decided["dtype"] = str(self.descent.dtype)  # "auto" may come to another elsewhere
        self.identity = json.dumps(asdict(settings) | decided) + identity

    # --- the three passes ---------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Fit, choose, correct; returns the fit of each branch, seconds, and whether the third pass was kept."""
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(self.device.type == "cpu", warn_only=True)
        try:
            return self._run()
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    def _run(self) -> dict[str, Any]:
        state = self._resume()
        if state["pass"] == 1:
            self._dense_pass(state["layer"])
            fitted = self._learnt()
            write_atomically(self.folder / "fitted.pt", lambda path: torch.save(fitted, path))
            state = self._save(3, 0, ())
        self.through = True
        fitted = torch.load(self.folder / "fitted.pt", weights_only=True)
        if state["pass"] == 3:
            if self.branches:  # without, there is nothing to correct
                self._correct(state["layer"])
            self._save(4, 0, ())
        corrected, ratio = self._learnt(), [self.settings.keep_ratio]
        cosines = {"corrected": self.cosines(ratio)[0]}
        self.model.load_state_dict(fitted, strict=False)
        cosines["fitted"] = self.cosines(ratio)[0]
        kept = cosines["corrected"] > cosines["fitted"]
        if kept:
            self.model.load_state_dict(corrected, strict=False)
        took = {"steps": self.steps, "seconds": self.descent.seconds}
        return {"explained": self.fits, "cosine": cosines, "correction_kept": kept} | took

    @torch.no_grad()
    def _dense_pass(self, start: int) -> None:
        """Passes 1 and 2 from layer `start` on, along the dense model's stream."""
        streams, model, config = self.streams, self.model, self.model.config
        if start == 0:
            streams.write("dense-0", lambda j: model.stem(self.inputs(j)[0][None]))
        for i in range(start, config.depth):
            block, before, after = model.blocks[i], f"dense-{i}", f"dense-{i + 1}"
            stage = config.stage_of(i)
            if not isinstance(block, RoutedBlock):
                self._write_through(block, before, after)
            else:
                began = time.perf_counter()
                self._fit_layer(i, block)
                self._report(i, began)
            if stage is not None and (i in config.predictor_layers or i == config.depth - 1):
                self._fit_predictor(stage, f"residual-{i + 1}")
            if i in config.predictor_layers or i == config.depth - 1:
                self._write_through(nn.Identity(), after, f"goal-{0 if stage is None else stage + 1}")
            if i in config.predictor_layers:
                streams.write(f"residual-{i + 1}", lambda j: torch.zeros(streams.places), channels=1)
            self._save(1, i + 1, (after, f"residual-{i + 1}"))

    def _write_through(self, layer: Callable[[torch.Tensor], torch.Tensor], source: str, name: str) -> None:
        """What a layer makes of one stream, as another."""
        self.streams.write(name, lambda j: layer(self.streams.read(source, j)))

    def _fit_layer(self, i: int, block: RoutedBlock) -> None:
        """Both E-branches of a layer, then the layer's dense output and what the branches leave unexplained."""
        streams, e, seed, tokens = self.streams, block.e_block, self.settings.seed, self.streams.tokens
        before, middle, after = f"dense-{i}", f"middle-{i}", f"dense-{i + 1}"

        starts = min(max(STARTS, START_ROWS // tokens), len(self.fitted))
        photos = self.fitted[:: -(-len(self.fitted) // starts)]

        streams.write("target", lambda j: block.attention(streams.read(before, j)))
        if e is not None:
            e.norm1.load_state_dict(block.norm1.state_dict())
            queries = block.prime(self._sample(photos, START_QUERIES if tokens > TOKENS else START_ROWS, [seed, 0, i]))
            start_attention(e.attn, block.attn, block.norm1(streams.read(before, photos)), queries)
            of_attention = [*e.norm1.parameters(), *e.attn.parameters()]
            self.fits[f"{i}.attention"] = self._fit_attention(block, e, of_attention, before, [seed, 1, i, 0])
        left = self._left_over(lambda j: None if e is None else e.attention(streams.read(before, j)))
        streams.write(middle, lambda j: streams.read(before, j) + streams.read("target", j))
        streams.write("target", lambda j: block.feed_forward(streams.read(middle, j)))
        if e is not None:
            e.norm2.load_state_dict(block.norm2.state_dict())
            queries = block.prime(self._sample(photos, START_ROWS, [seed, 4, i]))
            start_feed_forward(e, block, take(block.norm2(streams.read(middle, photos)).flatten(0, -2), queries))
            of_rows = [p for m in (e.norm2, e.entry, e.mlp, e.exit) for p in m.parameters()]
            self.fits[f"{i}.feed_forward"] = self._fit_rows(e, of_rows, middle, [seed, 1, i, 1])
        more = self._left_over(lambda j: None if e is None else e.feed_forward(streams.read(middle, j)))
        streams.write(
            f"residual-{i + 1}", lambda j: streams.read(f"residual-{i}", j)[0, ..., 0] + left[j] + more[j], channels=1
        )
        streams.write(after, lambda j: streams.read(middle, j) + streams.read("target", j))

    def _sample(self, photos: np.ndarray, count: int, seed: list[int]) -> Stage:
        """So many tokens of photos at random, the same share of every window's; all, if they are not more.

        As prime ones of a stage, whose queries are None for all.
        """
        order = np.random.default_rng(seed).random((len(photos), *self.streams.places), np.float32)
        places = torch.from_numpy(order).to(self.device)
        return self.model.choose(places, places, count / places.numel())

    def _left_over(self, branch: Callable[[int], torch.Tensor | None]) -> list[torch.Tensor]:
        """Squared distance between target and branch for every token of every photo: [*T] each."""
        found = []
        for j in range(self.count):
            target, d_e = self.streams.read("target", j), branch(j)
            distance = target if d_e is None else target - d_e.view(target.shape)
            found.append(distance.square().sum(-1)[0])
        return found

    @torch.enable_grad()
    def _fit_predictor(self, stage: int, residual: str) -> None:
        """The stage's predictor, to the tokens of each window on which the E-branches are worst."""
        predictor, keep = self.model.predictors[stage], self.settings.keep_ratio
        assert isinstance(predictor, ImportancePredictor)
        of_labels, of_real = [], []
        for j in self.fitted:
            left = self.streams.read(residual, j)[..., 0]
            of_labels.append(self.model.choose(left, left, keep, [self.sizes[j]]).mask.flatten().cpu())
            of_real.append(self.model.asked(torch.tensor([self.sizes[j]])).flatten())
        labels, real = torch.cat(of_labels), torch.cat(of_real)
        tokens = self.streams.tokens
        places = (torch.as_tensor(self.fitted)[:, None] * tokens + torch.arange(tokens)).flatten()[real].numpy()
        labels = labels[real].to(self.device)
        rng = np.random.default_rng([self.settings.seed, 2, stage])
        weight = torch.tensor([keep, 1 - keep], device=labels.device)  # as if both classes were equally frequent

        def loss(step: int) -> torch.Tensor:
            chosen = rng.integers(len(places), size=2 * TOKENS)
            x = self.streams.rows(f"goal-{stage}", places[chosen])
            with torch.autocast(x.device.type, enabled=False):  # float32, as the predictor itself
                return F.cross_entropy(predictor.linear(predictor.norm(x)), labels[chosen].long(), weight)

        self.descent.fit(list(predictor.parameters()), loss, self.steps, self.settings.lr, WEIGHTS["predictor"])

    # --- the third pass -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _correct(self, start: int) -> None:
        """The student's stream stage by stage from `start` on: its E-branches learn to come out where the dense does."""
        if start == 0:
            self._write_through(nn.Identity(), "goal-0", "student-0")
        for number in range(start, self.stages):
            began = time.perf_counter()
            loss = self._fit_stage(number)
            self._write_routed(number)
            self.progress(
                f"pass 3, stage {number}: error {loss:.4f}, {time.perf_counter() - began:.1f} s",
                0.5 + (number + 1) / self.stages / 2,
            )
            self._save(3, number + 1, (f"student-{number + 1}",))

    def _write_routed(self, number: int) -> None:
        """The student's stream after a stage."""
        read, keep = self.streams.read, self.settings.keep_ratio
        self.streams.write(
            f"student-{number + 1}",
            lambda j: self._routed(read(f"student-{number}", j), number, [self.sizes[j]], keep),
        )

    def _routed(self, x: torch.Tensor, number: int, sizes: list[tuple[int, int]], keep_ratio: float) -> torch.Tensor:
        """A stage of the student, routed by its own predictor on the stream where the stage begins."""
        with torch.no_grad():
            scores = self.model.scores(number, x)
        return self.model.run_stage(x, number, self.model.choose(scores, scores, keep_ratio, sizes))

    @torch.enable_grad()
    def _fit_stage(self, number: int) -> float:
        """The E-branches of a stage together; the mean loss in the end."""
        layers = self.model.config.layers_of(number)
        branches = [self.blocks[i].e_block for i in layers]
        parameters = [p for e in branches if e is not None for p in e.parameters()]
        last = layers[-1] == self.model.config.depth - 1

        def loss(step: int) -> torch.Tensor:
            rng = np.random.default_rng([self.settings.seed, 3, number, step])
            photos = self._draw(rng)
            sizes = [self.sizes[j] for j in photos]
            start = self.streams.read(f"student-{number}", photos)
            goal = self.streams.read(f"goal-{number + 1}", photos)
            x = self._routed(start, number, sizes, self.ratios[rng.integers(len(self.ratios))])
            if last:
                return cosine_distance(self.model.compared(x), self.model.compared(goal))[self._real(sizes)].mean()
            return (x - goal).square().sum() / (goal - start).square().sum()

        return self.descent.fit(parameters, loss, self.stage_steps, self.settings.stage_lr, WEIGHTS["stage"])

    # --- fitting one branch -------------------------------------------------------------------------------------

    @torch.enable_grad()
    def _fit_attention(self, block: RoutedBlock, e: EBlock, parameters: list, source: str, seed: list[int]) -> float:
        """An E-branch's attention to "target", for tokens of whole photos; the share that it explains in the end."""

        def loss(step: int) -> torch.Tensor:
            photos = self._draw(np.random.default_rng([*seed, step]))
            queries = block.prime(self._sample(photos, TOKENS, [*seed, step, 1]))
            target = take(self.streams.read("target", photos).flatten(0, -2), queries)
            d_e = e.attention(self.streams.read(source, photos), queries).flatten(0, -2)
            return (d_e - target).square().sum() / target.square().sum()

        return 1 - self.descent.fit(parameters, loss, self.steps, self.settings.lr, WEIGHTS["attention"])

    @torch.enable_grad()
    def _fit_rows(self, e: EBlock, parameters: list, source: str, seed: list[int]) -> float:
        """An E-branch's feed-forward part to "target", on tokens drawn from all photos; the share it explains."""
        tokens = self.streams.tokens
        places = (self.fitted[:, None] * tokens + np.arange(tokens)).reshape(-1)

        def loss(step: int) -> torch.Tensor:
            chosen = np.sort(places[np.random.default_rng([*seed, step]).integers(len(places), size=TOKENS)])
            target = self.streams.rows("target", chosen)
            return (e.feed_forward(self.streams.rows(source, chosen)) - target).square().sum() / target.square().sum()

        return 1 - self.descent.fit(parameters, loss, self.steps, self.settings.lr, WEIGHTS["feed_forward"])

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """Photos of one step."""
        return np.sort(rng.choice(self.fitted, min(self.batch_size, len(self.fitted)), replace=False))

    # --- ends, state, report ------------------------------------------------------------------------------------

    def _real(self, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The cells of what is compared that are not wholly in the padding."""
        return self.model.real_cells(torch.tensor(sizes, device=self.device))

    def _dense(self, image: torch.Tensor) -> torch.Tensor:
        """What the dense model makes of an image [3, S, S]."""
        x = self.model.stem(image[None])
        for number in (None, *range(self.stages)):
            x = self.model.run_stage(x, number)
        return self.model.compared(x)

    @torch.no_grad()
    def cosines(self, keep_ratios: Sequence[float]) -> list[float]:
        """For each keep ratio the mean cosine of held-out photos to the dense model's, over real cells."""
        found = []
        for j in self.held_out:
            x, size = self.inputs(j)
            real = self._real([size])
            dense = (
                self.model.compared(self.streams.read(f"goal-{self.stages}", j)) if self.through else self._dense(x)
            )
            ours = [self.model.compared(self.model.run(x[None], k, [size], None)[0]) for k in keep_ratios]
            found.append([1 - cosine_distance(one, dense)[real].mean().item() for one in ours])
        return np.mean(found, axis=0).tolist()

    def _learnt(self) -> dict[str, torch.Tensor]:
        """What calibration changes, copied."""
        state = self.model.state_dict()
        return {
            k: v.detach().cpu().clone() for k, v in state.items() if ".e_block." in k or k.startswith("predictors")
        }

    def _save(self, number: int, layer: int, streams: Sequence[str]) -> dict[str, Any]:
        state = {"pass": number, "layer": layer, "identity": self.identity, "fits": self.fits}
        state |= {"weight_done": self.descent.done, "seconds": self.descent.seconds, "learnt": self._learnt()}
        write_atomically(self.folder / "state.pt", lambda path: torch.save(state, path))
        goals = range(layer if number == 3 else 0, self.stages + 1)  # where stages begin and end, still to be needed
        self.streams.keep_only([*streams, *(f"goal-{n}" for n in goals)])
        return state

    def _resume(self) -> dict[str, Any]:
        """Where an earlier run with these settings stopped, its weights loaded; else the beginning."""
        path = self.folder / "state.pt"
        if not path.is_file():
            self.descent.start(0, 0.0)
            return {"pass": 1, "layer": 0}
        state = torch.load(path, weights_only=True)
        if state["identity"] != self.identity:
            raise ValueError(
                f"{self.folder} holds a run with other settings, weights or photos; remove it to begin anew"
            )
        self.model.load_state_dict(state["learnt"], strict=False)
        self.fits = state["fits"]
        self.descent.start(state["weight_done"], state["seconds"])
        return state

    def _report(self, layer: int, began: float) -> None:
        done = (self.layers.index(layer) + 1) / len(self.layers) / 2
        fits = [f"{name.split('.')[1]} {fit:.3f}" for name, fit in self.fits.items() if name.startswith(f"{layer}.")]
        seconds = time.perf_counter() - began
        self.progress(", ".join([f"pass 1, layer {layer}", *fits, f"{seconds:.1f} s"]), done)
        if layer == next((i for i, block in self.blocks.items() if block.e_block is not None), self.layers[0]):
            self.note(self._estimate(layer, seconds))

    def _estimate(self, first: int, seconds: float) -> str:
        """How long the whole run takes, from the seconds of the first layer with an E-branch."""
        x, in_stages = self.streams.read(f"dense-{first}", 0), self.stage_steps * self.batch_size
        minutes = minutes_in_all(self.blocks, x, first, seconds, self.descent.dtype, in_stages, self.count)
        if self.settings.minutes is None or minutes <= self.settings.minutes:
            return f"about {minutes:.0f} minutes in all"
        return f"about {minutes:.0f} minutes without the limit of {self.settings.minutes:g}: fewer steps of every fit"
