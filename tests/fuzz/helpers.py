"""Properties tried on generated input: a few cases in every run, as many as the time allows in the slow one.

    BLSAM_FUZZ_SECONDS=600 python -m pytest -m slow tests/fuzz -k checkpoint

says how many cases were tried. A case that hangs ends the process with its traceback.
"""

import copy
import faulthandler
import io
import os
import time
import warnings
from contextlib import contextmanager, redirect_stderr

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("BLSAM_FUZZ_SECONDS", 60))
LONGEST = 60  # seconds a case may take before it is taken for one that hangs, on a busy machine
ROUND = 100  # cases between two looks at the clock

COMMON = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@contextmanager
def within_time():
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def few(check, strategy, count):
    """`check(case)` on `count` cases, the same ones in every run."""

    @seed(0)
    @settings(COMMON, max_examples=count)
    @given(strategy)
    def run(case):
        with within_time():
            check(case)

    run()


def many(check, strategy, name, seconds=SECONDS):
    """`check(case)` on other cases every time until the time is over; how many there were is printed."""
    tried, start, first = 0, time.monotonic(), int.from_bytes(os.urandom(4), "big")

    def run(case):
        nonlocal tried
        tried += 1
        with within_time():
            check(case)

    rounds = 0
    while time.monotonic() < start + seconds:
        seed(first + rounds)(settings(COMMON, max_examples=ROUND)(given(strategy)(run)))()
        rounds += 1
    print(f"\n{name}: {tried} cases in {time.monotonic() - start:.0f} s", flush=True)


def outcome(call, *allowed):
    """What a reader returns, or None where it raises one of the errors promised, in one line."""
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # what was left out
            warnings.simplefilter("ignore")
            return call()
    except allowed as error:
        text = str(error)
        assert text and len(text.splitlines()) == 1 and len(text) < 1500, f"not one line: {text!r}"
        return None


# --- bytes -----------------------------------------------------------------------------------------------------------

PLACE = st.floats(0, 1, exclude_max=True)  # along a file, whatever its length
DAMAGE = st.one_of(
    st.tuples(st.just("set"), PLACE, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACE, st.none()),
    st.tuples(st.just("drop"), PLACE, st.integers(1, 64)),
    st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=32)),
    st.tuples(st.just("repeat"), PLACE, st.integers(1, 512)),
)


def damaged(data, damages):
    """Bytes with a list of damages done to them."""
    data = bytearray(data)
    for kind, place, how in damages:
        at = int(place * len(data))
        if kind == "set":
            data[at : at + len(how)] = how
        elif kind == "flip" and data:
            data[at] ^= 1 << how
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + how]
        elif kind == "insert":
            data[at:at] = how
        elif kind == "repeat":
            data[at:at] = data[at : at + how]
    return bytes(data)


def damaged_files(files):
    """(name, bytes) of one of {name: bytes} with up to four damages."""
    return st.tuples(st.sampled_from(sorted(files)), st.lists(DAMAGE, max_size=4)).map(
        lambda case: (case[0], damaged(files[case[0]], case[1]))
    )


# --- json ------------------------------------------------------------------------------------------------------------

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([2**31, 2**63, 10**30, -1, 0, 1e308, -1e308, 1e9, float("nan"), float("inf"), 0.5, 1e-300, -0.0]),
    st.floats(),
    st.sampled_from(["", "0", "1", "a", "NaN", "\0", "../x", "1.png", "\ud800", "a" * 300, "52203", "`0"]),
    st.text(max_size=8),
    st.sampled_from(
        [[], {}, [[]], [None], [[1, 2], [3, 4]], [1, 1, 3, 1, 3, 3], [[1, 1, 3, 1, 3, 3]], [16], [5, 2, 9]]
    ),
    st.recursive(
        st.one_of(st.none(), st.integers(-5, 5), st.floats(), st.text(max_size=3)),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
)
CHANGE = st.tuples(st.sampled_from(["replace", "replace", "replace", "delete", "double"]), st.integers(0, 10**6), ODD)


def places(content):
    """Every (container, key) of a json content, the outermost excluded."""
    found, todo = [], [content]
    while todo:
        one = todo.pop()
        for key in list(one) if isinstance(one, dict) else range(len(one)):
            found.append((one, key))
            if isinstance(one[key], (dict, list)):
                todo.append(one[key])
    return found


def changed(content, changes):
    """A copy of a json content with some of its values replaced, removed or doubled, wherever they are."""
    content = copy.deepcopy(content)
    for kind, number, value in changes:
        if not isinstance(content, (dict, list)) or not (found := places(content)):
            break
        container, key = found[number % len(found)]
        if kind == "delete":
            del container[key]
        elif kind == "double" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(value)
    return content


def changed_json(content):
    """The content with one to five changes."""
    return st.lists(CHANGE, min_size=1, max_size=5).map(lambda changes: changed(content, changes))
