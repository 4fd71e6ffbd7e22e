"""A loaded model's answers to the shipped prompts, against those of the reference. Imports nothing heavy of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyquant.errors import PolyquantError
from polyquant.loaded import LoadedModel
from polyquant.measure.behaviour.figures import behaviour
from polyquant.measure.behaviour.prompts import NEW_TOKENS, prompts_hash, questions
from polyquant.measure.behaviour.records import Answer, Answers, Behaviour
from polyquant.measure.behaviour.stored import answers_in
from polyquant.models.prompts import encode_prompt
from polyquant.support.progress import SILENT, Progress, Step

THINKING = "enable_thinking"  # a switch of chat templates; an answer has no room for it
GREEDY: Mapping[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "repetition_penalty": 1.0}


def measure_behaviour(loaded: LoadedModel, folder: Path, progress: Progress = SILENT) -> Behaviour:
    """The model's answers against those in the reference's folder. Raises PolyquantError where there are none."""
    reference = answers_in(folder)
    if reference is None:
        raise PolyquantError(f"{folder} holds no answers of a reference to these prompts; measure the reference again")
    return behaviour(reference, ask(loaded, progress))


def ask(loaded: LoadedModel, progress: Progress = SILENT) -> Answers:
    """Greedy answers to all prompts, through the chat template where the model has one, else as plain text."""
    template = str(getattr(loaded.tokenizer, "chat_template", None) or "")
    switches = {THINKING: False} if THINKING in template else {}
    answers = []
    for number, question in enumerate(questions(), 1):
        prompt = [{"role": "user", "content": question.prompt}] if template else question.prompt
        ids = encode_prompt(loaded.tokenizer, prompt, switches)
        made = [token.id for token in loaded.tokens(ids, **GREEDY)]
        decoder = loaded.decoder()
        text = "".join([*map(decoder.feed, made), decoder.end()])
        answers.append(Answer(tokens=tuple(made), text=text))
        progress.step(Step(what="behaviour", done=number, of=len(questions())))
    return Answers(prompts=prompts_hash(), answers=tuple(answers), template=bool(template))
