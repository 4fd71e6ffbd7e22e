"""Runs the fenced blocks of one page of the docs in order, as a reader would: `python tests/snippets.py PAGE FOLDER`.

`console` blocks are compared with what happens (figures aside), `sh` lines must succeed, `python` blocks share one
namespace. A line that is one polyquant command runs in this process, which has torch already; any other in bash.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
READMES = sorted(ROOT.glob("plugins/*/README.md"))
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHOWN = ("text", "toml", "json", "yaml", "svg")  # nothing to run
NOT_RUN = {
    ("README.md", "python -m pip install nox"): "makes an environment and runs the demo; CI does",
    ("README.md", "python -m nox -s tests"): "is what runs this",
    ("README.md", "pip install"): "installs; packages.py tries what was",
    ("authors/index.md", "pip install 'polyquant[testing]'"): "installs from an index",
    ("authors/index.md", "polyquant check-backend acme"): "needs acme installed; test_authoring.py does all of it",
    ("how-to/index.md", "pip install polyquant-autoawq"): "installs from an index",
    (
        "how-to/index.md",
        "polyquant env create autoawq",
    ): "installs from an index; test_isolated.py makes an environment",
    ("how-to/index.md", "polyquant compare builtin:smollm2 -c awq"): "needs that; test_isolated.py has cells in one",
    ("how-to/cluster.md", "pip install 'polyquant[ray]'"): "installs from an index",
    ("how-to/cluster.md", "polyquant compare MODEL -c bitsandbytes:nf4 -c hqq:int4"): "needs a cluster's address; "
    "test_cluster.py runs it on one of this machine",
    ("how-to/serve.md", "pip install 'polyquant[serve]'"): "installs from an index",
    ("how-to/serve.md", "polyquant serve builtin:smollm2"): "does not end; test_serving.py runs it",
    ("how-to/serve.md", "curl http"): "needs a server on that port; test_serving.py asks one",
    ("how-to/gpu.md", "python -m nox -s gpu_kit"): "fetches from an index; test_gpu_kit.py packs and installs",
    ("how-to/gpu.md", "python build/gpu-kit/install.py"): "needs the kit; test_gpu_kit.py installs one",
    ("how-to/gpu.md", "export PYTHONPATH=/tmp/site"): "belongs to the kit's installation",
    ("how-to/gpu.md", "python docs/examples/gpu.py"): "needs a GPU; test_gpu_run.py rehearses it",
}
"""(page, how the command begins): why it is not run. The command line is parsed all the same."""


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def commands(language: str, text: str) -> list[tuple[str, str | None]]:
    """(command, what is shown of its output) of a `sh` or `console` block."""
    if language == "console":
        parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
        return [(part.partition("\n")[0], part.partition("\n")[2]) for part in parts]
    joined = text.replace("\\\n", " ")
    return [(line, None) for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def reason_not_to_run(path: Path, command: str) -> str:
    for (page, start), reason in NOT_RUN.items():
        if path.as_posix().endswith(page) and "plugins" not in path.parts and command.startswith(start):
            return reason
    return ""


def comparable(text: str) -> list[str]:
    """Lines with figures and runs of blanks levelled, blank lines left out."""
    lines = (re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*", "N", line)).strip() for line in text.splitlines())
    return [re.sub(r"N [KMGT]iB", "N iB", line) for line in lines if line]


def furnish(folder: Path) -> None:
    """What the pages name: MODEL, and the files of a reader."""
    from polyquant.testing.models import tiny_model
    from polyquant.testing.texts import CALIBRATION

    shutil.copytree(tiny_model("llama", folder.parent / "tiny"), folder / "MODEL")
    for name in ("captain.jsonl", "train.yaml"):
        shutil.copy(ROOT / "docs" / "examples" / name, folder / name)
    example = json.dumps({"prompt": "What is the capital of Norway?", "completion": " Oslo."})
    (folder / "train.jsonl").write_text(f"{example}\n" * 20)
    (folder / "pages.txt").write_text("\n\n".join([*CALIBRATION] * 8))
    (folder / "prompt.txt").write_text("The capital of France is")


def run_command(command: str) -> tuple[int, str]:
    """Exit code, and standard output and error together."""
    words = shlex.split(command, comments=True)
    if words[0] != "polyquant" or re.search(r"[|&;<>]", command.partition(" #")[0].replace('"', "")):
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
        bash = ["bash", "-c", command]
        done = subprocess.run(bash, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
        return done.returncode, done.stdout + done.stderr
    from polyquant.cli.main import main

    sys.argv, out, err, code = words, io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    return code, out.getvalue() + err.getvalue()


def run_page(path: Path) -> list[str]:
    """What does not hold of a page, whose blocks run in the current folder."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    real = path.parent.name in ("tutorial", path.anchor) or path.name == "README.md"

    def tiny(text: str) -> str:
        return text if real else text.replace("builtin:smollm2", "MODEL")

    for language, text in blocks(path):
        if language == "python":
            importlib.invalidate_caches()  # a command before it may have written a package
            try:
                exec(compile(tiny(text), path.name, "exec"), namespace)
            except BaseException:
                return [f"{text}\n{traceback.format_exc()}"]
        for command, shown in commands(language, text) if language in ("sh", "console") else ():
            if reason_not_to_run(path, command):
                continue
            code, happened = run_command(tiny(command))
            if code != (2 if shown and "polyquant: " in shown else 0):
                return [f"$ {command}\nexit code {code}\n{happened}"]
            missing = [line for line in comparable(tiny(shown or "")) if line not in comparable(happened)]
            if missing:
                return [f"$ {command}\nis shown with {missing}, and gave\n{happened}"]
    return []


if __name__ == "__main__":
    os.environ["COLUMNS"] = "140"
    page, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    furnish(folder)
    os.chdir(folder)
    sys.path.append("polyquant-acme/src")  # which the page for authors writes before it shows a file of it
    failures = run_page(page)
    sys.exit("\n".join(failures) or 0)
