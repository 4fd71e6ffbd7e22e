"""The reference's answers on disk, beside its log-probabilities. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

import msgspec

from polyquant.measure.behaviour.prompts import prompts_hash, questions
from polyquant.measure.behaviour.records import Answers
from polyquant.support.files import make_folder, write_atomically
from polyquant.types import UNREADABLE

FILE = "answers.json"


def store(folder: Path, answers: Answers) -> None:
    """Write them into the folder of a reference. Raises SaveError where the disk does not take them."""
    make_folder(folder)
    write_atomically(folder / FILE, answers.to_json())


def answers_in(folder: Path) -> Answers | None:
    """The answers in a reference's folder; None where there are none to these prompts that can be read."""
    try:
        answers = msgspec.json.decode((folder / FILE).read_bytes(), type=Answers)
    except (OSError, *UNREADABLE):
        return None
    return answers if answers.prompts == prompts_hash() and len(answers.answers) == len(questions()) else None
