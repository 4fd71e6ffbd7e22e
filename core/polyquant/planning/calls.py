"""The public functions `plan` and `recommend`. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from polyquant import api
from polyquant.errors import ConfigError

if TYPE_CHECKING:
    from polyquant.comparison.records import Goal
    from polyquant.planning.records import Plan, Plans, Recommendation


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
    device: str = "auto",
    memory: int | str | None = None,
    devices: str | None = None,
    offload: str = "error",
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Plan | Plans:
    """What a model takes with a backend, tensor by tensor, from headers alone: nothing is loaded, no weights are read.

    model: what `load` takes, or a `config.json` alone.
    backend: a name; None: a table of every installed backend's presets, what fits first.
    context, batch: tokens and sequences of the key-value cache.
    memory: the budget, such as '6GiB'; None: what is free on the device now.
    devices: simulated ones, such as 'cuda:0=24GiB,cuda:1=24GiB,cpu=64GiB'; they need not be there.
    options: the backend's own. Raises UnsupportedOperation where the backend does not plan.

    >>> polyquant.plan("builtin:smollm2", backend="bitsandbytes", bits=4).ratio
    """
    from polyquant.planning.devices import read_budget
    from polyquant.planning.model import PlannedModel
    from polyquant.planning.plan import Asked, plan_one
    from polyquant.planning.process import problems_of
    from polyquant.planning.table import plan_all

    asked = Asked(context=context, batch=batch, device=device, offload=offload)
    if backend is None:
        if options:
            raise ConfigError(f"name the backend that {', '.join(options)} belongs to (backend=...), or leave it out")
        budget = read_budget(memory, devices)
        return plan_all(PlannedModel(model, revision=revision, trust_remote_code=trust_remote_code), asked, budget)
    handle = api.backend(backend)
    handle.config(options)  # raises for wrong options before any file is read
    budget = read_budget(memory, devices)
    found = PlannedModel(
        model, revision=revision, trust_remote_code=trust_remote_code, as_gguf=handle.capabilities.only_gguf
    )
    problems_of(handle, "cpu")  # imports what the backend imports, so that the process is weighed with it
    return plan_one(found, handle, options, asked, budget)


def recommend(
    model: str | Path,
    *,
    memory: int | str | None = None,
    goal: Goal = "quality",
    needs: Collection[str] = (),
    device: str = "auto",
    context: int = 4096,
    batch: int = 1,
    comparisons: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Recommendation:
    """The best way to run a model in a budget, with the reason, and why each other one is out.

    goal: quality (closest to the dense model), speed, or memory (needs least). needs: abilities that it must have, such
        as {"trains"}: names of Capabilities that are true or false.
    comparisons: folder of comparisons measured on this machine; None: polyquant's own. What is not measured is ordered
        by published figures. Nothing that `doctor` refuses is recommended.
    """
    from polyquant.comparison.store import comparisons_folder
    from polyquant.planning.recommend import choose, require

    require(goal, needs)
    found = plan(
        model, None, context=context, batch=batch, device=device, memory=memory, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return choose(found, goal, needs, Path(comparisons) if comparisons is not None else comparisons_folder())
