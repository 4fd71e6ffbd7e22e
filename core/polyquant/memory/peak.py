"""Peak memory of a stretch of work: the CUDA allocator's where a GPU is used, else the process's resident set."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Filled in when the measured block ends."""

    peak_bytes: int | None = None  # None: this system gives no peak that can be reset
    held_bytes: int | None = None  # what was held when the block began
    device: str = "cpu"


@contextmanager
def measure_peak() -> Iterator[Peak]:
    """Peak bytes of the block, including what was held before it began.

    CUDA: the allocator's peak, summed over devices, where torch is imported and CUDA initialised. Otherwise the
    peak resident set of the process, which Linux can reset (proc(5), clear_refs); elsewhere it stays None.
    """
    peak = Peak()
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_available()
    if torch is not None and on_gpu:
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
        peak.held_bytes = sum(torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count()))
    resettable = _reset_resident_peak()
    if resettable and not on_gpu:
        peak.held_bytes = _resident_peak()  # just reset to what is resident
    try:
        yield peak
    finally:
        if torch is not None and on_gpu:
            peak.device = "cuda"
            peak.peak_bytes = sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
        elif resettable:
            peak.peak_bytes = max(_resident_peak(), peak.held_bytes or 0)  # Linux counts pages of threads in batches


def _reset_resident_peak() -> bool:
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return STATUS.exists()


def _resident_peak() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
