"""Entry point: builds the commands for the backend that the arguments name, runs one, turns errors into exit codes."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback

from polyquant.errors import ConfigError, PolyquantError


def main() -> None:
    """Run the command line. Exit codes: 0 fine, 1 the check or the work failed, 2 wrong use, 130 interrupted."""
    from polyquant.cli import output

    output.prepare()
    try:
        code = _command()
        output.finish(failed=bool(code))
    except PolyquantError as error:
        output.say(f"polyquant: {error}", error=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        output.drop()
        sys.exit(141)
    except OSError as error:
        if error.filename is not None or error.errno != errno.ENOSPC:
            raise
        output.say(f"polyquant: standard output cannot be written: {error}", error=True)  # a help text, most likely
        output.drop()
        sys.exit(1)
    sys.exit(code)


def _command() -> int | str | None:
    """What the command ends with."""
    from polyquant.cli.build import build
    from polyquant.cli.output import say
    from polyquant.support.paths import require_utf8

    completing = "_POLYQUANT_COMPLETE" in os.environ  # some shells give the words, others do not
    words = shlex.split(os.environ["COMP_WORDS"]) if "COMP_WORDS" in os.environ else sys.argv
    backend = backend_named_in(words)
    try:
        for word in words:
            require_utf8(word)
        build(backend, None if completing else "".join(words[1:2]))(prog_name="polyquant")
    except SystemExit as ended:
        return ended.code
    except PolyquantError as error:
        if os.environ.get("POLYQUANT_TRACEBACK"):
            say(traceback.format_exc(), error=True)
        from polyquant.cli.words import in_shell

        say(f"polyquant: {in_shell(str(error), backend)}", error=True)
        if (
            error.__cause__ is not None
            and not isinstance(error, ConfigError)
            and "POLYQUANT_TRACEBACK" not in os.environ
        ):
            say("(POLYQUANT_TRACEBACK=1 shows the cause)", error=True)
        return error.exit_code
    except KeyboardInterrupt:
        say("polyquant: interrupted", error=True)
        return 130
    return 0


def backend_named_in(words: list[str]) -> str | None:
    """The value of --backend or -b, wherever it stands; else the backend of the file of --config."""
    backend = _value_of(words, "--backend", "-b")
    if backend is not None or (path := _value_of(words, "--config")) is None:
        return backend
    from pathlib import Path

    from polyquant.cli.training_file import backend_in

    return backend_in(Path(path))


def _value_of(words: list[str], *flags: str) -> str | None:
    """flags: the long one first, which may be written with =."""
    for index, word in enumerate(words):
        if word in flags and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{flags[0]}="):
            return word.partition("=")[2]
    return None
