"""The string form of patterns: `parse` is the inverse of `str`."""

from __future__ import annotations

import re

from compressor.discovery import load, names
from compressor.errors import CompressorError, UsageError
from compressor.sparsity.pattern import NM, Pattern, Unstructured

_NM = re.compile(r"(?:(\d{1,6})(c?):)?(\d{1,6}):(\d{1,6})")
_VENOM = re.compile(r"venom:(\d{1,6}):(\d{1,6}):(\d{1,6})")
_UNSTRUCTURED = re.compile(r"unstructured:(\d*\.?\d+(?:e-?\d+)?)")


def parse(text: str) -> Pattern:
    """The pattern that `text` names: the inverse of `str(pattern)`. Raises UsageError, naming what is allowed.

    >>> parse("2:4"), str(parse("4:2:4")), parse("unstructured:0.5").density
    (NM(n=2, m=4, v=1), '4:2:4', 0.5)
    """
    stripped = text.strip() if isinstance(text, str) else ""
    if found := _NM.fullmatch(stripped):
        v, clustered, n, m = found.groups()
        if clustered:
            from compressor.sparsity.clustered import Clustered

            return Clustered(int(n), int(m), int(v))
        return NM(int(n), int(m), int(v or 1))
    if found := _VENOM.fullmatch(stripped):
        from compressor.sparsity.venom import Venom

        block, n, m = found.groups()
        return Venom(int(n), int(m), int(block))
    if found := _UNSTRUCTURED.fullmatch(stripped):
        return Unstructured(float(found[1]))
    if (registered := _registered(stripped)) is not None:
        return registered
    raise UsageError(
        f"pattern {text!r} is not one that exists",
        "Write N:M (2:4), V:N:M (4:2:4; 4c:2:4 where any rows may share), venom:V:N:M (venom:64:2:8) or unstructured:DENSITY "
        "(unstructured:0.5). In V:N:M, V rows share one choice of N in M; what VENOM calls so is venom:V:N:M.",
    )


def refuse_unreadable(pattern: Pattern) -> None:
    """Raise UsageError where `parse` does not give `pattern` back from its text: no saved model could say what it obeys."""
    try:
        same = str(parse(str(pattern))) == str(pattern)
    except UsageError:
        same = False
    if not same:
        raise UsageError(
            f"pattern {pattern} of {type(pattern).__name__}: nothing reads this text back, so that no model of it could be saved",
            "Register a function from text to pattern under the entry-point group compressor.patterns, by the text's first word.",
        )


def _registered(text: str) -> Pattern | None:
    """The pattern that a plugin reads in `text`, which begins with the name of its entry point; None where there is none such."""
    name = text.partition(":")[0]
    if not name or name not in names("patterns"):
        return None
    pattern = load("patterns", name)(text)
    if not isinstance(pattern, Pattern) or str(pattern) != text:
        raise CompressorError(
            f"patterns plugin {name!r} gave {pattern!s} for {text!r}", "It has to give the pattern whose text that is."
        )
    return pattern
