"""Pipelines in memory: their calls recorded, a part of them pruned, and what was pruned put into its place."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compressor import recipe as recipes
from compressor import saving
from compressor.adapter import Adapter, to_device
from compressor.data.calls import INDEX, Picture, Recording
from compressor.data.settings import Record
from compressor.errors import CompressorError, UsageError, texts
from compressor.foreign.sound import copied, is_lowered, refuse_empty, refuse_kept
from compressor.lower import Lowered, lower
from compressor.pipelines.features import refuse_lost, resized
from compressor.pipelines.opened import Opened, is_pipeline, open_pipeline, opened, part_of, put
from compressor.pipelines.prompts import COUNT, as_calls, pictures
from compressor.pipelines.recording import first_call, index_of, other_than, recording
from compressor.pipelines.same import refuse_away, refuse_changed, refuse_hooked
from compressor.progress import result_of
from compressor.runs import facts
from compressor.runs.piped import DEFAULTS, adapter_of_calls, index_for, records_folder
from compressor.training import engine, in_place
from compressor.training.engine import Result
from compressor.training.given import refuse_8_bits, refuse_fused, refuse_untrainable
from compressor.training.pruner import Pruner
from compressor.training.settings import Training
from compressor.validation import validated
from compressor.weights import bare, cast_, dtypes_of, twin, unwrapped


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
    `arguments` are the pipeline's, for every picture. What is in `out` already is kept.

    Raises CompressorError: for a number that is not allowed, a part with hooks of diffusers that change its answers, with fused
    projections or with weights that are offloaded one by one, a folder with records of another pipeline or other pictures, and where
    the pipeline fails.
    """
    lines = [{**arguments, **line} for line in as_calls(prompts)]
    validated(Record, {"n": n, "unseen": unseen, "steps": steps, "keep": keep, "seed": seed}, "record()")
    if steps is not None and any(COUNT in line for line in lines):
        raise UsageError(f"record: steps and {COUNT} are two numbers of steps", "Give one of them.")
    found = opened(pipe, part) if is_pipeline(pipe) else open_pipeline(pipe, part)
    refuse_hooked(found, copied=False)
    refuse_fused(found.module)
    wanted = pictures(lines, n, unseen, seed)
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
    pattern, and losses that stop being finite; of a pipeline also for a part that cannot be copied or trained, before anything is
    recorded, and for records of another pipeline, or of a part that answered otherwise. Warns of a rule of `ignore` that matches no
    layer, and of other components that are of the class of the part.
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
    if found.left_dense is not None:
        warnings.warn(found.left_dense, stacklevel=2)
    _refuse_part(found, validated(Training, given, "prune()").steps)
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


def prune_(
    model: Any,
    pruner: Pruner,
    *,
    adapter: Adapter | None = None,
    data: Any = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    part: str | None = None,
    **training: Any,
) -> Result:
    """Prune `model` itself, in one shot: as `prune` with steps=0, but in place, in the model's own dtype, and without a copy.

    Above the model, memory goes to what the method keeps of its calibration, to one layer at a time where the method is
    `separable`, and to a bit per masked entry. The arguments are those of `prune`; of the `training` only the batches are used
    (`batch_size`, `seed`). Of a pipeline the `part` in it is pruned, with the Recording that `compressor.record` gave as `data`.
    In half precision calibration runs in it, so that scores are not to the last bit those of `prune`.
    Raises CompressorError as `prune` does; a model that a method had begun to change is then not what it was.
    """
    if not is_pipeline(model):
        if adapter is None or data is None:
            raise UsageError("prune_: a module needs adapter= and data=", "Give both: help(compressor.prune_).")
        if part is not None:
            raise UsageError("prune_: part is for pipelines", "Leave it out for a module.")
        return in_place.prune_(model, pruner, adapter=adapter, data=data, targets=targets, ignore=ignore, **training)
    if adapter is not None:
        raise UsageError("prune_: a pipeline brings its own adapter", "Leave adapter out.")
    if not isinstance(data, Recording):
        raise UsageError(
            "prune_: a pipeline needs data=, the records of its calls",
            "Make them: compressor.record(pipe, prompts, folder).",
        )
    found = opened(model, part)
    _refuse_part(found, 0, is_copied=False)
    _refuse_records(data, found)
    rules = {"targets": targets, "ignore": ignore}
    given = {**DEFAULTS["train"], **training}
    return in_place.prune_(found.module, pruner, adapter=adapter_of_calls(found, data), data=data, **rules, **given)


class Applied:
    """A part of a pipeline that another module stands for, until `remove` or the end of a `with` block."""

    def __init__(self, pipe: Any, part: str, module: nn.Module) -> None:
        self.pipe, self.part, self.module = pipe, part, module
        self._before: nn.Module | None = opened(pipe, part).module
        put(pipe, part, module)

    def remove(self) -> None:
        """Put the part that was there before back. Again, it does nothing.

        Raises UsageError where another module was put over it since: what was applied last is removed first.
        """
        if self._before is None:
            return
        if unwrapped(part_of(self.pipe, self.part)) is not unwrapped(self.module):
            raise UsageError(
                f"remove: {self.part} is not the module any more that was put there",
                f"Remove first what was applied after it, or put the module that you want there yourself: pipe.{self.part} = …",
            )
        if (grown := resized(unwrapped(self.module), unwrapped(self._before))) is not None:
            warnings.warn(
                f"remove: {self.part}: {grown} in the part that is put back: what was loaded since (textual inversion) goes with "
                "the former, and its tokens stay in the tokenizer; unload it before, or load it anew",
                stacklevel=2,
            )
        put(self.pipe, self.part, self._before)
        self._before = None

    def __enter__(self) -> Any:
        return self.pipe

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def example_inputs(
    pipe: Any,
    prompt: str | Mapping[str, Any] | None = None,
    *,
    part: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    **arguments: Any,
) -> dict[str, Any]:
    """What the pipeline `pipe` calls its `part` with (None: what denoises), by name: the example for `compressor.lower`.

    The pipeline draws a picture of `prompt`, a text or a mapping of its own arguments, with `arguments` and noise of `seed`, until it
    first calls the part, and no further. For an autoencoder's decoder that is nearly all of it: `steps` of the sampler (None: the
    pipeline's own number) can be few. Raises CompressorError: where the pipeline fails, never calls the part (but a module inside it,
    `vae.decoder`), or calls it in a way that has no names.
    """
    validated(Record, {"steps": steps, "seed": seed}, "example_inputs()")
    found = opened(pipe, part)
    (given,) = as_calls([{} if prompt is None else prompt])
    args, kwargs = first_call(found, Picture(arguments={**arguments, **given}, seed=seed), steps)
    names = inspect.signature(bare(found.module).forward)
    example = dict(names.bind(*args, **kwargs).arguments)
    for one in names.parameters.values():
        if one.kind is one.VAR_KEYWORD:
            example.update(example.pop(one.name, {}))
        elif one.kind in (one.VAR_POSITIONAL, one.POSITIONAL_ONLY) and example.pop(one.name, ()):
            raise CompressorError(
                f"{found.part} is called with arguments that have no names (*{one.name})",
                "Give compressor.lower a tuple of what it is called with.",
            )
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), example)  # type: ignore[no-any-return]


_LOWERING = ("backends", "dtype", "plan", "compiled", "tolerance", "max_error", "cache", "fuse_projections")
"""Arguments of `compressor.lower` that `apply` hands on."""


def apply(pipe: Any, pruned: Any, *, part: str | None = None, lowered: bool | Mapping[str, Any] = False) -> Applied:
    """Put a pruned model into the pipeline `pipe`, in the place of its `part` (None: that of the run, else what denoises).

    `pruned`: the directory of a run or of a saved model, a `Result`, a `Lowered`, or a module. With `lowered`, a run's model
    is lowered for this machine first, on the first of its recorded calls: True, or arguments of `compressor.lower`, such as
    `{"max_error": 0.05}` or `{"plan": Plan.read("runs/x/lowering.json")}`. The dtype and the device are those of the part: where a
    module has others, a copy of it is put there; a `Lowered` is put there as it is.
    `with compressor.apply(pipe, "runs/x"): …` takes it out again at the end; else `remove()` does. Several are removed in the
    opposite order. Raises CompressorError.
    """
    how = _how(lowered)
    folder = Path(pruned) if isinstance(pruned, (str, Path)) else None
    settings = recipes.read(folder / "recipe.yaml") if folder is not None and (folder / "recipe.yaml").is_file() else {}
    found = opened(pipe, part or settings.get("part"))
    own = found.module
    refuse_empty(own.state_dict(), f"{found.part}: ")
    if not any(map(is_lowered, own.modules())):  # one that was applied before stays as it is
        refuse_8_bits(bare(own))
    if folder is not None:
        module = saving.load(folder, copied(own))
    elif isinstance(pruned, (Result, Lowered)):
        module = pruned.model
    elif isinstance(pruned, nn.Module):
        module = pruned
    else:
        raise UsageError(
            f"apply: a {type(pruned).__name__}", "Give a run's directory, a Result, a Lowered or a module."
        )
    device = next((value.device for value in own.parameters()), torch.device("cpu"))
    if folder is None:
        refuse_lost(found, module, isinstance(pruned, Result))
    if not isinstance(pruned, Lowered):
        module = _like(module, own, device)
    # the saved model knows what its inputs look like
    if how is not None and folder is not None and settings.get("data"):
        adapter = saving.adapter_at(saving.model_folder(folder))
        module = lower(module, to_device(adapter.example_inputs(1), device), adapter=adapter, **how).model
    elif how is not None:
        if folder is None or not settings.get("prompts"):
            raise UsageError(
                "apply: lowered needs the directory of a pipeline's run",
                "Lower it yourself: compressor.lower(module, example).",
            )
        recipe = validated(recipes.Recipe, settings, str(folder))
        made = facts.begun(folder) or {}
        records = records_folder(recipe, index_for(recipe, found), made.get("pipeline_sha256"))
        if not (records / INDEX).is_file():
            raise CompressorError(
                f"apply: {folder} has no records of {found.part} with these weights in {records}",
                "Load the pipeline in the precision in which the run opened it, that of its files; or lower the model yourself: "
                "compressor.lower(module, example).",
            )
        calls = Recording.opened(records)
        adapter = adapter_of_calls(found, calls)
        module = lower(module, to_device(adapter.example_inputs(1), device), adapter=adapter, **how).model
    return Applied(pipe, found.part, module)


def _how(lowered: Any) -> Mapping[str, Any] | None:
    """The arguments of `lower` that `lowered` comes to, None where it is False. Raises UsageError for what is none of them."""
    if isinstance(lowered, bool):
        return {} if lowered else None
    if not isinstance(lowered, Mapping) or (other := [name for name in lowered if name not in _LOWERING]):
        what = f"a {type(lowered).__name__}" if not isinstance(lowered, Mapping) else repr(other[0])
        raise UsageError(
            f"apply: lowered is {what}", f"Give True, or arguments of compressor.lower: {', '.join(_LOWERING)}."
        )
    return lowered


def _like(module: nn.Module, own: nn.Module, device: torch.device) -> nn.Module:
    """`module` with the dtypes of `own`, by the names of its tensors, and on `device`: itself, or a copy where that changes it."""
    wanted, found = dtypes_of(unwrapped(own)), dtypes_of(unwrapped(module))
    same = all(wanted.get(name, dtype) == dtype for name, dtype in found.items())
    if same and all(value.device == device for value in (*module.parameters(), *module.buffers())):
        return module
    made = copied(module)
    cast_(unwrapped(made), wanted)
    return made.to(device)


def _refuse_part(found: Opened, steps: int, is_copied: bool = True) -> None:
    """Raise CompressorError where the part of `found` cannot be copied (where it `is_copied`), or trained for so many `steps`."""
    refuse_away(found)
    refuse_hooked(found, copied=True)
    refuse_untrainable(module := bare(found.module), steps)
    if is_copied:
        refuse_kept(module)
        twin(module)  # raises now what copying it would, for no memory
    if steps and not any(value.requires_grad for value in found.module.parameters()):
        raise UsageError(
            f"{found.part} is frozen: none of its weights is to be trained",
            f"pipe.{found.part}.requires_grad_(True), as peft leaves frozen what adapters were fused into; or prune with steps=0.",
        )


def _refuse_records(records: Recording, found: Opened) -> None:
    """Raise CompressorError where `records` are of another pipeline than `found`, or its part does not answer as it did then."""
    index = records.index
    if what := other_than(index, index_of(found, index.pictures, index.steps, index.keep)):
        raise CompressorError(
            f"{records.folder} has records of another pipeline than this one: {what}",
            "Record this pipeline: compressor.record(pipe, prompts, folder).",
        )
    refuse_changed(found, records)
