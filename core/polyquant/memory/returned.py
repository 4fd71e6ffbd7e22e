"""Gives memory that was freed back to the system: while a model is being quantized or trained."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

INTERVAL_SECONDS = 0.05


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Within the block, hand freed heap memory back every 50 ms (malloc_trim(3)); no effect without glibc.

    Quantizing layer by layer frees buffers of a few MB, which glibc keeps: with optimum-quanto int8 on SmolLM2-135M
    the peak resident set of a load is 1706 MB, and 1014 MB with this, in the same time. Training frees layers that were
    dequantized: LoRA on bitsandbytes' NF4 of that model has a peak 163 MB lower with this.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        yield
        return
    done = Event()

    def work() -> None:
        while not done.wait(INTERVAL_SECONDS):
            trim(0)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        trim(0)
