"""Memory of a CPU's passes is kept for the next ones, in large pages.

glibc gives large blocks back to the system when torch frees them and takes them anew for the next tensor, in pages of 4
KB that the system fills with zeros one by one: a million of them in a pass of ViT-B in float32, a tenth of its time. An
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
    "mmap_threshold": 2**30,  # bytes from which a block is the system's own again when it is free
    "trim_threshold": 2**32,  # bytes at the end of the heap from which they are
}
CHOSEN = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_")  # how whoever starts the process says what allocator it has


def keep_memory() -> None:
    """Start this process again with `TUNABLES`, once; nothing without glibc, or where an allocator is chosen already."""
    chosen = any(name.startswith(CHOSEN) for name in os.environ)
    if chosen or sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or not sys.executable:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
