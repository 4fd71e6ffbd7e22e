"""Installs the kit beside what the machine has: `python install.py --target DIR`, then `export PYTHONPATH=DIR`.

Needs pip and the standard library. Every wheel's hash is checked first; nothing is fetched, and nothing that is
installed on the machine is changed. Afterwards each wheel's requirements are held against what is there now.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

KIT = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True, help="folder to install into")
    arguments = parser.parse_args()
    manifest = json.loads((KIT / "manifest.json").read_text(encoding="utf-8"))
    wheels = checked(manifest["wheels"])
    require_python(manifest["python"], wheels)
    offline = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    into = ["--upgrade", "--target", str(arguments.target)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, *into, *map(str, wheels)]
    if subprocess.run(command, check=False).returncode:
        sys.exit("pip could not install the kit; its words are above")
    print(f"{len(wheels)} wheels in {arguments.target}")
    for line in unmet(arguments.target, [wheel["name"] for wheel in manifest["wheels"]]):
        print(f"  not met: {line}")
    for row in manifest["left_out"]:
        print(f"  not in the kit: {row['name']}: {row['reason']}")


def checked(stated: list[dict]) -> list[Path]:
    """The wheels of the manifest; ends the process where one is missing or is not the one that was packed."""
    wheels, wrong = [], []
    for wheel in stated:
        path = KIT / wheel["part"] / wheel["file"]
        if not path.is_file():
            wrong.append(f"{wheel['part']}/{wheel['file']} is not here: bring that part along")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != wheel["sha256"]:
            wrong.append(f"{wheel['part']}/{wheel['file']} is not the file that was packed: copy the kit again")
        wheels.append(path)
    if wrong:
        sys.exit("nothing installed:\n  " + "\n  ".join(wrong))
    return wheels


def require_python(wanted: str, wheels: list[Path]) -> None:
    """Ends the process where compiled wheels are for another Python than this one."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    own = f"-cp{wanted.replace('.', '')}-cp"
    compiled = [wheel.name for wheel in wheels if own in wheel.name]
    if here != wanted and compiled:
        sys.exit(f"nothing installed: this is Python {here}, and the kit was packed for {wanted} ({compiled[0]}, ...); "
                 f"pack it again with: python -m nox -s gpu_kit -- --python {here}")  # fmt: skip


def unmet(target: Path, names: list[str]) -> list[str]:
    """What is there in another version than the kit's distributions ask for; what is not there, and who asks for it."""
    sys.path.insert(0, str(target))
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging is not there, so nothing else could be looked at"]
    missing: dict[str, list[str]] = {}
    others = []
    for name in sorted(names):
        for text in metadata.distribution(name).requires or ():
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                missing.setdefault(requirement.name.lower().replace("_", "-"), []).append(name)
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                others.append(f"{name} asks for {requirement.name}{requirement.specifier}, and there is {version}")
    return others + [f"{name} is not installed; asked for by {', '.join(who)}" for name, who in sorted(missing.items())]


if __name__ == "__main__":
    main()
