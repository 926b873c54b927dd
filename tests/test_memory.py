"""The command's allocator: chosen once, by every command, not over another choice, and it keeps what is freed."""

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from blsam import memory
from blsam.__main__ import start

pytestmark = pytest.mark.skipif(not memory.can_choose(), reason="the allocator is chosen where it is a new glibc's")
PROGRAM = """
import json, os, resource, sys
from blsam.memory import keep_memory
{call}
for i in range(20):
    bytes([i]) * 2**26
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(json.dumps([sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), faults]))
"""
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def bare(monkeypatch):
    """An environment that says nothing of allocators."""
    for name in [name for name in os.environ if name.startswith((memory.STARTED, *memory.CHOSEN))]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def started(bare):
    """What programs were started in this one's place."""
    found = []
    bare.setattr(os, "execve", lambda *args: found.append(args))
    return found


def run(call):
    """Arguments, tunables and page faults that a program saw which frees 64 MB twenty times."""
    command = [sys.executable, "-c", PROGRAM.format(call=call), "one", "a b"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = done.stdout.splitlines()  # what comes after the new start is said once
    return json.loads(line)


def test_what_is_freed_is_kept(bare):
    if LARGE_PAGES.is_file() and "[always]" in LARGE_PAGES.read_text():
        pytest.skip("all memory comes in large pages here")
    arguments, tunables, faults = run("keep_memory()")
    assert arguments == ["one", "a b"] and "glibc.malloc.trim_threshold=4294967296" in tunables
    _, nothing, before = run("")
    assert nothing is None and before - faults > 14 * 2**26 / resource.getpagesize(), (before, faults)


def test_every_command_is_started_again(started):
    with pytest.raises(SystemExit):
        start(["models", "--help"])
    ((program, arguments, environment),) = started
    assert program == sys.executable and arguments[1:] == sys.orig_argv[1:]
    assert "hugetlb=1" in environment["GLIBC_TUNABLES"] and "GLIBC_TUNABLES" not in os.environ


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_ARENA_MAX", memory.STARTED])
def test_an_allocator_that_is_chosen_stays(name, started, monkeypatch):
    monkeypatch.setenv(name, "")
    memory.keep_memory()
    assert not started


@pytest.mark.parametrize("found", [("glibc", "2.34"), ("glibc", "2.4"), ("", "")])
def test_an_old_glibc_is_left_alone(found, started, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: found)
    memory.keep_memory()
    assert not started


def test_a_debugger_keeps_its_process(started, monkeypatch):
    monkeypatch.setattr(sys, "gettrace", lambda: lambda *_: None)
    memory.keep_memory()
    assert not started


def test_where_nothing_may_be_started_it_goes_on(bare):
    def forbidden(*_):
        raise PermissionError

    bare.setattr(os, "execve", forbidden)
    memory.keep_memory()
    assert "GLIBC_TUNABLES" not in os.environ
