"""What a call to a backend in an environment of its own costs: `logits` over 512 tokens, remote against in-process.

python docs/examples/remote.py BACKEND CHECKPOINT [--calls 25]

Needs `polyquant env create BACKEND`. The same checkpoint is loaded twice on CPU: by a worker of this process, and by a
second process of that environment, which times its own calls. They take turns, so that a machine's moods meet both.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import polyquant
from polyquant.isolated.remote import RemoteBackend

TOKENS = range(1000, 1512)
IN_PROCESS = f"""
import hashlib, sys, time, polyquant
loaded = polyquant.load(sys.argv[2], sys.argv[1], device="cpu")
logits = None
for line in sys.stdin:
    started = time.perf_counter()
    logits = loaded.logits({TOKENS})
    print(time.perf_counter() - started, flush=True)
print(hashlib.sha256(logits.numpy()).hexdigest())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend")
    parser.add_argument("checkpoint")
    parser.add_argument("--calls", type=int, default=25)
    arguments = parser.parse_args()
    handle = polyquant.backend(arguments.backend)
    if not isinstance(handle, RemoteBackend):
        parser.error(f"{arguments.backend} runs in this environment")
    loaded = polyquant.load(arguments.checkpoint, arguments.backend, device="cpu")
    logits: Any = None

    def remote() -> float:
        nonlocal logits
        started = time.perf_counter()
        logits = loaded.logits(TOKENS)
        return time.perf_counter() - started

    command = [handle.environment.python, "-c", IN_PROCESS, arguments.backend, arguments.checkpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def near() -> float:
            print(file=process.stdin, flush=True)
            return float(process.stdout.readline())

        seconds = {"in-process": list[float](), "remote": list[float]()}
        ways: list[tuple[str, Callable[[], float]]] = [("in-process", near), ("remote", remote)]
        for turn in range(-2, arguments.calls):
            for name, call in ways if turn % 2 else reversed(ways):
                took = call()
                if turn >= 0:  # the first two warm up
                    seconds[name].append(took)
        process.stdin.close()
        same = process.stdout.read().strip() == hashlib.sha256(logits.numpy()).hexdigest()
    for name, taken in seconds.items():
        print(f"{name:12} {statistics.median(taken):.3f} s a call, median; {min(taken):.3f} least")
    pairs = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    medians = statistics.median(seconds["remote"]) / statistics.median(seconds["in-process"])
    print(f"ratio        {medians:.3f} of the medians, {pairs:.3f} the median of {arguments.calls} pairs")
    print(f"logits       {'bit for bit the same' if same else 'NOT the same'}")


if __name__ == "__main__":
    main()
