"""What a plugin implements, where, and what does not fit the specification: each with the file and the cure.

Read off the plugin's functions, so that the words name them; pluggy's own checks come after.
"""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import Any, NamedTuple

from polyquant.contract import hookspecs
from polyquant.errors import did_you_mean

CURES: Mapping[str, str] = {
    "backend_info": "return a BackendInfo, and import nothing heavy for it",
    "validate_environment": "return a list of Problem, empty where the backend can run, and raise nothing: "
    "polyquant.plugin has the usual checks",
    "build_config": "return your options record: polyquant.plugin.convert(YourOptions, options) makes it, and raises "
    "ConfigError",
    "load": "return LoadedModel(model=..., config=config, kernel=...)",
    "describe_layers": "return a list of LayerInfo: polyquant.plugin.layers.describe makes it",
    "plan_layers": "return a list with one LayerPlan for each of `weights`: polyquant.plugin.plan_linears makes it",
    "quantize": "write the checkpoint into `out` and return `out`, a Path",
    "prepare_for_training": "return the model: polyquant.plugin.layers.prepare_for_training does for most",
    "save": "write the checkpoint into `out` and return `out`, a Path",
    "quantize_linear": "return the module that `load` puts in the place of a linear layer, and that `pack` takes",
    "unpack": "return a dictionary of tensors under your format's names: polyquant.plugin.packing has the usual words",
    "write_unpacked": "write the checkpoint into `out` and return `out`, a Path",
    "pack": "return a PackedWeight of the layout that was planned: polyquant.plugin.layers.pack_weight makes it",
}
"""hook -> what it must do."""


GPU_SIGNS = (
    "NVIDIA driver",
    "not compiled with CUDA",
    "CUDA error",
    "CUDA driver",
    "no CUDA-capable device",
    "HIP error",
)
"""Of torch's words where a GPU is not there, or does not answer."""
Removed = Mapping[str, Mapping[str, str]]
"""hook -> argument -> what to use instead."""


class Implementation(NamedTuple):
    """A method that is marked as a hook."""

    hook: str
    asks: tuple[str, ...]  # names of its arguments that the core must give
    method: Any
    optional: bool  # marked optionalhook: may be unknown to this core


def implementations(plugin: object, parse: Callable[[Any, str], Any]) -> list[Implementation]:
    """The marked methods of `plugin`; parse: pluggy's `parse_hookimpl_opts`."""
    found = []
    for name in dir(plugin):
        if name.startswith("__"):  # Python's own, two thirds of them
            continue
        options = parse(plugin, name)
        if options is not None:
            method = getattr(plugin, name)
            hook = options.get("specname") or name
            found.append(Implementation(hook, _asked(method), method, bool(options.get("optionalhook"))))
    return found


def misfits(plugin: object, marked: list[Implementation], specification: type, removed: Removed) -> Iterator[str]:
    """What keeps `plugin` from answering as `specification` has it, in words that name the file and the cure."""
    if isinstance(plugin, type):
        yield (
            f"the entry point names the class {plugin.__name__} ({defined_at(plugin)}), and must name an object; write "
            f"backend = {plugin.__name__}() below the class, and name that"
        )
        return
    unknown = [each for each in marked if not each.optional and not hasattr(specification, each.hook)]
    known = {name: _asked(member)[1:] for name, member in vars(specification).items() if callable(member)}
    for each in unknown:
        yield (
            f"{defined_at(each.method)}: unknown hook {each.hook!r}.{did_you_mean(each.hook, known)} Rename it, or "
            "take @hookimpl off; a hook that only a newer polyquant has is marked @hookimpl(optionalhook=True)"
        )
    for each in marked:
        for name in each.asks if each.hook in known else ():
            if name not in known[each.hook]:
                why = _not_given(each.hook, name, known, removed)
                yield f"{defined_at(each.method)}: {each.hook} asks for {name!r}, {why}"
    missing = set(known).difference(each.hook for each in marked)
    for hook in [hook for hook in known if hook in missing]:
        unmarked = getattr(plugin, hook, None)
        if callable(unmarked):
            yield f"{defined_at(unmarked)}: {hook} has no mark, so it is never called; put @hookimpl above it"
        elif hook in hookspecs.REQUIRED and not unknown:
            yield _missing(plugin, hook, known[hook])


def _not_given(hook: str, name: str, known: Mapping[str, tuple[str, ...]], removed: Removed) -> str:
    given = ", ".join(known[hook]) or "nothing"
    if gone := removed.get(hook, {}).get(name):
        return f"which was taken out of the specification: {gone}"
    return (
        f"and hook specification {hookspecs.VERSION} gives {given}.{did_you_mean(name, known[hook])} "
        "Rename it or take it out; where a newer polyquant gives it, update polyquant"
    )


def _missing(plugin: object, hook: str, arguments: tuple[str, ...]) -> str:
    others = [name for name in dir(plugin) if not name.startswith("_") and name not in hookspecs.REQUIRED]
    return (
        f"{defined_at(type(plugin))}: lacks the required hook {hook}.{did_you_mean(hook, others)} Add it: @hookimpl "
        f"def {hook}({', '.join(('self', *arguments))}); {CURES[hook]}"
    )


def _asked(method: Any) -> tuple[str, ...]:
    """Arguments without a default; pluggy passes no others."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(method).parameters.values()
    return tuple(each.name for each in parameters if each.kind in kinds and each.default is each.empty)


def package_of(plugin: object) -> str:
    """The module of a plugin's own files: a PluginBackend says where they are, else that of its class."""
    return getattr(plugin, "package", "") or type(plugin).__module__


def defined_at(thing: Any) -> str:
    """Where a function or class is defined, from its top package on: polyquant_acme/plugin.py:57."""
    thing = inspect.unwrap(thing)
    if forwarded := _forwarded(thing):
        return forwarded
    try:
        code = getattr(thing, "__code__", None)
        line = code.co_firstlineno if code else inspect.getsourcelines(thing)[1]
        return f"{short(inspect.getfile(thing))}:{line}"
    except (OSError, TypeError):  # written in C, or without its source
        return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__name__)}"


def _forwarded(hook: Any) -> str:
    """Where the author wrote what a PluginBackend answers `hook` with; empty for what is written out as a method.

    With the line of the function, but for one that the file imports from elsewhere.
    """
    module, _, function = getattr(hook, "forwards_to", "").partition(":")
    if module.startswith("."):
        module = f"{hook.__self__.package}{module}"
    spec = find_spec(module) if module else None
    if spec is None or spec.origin is None:
        return ""
    lines = Path(spec.origin).read_text(encoding="utf-8").splitlines()
    starts = [number for number, line in enumerate(lines, 1) if function and line.startswith(f"def {function}(")]
    return ":".join((short(spec.origin), *map(str, starts[:1])))


def short(file: str | Path) -> str:
    """A path from its top package on."""
    path = Path(file)
    top = path.parent
    while (top / "__init__.py").exists():
        top = top.parent
    return path.relative_to(top).as_posix()


def cure_of(error: BaseException) -> str:
    """What to do where an error is not the plugin's but of the machine: memory, disk, GPU; empty for any other."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return "it takes more memory than is free: choose fewer bits, a smaller model or another device"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: make room there, or take another place"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"see whether {error.filename} is there, and may be read and written"
    if any(sign in text for sign in GPU_SIGNS):
        return "that is this machine's GPU or its driver: polyquant doctor shows them; without one, use --device cpu"
    return ""


def raised_at(error: BaseException, module: str) -> str:
    """The last line of the package of `module` that `error` passed: 'polyquant_acme/_load.py:34'; empty for none."""
    lines = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((error.filename, error.lineno or 0))
    return last_own(lines, module)


def last_own(lines: list[tuple[str, int]], module: str) -> str:
    """The last of some files and lines that is in the package of `module`: 'polyquant_acme/_load.py:34', or empty."""
    homes = _homes(module.partition(".")[0])
    own = [(file, line) for file, line in lines if any(home in (path := Path(file), *path.parents) for home in homes)]
    return f"{short(own[-1][0])}:{own[-1][1]}" if own else ""


def _homes(package: str) -> list[Path]:
    """The folders or the file of a top-level package."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    return [Path(folder) for folder in spec.submodule_search_locations or filter(None, [spec.origin])]
