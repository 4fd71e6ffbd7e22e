"""The public functions. Imports nothing heavy; the work is in the rooms that are named like them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from polyquant.converting.convert import convert
from polyquant.isolated.doctor import Diagnosis, doctor
from polyquant.isolated.handles import backend, backends
from polyquant.loaded import SAMPLE_PROMPT
from polyquant.options import BackendOptions
from polyquant.registry.installed import observing
from polyquant.request import KvCache, MaxMemory, Offload
from polyquant.searching.search import search

if TYPE_CHECKING:
    from polyquant.comparison.candidates import Candidate
    from polyquant.comparison.options import EngineName
    from polyquant.comparison.progress import ComparisonProgress
    from polyquant.comparison.records import Goal, Part, Run
    from polyquant.comparison.result import Comparison, ComparisonDifference
    from polyquant.comparison.sweep import Sweep
    from polyquant.finetuning.merge_methods import Target
    from polyquant.finetuning.options import Tuned
    from polyquant.loaded import LoadedModel, Prompt
    from polyquant.loading.records import Verification
    from polyquant.measure.quality.records import Quality
    from polyquant.planning.records import Plan, Plans, Recommendation
    from polyquant.support.progress import Progress

__all__ = [
    "Diagnosis", "backend", "backends", "compare", "convert", "difference", "doctor", "finetune", "load", "merge",
    "observing", "plan", "quantize", "read_comparison", "recommend", "search", "verify",
]  # fmt: skip


def load(
    model: str | Path,
    backend: str | None = None,
    *,
    config: BackendOptions | None = None,
    revision: str | None = None,
    device: str = "auto",
    device_map: str | Mapping[str, int | str] = "auto",
    max_memory: MaxMemory | None = None,
    offload: Offload = "error",
    allow_dequantize: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    attention: str = "",
    kv_cache: KvCache = "keep",
    emulate_activations: bool = False,
    adapter: str | Path | Sequence[str | Path] = (),
    return_freed_memory: bool = False,
    cache: bool = True,
    progress: bool = False,
    **options: Any,
) -> LoadedModel:
    """Load a model quantized.

    model: hub name, local folder, `.gguf` file, or `builtin:smollm2`.
    backend: a name; None for a checkpoint that is quantized already, whose backend is then found.
    config: the backend's options as its own record, such as `HqqOptions(bits=4)`; or as keywords, in `options`
        (`polyquant.backend(name).info.options` has them). A record names its backend too.
    device: cpu, cuda, cuda:1, ...; auto: the fastest here that the backend supports.
    device_map: auto, or module name -> device. max_memory: device -> bytes or '6GiB', for auto.
    offload: what may happen where the model does not fit `device`: error, cpu, or disk (packed weights, on a CPU).
    allow_dequantize: accept a model that ends dense. attention: transformers' attn_implementation.
    kv_cache: older keys and values: keep, or codes: int8, int4. `LoadedModel.new_cache`: for transformers' `generate`.
    emulate_activations: round the inputs of layers as the format's kernels do (NVFP4, MX, FP8, int8), in software.
    adapter: a LoRA adapter of PEFT's to put on the model, by its folder or hub name; of several the products are added.
    return_freed_memory: give memory that is freed while loading on a CPU back: a lower peak, a slower load. Of a dense
        checkpoint that is always done; of a quantized one glibc's adjustment of its thresholds is off from then on.
    cache: whether weights that polyquant's packed runtime multiplies with are kept, quantized, for the next load of the
        same, which maps them; of checkpoints from 64 MiB on. `polyquant cache list` shows them.

    >>> loaded = polyquant.load("builtin:smollm2", backend="bitsandbytes", bits=4, quant_type="nf4")
    >>> loaded.generate("The capital of France is", max_new_tokens=8)
    """
    from polyquant.loading import load as loading

    if config is not None:
        backend, options = loading.of_config(config, backend, options)
    return loading.load(
        model, backend, revision=revision, device=device, device_map=device_map, max_memory=max_memory,
        offload=offload, allow_dequantize=allow_dequantize, trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle, attention=attention, kv_cache=kv_cache, emulate_activations=emulate_activations,
        adapter=adapter, return_freed_memory=return_freed_memory, cache=cache, progress=progress, **options,
    )  # fmt: skip


def verify(loaded: LoadedModel, *, prompt: Prompt = SAMPLE_PROMPT, max_new_tokens: int = 16) -> Verification:
    """Prove what a load gave: bytes, coverage, layers, outputs. One forward pass and one greedy generation.

    Raises nothing for a model that fails a check: read `passed` and `checks`.
    """
    from polyquant.loading import verify as verification

    return verification.verify(loaded, prompt=prompt, max_new_tokens=max_new_tokens)


def quantize(
    model: str | Path,
    backend: str,
    out: str | Path,
    *,
    calibration: Sequence[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write a quantized checkpoint of `model` into the folder `out`, all or nothing.

    A backend that quantizes offline gets the texts of `calibration`, and what it wrote is loaded back and verified
    before it takes its place; any other loads, verifies and saves. options: what `load` takes.
    Raises UnsupportedOperation, before any work, where the backend cannot write one, SaveError for what does not pass.
    """
    from polyquant.loading import quantize as quantizing

    return quantizing.quantize(model, backend, Path(out), calibration=calibration, overwrite=overwrite, **options)


@overload
def plan(model: str | Path, backend: str, **arguments: Any) -> Plan: ...
@overload
def plan(model: str | Path, backend: None = None, **arguments: Any) -> Plans: ...
def plan(
    model: str | Path,
    backend: str | None = None,
    *,
    context: int = 4096,
    batch: int = 1,
    kv_cache: KvCache = "keep",
    device: str = "auto",
    memory: int | str | None = None,
    devices: str | None = None,
    offload: str = "error",
    speed: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Plan | Plans:
    """What a model takes with a backend, tensor by tensor, from headers alone: nothing is loaded, no weights are read.

    model: what `load` takes, or a `config.json` alone.
    backend: a name; None: a table of every installed backend's presets, what fits first. options: the backend's own.
    context, batch: tokens and sequences of the key-value cache, which is kept as kv_cache says: see `load`.
    speed: whether tokens a second are foreseen, on a stand-in of random weights, which takes seconds a candidate once.
    memory: the budget, such as '6GiB'; None: what is free on the device now. devices: simulated ones, such as
        'cuda:0=24GiB,cpu=64GiB'; they need not be there. Raises UnsupportedOperation where the backend does not plan.

    >>> polyquant.plan("builtin:smollm2", backend="bitsandbytes", bits=4).ratio
    """
    from polyquant.planning.plan import Asked
    from polyquant.planning.table import plan_model as run

    asked = Asked(context=context, batch=batch, kv_cache=kv_cache, device=device, offload=offload, speed=speed)
    return run(model, backend, options, asked, memory, devices, revision=revision, trust_remote_code=trust_remote_code)


def recommend(
    model: str | Path, *, memory: int | str | None = None, goal: Goal = "quality", needs: Collection[str] = (),
    device: str = "auto", context: int = 4096, batch: int = 1, comparisons: str | Path | None = None,
    speed: bool = False, revision: str | None = None, trust_remote_code: bool = False,
) -> Recommendation:  # fmt: skip
    """The best way to run a model in a budget, with the reason, and why each other one is out.

    goal: quality (closest to the dense model), speed, or memory (needs least). needs: abilities that it must have, such
        as {"trains"}: names of Capabilities that are true or false.
    speed: whether tokens a second are foreseen, see `plan`; with goal "speed" they decide where nothing was measured.
    comparisons: folder of comparisons measured on this machine; None: polyquant's own. What is not measured is ordered
        by published figures. Nothing that `doctor` refuses is recommended.
    """
    from polyquant.planning import recommend as recommending
    from polyquant.planning.plan import Asked

    return recommending.recommend(
        model, goal, needs, Asked(context=context, batch=batch, device=device, speed=speed), memory,
        Path(comparisons) if comparisons is not None else None, revision=revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip


def compare(
    model: str | Path,
    candidates: Sequence[str | Candidate],
    *,
    sweep: Sweep | None = None,
    out: str | Path | None = None,
    progress: ComparisonProgress | None = None,
    parts: Sequence[Part] = ("quality", "speed"),
    device: str = "auto",
    preset: str = "llamacpp-512",
    text: str = "",
    windows: int = 16,
    reference: str = "dense",
    tasks: Sequence[str] = (),
    task_folder: str = "",
    task_limit: int = 0,
    behaviour: bool = False,
    jobs: int = 1,
    timeout_seconds: float = 3600,
    speed_limit_seconds: float = 30,
    retry: bool = False,
    emulate_activations: bool = False,
    engine: EngineName = "local",
    address: str = "",
) -> Comparison:
    """Measure candidates on `model`, each in a process of its own: quality against the dense model, speed, memory.

    candidates: `bitsandbytes:nf4,double_quant=true`, `gptq@folder`, `dense:bfloat16`; a failed one says why in its row.
    sweep: option -> values, such as {"group_size": [32, 64]}: each candidate with each of them, whatever its backend.
    out: folder that keeps finished cells: a run that was killed goes on, and measures what is new. None: in the cache.
    progress: a `ComparisonProgress`. The other keywords are described by `polyquant.comparison.options.CompareOptions`.

    >>> comparison = polyquant.compare("builtin:smollm2", ["bitsandbytes:nf4", "gguf:Q8_0"])
    >>> comparison.best(memory="6GiB").candidate.name, comparison.report("report.html")
    """
    from polyquant.comparison.options import CompareOptions
    from polyquant.comparison.run import compare as run
    from polyquant.options import convert

    options = {
        "parts": tuple(parts), "device": device, "preset": preset, "text": text, "windows": windows,
        "reference": reference, "tasks": tuple(tasks), "task_folder": task_folder, "task_limit": task_limit,
        "behaviour": behaviour, "jobs": jobs, "timeout_seconds": timeout_seconds, "engine": engine, "address": address,
        "speed_limit_seconds": speed_limit_seconds, "retry": retry, "emulate_activations": emulate_activations,
    }  # fmt: skip
    return run(model, candidates, Path(out) if out else None, convert(CompareOptions, options), progress, sweep)


def read_comparison(path: str | Path) -> Comparison:
    """The comparison in a folder or a comparison.json. Raises ConfigError where none is that can be read."""
    from polyquant.comparison.result import read_comparison as read

    return read(path)


def difference(before: Run | str | Path, after: Run | str | Path) -> ComparisonDifference:
    """What `changed` from one comparison to another, given as such or by folder, beyond noise; and what `worsened`."""
    from polyquant.comparison.result import difference as compared

    return compared(before, after)


def finetune(
    model: LoadedModel | str | Path,
    data: str | Path,
    out: str | Path,
    *,
    backend: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Tuned:
    """Train LoRA adapters on a quantized base, which stays frozen, and write them to the folder `out`.

    model: one that is loaded (it carries the adapter afterwards), or what `load` takes.
    data: JSONL (`text`, `prompt` with `completion`, or `messages`), a text file, or a name for `datasets`.
    progress: its method `step` sees each `polyquant.finetuning.options.TrainingStep`; in a terminal, loading shows its
        bars then, too. restart: forget an unfinished run; without, the same call goes on with it.
    options: of training (`polyquant.finetuning.options.TrainingOptions`); the others are `load`'s.

    >>> polyquant.finetune("builtin:smollm2", "train.jsonl", "adapter", backend="bitsandbytes", bits=4, steps=30)
    """
    from polyquant.finetuning.run import finetune_model

    return finetune_model(
        model, data, Path(out), backend, options, overwrite=overwrite, restart=restart, progress=progress
    )


def merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    into: Target,
    *,
    backend: str | None = None,
    threshold: float = 0.1,
    force: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Quality:
    """Merge an adapter (folder, hub name) into `model`; write it to `out`, and return how close it stays to both.

    into: `dense` (the dense model), `dequantized` (the dequantized base) or `requantized` (the dense model, quantized
        again); `polyquant.finetuning.merge_methods` says what each loses.
    backend, options: of the base, as `load` takes them; where left out, those on the adapter's card.
    threshold: largest mean KL(base and adapter || merged) in nats; above, MergeRefused unless `force`.
    """
    from polyquant.finetuning.merge import merge as run

    return run(model, adapter, Path(out), into, backend, options, threshold, force=force, overwrite=overwrite)
