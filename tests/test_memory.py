"""The command's allocator: chosen once, not over another choice, and it keeps what is freed."""

import json
import os
import platform
import subprocess
import sys

import pytest

from blsam.memory import CHOSEN

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the allocator is chosen where it is glibc's"
)
PROGRAM = """
import json, os, resource, sys
import torch
from blsam.memory import keep_memory
{call}
for _ in range(20):
    torch.ones(2**24)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(json.dumps([sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), faults]))
"""


def run(call, **environment):
    """Arguments, tunables and page faults that a program saw which frees 64 MB twenty times."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(CHOSEN)}
    command = [sys.executable, "-c", PROGRAM.format(call=call), "one", "a b"]
    done = subprocess.run(command, env=bare | environment, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = done.stdout.splitlines()  # what comes after the new start is said once
    return json.loads(line)


def test_what_is_freed_is_kept():
    arguments, tunables, faults = run("keep_memory()")
    assert arguments == ["one", "a b"] and "glibc.malloc.trim_threshold=4294967296" in tunables
    _, nothing, before = run("")
    assert nothing is None and before - faults > 14 * 2**26 / 2**12, (before, faults)  # pages of 4 KB


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_ARENA_MAX"])
def test_an_allocator_that_is_chosen_stays(name):
    value = {"GLIBC_TUNABLES": "glibc.malloc.perturb=0", "LD_PRELOAD": "", "MALLOC_ARENA_MAX": "2"}[name]
    assert run("keep_memory()", **{name: value})[1] == (value if name == "GLIBC_TUNABLES" else None)
