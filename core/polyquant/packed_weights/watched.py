"""Whether the modules inside a decoder are as they were when its steps were built. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_, methodcaller
from typing import Any

from torch.nn.modules import module as torch_module

HOOKED = methodcaller("__contains__", "_hf_hook")
CAPTURING = "transformers.utils.output_capturing"
"""Whose hooks stay in a model once a call has asked for hidden states or attentions; in other calls they do nothing."""


class Watched:
    """The modules inside a decoder. Asked for every token, so that the loops are the interpreter's own."""

    def __init__(self, model: Any) -> None:
        found = [(each._modules, name, child) for each in model.modules() for name, child in each._modules.items()]
        self._holders, self._names, self._modules = zip(*found, strict=True)
        modules = [child for child in self._modules if child is not None]
        self._hooks = [hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._own = [each.__dict__ for each in modules]

    def are_as_they_were(self) -> bool:
        """Whether none was replaced, and none has a hook that does something in a plain call, or accelerate's."""
        now = map(dict.get, self._holders, self._names)
        return (
            all(map(_only_capture, filter(None, self._hooks)))
            and all(map(is_, now, self._modules))
            and not any(map(HOOKED, self._own))
        )


def _only_capture(hooks: Mapping[int, Any]) -> bool:
    return all(getattr(hook, "__module__", "") == CAPTURING for hook in hooks.values())
