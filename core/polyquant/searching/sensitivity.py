"""How much a model's predictions change where some of its modules are quantized. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from polyquant.measure.quality.divergence import kl_divergence
from polyquant.models.generation import logits_of
from polyquant.models.versions import tied_tensors


class Reference:
    """The dense model with its predictions on windows of text.

    What its blocks gave is kept too: those before the first that holds a quantized module would give the same again,
    and are not computed again. That is so of most models, and is proven on each before it is relied on.
    """

    def __init__(self, model: Any, windows: Sequence[Sequence[int]]) -> None:
        self._model, self._windows = model, windows
        self._blocks = _blocks(model)
        self._tied = tied_tensors(model)
        self._given: list[list[Any]] = []
        self._logits = [self._recorded(window) for window in windows]
        self._replays = self._same_replayed()

    def kl(self, quantized: Any, modules: Sequence[str]) -> float:
        """Mean KL(reference || reference with `modules` of `quantized` in it), nats a position; modules tied to these
        are taken along.

        quantized: the same model, quantized.
        """
        taken = [*modules, *(_owner(tensor) for tensor, origin in self._tied.items() if _owner(origin) in modules)]
        before = self._blocks_before(taken) if self._replays else 0
        with self._swapped({name: quantized.get_submodule(name) for name in taken}):
            found = [
                kl_divergence(exact, self._run(number, before))
                for number, exact in enumerate(self._logits)
            ]  # fmt: skip
        return max(0.0, float(torch.cat(found).double().mean()))

    @contextmanager
    def _swapped(self, modules: Mapping[str, Any]) -> Iterator[None]:
        own = {name: self._model.get_submodule(name) for name in modules}
        try:
            for name, module in modules.items():
                self._model.set_submodule(name, module)
            yield
        finally:
            for name, module in own.items():
                self._model.set_submodule(name, module)

    def _recorded(self, window: Sequence[int]) -> Any:
        given: list[Any] = []
        hooks = [block.register_forward_hook(lambda block, inputs, output: given.append(output))
                 for block in self._blocks.values()]  # fmt: skip
        try:
            logits = logits_of(self._model, window)
        finally:
            for hook in hooks:
                hook.remove()
        self._given.append(given)
        return logits

    def _run(self, number: int, before: int) -> Any:
        """Logits on a window, with the first `before` blocks giving what they gave."""
        replayed = list(self._blocks.values())[:before]
        try:
            for block, output in zip(replayed, self._given[number], strict=False):
                block.forward = lambda *inputs, output=output, **more: output
            return logits_of(self._model, self._windows[number])
        finally:
            for block in replayed:
                vars(block).pop("forward", None)

    def _same_replayed(self) -> bool:
        """Whether the predictions are the same with all blocks but the last one replayed."""
        if not self._blocks or any(len(given) != len(self._blocks) for given in self._given):
            return False
        try:
            return bool(torch.equal(self._run(0, len(self._blocks) - 1), self._logits[0]))
        except Exception:  # of a model whose blocks share more than what they give each other
            return False

    def _blocks_before(self, modules: Sequence[str]) -> int:
        """How many blocks come before all of `modules`; an output head comes after all of them."""
        head = self._model.get_output_embeddings()
        places = []
        for module in modules:
            inside = (number for number, name in enumerate(self._blocks) if module.startswith(f"{name}."))
            after = len(self._blocks) if self._model.get_submodule(module) is head else 0
            places.append(next(inside, after))
        return min(places)


def _blocks(model: Any) -> dict[str, Any]:
    """The blocks that a model is a stack of, by name: its longest list of modules that is in no other one."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and not any(part.isdigit() for part in name.split("."))
    ]
    name, longest = max(lists, key=lambda found: len(found[1]), default=("", ()))
    return {f"{name}.{number}": block for number, block in enumerate(longest)}


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]
