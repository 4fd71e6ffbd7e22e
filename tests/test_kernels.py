"""The compiled products where no Python is: built by each compiler that is here, each instruction set against sums."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "core" / "kernels"
X86 = {
    "scalar": ["-O2"],
    "avx2": ["-O3", "-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-O3", *(f"-m{name}" for name in ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni"))],
}  # fmt: skip
TARGETS = {
    "x86": ("x86_64-linux-gnu-g++", [], "PQ_X86", X86),
    "arm": ("aarch64-linux-gnu-g++", ["qemu-aarch64-static"], "PQ_ARM", {"scalar": ["-O2"], "neon": ["-O3"]}),
}
"""name -> compiler, what runs its programs, the macro of the processor, and flags for each instruction set."""
WARNINGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_instruction_set_multiplies_right(target: str, tmp_path: Path) -> None:
    compiler, emulator, macro, sets = TARGETS[target]
    if missing := [name for name in (compiler, *emulator) if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    objects = []

    def compile_one(file: str, name: str, *flags: str) -> None:
        objects.append(tmp_path / f"{name}.o")
        source = KERNELS / file
        subprocess.run([compiler, *WARNINGS, *flags, "-c", str(source), "-o", str(objects[-1])], check=True)

    for name, flags in sets.items():
        for file in ("products", "panels", "steps"):
            compile_one(f"src/{file}.cpp", f"{name}-{file}", f"-DPQ_SET={name}", *flags)
    for file in ("dispatch", "product", "step", "threads"):
        compile_one(f"src/{file}.cpp", file, "-O2", f"-D{macro}")
    compile_one("tests/sets.cpp", "sets", "-O1")
    program = tmp_path / "sets"
    subprocess.run([compiler, *map(str, objects), "-static", "-pthread", "-o", str(program)], check=True)
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "scalar: as it should be" in done.stdout and "wrong" not in done.stdout
