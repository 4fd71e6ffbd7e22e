"""The commands for environments of their own: list, create, remove, path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import polyquant
from polyquant.cli.arguments import Json
from polyquant.cli.output import print_json, say
from polyquant.errors import ConfigError, EnvironmentProblem
from polyquant.support.sizes import size

if TYPE_CHECKING:
    from polyquant.isolated.environments import Environment


def _complete(incomplete: str) -> list[str]:
    return [name for name in _declaring() if name.startswith(incomplete)]


Name = Annotated[
    str, typer.Argument(help="A backend that needs one.", autocompletion=_complete, show_default=False)
]  # fmt: skip


HELP = "Environments of their own, for backends that cannot share one."


def list_(json: Json = False) -> None:
    """List the backends that need an environment of their own, and every environment that is there.

    Example: polyquant env list
    """
    from polyquant.isolated import environments as own

    rows: list[dict[str, object]] = []
    for name in _declaring():
        environment = _environment(name)
        for folder in dict.fromkeys([environment.folder, *own.folders_of(name)]):
            record = own.read_record(folder)
            problem = environment.problem() if folder == environment.folder else None
            state = "created" if record and not problem else "not created" if not folder.exists() else "broken"
            if folder != environment.folder:
                state = "of other pins or versions" if record else "unfinished"
            fix = problem.fix if problem else f"polyquant env remove {name}" if state != "created" else ""
            rows.append({
                "backend": name, "environment": folder.name, "state": state, "fix": fix,
                "stored_bytes": record.stored_bytes if record else None, "folder": str(folder),
                "reason": environment.isolated.reason,
            })  # fmt: skip
    if json:
        print_json(rows)
        return
    if not rows:
        say("No installed backend needs an environment of its own.")
    for row in rows:
        held = f", {size(row['stored_bytes'])}" if isinstance(row["stored_bytes"], int) else ""
        say(f"{row['environment']}: {row['state']}{held}" + (f"; {row['fix']}" if row["fix"] else ""))


def create(
    name: Name,
    constraint: Annotated[list[Path] | None, typer.Option(help="A constraint file of pip's; may come again.")] = None,
    index_url: Annotated[str | None, typer.Option(help="The package index to use.")] = None,
    extra_index_url: Annotated[list[str] | None, typer.Option(help="One more; may come again.")] = None,
    find_links: Annotated[list[str] | None, typer.Option(help="A folder with packages; may come again.")] = None,
    no_index: Annotated[bool, typer.Option("--no-index", help="Use --find-links only.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Make it anew where it is there.")] = False,
) -> None:
    """Make the environment that a backend needs: with uv where that is installed, else with venv and pip.

    pip's PIP_* variables hold as well. It takes minutes, and often gigabytes.

    Example: polyquant env create autoawq
    """
    from polyquant.cli.progress import showing_steps
    from polyquant.isolated.creating import create as make
    from polyquant.isolated.installer import Index

    environment = _environment(name)
    index = Index(
        constraint=tuple(str(each.absolute()) for each in constraint or ()),
        index_url=(index_url,) if index_url else (), extra_index_url=tuple(extra_index_url or ()),
        find_links=tuple(find_links or ()), no_index=no_index,
    )  # fmt: skip
    with showing_steps(environment.name) as progress:
        made = make(environment, index, progress, again=again)
    say(f"{'created' if made else 'there already:'} {environment.folder}")
    problems = polyquant.backend(name).problems(_device(name))
    for problem in problems:
        say(f"  {problem.what}\n  fix: {problem.fix}")
    if problems:
        raise typer.Exit(1)


def remove(name: Name) -> None:
    """Delete every environment of a backend, those of other pins too.

    Example: polyquant env remove autoawq
    """
    from filelock import Timeout

    from polyquant.isolated import environments as own
    from polyquant.isolated.creating import lock_of

    folders = own.folders_of(name)
    if not folders:
        raise ConfigError(f"there is no environment of {name}; polyquant env list shows what there is")
    for folder in folders:
        try:
            with lock_of(folder).acquire(timeout=0):
                own.remove(folder)
        except Timeout:
            raise EnvironmentProblem(f"{folder.name} is being made by another process; wait for it") from None
        except OSError as error:
            raise EnvironmentProblem(f"{folder} cannot be deleted: {error}; delete it by hand") from error
        say(f"removed {folder}")


def path(name: Name) -> None:
    """Print the folder of a backend's environment; exit code 1 where it is not there.

    Example: source "$(polyquant env path autoawq)/bin/activate"
    """
    environment = _environment(name)
    environment.require()
    say(environment.folder)


def _declaring() -> list[str]:
    return [info.name for info in polyquant.backends() if info.isolated is not None]


def _environment(name: str) -> Environment:
    """Raises ConfigError for a backend that needs none."""
    from polyquant.isolated.environments import environment_of
    from polyquant.registry.installed import registry

    info = registry().info(name)
    if info.isolated is None:
        need = ", ".join(_declaring()) or "none of those installed"
        raise ConfigError(f"{name} needs no environment of its own; backends that do: {need}")
    return environment_of(info, registry().distribution(name))


def _device(name: str) -> str:
    from polyquant.support.devices import choose_device

    return choose_device("auto", polyquant.backend(name).capabilities)


COMMANDS = (list_, create, remove, path)
