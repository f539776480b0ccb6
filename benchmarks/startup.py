"""The time of `puna VERB --help`, which imports no torch, beside that of importing torch. Medians over fresh processes.

python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from puna.commands import VERBS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=7)


def seconds(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    rounds = parser.parse_args().rounds
    commands = {f"puna {verb} --help": ("-m", "puna", *verb.split(), "--help") for verb in VERBS}
    commands = {"python": ("-c", ""), "puna --help": ("-m", "puna", "--help"), **commands}
    commands["import torch"] = ("-c", "import torch")
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):  # interleaved, so that a busy machine slows all of them alike
        for name, words in commands.items():
            times[name].append(seconds(*words))
    for name, measured in times.items():
        print(f"{name:<32}{1e3 * statistics.median(measured):6.0f} ms")


if __name__ == "__main__":
    main()
