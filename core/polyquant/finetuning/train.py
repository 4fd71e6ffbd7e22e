"""Trains adapters with transformers' Trainer and PEFT. Imports torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import ceil
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from polyquant.errors import OutOfMemory, PolyquantError, SaveError
from polyquant.finetuning import state
from polyquant.finetuning.data import IGNORED, Example
from polyquant.finetuning.options import TrainingOptions
from polyquant.finetuning.progress import TrainerProgress
from polyquant.support.malloc import returning_freed_memory
from polyquant.support.progress import SILENT, Progress


def with_adapters(model: Any, targets: Sequence[str], options: TrainingOptions) -> Any:
    """`model`, frozen, with trainable LoRA adapters on `targets` (full module names)."""
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=list(targets),
        use_rslora=options.rslora, use_dora=options.dora, task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        return peft.get_peft_model(model, config)


def train(
    model: Any, examples: Sequence[Example], held_out: Sequence[Example], pad: int, options: TrainingOptions,
    folder: Path, checkpoint: Path | None, *, progress: Progress = SILENT,
) -> TrainerProgress:  # fmt: skip
    """Train the adapters of `model` in place, with checkpoints in `folder`, from `checkpoint` on if there is one.

    pad: token id that fills shorter examples. Returns what followed it, with every step. Raises TrainingDiverged,
    OutOfMemory (which says what to lower), SaveError for a full disk.
    """
    per_step = examples_per_step(options)
    mean_tokens = sum(len(example.input_ids) for example in examples) / len(examples)
    followed = TrainerProgress(mean_tokens * per_step, progress)
    callbacks: list[Any] = [followed]
    if options.patience:
        callbacks.append(EarlyStoppingCallback(options.patience))
    trainer = _Trainer(
        model=model,
        args=_arguments(options, len(examples), folder, model.device.type, evaluates=bool(held_out)),
        train_dataset=_rows(examples),
        eval_dataset=_rows(held_out) if held_out else None,
        data_collator=lambda rows: collate(rows, pad),
        callbacks=callbacks,
    )
    for chatty in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(chatty)
    on_cpu = model.device.type == "cpu"  # dequantized layers come and go there, and glibc would keep their memory
    with _explained(options), returning_freed_memory() if on_cpu else nullcontext():
        if checkpoint and state.has_ended(folder, checkpoint, total_steps(options, len(examples))):
            _take_up(trainer, checkpoint, followed)
            return followed
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        state.mark_ended(folder, trainer.state.global_step)
    return followed


def _take_up(trainer: Trainer, checkpoint: Path, followed: TrainerProgress) -> None:
    """The end of a run as `checkpoint` has it: the adapter, the best one where that is kept, and the steps."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    weights = load_file(Path(best or checkpoint) / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(trainer.model, weights)
    followed.on_train_begin(trainer.args, trainer.state, trainer.control)


def collate(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, Any]:
    """Examples as one batch, (examples, longest): padded on the right, padding neither seen nor learned."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> Any:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    ids, labels = padded("input_ids", pad), padded("labels", IGNORED)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def examples_per_step(options: TrainingOptions) -> int:
    """Examples of an optimizer step, over all processes."""
    return options.batch_size * options.accumulation * int(PartialState().num_processes)


def total_steps(options: TrainingOptions, examples: int) -> int:
    """Optimizer steps of a run."""
    per_epoch = max(1, ceil(examples / examples_per_step(options)))
    return options.steps or max(1, round(per_epoch * options.epochs))


def _arguments(
    options: TrainingOptions, examples: int, folder: Path, device: str, *, evaluates: bool
) -> TrainingArguments:
    steps = total_steps(options, examples)
    every = min(options.checkpoint_every, steps)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        max_steps=steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule if options.schedule != "constant" else "constant_with_warmup",
        warmup_steps=round(options.warmup * steps),
        weight_decay=options.weight_decay,
        optim=options.optimizer,
        max_grad_norm=options.gradient_clip,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it hides the NaN that ends a run
        eval_strategy="steps" if evaluates else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=evaluates and options.patience > 0,
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        seed=options.seed,
        disable_tqdm=True,
        report_to=["tensorboard"] if _has_tensorboard() else [],
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=device == "cpu",
    )


class _Trainer(Trainer):
    """Says so where a checkpoint could not be written; torch and safetensors have many words for a full disk."""

    def _save_checkpoint(self, *arguments: Any, **more: Any) -> None:
        try:
            super()._save_checkpoint(*arguments, **more)
        except MemoryError:
            raise
        except Exception as error:
            folder = self.args.output_dir
            raise SaveError(
                f"a checkpoint could not be written to {folder} ({error}; {shutil.disk_usage(folder).free / 2**20:.0f} "
                "MiB are free there); the one before it is kept: make room and give the same command again"
            ) from error


def _rows(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    return [example._asdict() for example in examples]


def _has_tensorboard() -> bool:
    from transformers.integrations import is_tensorboard_available

    return bool(is_tensorboard_available())


@contextmanager
def _explained(options: TrainingOptions) -> Iterator[None]:
    """Errors of the training loop in words that help."""
    try:
        yield
    except PolyquantError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(options, error) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "out of memory" in str(error):
            raise _out_of_memory(options, error) from error
        raise


def _out_of_memory(options: TrainingOptions, error: BaseException) -> OutOfMemory:
    lower = [f"batch_size (now {options.batch_size}; raise accumulation as much to keep the step the same)"]
    lower += ["max_length (--max-length)", f"rank (now {options.rank})"]
    lower += ["" if "8bit" in options.optimizer else "optimizer='adamw_8bit' ('paged_adamw_8bit' on a GPU)"]
    return OutOfMemory(f"training ran out of memory ({error}); lower {', '.join(part for part in lower if part)}")
