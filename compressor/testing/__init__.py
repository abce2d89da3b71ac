"""Whether a pruner keeps the promises of its interface: a suite for methods of your own, and for every registered one.

    from compressor.testing import check_pruner
    check_pruner(MyPruner)

or `compressor check-plugin my_pruner.py:MyPruner`. It trains a tiny model of each family for a few steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import isclass

from compressor import registry
from compressor.errors import CompressorError
from compressor.testing.checks import CHECKS
from compressor.testing.elsewhere import Elsewhere, NotTriedError
from compressor.testing.trial import BrokenError, Trial
from compressor.testing.trial import families as families
from compressor.training.pruner import Pruner


@dataclass(frozen=True)
class Finding:
    """One check of one family: `fault` says what is wrong, None where nothing is."""

    check: str
    family: str
    fault: str | None


def check_pruner(pruner: Pruner | type[Pruner]) -> None:
    """Raise CompressorError, with everything that is wrong, unless `pruner` (a class with defaults for all settings, or an
    instance) keeps the promises of `compressor.Pruner`. Takes well under a minute on a CPU."""
    wrong = [found for found in findings(pruner) if found.fault is not None]
    if wrong:
        lines = "\n".join(f"  {found.check}, {found.family}: {found.fault}" for found in wrong)
        raise CompressorError(f"the pruner breaks {len(wrong)} promises:\n{lines}", "help(compressor.Pruner) has them.")


def findings(pruner: Pruner | type[Pruner]) -> Iterator[Finding]:
    """Every check on every family, one after another. What could not be tried says so in its `check`."""
    if isclass(pruner):
        try:
            made = registry.build_pruner(pruner, {})
        except Exception as error:  # a plugin may raise anything
            yield Finding("is made without settings", "all", f"{type(error).__name__}: {error}")
            return
    else:
        made = pruner
    if not isinstance(made, Pruner):
        yield Finding("is a Pruner", "all", f"{type(made).__name__} is no subclass of compressor.Pruner")
        return
    models = families()
    elsewhere = Elsewhere(made, list(models))
    for family, (adapter, model) in models.items():
        trial = Trial(made, adapter, model, elsewhere)
        for check in CHECKS:
            said = check.__doc__ or check.__name__.strip("_").replace("_", " ")  # Python without docstrings (-OO)
            fault, name = None, said.strip().rstrip(".")
            try:
                check(trial)
            except BrokenError as broken:
                fault = str(broken)
            except NotTriedError as reason:
                name = f"{name} (not tried in another process: {reason})"
            except (Exception, SystemExit) as error:  # a plugin may raise anything
                fault = f"{type(error).__name__}: {error}"
            yield Finding(name, family, fault)
