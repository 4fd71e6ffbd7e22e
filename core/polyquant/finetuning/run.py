"""A fine-tuning run from start to end: data, adapters, training that can go on after a kill, an adapter folder."""

from __future__ import annotations

import random
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from polyquant.errors import ConfigError, SaveError, UnsupportedOperation
from polyquant.finetuning import state
from polyquant.finetuning.curve import write_curve, write_steps
from polyquant.finetuning.data import Example, read_examples
from polyquant.finetuning.options import TrainingOptions, TrainingStep, Tuned
from polyquant.finetuning.requirements import require_optimizer
from polyquant.finetuning.targets import target_modules
from polyquant.isolated import handles
from polyquant.loaded import LoadedModel
from polyquant.loading import trial
from polyquant.loading.adapter import CARD, WEIGHTS, Card
from polyquant.loading.load import load
from polyquant.memory.peak import measure_peak
from polyquant.models import versions
from polyquant.models.hashing import content_hash
from polyquant.models.limits import limits_of
from polyquant.options import convert
from polyquant.support.files import atomic_folder, claimed
from polyquant.support.machine import this_machine
from polyquant.support.outputs import require_free
from polyquant.support.peft import import_peft
from polyquant.support.progress import SILENT, Progress


def finetune_model(
    model: LoadedModel | str | Path, data: str | Path, out: Path, backend: str | None, options: dict[str, Any], *,
    overwrite: bool, restart: bool, progress: Progress | None,
) -> Tuned:  # fmt: skip
    """See `polyquant.finetune`; options: of training, the others of loading."""
    training = {name: options.pop(name) for name in TrainingOptions.__struct_fields__ if name in options}
    chosen = convert(TrainingOptions, training)
    backend, options = handles.written(backend, options)
    if isinstance(model, (str, Path)):
        if backend is not None and not handles.backend(backend).capabilities.trains:
            able = ", ".join(handles.backends(trains=True).names)
            raise UnsupportedOperation(f"{backend} cannot train adapters; installed backends that do: {able}")
        model = load(model, backend, progress=progress is not None and sys.stderr.isatty(), **options)
    elif options or backend is not None:
        raise ConfigError(f"the model is loaded already: leave out {', '.join(options) or 'backend'}")
    return finetune(model, data, out, chosen, overwrite=overwrite, restart=restart, progress=progress or SILENT)


def finetune(
    loaded: LoadedModel, data: str | Path, out: Path, options: TrainingOptions, *, overwrite: bool = False,
    restart: bool = False, progress: Progress = SILENT,
) -> Tuned:  # fmt: skip
    """Train adapters on `loaded` and write them to the folder `out`; see `polyquant.finetune`.

    Under `accelerate launch` every process has the whole base and a share of each step; the first one writes.
    """
    with ExitStack() as claims:
        return _finetune(loaded, data, out, options, claims, overwrite=overwrite, restart=restart, progress=progress)


def _finetune(
    loaded: LoadedModel, data: str | Path, out: Path, options: TrainingOptions, claims: ExitStack, *, overwrite: bool,
    restart: bool, progress: Progress,
) -> Tuned:  # fmt: skip
    """claims: holds the right to the run's working folder for as long as it is open."""
    backend = loaded.backend
    if not backend.capabilities.trains:
        raise UnsupportedOperation(f"{backend.name} cannot train adapters on its quantized base")
    keeps = (*loaded.files, Path(data))
    require_free(out, overwrite=overwrite, keeps=keeps)
    import_peft()
    from accelerate import PartialState

    from polyquant.finetuning import train
    from polyquant.memory.mapped import own_mapped_tensors
    from polyquant.plugin.adapters import require_readable

    if loaded.request is None:
        raise SaveError("where the model came from is unknown: load it through polyquant.load")
    if loaded.adapter:
        raise ConfigError(
            f"the model carries the adapter {loaded.adapter} already: load the base anew to train another"
        )
    require_optimizer(options, loaded.request.device)
    targets, about_targets = target_modules(loaded.layers, options.targets, loaded.model)
    read = read_examples(data, loaded.tokenizer, options, longest_example(loaded.model, options.max_length))
    limits_of(loaded.model).require([max(max(example.input_ids) for example in read.examples)])
    learned, held_out = split(read.examples, options.evaluation, options.seed)
    card = Card(
        base_model=loaded.request.source.name, base_hash=content_hash(loaded.request.source),
        architecture=type(loaded.model).__name__, backend=backend.name,
        backend_options=msgspec.to_builtins(loaded.config), training=msgspec.to_builtins(options),
        data_hash=read.digest, examples=len(learned), versions=this_machine(("peft",)).versions,
    )  # fmt: skip
    own_mapped_tensors(loaded.model, loaded.request.source.checkpoint_bytes)
    with quiet_libraries():
        base = backend.prepare_for_training(loaded)
    if options.dora:
        require_readable(base, targets, backend.name)
    processes = PartialState(cpu=loaded.request.device == "cpu")
    notes: list[str] = []
    if processes.is_main_process:
        claims.enter_context(claimed(state.working_folder(out)))
    with processes.main_process_first():
        folder = state.begin(out, _job(card), restart=restart and processes.is_main_process, notes=notes)
        checkpoint, thrown_away = state.last_whole_checkpoint(folder)
        notes += thrown_away
    with quiet_libraries():
        model = train.with_adapters(base, targets, options)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else 0
    started = perf_counter()
    with measure_peak() as peak, quiet_libraries(), _off_again(model), trial.training(loaded):
        followed = train.train(
            model, learned, held_out, pad, options, folder, checkpoint,
            progress=progress if processes.is_main_process else SILENT,
        )  # fmt: skip
    seconds = perf_counter() - started
    if processes.is_main_process:
        write(model.eval(), out, card, followed.steps, folder, overwrite=overwrite, keeps=keeps)
    processes.wait_for_everyone()
    loaded.model, loaded.adapter = model, str(out)
    last = followed.steps[-1]
    kept, evaluation_loss = _kept(followed.steps, best=options.patience > 0)
    if kept < last.done:
        notes.append(f"the adapter is that of step {kept} of {last.done}, where the held-out loss was lowest")
    if followed.untrained:
        notes.append(
            f"no gradient reached the adapters on {', '.join(followed.untrained)}: they are as they began, and change "
            "nothing; leave them out with targets"
        )
    return Tuned(
        adapter=str(out), steps=last.done, first_loss=followed.steps[0].loss,
        last_loss=last.loss, evaluation_loss=evaluation_loss,
        trained_parameters=trained, adapter_bytes=(out / WEIGHTS).stat().st_size, seconds=seconds,
        peak_bytes=peak.peak_bytes, resumed_from=state.step_of(checkpoint), notes=(*read.notes, *about_targets, *notes),
    )  # fmt: skip


def longest_example(model: Any, asked: int) -> int:
    """Tokens of an example at most: as asked, else what the model can. Raises ConfigError where that is less."""
    limit = limits_of(model).positions
    if limit is not None and asked > limit:
        raise ConfigError(f"max_length {asked} is more than the {limit} positions that this model has; give less")
    return asked or limit or int(getattr(model.config, "max_position_embeddings", 0)) or 2048


@contextmanager
def _off_again(model: Any) -> Iterator[None]:
    """Where the block does not end well, `model` is the bare base again, and the same call can be made once more."""
    try:
        yield
    except BaseException:
        versions.unloaded(model).eval()
        raise


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block, what transformers and torch announce for their next versions is not shown to users."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to learn and to evaluate on; at least one of each where `share` is not 0."""
    if not share:
        return list(examples), []
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)  # noqa: S311  a split, no secret
    held_out = min(max(1, round(share * len(shuffled))), len(shuffled) - 1)
    return shuffled[held_out:], shuffled[:held_out]


def write(
    model: Any, out: Path, card: Card, steps: Sequence[TrainingStep], folder: Path, *, overwrite: bool,
    keeps: Iterable[Path] = (),
) -> None:  # fmt: skip
    """The adapter folder, all or nothing; the run's working folder is then gone."""
    with atomic_folder(out, overwrite=overwrite, keeps=keeps) as partial:
        model.save_pretrained(partial)
        (partial / "README.md").write_text(_readme(card, steps), encoding="utf-8")
        (partial / CARD).write_text(card.to_json(), encoding="utf-8")
        write_steps(steps, partial / "steps.csv")
        write_curve(steps, partial / "loss.svg", f"{card.base_model} on {card.backend}")
        if (folder / "runs").is_dir():
            shutil.copytree(folder / "runs", partial / "runs")
    shutil.rmtree(folder)


def _kept(steps: Sequence[TrainingStep], *, best: bool) -> tuple[int, float | None]:
    """(step, held-out loss) of the adapter that is written: the last, or with early stopping the best evaluated."""
    evaluated = {step.done: step.evaluation_loss for step in steps if step.evaluation_loss is not None}
    if not evaluated:
        return steps[-1].done, None
    if best:
        return min(evaluated.items(), key=lambda entry: entry[1])
    return steps[-1].done, list(evaluated.values())[-1]


def _job(card: Card) -> dict[str, Any]:
    """What makes two runs the same run: everything on the card but the versions."""
    job: dict[str, Any] = msgspec.to_builtins(card)
    training = job.pop("training")
    return {name: value for name, value in {**job, **training}.items() if name != "versions"}


def _readme(card: Card, steps: Sequence[TrainingStep]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in card.backend_options.items() if value not in (None, []))
    return (
        f"---\nbase_model: {card.base_model}\nlibrary_name: peft\n---\n# Adapter for {card.base_model}\n\n"
        f"LoRA of rank {card.training['rank']}, trained on the base quantized with {card.backend} ({options}): "
        f"{card.examples} examples, {steps[-1].done} steps, loss {steps[0].loss:.3f} -> {steps[-1].loss:.3f}.\n\n"
        "`steps.csv` and `loss.svg` show the run, `polyquant.json` holds all of its options and hashes.\n"
    )
