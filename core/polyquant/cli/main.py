"""Entry point: builds the commands for the backend that the arguments name, runs one, turns errors into exit codes."""

from __future__ import annotations

import os
import shlex
import sys
import traceback

from polyquant.errors import ConfigError, PolyquantError


def main() -> None:
    """Run the command line. Exit codes: 0 fine, 1 the check or the work failed, 2 wrong use, 130 interrupted."""
    from polyquant.cli.commands import build

    words = shlex.split(os.environ["COMP_WORDS"]) if "COMP_WORDS" in os.environ else sys.argv
    try:
        build(backend_named_in(words))(prog_name="polyquant")
    except PolyquantError as error:
        if os.environ.get("POLYQUANT_TRACEBACK"):
            traceback.print_exc()
        print(f"polyquant: {error}", file=sys.stderr)
        if (
            error.__cause__ is not None
            and not isinstance(error, ConfigError)
            and "POLYQUANT_TRACEBACK" not in os.environ
        ):
            print("(POLYQUANT_TRACEBACK=1 shows the cause)", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("polyquant: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def backend_named_in(words: list[str]) -> str | None:
    """The value of --backend or -b, wherever it stands."""
    for index, word in enumerate(words):
        if word in ("--backend", "-b") and index + 1 < len(words):
            return words[index + 1]
        if word.startswith("--backend="):
            return word.partition("=")[2]
    return None
