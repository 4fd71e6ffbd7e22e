"""Runs cells on a Ray cluster: one task a cell, with the GPUs and memory it needs; the results are the same files."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from polyquant.comparison.engines.measure import CellTask, measure_cell
from polyquant.comparison.records import Result
from polyquant.errors import ConfigError
from polyquant.models.resolve import resolve_dense
from polyquant.support.cache import cache_folder
from polyquant.support.files import once
from polyquant.support.progress import SILENT, Progress, Step

RETRIES = 3  # of a cell whose node or worker died
WAIT_SECONDS = 1.0
CONNECT_SECONDS = 10
MEMORY_FACTOR = 3  # of a model's files: what a cell may hold of them, dense, quantized and on the way


class Cluster:
    """Cells on the Ray cluster at `address`; empty: on one that is started on this machine.

    Every node needs polyquant with the backends, and the model under the same name. Raises ConfigError without ray.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError("the engine ray needs the package ray: pip install 'polyquant[ray]'") from error
        self._ray, self._address = ray, address

    def run(self, tasks: Sequence[CellTask], work: Path, progress: Progress) -> Iterator[tuple[CellTask, Result]]:
        """See `Engine`; the files of processes are on the nodes."""
        ours = not self._ray.is_initialized()
        if ours:
            _connect(self._ray, self._address)
        try:
            yield from _run(self._ray, tasks, progress)
        finally:
            if ours:
                self._ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Raises ConfigError where nobody answers; Ray alone would go on asking for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=address or None, include_dashboard=False, log_to_driver=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {address or 'this machine'}: {error}") from error


def _run(ray: Any, tasks: Sequence[CellTask], progress: Progress) -> Iterator[tuple[CellTask, Result]]:
    remote = ray.remote(max_retries=RETRIES, max_calls=1)(_measure)
    folders = {task.job.reference for task in tasks if task.job.reference}
    references = {folder: ray.put(_files(Path(folder))) for folder in folders}
    waiting = {}
    for task in tasks:
        needs = _needs(task)
        lack = _lack(ray, needs)
        if lack:
            yield task, Result(job=task.job, status="failed", reason=lack)
            continue
        handle = remote.options(**needs).remote(task.to_json(), references.get(task.job.reference))
        waiting[handle] = task
        progress.step(Step(what="on the cluster", work=task.key))
    try:
        while waiting:
            for handle in ray.wait(list(waiting), timeout=WAIT_SECONDS)[0]:
                task = waiting.pop(handle)
                yield task, _result(ray, handle, task)
    finally:
        for handle in waiting:
            ray.cancel(handle, force=True)


def _result(ray: Any, handle: Any, task: CellTask) -> Result:
    try:
        return msgspec.json.decode(ray.get(handle), type=Result)
    except ray.exceptions.RayError as error:
        reason = f"its worker or node died {RETRIES + 1} times ({type(error).__name__}): {str(error).splitlines()[0]}"
        return Result(job=task.job, status="failed", reason=reason)


def _measure(task: str, files: Mapping[str, bytes] | None) -> bytes:
    """On a node: the result of a cell as JSON; the reference is unpacked there where it is not yet."""
    asked = msgspec.json.decode(task, type=CellTask)
    if files is not None:
        folder = cache_folder() / "references" / asked.job.reference_key
        once(folder, lambda out: _unpack(files, out))
        asked = msgspec.structs.replace(asked, job=msgspec.structs.replace(asked.job, reference=str(folder)))
    with TemporaryDirectory() as work:
        return msgspec.json.encode(measure_cell(asked, Path(work), SILENT))


def _unpack(files: Mapping[str, bytes], out: Path) -> None:
    for name, content in files.items():
        (out / name).write_bytes(content)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _needs(task: CellTask) -> dict[str, float]:
    """What Ray keeps free for a cell: a core, memory in bytes, and a GPU where one is asked for."""
    model = task.checkpoint.model if task.checkpoint else task.job.model
    gpus = 1 if task.job.device.partition(":")[0] == "cuda" else 0
    return {"num_cpus": 1, "num_gpus": gpus, "memory": MEMORY_FACTOR * resolve_dense(model).checkpoint_bytes}


def _lack(ray: Any, needs: Mapping[str, float]) -> str:
    """Why no node can ever run a cell; empty where one can."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, resource in (("num_gpus", "GPU"), ("memory", "memory")):
        most = max((node.get(resource, 0) for node in nodes), default=0)
        if needs[name] > most:
            return f"no node of the cluster has what it needs: {resource} {needs[name]:.0f}, the largest has {most:.0f}"
    return ""
