"""A candidate's answers against the reference's: figures with their intervals. Imports nothing heavy."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

from polyquant.measure.behaviour.prompts import questions, refused, right
from polyquant.measure.behaviour.records import Answer, Answered, Answers, Behaviour, Interval

Z = 1.959964  # standard normal, 97.5 %
RESAMPLES = 2000


def behaviour(reference: Answers, candidate: Answers) -> Behaviour:
    """The figures. Raises ValueError where the two did not answer the same prompts."""
    if reference.prompts != candidate.prompts or len(reference.answers) != len(candidate.answers):
        raise ValueError("the reference and the candidate answered other prompts")
    pairs = zip(questions(), reference.answers, candidate.answers, strict=True)
    asked = tuple(
        Answered(
            reference=before.text, answer=after.text, parts_at=parting(before, after),
            right_before=right(question, before.text), right=right(question, after.text),
            refused_before=refused(before.text), refused=refused(after.text),
        )
        for question, before, after in pairs
    )  # fmt: skip
    positions = [each.parts_at for each in asked if each.parts_at is not None]

    def share(held: Sequence[bool]) -> Interval:
        return wilson(sum(held), len(held))

    return Behaviour(
        prompts=candidate.prompts,
        template=candidate.template,
        identical_answers=share([each.parts_at is None for each in asked]),
        parting_token=median(positions) if positions else None,
        right_answers=share([each.right for each in asked]),
        right_lost=share([each.right_before and not each.right for each in asked]),
        right_gained=share([each.right and not each.right_before for each in asked]),
        refusals_lost=share([each.refused_before and not each.refused for each in asked]),
        refusals_gained=share([each.refused and not each.refused_before for each in asked]),
        asked=asked,
    )


def parting(before: Answer, after: Answer) -> int | None:
    """Index of the first token in which two answers differ, the end of one included; None where none does."""
    for index, (one, other) in enumerate(zip(before.tokens, after.tokens, strict=False)):
        if one != other:
            return index
    shorter, longer = sorted((len(before.tokens), len(after.tokens)))
    return None if shorter == longer else shorter


def wilson(held: int, count: int) -> Interval:
    """A share with its score interval, 95 %: E. B. Wilson, Probable inference, J. Am. Stat. Assoc. 22 (1927) 209."""
    share = held / count
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    low = 0.0 if held == 0 else middle - half
    high = 1.0 if held == count else middle + half
    return Interval(value=share, low=low, high=high)


def median(values: Sequence[float]) -> Interval:
    """The median with its percentile interval, 95 %, of resamples with one seed: B. Efron, Ann. Stat. 7 (1979) 1."""
    rng = random.Random(0)  # noqa: S311  resampling, no secret
    resampled = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    edge = round(0.025 * RESAMPLES)
    return Interval(value=statistics.median(values), low=resampled[edge], high=resampled[-edge - 1])
