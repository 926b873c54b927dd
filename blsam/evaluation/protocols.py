"""The rules under which prompted masks are measured; figures made under different rules cannot be compared.

`paper`: as EfficientSAM's table (arXiv 2312.00863, section 4.3), whose columns the method's paper has. `efficientvit`:
as EfficientViT-SAM's evaluator (arXiv 2402.05008). `sam`: as the SAM paper (arXiv 2304.02643, appendix D.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.annotations import Target
from ..data.prompts import Click, centre_point, error_click, random_points, ritm_click

SAMPLINGS = ("random", "center")
SELECTIONS = ("score", "oracle")


@dataclass(frozen=True)
class Protocol:
    """Where points go, which masks are asked for and chosen, which annotations count.

    sampling: the first point, "random" in the mask or its "center". later: where the further ones go: "drawn" at once
    with the first, by RITM's clicker ("ritm"), or farthest inside the "error" region. single_mask: "never" (three
    candidates), "later" (from the second prompt on) or "always". select: of three masks the most confident ("score")
    or the best by true IoU ("oracle"). feedback: give the previous logits back with the next click. crowd: whether
    crowd annotations count. min_area: annotations below it, in pixels, do not.
    """

    name: str
    sampling: str = "random"
    later: str = "drawn"
    single_mask: str = "never"
    select: str = "score"
    feedback: bool = False
    crowd: bool = False
    min_area: float = 0

    def __post_init__(self) -> None:
        if self.sampling == "center" and self.later == "drawn":  # a mask has one centre: the rest must answer errors
            object.__setattr__(self, "later", "ritm")

    def asks_three(self, round_number: int) -> bool:
        """Whether the prompt of this round, from 0, asks for three masks."""
        return self.single_mask == "never" or (self.single_mask == "later" and round_number == 0)

    @property
    def drawn_at_once(self) -> bool:
        """All points in one prompt, instead of one more in every round."""
        return self.later == "drawn"

    def next_clicks(
        self,
        target: Target,
        mask: np.ndarray,
        prediction: np.ndarray | None,
        earlier: list[Click],
        total: int,
        seed: int,
    ) -> list[Click]:
        """The new clicks of a round on an object, of `total` in all; none if there is nothing left to correct."""
        if not earlier:
            if self.sampling == "center":
                return [centre_point(mask)]
            return random_points(mask, total if self.drawn_at_once else 1, seed, target.id)
        assert prediction is not None  # there is one as soon as there are clicks
        if self.later == "ritm":
            return [ritm_click(mask, prediction, earlier)]
        click = error_click(mask, prediction)
        return [] if click is None else [click]

    def rules(self, prompt: str, num_points: int) -> str:
        """The rules in one line, for the head of a table."""
        first = {"random": "uniform in the mask", "center": "centre of the mask"}[self.sampling]
        later = {"drawn": "drawn at once", "ritm": "then RITM clicks on the error", "error": "then farthest error"}
        clicks = "true box" if prompt == "box" else f"{num_points} point{'s' * (num_points > 1)} ({first}"
        if prompt == "point":
            clicks += (f", {later[self.later]}" if num_points > 1 else "") + ")"
        masks = {"never": "3 masks", "later": "3 masks, 1 from the second prompt on", "always": "1 mask"}
        chosen = {"score": "most confident", "oracle": "best by true IoU"}[self.select]
        parts = [clicks, masks[self.single_mask] + (f", {chosen}" if self.single_mask != "always" else "")]
        if self.feedback and prompt == "point" and num_points > 1:
            parts.append("logits fed back")
        if self.min_area:
            parts.append(f"areas below {self.min_area:g} left out")
        return "; ".join([*parts, f"crowd {'included' if self.crowd else 'left out'}"])


PROTOCOLS = {
    "paper": Protocol("paper"),
    "efficientvit": Protocol("efficientvit", "center", "ritm", crowd=True, min_area=1),
    "sam": Protocol("sam", "center", "error", "later", feedback=True),
}
