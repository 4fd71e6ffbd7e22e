"""Packs what a machine with a GPU and no network lacks: `python -m nox -s gpu_kit`, and then build/gpu-kit/ is the kit.

The wheels are polyquant's, its plugins' and all that these need, found by following Requires-Dist from what the
repository's pyproject.toml files say, less what the machine has (there.txt). What cannot run there is no failure but a
row of the manifest, with its reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wheels
from asked import ROOT, Target, applying, interpreter_of, read_pins, read_plugins, read_there, read_toml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PART_BYTES = 60 * 2**20  # largest part: what travels in one go
SPARE_BYTES = 2**20
GLIBC = range(5, 40)  # minor versions: manylinux_2_5 to manylinux_2_39
CORE_EXTRAS = ("testing",)  # the conformance suite, and adapters

LEFT_OUT = {
    "amd-quark": "compiles a C++ extension at its first import; checkpoints that are there are read without it",
    "auto-round-lib": "kernels for CPUs alone, 14 MB, and it asks for torch 2.13",
    "gemlite": "sinq only lists it: its layers run without",
    "hf-transfer": "sinq only lists it: it speeds up downloads, and there is no network",
    "llama-cpp-python": "source alone, ten minutes of compiling; its plugin declares no GPU",
    "lm-eval": "sinq only lists it; task accuracy is not measured here",
    "maturin": "gptqmodel lists it to build kernels in Rust, which are not used",
    "torchaudio": "sinq only lists it",
    "torchvision": "sinq only lists it",
}
"""What some wheel of the kit asks for and is not carried, and why. The one list that is kept by hand."""

THINNED: dict[str, tuple[Callable[[str], bool], str]] = {
    "bitsandbytes": (
        lambda name: "/libbitsandbytes_" not in name or name.endswith(("_cpu.so", "_cuda130.so")),
        "libraries for other toolkits than CUDA 13.0 and the CPU",
    ),
    "sinq": (
        lambda name: name != "sitecustomize.py",
        "a sitecustomize.py that imports torch and transformers at every start of Python",
    ),
}
"""Wheels that travel with fewer files: which stay, and what goes."""


@dataclass
class Kit:
    """What has been gathered so far."""

    folder: Path
    target: Target
    versions: dict[str, str] = field(default_factory=dict)  # of the wheels, by canonical name
    left_out: list[dict[str, str]] = field(default_factory=list)  # name, reason
    conflicts: list[dict[str, str]] = field(default_factory=list)  # who, asks for, there is
    assumed: set[str] = field(default_factory=set)  # there in a version not known
    thinned: dict[str, str] = field(default_factory=dict)

    def leave_out(self, name: str, reason: str) -> None:
        if not any(row["name"] == name for row in self.left_out):
            self.left_out.append({"name": name, "reason": reason})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-kit")
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU")
    parser.add_argument("--there", type=Path, default=HERE / "there.txt", help="what that machine has: pip freeze")
    parser.add_argument("--try", dest="tried", action="store_true", help="install it into an empty environment here")
    arguments = parser.parse_args()
    target = Target(arguments.python, read_there(arguments.there), interpreter_of(arguments.python))
    kit = gather(arguments.out, target)
    show(kit)
    if arguments.tried:
        try_out(kit)


def gather(out: Path, target: Target) -> Kit:
    """The kit in the folder `out`, which is made anew."""
    shutil.rmtree(out, ignore_errors=True)
    wheelhouse = out / "wheels"
    wheelhouse.mkdir(parents=True)
    kit = Kit(out, target)
    pins, plugins = read_pins(), read_plugins()
    own = build(["--no-deps", str(ROOT), *map(str, plugins)], wheelhouse, Path(sys.executable))
    if own:
        sys.exit(f"polyquant's own wheels do not build:\n{own}")
    for wheel in sorted(wheelhouse.glob("*.whl")):
        kit.versions.update([wheels.name_and_version(wheel)])
    waiting = deque(roots(kit, plugins))
    while waiting:
        who, requirement = waiting.popleft()
        for wheel in settle(kit, who, requirement, pins, plugins):
            waiting.extend((name_of(wheel), need) for need in applying(wheels.needs(wheel), target))
    for name, (keep, what) in THINNED.items():
        for wheel in wheelhouse.glob(f"{name}-*.whl"):
            wheels.thin(wheel, keep)
            kit.thinned[name] = what
    in_parts(kit, wheelhouse)
    return kit


def roots(kit: Kit, plugins: dict[Path, dict[str, Any]]) -> Iterator[tuple[str, Requirement]]:
    """(who asks, requirement): of polyquant with its extras, and of every plugin that can share an environment."""
    core = read_toml(ROOT)["project"]
    extras = [text for extra in CORE_EXTRAS for text in core["optional-dependencies"][extra]]
    stated = [("polyquant", text) for text in (*core["dependencies"], *extras)]
    for path, table in plugins.items():
        project = read_toml(path)["project"]
        if table.get("own-versions"):
            for text in table.get("without-dependencies", ()):
                kit.leave_out(Requirement(text).name, f"{project['name']}: {table['own-environment']}")
            continue
        alone = (*table.get("without-dependencies", ()), *table.get("without-build-isolation", ()))
        stated += [(project["name"], text) for text in (*alone, *project["dependencies"])]
    for who, text in stated:
        yield from ((who, requirement) for requirement in applying([Requirement(text)], kit.target))


def settle(
    kit: Kit, who: str, requirement: Requirement, pins: dict[str, str], plugins: dict[Path, dict[str, Any]]
) -> list[Path]:
    """What is done about one requirement; the wheel that was fetched for it, if one was.

    What is there in a version not known is carried all the same where polyquant asks for it, or where it is small and
    somebody asks for a version of it; else it is taken to do.
    """
    name, there = canonicalize_name(requirement.name), kit.target.there
    direct = who == "polyquant" or who.startswith("polyquant-")
    version = kit.versions.get(name) or there.get(name)
    if name in kit.assumed and not direct:
        return []
    if name in LEFT_OUT and name not in there:
        kit.leave_out(name, LEFT_OUT[name])
        return []
    if version:
        if not requirement.specifier.contains(version, prereleases=True):
            asked = f"{name}{requirement.specifier}"
            kit.conflicts.append({"who": who, "asks": asked, "there": version})
        return []
    if name in there and not direct and not requirement.specifier:
        kit.assumed.add(name)
        return []
    pinned = Requirement(f"{name}=={pins[name]}") if name in pins else Requirement(f"{name}{requirement.specifier}")
    wheel, reason = fetch(kit, pinned, plugins)
    if wheel is None:
        kit.leave_out(name, f"{who} asks for it, and there is none to carry: {reason}")
        return []
    if name in there and not direct and not (wheels.runs_anywhere(wheel) and wheel.stat().st_size <= SPARE_BYTES):
        wheel.unlink()
        kit.assumed.add(name)
        return []
    kit.assumed.discard(name)
    kit.versions.update([wheels.name_and_version(wheel)])
    return [wheel]


def fetch(kit: Kit, requirement: Requirement, plugins: dict[Path, dict[str, Any]]) -> tuple[Path | None, str]:
    """The wheel for the target, from the index, or built here where there is only source; or why there is none."""
    target, wheelhouse = kit.target, kit.folder / "wheels"
    before = set(wheelhouse.glob("*.whl"))
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    legacy = [f"--platform={name}_x86_64" for name in ("manylinux1", "manylinux2010", "manylinux2014", "linux")]
    compiled = ["--only-binary=:all:", "--implementation=cp", f"--python-version={target.python}", *platforms, *legacy]
    reason = pip(["download", "--no-deps", *compiled, "--dest", str(wheelhouse), str(requirement)])
    if reason:
        reason = build_source(kit, requirement, plugins)
    made = set(wheelhouse.glob("*.whl")) - before
    return (made.pop(), "") if made else (None, reason)


def build_source(kit: Kit, requirement: Requirement, plugins: dict[Path, dict[str, Any]]) -> str:
    """Build a wheel from source: with the target's Python where it is here, else with this one if it is all Python."""
    wheelhouse = kit.folder / "wheels"
    for table in plugins.values():
        texts = table.get("without-build-isolation", ())
        if any(canonicalize_name(Requirement(text).name) == canonicalize_name(requirement.name) for text in texts):
            arguments = ["--no-deps", "--no-build-isolation", str(requirement)]  # its build imports torch: nox has it
            return build(arguments, wheelhouse, Path(sys.executable), table.get("environment", {}))
    if kit.target.interpreter is not None:
        return build(["--no-deps", str(requirement)], wheelhouse, kit.target.interpreter)
    before = set(wheelhouse.glob("*.whl"))
    reason = build(["--no-deps", str(requirement)], wheelhouse, Path(sys.executable))
    for wheel in set(wheelhouse.glob("*.whl")) - before:
        if not wheels.runs_anywhere(wheel):
            wheel.unlink()
            reason = f"it is compiled, and no Python {kit.target.python} is here to build it with"
    return reason


def build(arguments: list[str], wheelhouse: Path, interpreter: Path, environment: dict[str, str] | None = None) -> str:
    """`pip wheel`; the reason where it fails."""
    return pip(["wheel", "--wheel-dir", str(wheelhouse), *arguments], interpreter, environment)


def pip(arguments: list[str], interpreter: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """Run pip; its last words where it fails, empty where it does not."""
    command = [str(interpreter or sys.executable), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if ended.returncode == 0:
        return ""
    errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR") or "Error:" in line]
    return (errors or ended.stderr.splitlines() or ["pip gave no reason"])[-1].strip()


def in_parts(kit: Kit, wheelhouse: Path) -> None:
    """Move the wheels into folders of at most PART_BYTES, the largest first, and write manifest and installer.

    Ends the process where a wheel is larger than a part.
    """
    rooms: list[int] = []
    stated = []
    for wheel in sorted(wheelhouse.glob("*.whl"), key=lambda path: path.stat().st_size, reverse=True):
        nbytes = wheel.stat().st_size
        if nbytes > PART_BYTES:
            sys.exit(f"{wheel.name} has {nbytes} bytes, more than a part of {PART_BYTES}: thin it, or leave it out")
        number = next((number for number, taken in enumerate(rooms) if taken + nbytes <= PART_BYTES), len(rooms))
        if number == len(rooms):
            rooms.append(0)
        rooms[number] += nbytes
        part = kit.folder / f"part{number + 1}"
        part.mkdir(exist_ok=True)
        name, version = wheels.name_and_version(wheel)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        wheel.rename(part / wheel.name)
        stated.append({"name": name, "version": version, "file": wheel.name, "bytes": nbytes, "sha256": digest,
                       "part": part.name, "without": kit.thinned.get(name, "")})  # fmt: skip
    wheelhouse.rmdir()
    manifest = {
        "python": kit.target.python, "there": kit.target.there, "wheels": sorted(stated, key=lambda row: row["name"]),
        "conflicts": kit.conflicts, "left_out": kit.left_out, "assumed": sorted(kit.assumed),
    }  # fmt: skip
    (kit.folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    shutil.copy(HERE / "install.py", kit.folder / "install.py")


def show(kit: Kit) -> None:
    """The manifest, for the eye."""
    manifest = json.loads((kit.folder / "manifest.json").read_text(encoding="utf-8"))
    total = sum(row["bytes"] for row in manifest["wheels"])
    for row in manifest["wheels"]:
        less = f"  without {row['without']}" if row["without"] else ""
        print(f"{row['part']}  {row['bytes']:>9}  {row['name']} {row['version']}{less}")
    parts = len({row["part"] for row in manifest["wheels"]})
    print(f"{len(manifest['wheels'])} wheels, {total} bytes ({total / 2**20:.1f} MiB), {parts} part(s): {kit.folder}")
    for row in manifest["conflicts"]:
        print(f"conflict: {row['who']} asks for {row['asks']}, and there is {row['there']}")
    for row in manifest["left_out"]:
        print(f"left out: {row['name']}: {row['reason']}")
    print(f"taken to be there in a version that will do: {', '.join(manifest['assumed'])}")


def try_out(kit: Kit) -> None:
    """Install the kit into an empty environment without an index, and list the backends from there."""
    interpreter = kit.target.interpreter or Path(sys.executable)
    empty, site = kit.folder.parent / "gpu-kit-empty", kit.folder.parent / "gpu-kit-site"
    for folder in (empty, site):
        shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([str(interpreter), "-m", "venv", str(empty)], check=True)
    python = empty / "bin" / "python"
    offline = {**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": ""}
    subprocess.run([str(python), str(kit.folder / "install.py"), "--target", str(site)], check=True, env=offline)
    listed = "import polyquant; names = polyquant.backends().names; print(len(names), 'backends:', ', '.join(names))"
    subprocess.run([str(python), "-c", listed], check=True, env={**offline, "PYTHONPATH": str(site)})


def name_of(wheel: Path) -> str:
    return wheels.name_and_version(wheel)[0]


if __name__ == "__main__":
    main()
