"""Pipelines in memory: their calls recorded, a part of them pruned, and what was pruned put into its place."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from compressor import recipe as recipes
from compressor import saving
from compressor.adapter import Adapter, to_device
from compressor.data.calls import Recording
from compressor.errors import CompressorError, UsageError, texts
from compressor.lower import Lowered, lower
from compressor.pipelines.opened import is_pipeline, open_pipeline, opened, put
from compressor.pipelines.prompts import as_calls, pictures
from compressor.pipelines.recording import index_of, recording
from compressor.progress import result_of
from compressor.runs.piped import DEFAULTS, adapter_of_calls, index_for, records_folder
from compressor.training import engine
from compressor.training.engine import Result
from compressor.training.pruner import Pruner
from compressor.validation import validated


def record(
    pipe: Any,
    prompts: Sequence[Any],
    out: str | Path,
    *,
    n: int = 16,
    unseen: int = 4,
    steps: int | None = None,
    keep: int | None = None,
    seed: int = 0,
    part: str | None = None,
    **arguments: Any,
) -> Recording:
    """Run the pipeline `pipe` (of diffusers, or the folder of one) and keep every call of its `part` in the folder `out`.

    `prompts`: texts, or mappings of the pipeline's own arguments; `n` pictures are made of them to learn from, and `unseen` of
    others to be judged on, each in `steps` sampler steps (None: the pipeline's own number), from noise that `seed` gives; `keep`
    calls of each are kept, chosen by chance (None: all).
    `arguments` are the pipeline's, for every picture. What is in `out` already is kept. Raises CompressorError.
    """
    found = opened(pipe, part) if is_pipeline(pipe) else open_pipeline(pipe, part)
    wanted = pictures([{**arguments, **line} for line in as_calls(prompts)], n, unseen, seed)
    events = recording(found, index_of(found, wanted, steps, keep), Path(out), wanted)
    return result_of(events)


def prune(
    model: Any,
    pruner: Pruner,
    *,
    adapter: Adapter | None = None,
    data: Any = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    prompts: Sequence[Any] | None = None,
    part: str | None = None,
    record: Mapping[str, Any] | None = None,
    **training: Any,
) -> Result:
    """Prune a copy of `model` with `pruner` and fine-tune it. `model` stays as it is.

    `model`: a module, with its `adapter` and its `data` (a SampleSet, from `read_data`; Samples; a tensor of samples; a map-style
    dataset; ready batches); or a pipeline of diffusers, with `prompts`, whose `part` (None: what denoises) is pruned by recorded
    calls. `record` are then the arguments of `compressor.record` (`n`, `steps`, `seed`, `height`, …), or `data` is a Recording
    that was made before. `compressor.apply` puts the result into the pipeline.
    `targets`, `ignore`: rules for layer names (`compressor.sparsity.layers`); None takes the adapter's. `training`: the fields
    of `Training`, above all `steps`, `batch_size`, `lr`, `seed`, `device`; `steps=0` is one-shot pruning.

    Raises CompressorError: for settings that are not valid, a pattern that fits no layer, masks that break their
    pattern, and losses that stop being finite. Warns of a rule of `ignore` that matches no layer.
    """
    rules = {
        name: None if own is None else texts(name, own) for name, own in (("targets", targets), ("ignore", ignore))
    }
    if not is_pipeline(model):
        if adapter is None or data is None:
            raise UsageError("prune: a module needs adapter= and data=", "Give both: help(compressor.prune).")
        if prompts is not None or record is not None or part is not None:
            raise UsageError("prune: prompts, part and record are for pipelines", "Leave them out for a module.")
        return engine.prune(model, pruner, adapter=adapter, data=data, **rules, **training)
    if adapter is not None:
        raise UsageError("prune: a pipeline brings its own adapter", "Leave adapter out.")
    found = opened(model, part)
    given = {**DEFAULTS["train"], **training}
    if isinstance(data, Recording):
        _refuse_records(data, found)
        return engine.prune(found.module, pruner, adapter=adapter_of_calls(found, data), data=data, **rules, **given)
    if prompts is None:
        raise UsageError("prune: a pipeline needs prompts=", "Or data=, the Recording that compressor.record gave.")
    with tempfile.TemporaryDirectory() as folder:
        records = _record(model, prompts, Path(folder) / "records", part=part, **(record or {}))
        return engine.prune(
            found.module, pruner, adapter=adapter_of_calls(found, records), data=records, **rules, **given
        )


_record = record


class Applied:
    """A part of a pipeline that another module stands for, until `remove` or the end of a `with` block."""

    def __init__(self, pipe: Any, part: str, module: nn.Module) -> None:
        self.pipe, self.part = pipe, part
        self._before: nn.Module | None = opened(pipe, part).module
        put(pipe, part, module)

    def remove(self) -> None:
        """Put the part that was there before back. Again, it does nothing."""
        if self._before is not None:
            put(self.pipe, self.part, self._before)
            self._before = None

    def __enter__(self) -> Any:
        return self.pipe

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply(pipe: Any, pruned: Any, *, part: str | None = None, lowered: bool = False) -> Applied:
    """Put a pruned model into the pipeline `pipe`, in the place of its `part` (None: that of the run, else what denoises).

    `pruned`: the directory of a run or of a saved model, a `Result`, a `Lowered`, or a module. With `lowered`, a run's model
    is lowered for this machine first, on the first of its recorded calls. The dtype and the device are those of the part.
    `with compressor.apply(pipe, "runs/x"): …` takes it out again at the end; else `remove()` does. Raises CompressorError.
    """
    folder = Path(pruned) if isinstance(pruned, (str, Path)) else None
    settings = recipes.read(folder / "recipe.yaml") if folder is not None and (folder / "recipe.yaml").is_file() else {}
    found = opened(pipe, part or settings.get("part"))
    own = found.module
    if folder is not None:
        module = saving.load(folder, copy.deepcopy(own))
    elif isinstance(pruned, (Result, Lowered)):
        module = pruned.model
    elif isinstance(pruned, nn.Module):
        module = pruned
    else:
        raise UsageError(
            f"apply: a {type(pruned).__name__}", "Give a run's directory, a Result, a Lowered or a module."
        )
    first = next(own.parameters())
    if not isinstance(pruned, Lowered):
        module = module.to(first.device)
    if lowered and folder is not None and settings.get("data"):  # the saved model knows what its inputs look like
        adapter = saving.adapter_at(saving.model_folder(folder))
        module = lower(module, to_device(adapter.example_inputs(1), first.device), adapter=adapter).model
    elif lowered:
        if not settings.get("prompts"):
            raise UsageError(
                "apply: lowered needs the directory of a pipeline's run",
                "Lower it yourself: compressor.lower(module, example).",
            )
        recipe = validated(recipes.Recipe, settings, str(folder))
        calls = Recording.opened(records_folder(recipe, index_for(recipe, found)))
        adapter = adapter_of_calls(found, calls)
        module = lower(module, adapter.example_inputs(1), adapter=adapter).model
    return Applied(pipe, found.part, module)


def _refuse_records(records: Recording, found: Any) -> None:
    """Raise CompressorError where `records` are of another model than the part of `found`."""
    mine = index_of(found, records.index.pictures, records.index.steps)
    if (records.index.part, records.index.weights_sha256) != (mine.part, mine.weights_sha256):
        raise CompressorError(
            f"{records.folder}: records of {records.index.part} with other weights than this pipeline's {found.part}",
            "Record this pipeline: compressor.record(pipe, prompts, folder).",
        )
