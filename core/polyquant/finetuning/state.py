"""A run's working folder: what it is a run of, its checkpoints, and which of them is whole."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import msgspec
from safetensors import SafetensorError, safe_open

from polyquant.errors import SaveError, TrainingConflict
from polyquant.support.files import write_atomically
from polyquant.types import UNREADABLE

JOB, ENDED = "job.json", "ended"
PARTS = ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def working_folder(out: Path) -> Path:
    """Where a run that is to end in `out` keeps its checkpoints."""
    return out.parent / f".{out.name}.training"


def begin(out: Path, job: Mapping[str, Any], *, restart: bool, notes: list[str] | None = None) -> Path:
    """The working folder of the run `job`, made or found again; what of an older run was thrown away goes to `notes`.

    Raises TrainingConflict, field by field, where another run was left unfinished there with a checkpoint, SaveError
    where the folder cannot be written.
    """
    folder = working_folder(out)
    try:
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
        unfinished = _unfinished(folder, [] if notes is None else notes)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot keep a run in {folder}: {error}") from error
    text = msgspec.json.encode(job)
    if unfinished is None:
        write_atomically(folder / JOB, text.decode())
        return folder
    now = msgspec.json.decode(text)
    if unfinished != now and not _numbered(folder):  # of a run that made no step nothing is lost
        return begin(out, job, restart=True, notes=notes)
    changed = [
        f"  {name}: unfinished run {unfinished.get(name)!r}, now {now.get(name)!r}"
        for name in {**unfinished, **now}
        if unfinished.get(name) != now.get(name)
    ]
    if changed:
        raise TrainingConflict(
            f"an unfinished run of another job lies in {folder}:\n" + "\n".join(changed) + "\n"
            "Give the same options to go on with it, another --out, or begin anew with restart=True (--restart)"
        )
    return folder


def _unfinished(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """The job of the run in a working folder; None where there is none, or it cannot be known which: that one goes."""
    try:
        return msgspec.json.decode((folder / JOB).read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        shutil.rmtree(folder)
        notes.append(f"{JOB} of an unfinished run was cut short ({error}): it begins anew")
        return None


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that was written to its end, and what was thrown away because it was not."""
    notes: list[str] = []
    for path in sorted(_numbered(folder), key=step_of, reverse=True):
        broken = _damage(path)
        if not broken:
            return path, notes
        notes.append(f"{path.name} was half written ({broken}) and was thrown away")
        shutil.rmtree(path)
    return None, notes


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]


def mark_ended(folder: Path, step: int) -> None:
    """Training is over, and the adapter is in the checkpoint of `step`: what is left to do is to write its folder."""
    write_atomically(folder / ENDED, str(step))


def has_ended(folder: Path, checkpoint: Path | None, steps: int) -> bool:
    """Whether nothing is left to train: `checkpoint` is that of the last of `steps`, or the run stopped early there."""
    if checkpoint is None:
        return False
    ended = folder / ENDED
    return step_of(checkpoint) >= steps or (ended.exists() and ended.read_text() == str(step_of(checkpoint)))


def step_of(checkpoint: Path | None) -> int:
    """The step after which a checkpoint was written; 0 for none."""
    return int(checkpoint.name.partition("-")[2]) if checkpoint else 0


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty where it is whole. trainer_state.json is written last."""
    missing = [name for name in PARTS if not (checkpoint / name).is_file()]
    if missing:
        return f"{', '.join(missing)} missing"
    try:
        msgspec.json.decode((checkpoint / "trainer_state.json").read_bytes())
        with safe_open(checkpoint / "adapter_model.safetensors", framework="numpy") as file:
            file.keys()
        with ZipFile(checkpoint / "optimizer.pt") as file:  # torch writes its directory last
            file.namelist()
    except (SafetensorError, BadZipFile, OSError, *UNREADABLE) as error:
        return str(error)
    return ""
