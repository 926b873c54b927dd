"""The evaluation programs as users start them."""

import os
import subprocess
import sys

from tests.helpers import ROOT


def script(name, *arguments, processes=None, threads=1, **more):
    """A script as users start it, on two COCO or LVIS photos a process."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "29511"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **more)


def unspeedy(text):
    """The table without the line on speed."""
    return [line for line in text.splitlines() if not line.startswith("images a second")]
