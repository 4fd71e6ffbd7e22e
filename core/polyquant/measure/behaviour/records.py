"""The records of a behaviour measurement. Imports nothing heavy."""

from __future__ import annotations

from polyquant.types import Record


class Answer(Record, frozen=True):
    """A greedy answer, cut after so many tokens."""

    tokens: tuple[int, ...]
    text: str


class Answers(Record, frozen=True):
    """What a model answered to every prompt."""

    prompts: str  # hash of the prompts
    answers: tuple[Answer, ...]
    template: bool = True  # whether through the model's chat template; it may have none


class Interval(Record, frozen=True):
    """A figure with the interval that it lies in with 95 % confidence."""

    value: float
    low: float
    high: float


class Answered(Record, frozen=True):
    """One prompt, and both answers."""

    reference: str
    answer: str
    parts_at: int | None  # the first token that is another; None: the answers are the same
    right_before: bool  # the reference's answer
    right: bool
    refused_before: bool
    refused: bool


class Behaviour(Record, frozen=True):
    """How a candidate answered the shipped prompts beside the reference: greedily, 48 tokens at most.

    Shares are of all prompts, with Wilson's intervals.
    """

    prompts: str  # hash of the prompts
    template: bool
    identical_answers: Interval
    parting_token: Interval | None  # median of those that part, counted from 0, bootstrap interval; None: none does
    right_answers: Interval
    right_lost: Interval  # right by the reference, wrong here
    right_gained: Interval
    refusals_lost: Interval
    refusals_gained: Interval
    asked: tuple[Answered, ...] = ()  # in the order of the prompts
