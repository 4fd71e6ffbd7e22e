"""Follows a run of transformers' Trainer: a `Step` at each log, and an end where the loss is no number."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import msgspec
import psutil
import torch
from transformers import TrainerCallback

from polyquant.errors import TrainingDiverged
from polyquant.finetuning.options import Step

Report = Callable[[Step], None]


class Reporter(TrainerCallback):
    """Turns the Trainer's logs into steps; `steps` holds those of a run that was gone on with, too."""

    def __init__(self, tokens_per_step: float, report: Report | None) -> None:
        self.steps: list[Step] = []
        self._report = report
        self._tokens_per_step = tokens_per_step
        self._began = self._began_at = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._began, self._began_at = perf_counter(), state.global_step
        evaluated = {log["step"]: float(log["eval_loss"]) for log in state.log_history if "eval_loss" in log}
        steps = (self._step(state, log, 0.0) for log in state.log_history if "loss" in log)
        self.steps = [msgspec.structs.replace(step, evaluation_loss=evaluated.get(step.step)) for step in steps]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
        loss = (metrics or {}).get("eval_loss")
        if loss is not None and self.steps:
            self.steps[-1] = msgspec.structs.replace(self.steps[-1], evaluation_loss=float(loss))
            self._tell(self.steps[-1])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise TrainingDiverged(
                f"the loss is {logs['loss']} at step {state.global_step}; the last good checkpoint is kept: lower "
                f"learning_rate (it was {logs.get('learning_rate', 0):.2g}), or raise warmup, and start again"
            )
        step = self._step(state, logs, perf_counter() - self._began)
        self.steps.append(step)
        self._tell(step)

    def _step(self, state: Any, logs: Any, seconds: float) -> Step:
        done = state.global_step - self._began_at
        number = int(logs.get("step", state.global_step))
        left = seconds / done * (state.max_steps - state.global_step) if done and seconds else 0.0
        return Step(
            step=number, of=int(state.max_steps), loss=float(logs["loss"]),
            learning_rate=float(logs.get("learning_rate", 0.0)),
            tokens_per_second=done * self._tokens_per_step / seconds if seconds else 0.0,
            memory_bytes=_memory_bytes(), seconds_left=left,
        )  # fmt: skip

    def _tell(self, step: Step) -> None:
        if self._report is not None:
            self._report(step)


def _memory_bytes() -> int:
    if torch.cuda.is_available():
        return sum(torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count()))
    return int(psutil.Process().memory_info().rss)
