"""Runs of a test's own program, in one process, in several under torchrun, and killed again and again; a full disk."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLS = 10


def run_program(program: Path, *arguments, processes: int = 1, killed: bool = False) -> str:
    """What the program prints, run on one thread of the CPU; ``killed``: it is to end by being killed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(program), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == killed, done.stderr[-3000:]
    return done.stdout


def kill_repeatedly(
    run: Callable[[], None],
    progress: Callable[[], Any],
    step: Callable[[], int],
    *,
    seed: int,
    early: int,
    longest: float,
) -> None:
    """Start ``run`` in a child and kill it by SIGKILL, ten times; prints what each kill left.

    Children are forked, so that everything is imported once; each is a process like any other.

    Args:
        progress: something that changes with every state that the run has written.
        step: how far the last such state is.
        seed: of the moments.
        early: so many kills may come at any time; the others come after the run has written something.
        longest: seconds to wait from there on, at most; the run's next state ends the wait too. A kill so costs
            two states at the most, and a run of more than twice as many states as kills is not over before them.
    """
    from matplotlib.figure import Figure

    Figure().savefig(os.devnull, format="png")  # finds its fonts before the first fork
    draw = random.Random(seed)
    for kill in range(KILLS):
        child = os.fork()
        if child == 0:
            try:
                run()
            finally:
                os._exit(0)
        before = progress()
        while kill >= early and progress() == before:
            if os.waitpid(child, os.WNOHANG)[0]:
                sys.exit("the run ended before it was killed")
            time.sleep(0.002)
        seen, deadline = progress(), time.monotonic() + draw.uniform(0, longest)
        while progress() == seen and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(f"killed={os.waitstatus_to_exitcode(status) == -signal.SIGKILL} step={step()}", flush=True)


@contextlib.contextmanager
def file_limit(size):
    """Within the ``with``, no file of this process grows beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
