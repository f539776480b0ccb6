"""Python processes as the ranks of one group, for tests."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

SECONDS = 240  # after which a launch counts as hanging; on a machine that is not overrun it takes five


@dataclass
class Ended:
    code: int
    out: str
    err: str


def launch(size, *argv):
    """Runs python with `argv` as `size` ranks, as torchrun would; but nobody ends the others when one has ended."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "PYTHONFAULTHANDLER": 1}
        # The folders of tests that import one another's helpers.
        place["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        variables = os.environ | {key: str(value) for key, value in place.items()}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen([sys.executable, *map(str, argv)], env=variables, **pipes))
    end = time.monotonic() + SECONDS
    outputs, hung = [], []
    for number, rank in enumerate(ranks):
        try:
            outputs.append(rank.communicate(timeout=max(0.1, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            hung.append(number)
            rank.send_signal(signal.SIGABRT)  # shows where it is
            outputs.append(rank.communicate())
    ended = [Ended(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]
    assert not hung, f"ranks {hung} did not end: {ended}"
    return ended
