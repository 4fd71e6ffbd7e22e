"""A check of damaged checkpoints: a tensor that does not fit is refused before a kernel reads past its end."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from polyquant.testing.check import FIRST, NotApplicable, check, expect
from polyquant.testing.checkpoints import changed_copy
from polyquant.testing.processes import run_python
from polyquant.testing.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

ATTACKS = 13
"""Damaged checkpoints for each backend, over all of its presets: more than 200 for the backends that read tensors."""
LOADS = """
import json, sys
import polyquant

backend, device, *paths = sys.argv[1:]
found, sound = [], None
for path in paths:
    print(path, file=sys.stderr)  # the last one is the culprit where the process dies
    try:
        logits = polyquant.load(path, backend, device=device).logits([5, 6, 7, 8])
    except Exception as error:
        found.append([type(error).__name__, str(error)])
    else:
        sound = logits if sound is None or path.endswith("sound") else sound
        found.append(["loaded", "the same" if bool((logits == sound).all()) else "another model"])
print(json.dumps(found))
"""


@check(per="backend", needs=("runs_on_torch",))
def wrong_tensors_are_refused(subject: Subject) -> None:
    """A packed tensor that is missing, short, long, turned, NaN or of another dtype is a ModelError that names it.

    A checkpoint that is damaged where nothing depends on it may load, as the model that it was. Each is loaded in a
    process of its own, which must not crash.
    """
    with TemporaryDirectory(dir=subject.folder) as folder:
        attacks = _attacks(subject, Path(folder))
        paths = [path for path, _, _ in attacks]
        outcomes = run_python(LOADS, subject.backend, subject.runs_on, *map(str, paths), imported=True)
    for (path, module, part), (kind, message) in zip(attacks, outcomes, strict=True):
        if not part:
            expect(kind == "loaded", f"the undamaged checkpoint of {path.parent.name} does not load: {message}")
            continue
        refused = kind == "ModelError" and module in message and part in message
        told = f"{module}.{part} of {path.parent.name}, {path.name}: {kind}: {message}"
        expect(refused or (kind, message) == ("loaded", "the same"), told)


def _attacks(subject: Subject, folder: Path) -> list[tuple[Path, str, str]]:
    """(checkpoint, module, tensor) of the damaged ones, after the sound one of their preset, which names no tensor."""
    presets = list(subject.info.presets)
    shares = [len(range(at, ATTACKS, len(presets))) for at in range(len(presets))]
    chosen = (_of_preset(subject, *each, folder) for each in zip(presets, shares, strict=True))
    return [attack for own in chosen for attack in own]


def _of_preset(subject: Subject, preset: str, share: int, folder: Path) -> list[tuple[Path, str, str]]:
    chance = random.Random(preset)  # noqa: S311  the same each time, and no secret
    sound = _checkpoint(subject, preset, folder / preset / "sound")
    module = chance.choice([layer.name for layer in subject.loaded(preset).layers if layer.quantized])
    module, possible, found = module.rpartition(".")[0], list[tuple[str, str]](), [(sound, "", "")]
    changed_copy(sound, folder / preset / "looked-at", lambda tensors: possible.extend(_possible(tensors, module)))
    for part, kind in chance.sample(possible, min(share, len(possible))):
        damage = partial(_damage, name=f"{module}.{part}", how=DAMAGES[kind])
        found.append((changed_copy(sound, folder / preset / f"{part}-{kind}", damage), module, part))
    return found


def _checkpoint(subject: Subject, preset: str, out: Path) -> Path:
    """A sound checkpoint of a preset, in `out`. Raises NotApplicable where the backend keeps no safetensors."""
    can = subject.capabilities
    if can.on_the_fly and not can.saves:
        raise NotApplicable(f"{subject.backend} writes no checkpoint that could be damaged")
    if can.on_the_fly:
        subject.loaded(preset).save(out)
    else:
        shutil.copytree(subject.source(preset, FIRST)[0], out)
    if len(list(out.glob("*.safetensors"))) != 1:
        raise NotApplicable(f"{subject.backend} keeps no tensors in one safetensors file")
    return out


def _possible(tensors: Mapping[str, Tensor], module: str) -> Iterator[tuple[str, str]]:
    """(tensor's name in the module, kind of damage) of all that can be done to the packed tensors of `module`."""
    for name, tensor in tensors.items():
        if name.startswith(f"{module}."):
            changed = {kind: how(tensor) for kind, how in DAMAGES.items()}
            yield from ((name.removeprefix(f"{module}."), kind) for kind, new in changed.items() if new is not tensor)


def _damage(tensors: dict[str, Tensor], name: str, how: Callable[[Tensor], Tensor | None]) -> None:
    damaged = how(tensors.pop(name))
    if damaged is not None:
        tensors[name] = damaged


def _turned(tensor: Tensor) -> Tensor:
    square = tensor.dim() < 2 or tensor.shape[0] == tensor.shape[-1] or 1 in (tensor.shape[0], tensor.shape[-1])
    return tensor if square else tensor.transpose(0, -1).contiguous()


def _not_finite(tensor: Tensor) -> Tensor:
    import torch

    if not tensor.is_floating_point():
        return tensor
    copy = tensor.clone()
    if copy.element_size() == 1:
        copy.view(torch.uint8).view(-1)[0] = 0xFF  # NaN in each of torch's types of a byte
    else:
        copy.view(-1)[0] = float("nan")
    return copy


def _retyped(tensor: Tensor) -> Tensor:
    return tensor.int() if tensor.is_floating_point() else tensor.float()


DAMAGES: Mapping[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda tensor: None,
    "empty": lambda tensor: tensor.reshape(-1)[:0],
    "short": lambda tensor: tensor.reshape(tensor.shape or (1,))[:-1].clone(),
    "long": lambda tensor: tensor.reshape(tensor.shape or (1,)).repeat_interleave(2, 0),
    "turned": _turned,
    "retyped": _retyped,
    "not finite": _not_finite,
}
"""What is done to a tensor; one that it cannot be done to is given back."""
