"""What the rules of each protocol ask the decoder for."""

from blsam.data.prompts import centre_point
from blsam.decoding import decode
from blsam.evaluation.prompted import (
    predict_objects,
)
from blsam.evaluation.protocols import PROTOCOLS, Protocol


def calls(predictor, targets, protocol, prompt, num_points, monkeypatch):
    """What `predict_objects` asks the decoder for: (points an object, labels of the first, logits?, three?)."""
    seen = []

    def spy(predictor, *, points=None, boxes=None, logits=None, three=True):
        labels = [p[2] for p in points[0]] if points else "box"
        seen.append((len(points[0]) if points else 0, labels, logits is not None, three))
        return decode(predictor, points=points, boxes=boxes, logits=logits, three=three)

    monkeypatch.setattr("blsam.evaluation.prompted.decode", spy)
    return seen, predict_objects(predictor, targets, protocol, prompt, num_points, seed=0)


def test_rules_of_the_protocols(predictor, targets, monkeypatch):
    seen, rows = calls(predictor, targets, PROTOCOLS["paper"], "point", 3, monkeypatch)
    assert seen == [(3, [1, 1, 1], False, True)]
    for row, target in zip(rows, targets):
        assert all(target.mask[int(y), int(x)] for x, y, _ in row["points"])
    seen, rows = calls(predictor, targets, PROTOCOLS["efficientvit"], "point", 3, monkeypatch)
    assert [(n, logits, three) for n, _, logits, three in seen] == [(n, False, True) for n in (1, 2, 3)]
    assert tuple(rows[0]["points"][0]) == centre_point(targets[0].mask)
    seen, rows = calls(predictor, targets, PROTOCOLS["sam"], "point", 3, monkeypatch)
    assert [(n, logits, three) for n, _, logits, three in seen] == [
        (1, False, True),
        (2, True, False),
        (3, True, False),
    ]
    for row, target in zip(rows, targets):
        assert all(label == target.mask[int(y), int(x)] for x, y, label in row["points"])
    seen, _ = calls(predictor, targets, PROTOCOLS["paper"], "box", 1, monkeypatch)
    assert seen == [(0, "box", False, True)]
    single = Protocol("paper", single_mask="always")
    assert calls(predictor, targets, single, "box", 1, monkeypatch)[0] == [(0, "box", False, False)]


def test_heads_state_every_rule():
    assert PROTOCOLS["paper"].rules("point", 3) == (
        "3 points (uniform in the mask, drawn at once); 3 masks, most confident; crowd left out"
    )
    assert PROTOCOLS["sam"].rules("point", 2) == (
        "2 points (centre of the mask, then farthest error); 3 masks, 1 from the second prompt on, most confident; "
        "logits fed back; crowd left out"
    )
    assert (
        PROTOCOLS["efficientvit"].rules("box", 1)
        == "true box; 3 masks, most confident; areas below 1 left out; crowd included"
    )
