"""Task accuracy through lm-eval, on any backend's loaded model, PyTorch or not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from polyquant.comparison.records import Job, Score
from polyquant.errors import ConfigError, did_you_mean
from polyquant.loaded import LoadedModel
from polyquant.models.prompts import prompt_ids
from polyquant.support.progress import SILENT, Progress, Step

MAX_NEW_TOKENS = 256  # of tasks that generate and say no length


def measure_tasks(loaded: LoadedModel, job: Job, progress: Progress = SILENT) -> tuple[Score, ...]:
    """Every metric of the job's tasks. Raises ConfigError without lm-eval, or for a task that it does not know."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("tasks need lm-eval: pip install 'polyquant[tasks]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=job.task_folder or None)
    unknown = [task for task in job.tasks if task not in manager.all_tasks]
    if unknown:
        close = did_you_mean(unknown[0], manager.all_tasks)
        where = f"in {job.task_folder} and " if job.task_folder else ""
        raise ConfigError(f"no task {', '.join(map(repr, unknown))} {where}among lm-eval's own.{close}")
    answered = lm_eval.simple_evaluate(
        model=as_lm_eval_model(loaded, progress), tasks=list(job.tasks), task_manager=manager,
        limit=job.task_limit or None, bootstrap_iters=0, log_samples=False, verbosity="ERROR",
    )  # fmt: skip
    return tuple(_scores(answered))


def _scores(answered: Any) -> Iterator[Score]:
    for task, metrics in answered["results"].items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            shown = metric if kind == "none" else f"{metric} ({kind})"
            yield Score(
                task=task, metric=shown, value=float(value),
                standard_error=float(error) if isinstance(error, (int, float)) else None,
                examples=int(answered["n-samples"][task]["effective"]) if task in answered["n-samples"] else 0,
            )  # fmt: skip


def as_lm_eval_model(loaded: LoadedModel, progress: Progress = SILENT) -> Any:
    """`loaded` as lm-eval takes a model: log-likelihoods of continuations, and greedy generation."""
    from lm_eval.api.model import TemplateLM

    class LoadedForLmEval(TemplateLM):  # type: ignore[misc]  # lm-eval is optional, and not typed here
        tokenizer = loaded.tokenizer
        tokenizer_name = str(loaded.tokenizer.name_or_path)

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            first = self.tokenizer.bos_token_id
            return self.eot_token_id if first is None else int(first)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
            if add_special_tokens:
                return prompt_ids(self.tokenizer, string)
            return list(self.tokenizer(string, add_special_tokens=False).input_ids)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **more: Any) -> list[tuple[float, bool]]:
            answers = []
            for number, (_, context, continuation) in enumerate(requests, 1):
                answers.append(likelihood(loaded, context, continuation))
                progress.step(Step(what="tasks", done=number, of=len(requests)))
            return answers

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            texts = [self.tok_encode(request.args[0]) for request in requests]
            return [likelihood(loaded, [self.prefix_token_id], tokens)[0] for tokens in texts]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            answers = []
            for number, request in enumerate(requests, 1):
                prompt, how = request.args
                answers.append(continued(loaded, prompt, how))
                progress.step(Step(what="tasks", done=number, of=len(requests)))
            return answers

    return LoadedForLmEval()


def likelihood(loaded: LoadedModel, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of the tokens of `continuation` after `context`, nats, and whether each is the most likely."""
    limit = loaded.context or 2**31
    tokens = [*context, *continuation][-limit - 1 :]
    count = min(len(continuation), len(tokens) - 1)
    logits = loaded.logits(tokens[:-1])[-count:].float().cpu()
    targets = torch.tensor(tokens[-count:])
    chosen = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
    return float(chosen.sum()), bool((logits.argmax(dim=-1) == targets).all())


def continued(loaded: LoadedModel, prompt: str, how: Any) -> str:
    """What follows `prompt`, up to the first of the stop texts in `how`."""
    stops = how.get("until") or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    text = ""
    for piece in loaded.stream(prompt, max_new_tokens=int(how.get("max_gen_toks", MAX_NEW_TOKENS)), do_sample=False):
        text += piece
        if any(stop in text for stop in stops):
            break
    for stop in stops:
        text = text.partition(stop)[0]
    return text
