"""Memory of a CPU's passes is kept for the next ones, in large pages.

glibc gives large blocks back to the system when torch frees them and takes them anew for the next tensor, in pages of 4
KB that the system fills with zeros one by one: about a hundred thousand of them in a pass of ViT-B, a tenth of its time. An
allocator is chosen when a process starts, so that the command starts itself again, once, with the choice in its
environment. A program that embeds this package is left alone: docs/speed.md says what it can set.
"""

from __future__ import annotations

import os
import platform
import sys

TUNABLES = {
    "arena_max": 1,  # one heap for all threads: others than the first thread's are cut into pieces of 64 MB
    "hugetlb": 1,  # ask for pages of 2 MB
    "mmap_threshold": 2**30,  # bytes of a block from which it is given back as soon as it is free
    "trim_threshold": 2**32,  # free bytes at the end of the heap from which the end is given back
}
SINCE = 2, 35  # the glibc that takes these values; an older one would map every block of 128 KB anew
CHOSEN = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_")  # how whoever starts the process says what allocator it has
STARTED = "BLSAM_STARTED_AGAIN"


def keep_memory() -> None:
    """Start this process again with `TUNABLES`, once; nothing where an allocator is chosen already, or cannot be."""
    if not can_choose() or any(name.startswith((STARTED, *CHOSEN)) for name in os.environ):
        return
    tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())
    try:
        environment = {**os.environ, "GLIBC_TUNABLES": tunables, STARTED: "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        return  # where starting programs is forbidden, it is slower


def can_choose() -> bool:
    """Whether this is a process of a new enough glibc that can be started again without anybody losing anything."""
    debugged = sys.gettrace() is not None  # it would forget its breakpoints
    if sys.platform != "linux" or not sys.executable or debugged:
        return False
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= SINCE
