"""Options of backends whose checkpoints hold layers in several formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import msgspec

from polyquant.errors import ConfigError
from polyquant.modules import matching_modules, module_of
from polyquant.options import BackendOptions

if TYPE_CHECKING:
    from polyquant.types import WeightInfo

Format = TypeVar("Format", bound=str)
LayerFormats = tuple[tuple[str, Format], ...]
"""(pattern as in `skip`, format) of modules whose format is another; where several match, the last. A dictionary, or
texts `pattern=format`, become this."""


class MixableOptions(BackendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a backend whose checkpoints hold layers in several formats.

    A backend has a field `layers` of `LayerFormats` with its own formats, () by default, and takes what `format_of`
    names instead of its usual format. This class has no fields, so that options may be of another kind too.
    """

    format_options: ClassVar[tuple[str, ...]] = ()
    """The options that choose a format: of linear layers first; others, such as the embedding's, after it."""
    mixes: ClassVar[tuple[str, ...]] = ("linear", "head", "embedding")
    """Roles of the tensors that may have a format of their own."""

    @property
    def layers(self) -> LayerFormats[str]:
        """The backend's own field of this name."""
        raise NotImplementedError

    @classmethod
    def of_format(cls, name: str) -> Mapping[str, Any]:
        """The options that give linear layers the format `name` where `layers` names none."""
        return {cls.format_options[0]: name}

    def with_full_names(self, weights: Sequence[WeightInfo]) -> Self:
        """As of every backend, and `layers` as one format for each module, by its full name.

        Raises ConfigError too for a pattern that matches nothing but modules which have no format.
        """
        formats = self._formats_in(weights)
        named = [
            msgspec.structs.replace(weight, default_skip=False) if module_of(weight) in formats else weight
            for weight in weights
        ]
        return msgspec.structs.replace(super().with_full_names(named), layers=tuple(formats.items()))

    def _formats_in(self, weights: Sequence[WeightInfo]) -> dict[str, str]:
        """Full module name -> format, in the order of `weights`."""
        skipped = matching_modules(weights, self.skip)
        able = {module_of(each) for each in weights
                if each.role in self.mixes and not each.tied_to} - set(skipped)  # fmt: skip
        formats: dict[str, str] = {}
        for pattern, chosen in self.layers:
            hits = matching_modules(weights, (pattern,), "layers")
            if not able.intersection(hits):
                tied = [f"{each.name} is tied to {each.tied_to}" for each in weights
                        if each.tied_to and module_of(each) in hits]  # fmt: skip
                why = f"{tied[0]}: name that one" if tied else "skip has them, or their kind always stays dense"
                raise ConfigError(f"layers pattern {pattern!r} matches {', '.join(hits[:3])} only, and {why}")
            formats |= {name: chosen for name in hits if name in able}
        return {name: formats[name] for name in map(module_of, weights) if name in formats}

    def format_of(self, weight: WeightInfo) -> str | None:
        """The format that `layers`, with full names, has for a tensor's module; None where it names none."""
        return dict(self.layers).get(module_of(weight))

    def skips(self, weight: WeightInfo) -> bool:
        """As of every backend; a module that `layers` names is taken."""
        return self.format_of(weight) is None and super().skips(weight)
