"""Removed structure, as data: which entries of each tensor were kept, what the modules must know of it, and which went.

A method that removes channels or blocks says so with a `Surgery`; the engine carries it out, a saved model stores it as JSON, and
loading carries it out again on a model of the original shape. It can only make tensors smaller and numbers lower.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from compressor.errors import CompressorError, Refusal
from compressor.validation import validated
from compressor.weights import ties

FILE = "surgery.json"


@dataclass(frozen=True)
class Surgery:
    """What to keep of a model.

    `kept`: for each tensor of the model's state that gets smaller, by name and by dim, the entries that stay, ascending.
    `numbers`: for each module, by name, the whole numbers (or tuples of them) that it remembers about its shape, as they
    are afterwards: `{"conv1": {"out_channels": 24}}`.
    `removed`: modules, by name, each of which becomes a `Bypass`; nothing inside them is kept or numbered.
    `passed`: for those that answer several tensors, the names of the arguments that are answered instead, in order; None
    where the answer had none: `{"blocks.3": ("text", "image")}`.
    """

    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, int | tuple[int, ...]]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    passed: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Carry it out on `model`, in place; all of it, or, where it does not fit, nothing and a CompressorError.

        The model remembers what was removed of it (`surgery_of`), so that saving it needs nobody to tell; a `save_pretrained` of its
        own is an error from then on (not one of a module inside it, nor of one that it lies in).
        """
        self._check(model)
        modules = dict(model.named_modules())
        with torch.no_grad():
            for name, dims in self.kept.items():
                owner, _, key = name.rpartition(".")
                old = getattr(modules[owner], key)
                value = old.detach()
                for dim, kept in dims.items():
                    value = value.index_select(dim, torch.tensor(kept, device=value.device))
                new = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
                setattr(modules[owner], key, new)
        for name, numbers in self.numbers.items():
            for attribute, number in numbers.items():
                setattr(modules[name], attribute, number)
        for name in self.removed:
            model.set_submodule(name, Bypass(_parameters(modules[name]), self.passed.get(name, ())))
        before = surgery_of(model)
        vars(model)[_MEMORY] = self if before is None else self._after(before)
        if (self.kept or self.removed) and callable(getattr(model, "save_pretrained", None)):
            vars(model)["save_pretrained"] = _UNSAVED

    def _after(self, first: Surgery) -> Surgery:
        """The one surgery that does what `first` and then this one does."""
        kept: dict[str, dict[int, tuple[int, ...]]] = {name: dict(dims) for name, dims in first.kept.items()}
        for name, dims in self.kept.items():
            for dim, some in dims.items():
                old = kept.setdefault(name, {}).get(dim)
                kept[name][dim] = some if old is None else tuple(old[i] for i in some)
        numbers = {name: dict(own) for name, own in first.numbers.items()}
        for name, own in self.numbers.items():
            numbers.setdefault(name, {}).update(own)
        gone = (*first.removed, *self.removed)
        return Surgery(
            {name: dims for name, dims in kept.items() if not _inside(name, gone)},
            {name: own for name, own in numbers.items() if not _inside(name, gone)},
            (left := tuple(name for name in gone if not _inside(name, set(gone) - {name}))),
            {name: names for name, names in {**first.passed, **self.passed}.items() if name in left},
        )

    def to_json(self) -> dict[str, Any]:
        """The content of `surgery.json`."""
        kept = {name: {str(dim): list(some) for dim, some in dims.items()} for name, dims in self.kept.items()}
        numbers = {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
            for name, own in self.numbers.items()
        }
        removed: dict[str, Any] = {"removed": list(self.removed)} if self.removed else {}
        if self.passed:
            removed["passed"] = {name: list(names) for name, names in self.passed.items()}
        return {"schema_version": 1, "kept": kept, "numbers": numbers, **removed}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> Self:
        """The surgery that `to_json` wrote. Raises UsageError, with `where`, for anything else."""
        found = validated(_File, content, where)
        kept = {name: {int(dim): tuple(some) for dim, some in dims.items()} for name, dims in found.kept.items()}
        numbers = {
            name: {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
            for name, own in found.numbers.items()
        }
        passed = {name: tuple(names) for name, names in found.passed.items()}
        return cls(kept, numbers, tuple(found.removed), passed)

    def _check(self, model: nn.Module) -> None:
        state, tied, modules = model.state_dict(keep_vars=True), ties(model), dict(model.named_modules())
        for name, dims in self.kept.items():
            if name not in state:
                raise CompressorError(f"surgery: the model has no tensor {name!r}", _HINT)
            if name in tied or name in tied.values():
                raise CompressorError(f"surgery: {name} is shared by two modules", "Such tensors are not made smaller.")
            for dim, some in dims.items():
                shape = tuple(state[name].shape)
                ascending = all(a < b for a, b in pairwise(some))
                if not 0 <= dim < len(shape) or not some or not ascending or some[0] < 0 or some[-1] >= shape[dim]:
                    raise CompressorError(f"surgery: {name} is {shape}: dim {dim} cannot keep {_shown(some)}", _HINT)
        for name in self.removed:
            gone = name not in modules or isinstance(modules[name], Bypass) or self.removed.count(name) > 1
            if not name or gone:
                raise CompressorError(f"surgery: the model has no module {name!r} to remove", _HINT)
        for name, names in self.passed.items():
            known = _parameters(modules[name]) if name in self.removed else ()
            if not names or any(one is not None and one not in known for one in names):
                raise CompressorError(f"surgery: {name} cannot pass on {_shown(names)}", _HINT)
        for name in (*self.kept, *self.numbers, *self.removed):
            if _inside(name, set(self.removed) - {name}):
                raise CompressorError(f"surgery: {name} is inside of what is removed", _HINT)
        for name, numbers in self.numbers.items():
            for attribute, new in numbers.items():
                old = vars(modules[name]).get(attribute) if name in modules else None
                if not _lowers(old, new):
                    raise CompressorError(
                        f"surgery: {name}.{attribute} is {old!r} and cannot become {str(new)[:40]}", _HINT
                    )


class Bypass(nn.Module):
    """What is left of a removed module: its first argument, whatever else it is given; or where names are `passed`, a tuple
    of the arguments of these names. `parameters`: what the module called its arguments, in order."""

    def __init__(self, parameters: Sequence[str] = (), passed: Sequence[str | None] = ()) -> None:
        super().__init__()
        self.parameters_in_order, self.passed = tuple(parameters), tuple(passed)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if not self.passed:
            return inputs[0] if inputs else next(iter(named.values()))
        given = {**dict(zip(self.parameters_in_order, inputs, strict=False)), **named}
        return tuple(None if name is None else given[name] for name in self.passed)


def surgery_of(model: nn.Module) -> Surgery | None:
    """What was removed of `model`'s structure; None where it has its original one."""
    found = vars(model).get(_MEMORY)
    return found if isinstance(found, Surgery) else None


_MEMORY = "_compressor_surgery"
_UNSAVED = Refusal(
    "save_pretrained would write a folder that does not load: the model has less than its configuration says",
    "compressor.save keeps what was removed too, and compressor.load reads it.",
)
_HINT = "It belongs to another model, or is damaged."


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1]
    kept: dict[str, dict[Literal["0", "1", "2", "3", "4"], list[int]]]
    numbers: dict[str, dict[str, int | list[int]]]
    removed: list[str] = []
    passed: dict[str, list[str | None]] = {}


def _inside(name: str, modules: Collection[str]) -> bool:
    """Whether `name` is one of `modules` or of their parts."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _lowers(old: Any, new: int | tuple[int, ...]) -> bool:
    """Whether `new` is of the kind of `old`, whole numbers, and at least one and at most `old` everywhere."""
    before, after = (value if isinstance(value, tuple) else (value,) for value in (old, new))
    if isinstance(old, tuple) != isinstance(new, tuple) or len(before) != len(after):
        return False
    return all(type(a) is int and type(b) is int and 1 <= b <= a for a, b in zip(before, after, strict=True))


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """What the forward of `module` calls its arguments, in order."""
    found = inspect.signature(module.forward).parameters.values()
    return tuple(one.name for one in found if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY))


def _shown(entries: tuple[int | str | None, ...]) -> str:
    return f"{len(entries)} entries" if len(entries) > 6 else str(list(entries))
