"""Jobs of `polyquant.plugin.process.run_in_process`: python -m polyquant.plugin.jobs MODULE gives each to its `main`.

A line of standard input is a job as JSON; a byte of standard output says that it is done. What the module prints goes
to standard error.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
from pathlib import Path
from threading import Thread

import msgspec
import psutil

from polyquant.plugin.process import DONE, Job


def main(module: str) -> None:
    """Answers jobs until standard input is closed."""
    incoming, outgoing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    if hasattr(select, "poll"):
        Thread(target=_end_with_reader, args=(outgoing,), daemon=True).start()
    works = importlib.import_module(module).main
    with os.fdopen(incoming, "rb") as lines:
        for line in lines:
            job = msgspec.json.decode(line, type=Job)
            os.environ.clear()
            os.environ.update(job.environment)
            os.chdir(job.folder)
            works(job.content)
            os.chdir(Path(job.folder).parent)  # the folder is deleted
            sys.stdout.flush()
            os.write(outgoing, DONE)


def _end_with_reader(pipe: int) -> None:
    """End this process, and what it has started, in the middle of a job too, as soon as nobody reads `pipe`."""
    watched = select.poll()
    watched.register(pipe, 0)  # only that its other end is closed
    watched.poll()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
