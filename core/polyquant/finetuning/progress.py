"""Follows a run of transformers' Trainer: a `TrainingStep` at each log, and an end where the loss is no number."""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any

import msgspec
import psutil
import torch
from transformers import TrainerCallback

from polyquant.errors import TrainingDiverged
from polyquant.finetuning.options import TrainingStep
from polyquant.memory.adapted import MARK
from polyquant.support.progress import Progress


class TrainerProgress(TrainerCallback):
    """Gives `progress` a step for each of the Trainer's logs; `steps` holds them all, those before a kill too."""

    def __init__(self, tokens_per_step: float, progress: Progress) -> None:
        self.steps: list[TrainingStep] = []
        self._progress = progress
        self._tokens_per_step = tokens_per_step
        self._began = self._began_at = 0.0
        self._without_gradient: set[str] | None = None  # adapters; None: no step was made

    @property
    def untrained(self) -> list[str]:
        """The modules whose adapters no gradient has reached, in none of this process's steps."""
        return sorted(self._without_gradient or ())

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._began, self._began_at = perf_counter(), state.global_step
        evaluated = {log["step"]: float(log["eval_loss"]) for log in state.log_history if "eval_loss" in log}
        steps = (self._step(state, log, 0.0) for log in state.log_history if "loss" in log)
        self.steps = [msgspec.structs.replace(step, evaluation_loss=evaluated.get(step.done)) for step in steps]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        trained = [(_adapted(name), tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
        if self._without_gradient is None:
            self._without_gradient = {name for name, _ in trained}
        for name, tensor in trained:  # all of them in the first step, later those that had none so far
            if name in self._without_gradient and tensor.grad is not None and bool(tensor.grad.any()):
                self._without_gradient.discard(name)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
        loss = (metrics or {}).get("eval_loss")
        if loss is not None and self.steps:
            self.steps[-1] = msgspec.structs.replace(self.steps[-1], evaluation_loss=float(loss))
            self._progress.step(self.steps[-1])

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
        self._progress.step(step)

    def _step(self, state: Any, logs: Any, seconds: float) -> TrainingStep:
        done = state.global_step - self._began_at
        number = int(logs.get("step", state.global_step))
        left = seconds / done * (state.max_steps - state.global_step) if done and seconds else 0.0
        return TrainingStep(
            what="training", done=number, of=int(state.max_steps), loss=float(logs["loss"]),
            learning_rate=float(logs.get("learning_rate", 0.0)),
            tokens_per_second=done * self._tokens_per_step / seconds if seconds else 0.0,
            memory_bytes=_memory_bytes(), seconds_left=left,
        )  # fmt: skip


def _adapted(parameter: str) -> str:
    """The module of the base that an adapter's parameter belongs to."""
    return parameter.removeprefix("base_model.model.").partition(f".{MARK}")[0]


def _memory_bytes() -> int:
    if torch.cuda.is_available():
        return sum(torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count()))
    return int(psutil.Process().memory_info().rss)
