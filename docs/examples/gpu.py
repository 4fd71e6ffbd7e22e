"""A quarter of an hour on a GPU: every backend there, the most valuable first.

python docs/examples/gpu.py [--minutes 8] [--out build/gpu]            on a machine with a GPU
python docs/examples/gpu.py --device cpu --small                       the same steps in small: the rehearsal

Each step is a process of its own with a limit (gpu/ holds them). After every step the results are written anew as
gpu.json and gpu.md, so that being cut off loses nothing; state.json says which processes run now. A step that hangs,
dies or writes nonsense is a row with its reason, and the others go on. What is copied to docs/reference/gpu.json is
what the documentation says was verified.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from itertools import groupby
from math import inf
from pathlib import Path
from threading import Lock
from time import monotonic
from types import FrameType
from typing import Any

SCRIPTS = Path(__file__).with_suffix("")
ROOT = SCRIPTS.parent.parent.parent
sys.path.insert(0, str(SCRIPTS))

from folders import Workplace, own_folder, replace, say  # noqa: E402
from steps import Step, busy, sizes, steps  # noqa: E402
from table import markdown  # noqa: E402

SCHEMA = 1
DOCTOR_SECONDS = 90.0
LEAST_SECONDS = 8.0  # with less time left nothing is started: importing torch takes about that
REHEARSAL_PATIENCE = 4.0  # times the limits: beside other work on two cores, importing torch alone may take a minute
END_SECONDS = 10.0  # for a killed process to be gone
SAID_LINES = 15  # of what a step printed last, kept where it failed
QUIET = {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
    "POLYQUANT_CHILD": "1",  # has end_with_parent end a step when this process is gone
}  # fmt: skip
Row = dict[str, Any]


class Run:
    """The steps that have ended, those that run, and the clock."""

    def __init__(self, out: Path, work: Path, minutes: float, head: Row) -> None:
        self.out, self.work = out, work
        self.started, self.seconds = monotonic(), 60 * minutes
        self.head = head
        self.rows: list[Row] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.stopped = ""  # by which signal
        self.unwritten = ""  # why the results are not whole, where they are not
        self.lock = Lock()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return 0.0 if self.stopped else self.seconds - (monotonic() - self.started)

    def take(self, step: Step) -> Row:
        """Run one step and write down how it ended."""
        began = monotonic()
        patience = REHEARSAL_PATIENCE if self.head["asked"]["small"] else 1.0
        limit = min(patience * step.limit_seconds, self.left)
        reason = self.reason_not_to(step)
        answer = {"status": "not run", "reason": reason, "facts": {}} if reason else self.process(step, limit)
        row = {"step": step.name, "kind": step.script, "arguments": self.portable(step.arguments), **answer,
               "seconds": round(monotonic() - began, 2)}  # fmt: skip
        with self.lock:
            self.rows.append(row)
            self.write()
        say(f"{monotonic() - self.started:6.1f} s  {row['status']:<10} {step.name}  {row['reason'][:150]}")
        return row

    def reason_not_to(self, step: Step) -> str:
        """Why the step is not worth a process; empty where it is."""
        if step.never:
            return step.never
        if self.left < LEAST_SECONDS:
            return "stopped before it began" if self.stopped else "no time was left"
        ended = {row["step"]: row for row in self.rows}
        for name in step.after:
            if name not in ended or ended[name]["status"] != "done":
                why = ended[name]["reason"] if name in ended else "it was not run"
                return f"after {name}: {why}"
        if step.backend:
            for diagnosis in self.head.get("diagnoses", []):
                if diagnosis["backend"] == step.backend and diagnosis["problems"]:
                    return "; ".join(problem["what"] for problem in diagnosis["problems"])
        return ""

    def process(self, step: Step, limit: float) -> Row:
        """The step's answer, whatever becomes of its process."""
        name = step.name.translate(str.maketrans(":@ ", "---"))
        answer, log = self.work / f"{name}.json", self.work / f"{name}.log"
        command = [sys.executable, str(SCRIPTS / f"{step.script}.py"), str(answer), json.dumps(step.arguments)]
        try:
            answer.unlink(missing_ok=True)
            with log.open("wb") as said:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, cwd=self.work,
                                           start_new_session=True, env=environment())  # fmt: skip
        except OSError as error:
            return {"status": "failed", "reason": f"could not be started: {error}", "facts": {}}
        with self.lock:
            self.processes[step.name] = process
            self.write_state()
        if self.stopped:  # before `stop` could see the process
            kill(process)
        try:
            process.wait(limit)
            ended = ending(process.returncode)
        except subprocess.TimeoutExpired:
            ended = f"no end within {limit:.0f} s"
        end(process)
        with self.lock:
            del self.processes[step.name]
            self.write_state()
        return judged(answer, ended, log)

    def portable(self, arguments: Row) -> Row:
        """The step's arguments without this machine's paths."""
        return {name: value for name, value in arguments.items() if not str(value).startswith("/")}

    def write(self) -> None:
        """The results so far, as JSON and as a table, each whole or as it was before."""
        taken = {"seconds": round(monotonic() - self.started, 1)}
        content = {"schema": SCHEMA, **self.head, **taken, "steps": self.rows}
        written = (("gpu.json", json.dumps(content, indent=1) + "\n"), ("gpu.md", markdown(content)))
        self.unwritten = "; ".join(filter(None, [replace(self.out / name, text) for name, text in written]))

    def write_state(self) -> None:
        """Which process runs which step."""
        running = {name: process.pid for name, process in self.processes.items()}
        replace(self.out / "state.json", json.dumps(running))

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Kill what runs; who waits for it ends it, and what is known is written then."""
        self.stopped = self.head["stopped"] = signal.Signals(number).name
        for process in list(self.processes.values()):
            kill(process)


def main() -> None:
    arguments = parse()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        place = Workplace(arguments.work)
    except OSError as error:
        sys.exit(f"--out or --work cannot be used: {error}")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    head: Row = {"date": date, "asked": {"device": arguments.device, "small": arguments.small,
                                         "minutes": arguments.minutes, "only": arguments.only}}  # fmt: skip
    run = Run(arguments.out.absolute(), place.path, arguments.minutes, head)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it for SIGHUP
            signal.signal(number, run.stop)
    try:
        carry_out(run, arguments)
    finally:
        if not arguments.keep:
            place.tidy()
        place.close()
    say(f"{len(run.rows)} steps in {monotonic() - run.started:.0f} s: {run.out / 'gpu.md'}")
    if run.unwritten:
        sys.exit(f"the results there are not whole: {run.unwritten}")
    if run.stopped:
        sys.exit(f"stopped by {run.stopped}")


def carry_out(run: Run, arguments: argparse.Namespace) -> None:
    """Every step. Ends the process where the first finds nothing that the others could run on."""
    head = run.head
    common = {"device": arguments.device, "small": arguments.small, "work": str(run.work)}
    doctor = run.take(Step("doctor", "machine", common, DOCTOR_SECONDS))
    head |= doctor["facts"]
    if "backends" not in head:
        run.write()
        sys.exit(f"nothing more was run: {doctor['reason']}")
    for group in groups(chosen(run, arguments), small=arguments.small):
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(run.take, group))
    run.write()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, one preset, short timings")
    parser.add_argument("--minutes", type=float, default=8.0, help="what is not begun by then is not run")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="for the results")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-work", help="for models, up to 20 GiB")
    parser.add_argument("--keep", action="store_true", help="leave the models and the steps' logs there")
    parser.add_argument("--only", default="", help="steps with one of these words, and what they need: nf4,qlora,model")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, min(8, cores // 2)),
        help="so many steps at a time, of those that are not timed",
    )
    arguments = parser.parse_args()
    if not 0 < arguments.minutes < inf:
        parser.error(f"--minutes must be a number above 0, got {arguments.minutes}")
    if arguments.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {arguments.jobs}")
    out, own = arguments.out.resolve(), own_folder(arguments.work)
    if own in (out, *out.parents):
        parser.error(f"--out must lie elsewhere than in {own}, which is removed at the end")
    return arguments


def chosen(run: Run, arguments: argparse.Namespace) -> list[Step]:
    """The steps for this machine, with what is said of its room and its state in the head of the results."""
    device, head = run.head["device"], run.head
    free = device.get("free_bytes", head["machine"]["memory_bytes"])
    fitting, missing = sizes(free, head["machine"]["disk_free_bytes"], small=arguments.small)
    taken = busy(free, device["memory_bytes"]) if "free_bytes" in device else ""
    head["notes"] = [note for note in (missing, taken) if note]
    asked = {diagnosis["backend"] for diagnosis in head.setdefault("diagnoses", [])}
    for name, on_gpus in head["backends"].items():
        if name not in asked:  # the doctor did not get to it: its own step finds out
            head["diagnoses"].append({"backend": name, "on_gpus": on_gpus, "problems": []})
    backends = [name for name, on_gpus in head["backends"].items() if on_gpus]
    listed = steps(backends, fitting, device=arguments.device, small=arguments.small, work=run.work)
    if strange := [word for word in words_of(arguments.only) if not any(word in step.name for step in listed)]:
        names = ", ".join(step.name for step in listed)
        sys.exit(f"--only: no step has {' or '.join(strange)} in its name; there are {names}")
    return selected(listed, arguments.only)


def words_of(only: str) -> list[str]:
    return [word.strip() for word in only.split(",") if word.strip()]


def selected(listed: list[Step], only: str) -> list[Step]:
    """The steps whose name holds one of the words of `only`, and those that they come after; all where it is empty."""
    words = words_of(only)
    wanted = {step.name for step in listed if not words or any(word in step.name for word in words)}
    for step in reversed(listed):
        if step.name in wanted:
            wanted |= set(step.after)
    return [step for step in listed if step.name in wanted]


def groups(listed: list[Step], *, small: bool) -> Iterator[list[Step]]:
    """Steps in order, those side by side that may run beside each other; in a rehearsal nothing is timed in earnest."""
    if small:
        listed = sorted(listed, key=lambda step: step.phase)
        yield from (list(group) for _, group in groupby(listed, key=lambda step: step.phase))
        return
    for beside, group in groupby(listed, key=lambda step: step.together):
        if beside:
            yield list(group)
        else:
            yield from ([step] for step in group)


def environment() -> dict[str, str]:
    """A step's variables: this process's, with an import path that holds in another folder."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in entries if entry)
    return {**os.environ, **QUIET, "PYTHONPATH": path}


def ending(code: int) -> str:
    """What a process's return code says; empty where it ended by itself and well."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with {code}" if code else ""


def judged(answer: Path, ended: str, log: Path) -> Row:
    """The answer of a step, from its file and how its process ended."""
    row: Row = {"status": "failed", "reason": ended, "facts": {}}
    try:
        row |= read_answer(answer)
    except FileNotFoundError:
        row["reason"] = f"{ended or 'ended'} without a result"
    except ValueError:
        row["reason"] = f"{ended or 'ended'} and left a result that is not whole"
    if row["status"] == "unfinished" or (ended and row["status"] == "done"):
        at = f", at {row['facts']['at']}" if "at" in row["facts"] else ""
        row |= {"status": "failed", "reason": f"{ended or 'ended before it was finished'}{at}"}
    if row["status"] == "failed":
        with suppress(OSError):
            row["said"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SAID_LINES:]
    return row


def read_answer(path: Path) -> Row:
    """What a step wrote. Raises ValueError for what is no whole answer, FileNotFoundError where there is none."""
    answer = json.loads(path.read_text(encoding="utf-8"))
    known = {"status": str, "reason": str, "facts": dict}
    if not isinstance(answer, dict) or not all(isinstance(answer.get(name), kind) for name, kind in known.items()):
        raise ValueError(f"{path.name} is no answer of a step")
    return answer


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it has started, where any of it is left."""
    with suppress(ProcessLookupError):  # all may have ended
        os.killpg(process.pid, signal.SIGKILL)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and wait until it has ended: not for ever, since one may hang in its GPU's driver."""
    kill(process)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    if process.stdin is not None:
        process.stdin.close()  # was open for as long as this process lived: see end_with_parent


if __name__ == "__main__":
    main()
