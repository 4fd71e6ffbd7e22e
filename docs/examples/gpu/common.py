"""What the steps share: how a step is started and answers, and every place where polyquant's inner modules are touched.

A step is a script of this folder in a process of its own: `python SCRIPT.py RESULT.json '{"device": "cuda", ...}'`. It
writes RESULT.json whenever it knows more, so that what it knew is there when it hangs or dies.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent.parent
Facts = dict[str, Any]
Note = Callable[[Facts], None]
"""Adds facts to the result and writes it."""


class NotRun(Exception):
    """The step cannot run here; the message says why."""


def step(measure: Callable[[Facts, Note], None]) -> None:
    """Run a step's `measure(arguments, note)` with what the command line says, and write its result."""
    from polyquant.support.processes import end_with_parent

    end_with_parent()
    path, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    facts: Facts = {}

    def note(more: Facts) -> None:
        facts.update(more)
        write(path, {"status": "unfinished", "reason": "", "facts": facts})

    try:
        measure(arguments, note)
    except NotRun as reason:
        write(path, {"status": "not run", "reason": str(reason), "facts": facts})
    except Exception as error:  # of a library: a row of the table, with its reason
        shown = "".join(traceback.format_exception(error)[-6:])
        reason = f"{type(error).__name__}: {error}"
        write(path, {"status": "failed", "reason": reason, "facts": facts, "detail": shown})
    else:
        write(path, {"status": "done", "reason": "", "facts": facts})


def write(path: Path, content: Facts) -> None:
    """JSON, the whole file or the one that was there before."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def speed_of(session: Callable[[], Any], vocabulary: int, *, small: bool) -> Facts:
    """pp512 and tg128 in tokens a second as polyquant measures them; less of both where `small`."""
    from polyquant.measure.speed import measure_speed

    sizes = {"prompt_tokens": 32, "generated_tokens": 16, "repetitions": 1} if small else {"repetitions": 3}
    found = measure_speed(session, vocabulary, limit_seconds=2.0 if small else 4.0, **sizes)
    rates = {"pp": found.prompt_tokens_per_second, "tg": found.generated_tokens_per_second}
    spread = {f"{name}_deviation": rate.standard_deviation for name, rate in rates.items()}
    return {
        "prompt_tokens": found.prompt_tokens, "generated_tokens": found.generated_tokens,
        **{name: rate.mean for name, rate in rates.items()}, **spread,
    }  # fmt: skip


def plain_session(model: Any) -> Callable[[], Any]:
    """Sessions of a plain transformers model, which are what polyquant times on its own."""
    from polyquant.models.generation import session

    return lambda: session(model)


def far_from_dense(loaded: Any, model: Path, device: str) -> Facts:
    """KL(dense || loaded) and top-1 agreement on the fixed tokens; no figures where the dense model left no logits."""
    from polyquant.measure.quality.divergence import kl_divergence, top1_agreement
    from safetensors.torch import load_file

    path = model / "reference.safetensors"
    if not path.exists():
        return {"not_compared": "the dense model's step left no logits"}
    tensors = load_file(path)
    candidate, reference = loaded.logits(tensors["tokens"].tolist()), tensors["logits"].to(device)
    kl, same = kl_divergence(reference, candidate), top1_agreement(reference, candidate)
    error = float(kl.std() / len(kl) ** 0.5)
    return {"kl": float(kl.mean()), "kl_standard_error": error, "top1": float(same.float().mean())}


def peak_of(work: Callable[[], Any]) -> tuple[Any, int | None]:
    """What `work` returns, and the peak while it ran: of the allocator on a GPU, else of the resident set."""
    from polyquant.memory.peak import measure_peak

    with measure_peak() as peak:
        result = work()
    return result, peak.peak_bytes


def tiny_tokenizer(folder: Path) -> Any:
    """The tokenizer of the conformance suite's tiny models: any text encodes, and decodes to itself."""
    from polyquant.testing.models import tiny_model
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model("llama", folder), trust_remote_code=False)


def text_to_train_on() -> Iterable[str]:
    """English prose."""
    from polyquant.testing.texts import CALIBRATION

    return CALIBRATION


def all_on(device: str) -> dict[str, str]:
    """A device map of one device, with its number."""
    return {"": "cuda:0" if device == "cuda" else device}


def compute_dtype(backend: str, device: str) -> str:
    """What a load with `backend` computes in here where nothing is said."""
    import polyquant

    kind = device.partition(":")[0]
    return polyquant.backend(backend).info.compute_dtypes.get(kind, "bfloat16")
