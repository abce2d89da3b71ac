"""What a run will write, before it does: a disk that is too small is found while there is nothing to lose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor import files
from compressor.errors import CompressorError
from compressor.pipelines.opened import DENOISERS
from compressor.recipe import Recipe
from compressor.training.engine import FineTuning
from compressor.weights import read_outline

_KEPT = 2
"""Checkpoints that are kept beside the one that is being written."""


def refuse_full_disk(recipe: Recipe, out: Path) -> None:
    """Raise CompressorError where the disk of `out` is too small for the run of `recipe`, by the sizes in the headers of its weights.

    It is a lower bound, so that no run is refused wrongly: half of each weight may be removed, and of checkpoints one counts. Where
    the weights are not files yet (of a hub), nothing is known here; `refuse_full_of` looks again when the model is there.
    """
    entries = _entries(recipe)
    if entries is not None:
        train = recipe.train
        # float32: the weights, their average, and two moments of the optimizer
        copies = 4 if train.mode == "full" and train.steps > recipe.checkpoint_every else 1
        files.refuse_full(out, 4 * entries * copies // 2, f"a run with {entries:,} weights at least")


def refuse_full_of(run: FineTuning, out: Path, every: int, there: int, keeps_one_shot: bool) -> None:
    """Raise CompressorError where the disk of `out` is too small for what `run`, from its step on, writes with a checkpoint after
    each `every` steps, of which `there` are there already."""
    weights = sum(value.nbytes for value in run.student.state_dict().values())
    trained = sum(value.nbytes for group in run.optimizer.param_groups for value in group["params"])
    # the optimizer's moments come with the first step
    state = nbytes(run.state(whole=False)) + (2 * trained if not run.done else 0)
    ahead = max(0, (run.training.steps - 1) // every - run.done // every)
    checkpoints = min(ahead, max(1, _KEPT + 1 - there))
    kept = weights if keeps_one_shot and not run.done else 0
    needs = checkpoints * state + kept + weights // 2
    files.refuse_full(out, needs, f"the run, with {checkpoints} checkpoints of {state:,} bytes at a time,")


def nbytes(value: Any) -> int:
    """The bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(nbytes, value.values()))
    return sum(map(nbytes, value)) if isinstance(value, Sequence) and not isinstance(value, str) else 0


def _entries(recipe: Recipe) -> int | None:
    """How many numbers the weights have that `recipe` names; None where no header says it."""
    for path in _files(recipe):
        with suppress(CompressorError):  # who opens them says what is wrong
            return sum(value.numel() for value in read_outline(path).values())
    return None


def _files(recipe: Recipe) -> Iterator[Path]:
    """The file with the weights that `recipe` names, where they are in one."""
    if recipe.pipeline is not None:
        sources = [Path(recipe.pipeline) / part for part in ([recipe.part] if recipe.part else DENOISERS)]
    else:
        sources = [] if recipe.weights is None else [Path(recipe.weights)]
    for source in sources:
        if source.is_file():
            yield source
        elif source.is_dir() and len(found := sorted(source.glob("*.safetensors"))) == 1:
            yield found[0]
