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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is not None or error.errno != errno.ENOSPC:
            raise
        output.say(f"polyquant: standard output cannot be written: {error}", error=True)  # a help text, most likely
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which ends without what could not be written
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
    """The value of --backend or -b, wherever it stands."""
    for index, word in enumerate(words):
        if word in ("--backend", "-b") and index + 1 < len(words):
            return words[index + 1]
        if word.startswith("--backend="):
            return word.partition("=")[2]
    return _backend_in_file(words)


def _backend_in_file(words: list[str]) -> str | None:
    """The backend that the file of `--config` names, whose options are flags too."""
    for index, word in enumerate(words):
        flag, equals, value = word.partition("=")
        path = value if equals else "".join(words[index + 1 : index + 2])
        if flag == "--config" and path:
            from pathlib import Path

            from polyquant.cli.training_file import backend_in

            return backend_in(Path(path))
    return None
