"""Two changes to a SAM's mask decoder that need no training, in any of its checkpoints.

    python -m scripts.studies.edit_decoder single vit_t_fine.safetensors --below 0.03 -o changed.safetensors
    python -m scripts.studies.edit_decoder from vit_t_fine.safetensors blsam_vit_t_fine.safetensors -o changed.safetensors

`single`: of the three masks of an ambiguous prompt the second becomes a copy of the one that is answered where a single
mask is wanted. Of the three the best alone learns, and in `vit_t_fine` each was worse than the single one, also where the
prompt leaves no doubt. `--below` lowers the third mask's score, so that it is not taken where the two are as good as
equal. The other masks change a little too, since the decoder's tokens look at each other.

`from`: the decoder of the first checkpoint with the encoders of the second.
"""

from __future__ import annotations

import sys
from pathlib import Path

from blsam.checkpoint import State, read, save
from blsam.options import Parser, UsageError, check_output, exit_status

DECODER = "mask_decoder."
SINGLE, SECOND, THIRD = 0, 2, 3  # of the decoder's four mask tokens


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    paths = {"decoder": "whose decoder is taken", "checkpoint": "to be changed; stays as it is"}
    for name, inputs in (("single", ("checkpoint",)), ("from", ("decoder", "checkpoint"))):
        one = what.add_parser(name)
        for path in inputs:
            one.add_argument(path, type=Path, metavar=path.upper(), help=paths[path])
        one.add_argument("-o", "--output", type=Path, required=True)
        if name == "single":
            one.add_argument(
                "--below", type=float, default=0.0, metavar="IOU", help="lower the third's score by so much"
            )
    args = parser.parse_args(argv)
    check_output("-o", args.output, taken=[args.checkpoint, getattr(args, "decoder", None)])
    if args.what == "single" and not 0 <= args.below <= 1:
        raise UsageError("--below lies in [0, 1]")
    state, metadata = decoded(args.checkpoint)
    if args.what == "single":
        changed = with_single_as_second(state, args.below)
    else:
        changed = with_decoder(state, decoded(args.decoder)[0])
    save(args.output, changed, metadata)
    return 0


def decoded(path: Path) -> tuple[State, dict[str, str]]:
    """A checkpoint with a mask decoder; UsageError if it has none of SAM's shape."""
    state, metadata = read(path)
    needed = [f"{DECODER}{name}" for name in ("mask_tokens.weight", "iou_prediction_head.layers.0.weight")]
    if any(key not in state for key in needed) or len(state[needed[0]]) != 4:
        raise UsageError(f"{path} has no mask decoder with four masks, as SAM's")
    return state, metadata


def with_single_as_second(state: State, below: float = 0.0) -> State:
    """Token, hypernetwork and score of the single mask in the place of the second of three, and the third's score lower by
    `below`."""
    changed = dict(state)
    second, single = (f"{DECODER}output_hypernetworks_mlps.{i}." for i in (SECOND, SINGLE))
    changed |= {second + key[len(single) :]: value.clone() for key, value in state.items() if key.startswith(single)}
    last = max(key for key in state if key.startswith(f"{DECODER}iou_prediction_head.layers."))  # one row a mask
    last = last[: last.rindex(".")]
    for key in (f"{DECODER}mask_tokens.weight", f"{last}.weight", f"{last}.bias"):
        changed[key] = state[key].clone()
        changed[key][SECOND] = state[key][SINGLE]
    changed[f"{last}.bias"][THIRD] -= below
    return changed


def with_decoder(state: State, other: State) -> State:
    """All of `state` but its decoder, which is the other's; UsageError where their shapes differ."""
    theirs = {key: value for key, value in other.items() if key.startswith(DECODER)}
    if {k: v.shape for k, v in theirs.items()} != {k: v.shape for k, v in state.items() if k.startswith(DECODER)}:
        raise UsageError("the two checkpoints have decoders of different shapes")
    return {**state, **theirs}


if __name__ == "__main__":
    sys.exit(exit_status("edit_decoder", main))
