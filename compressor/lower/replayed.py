"""What layers of a model answered in one forward, given again in place of being computed: of a forward that differs from that one in a
single layer, all that was called before it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from compressor.lower.units import Found

_LEAST = 2**30
"""Bytes that answers may take; more where the model itself takes more."""


class Replayed:
    """The answers of the layers of `found` in one call of `forward` on `model`, when it called them, and what it gave (`out`).

    Not kept are answers that the model writes to, and the last ones where all are larger than the model and than `_LEAST`.
    """

    def __init__(self, model: nn.Module, found: Collection[Found], forward: Callable[[nn.Module], object]) -> None:
        self._found = found
        self._begun: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._answers: dict[str, list[tuple[Tensor, int]] | None] = {}
        self._room = max(_LEAST, sum(own.nbytes for own in model.parameters()))
        self._clock = 0
        handles = []
        for path in {path for one in found for path in _paths(one)}:
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(partial(self._begin, path)))
            handles.append(module.register_forward_hook(partial(self._end, path)))
        try:
            self.out = forward(model)
        finally:
            for handle in handles:
                handle.remove()

    def before(self, one: Found) -> list[Found]:
        """Those that were called for the last time before `one` was for the first, and whose answers are kept."""
        first = min(self._begun.get(path, 0) for path in _paths(one))
        return [
            other
            for other in self._found
            if all(self._ended.get(path, first) < first and _kept(self._answers.get(path)) for path in _paths(other))
        ]

    def answer(self, form: nn.Module, found: Iterable[Found]) -> None:
        """Let the layers `found` in `form`, which must be its own, give their answers again."""
        for path in (path for one in found for path in _paths(one)):
            form.get_submodule(path).forward = _again(self._answers[path] or ())

    def _begin(self, path: str, *_: Any) -> None:
        self._clock += 1
        self._begun.setdefault(path, self._clock)

    def _end(self, path: str, module: nn.Module, args: Any, answer: Any) -> None:
        self._clock += 1
        self._ended[path] = self._clock
        own = self._answers.setdefault(path, [])
        if own is None or not isinstance(answer, Tensor) or answer.is_inference() or answer.nbytes > self._room:
            self._answers[path] = None
        else:
            self._room -= answer.nbytes
            own.append((answer, answer._version))


def _paths(one: Found) -> tuple[str, ...]:
    return one.fused or (one.at,)


def _kept(answers: list[tuple[Tensor, int]] | None) -> bool:
    return bool(answers) and all(answer._version == version for answer, version in answers or ())


def _again(answers: Iterable[tuple[Tensor, int]]) -> Callable[..., Tensor]:
    left = iter(answers)
    return lambda *_, **__: next(left)[0]
