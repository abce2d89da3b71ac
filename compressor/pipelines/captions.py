"""A user's own captioned pictures as data for a pipeline's denoiser: latents by its autoencoder, captions by its own encoders.

What a caption comes to is what the pipeline itself calls its denoiser with: it is run for each caption up to its first call. So
no encoder, and no name of an argument, has to be known here; which argument is noisy and which is the time, the adapter says.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.adapter import Adapter, Conditions, to_device
from compressor.data.calls import Call, Picture
from compressor.data.latents import Autoencoder
from compressor.data.reading.captions import Captioned
from compressor.data.sets import ImageSet, Records
from compressor.data.settings import Loading, Record
from compressor.errors import UsageError, first_line
from compressor.pipelines.opened import Opened, takes
from compressor.pipelines.recording import copied, first_call, sample
from compressor.pipelines.same import components_of
from compressor.progress import Progress
from compressor.seeds import generator

_RECORD = "Record its calls instead: --prompts FILE in the place of --data."
_STEPS = 2  # of the sampler, where the pipeline is run to look at it
_NOT_TOLD = 10  # one sample of so many is told nothing, where guidance asks for that too
_JUDGED = 32  # predictions at least
_AT_ONCE = 8
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative; half precision rounds more
_HALF_TOLERANCE = 1e-2


@torch.no_grad()
def encoded(
    opened: Opened, adapter: Adapter, captioned: Captioned, record: Record, loading: Loading
) -> Generator[Progress, None, Records]:
    """`captioned` as records of clean latents and of what `opened` calls its denoiser with for each caption, in memory.

    `adapter` is that of the denoiser. `record` says how many pictures are held out (`unseen`, `seed`) and the pipeline's own
    `arguments`. Raises UsageError where the pipeline takes no text, or where it is not known how it makes what its denoiser is
    called with; that is tried on one caption, before anything is encoded. The autoencoder in `opened` is left in float32.
    """
    components = components_of(opened)  # now: the autoencoder will be in float32
    yield Progress("captions", 0, len(captioned.captions), "one is tried")
    asking = _Asking.of(opened, adapter, record.arguments, loading.size, captioned.captions[0])
    yield Progress("pictures", 0, len(captioned.captions))
    pictures, captions = captioned.images((3, *asking.size), loading.workers, loading.skip_damaged, loading.cache_mb)
    told: dict[str, Conditions] = {}
    for number, caption in enumerate(captions):
        yield Progress("captions", number, len(captions))
        if caption not in told:
            told[caption] = asking.conditions(caption)
    conditions = _joined(told)
    place = {caption: row for row, caption in enumerate(told)}
    latents = yield from asking.latents(pictures)
    made_of = [pictures.sha256, captions, components, record.model_dump(mode="json"), asking.size]
    whole = Records(
        pictures.name,
        {asking.name: latents, **conditions.arrays},
        frozenset(conditions.shared),
        conditions.constants,
        skipped=pictures.skipped,
        made_of=hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest(),
    )
    rows = torch.tensor([place[caption] for caption in captions])
    return _split(whole, conditions, rows, asking, record)


def _split(whole: Records, conditions: Conditions, rows: Tensor, asking: _Asking, record: Record) -> Records:
    """The samples to learn from, with those that are held out; `rows` are the places of the pictures' conditions."""
    latents, n = whole.arrays[asking.name], len(rows)
    order = torch.randperm(n, generator=generator(record.seed, "captions"))
    held = order[: min(record.unseen, max(1, n // 5))] if n > 1 else order[:0]
    seen = order[len(held) :].sort().values

    def of(pictures: Tensor) -> Records:
        arrays = {name: array[rows[pictures]] for name, array in conditions.arrays.items()}
        if asking.nothing is not None:
            count = math.ceil(len(pictures) / (_NOT_TOLD - 1))
            again = torch.randperm(len(pictures), generator=generator(record.seed, "not told", len(pictures)))[:count]
            pictures = torch.cat([pictures, pictures[again]])
            for name, array in arrays.items():
                arrays[name] = torch.cat([array, asking.nothing[name].expand(count, *array.shape[1:])])
        return replace(whole, arrays={asking.name: latents[pictures], **arrays, **conditions.shared})

    if not len(held):
        return of(seen)
    # a picture is asked about at several times, as one of them says little
    return replace(of(seen), held_out=of(held.repeat(math.ceil(_JUDGED / len(held)))))


@dataclass(frozen=True, eq=False)
class _Asking:
    """How a pipeline is asked: with which `arguments`, `height` and `width` among them. `name` is the denoiser's noisy argument;
    `packed`, whether its latents are rows of patches; `nothing`, what the denoiser is told for guidance beside the caption, None
    where there is no such."""

    opened: Opened
    adapter: Adapter
    arguments: Mapping[str, Any]
    name: str
    packed: bool
    autoencoder: Autoencoder
    nothing: Mapping[str, Tensor] | None

    @classmethod
    def of(cls, opened: Opened, adapter: Adapter, given: Mapping[str, Any], size: int | None, caption: str) -> _Asking:
        """Found by running the pipeline for `caption` twice, in a few steps. Raises CompressorError."""
        guided = _guided(opened, given)
        autoencoder = _autoencoder(opened)
        guided |= dict(zip(("height", "width"), _size(opened, {**guided, "prompt": caption}, size), strict=True))
        own = {**guided, **_without_guidance(opened)}
        found, plain = _drawn(opened, {**own, "prompt": caption})
        call, latents = found.calls[0], found.latents[-1]
        told = _alone(opened, adapter.conditions(call.args, call.kwargs))
        adapter.noised({told.name: told.noisy}, generator("captions"))  # raises now where the noise is not known
        _check_answer(opened, adapter, told, call)
        packed = latents.dim() == 3
        ours = _packed(opened, autoencoder.scaled(plain), packed)
        if told.noisy.shape != latents.shape or not _alike(opened, ours, latents):
            raise UsageError(
                f"{opened.name}: how it makes latents {tuple(latents.shape)} of what its autoencoder gives is not known here",
                _RECORD,
            )
        nothing = _nothing(opened, adapter, {**guided, "prompt": caption}, told)
        asking = cls(opened, adapter, own, told.name, packed, autoencoder, nothing)
        autoencoder.model.float()
        made = tuple(asking.encode(torch.zeros(1, 3, *asking.size)).shape)
        if made != tuple(latents.shape):
            raise UsageError(
                f"pictures of {asking.size} pixels make latents {made[1:]}, and {opened.name} draws {tuple(latents.shape[1:])}",
                "Choose another loading.size, such as a multiple of 32.",
            )
        return asking

    def conditions(self, caption: str) -> Conditions:
        """What the denoiser is told for `caption`."""
        args, kwargs = _first_call(self.opened, {**self.arguments, "prompt": caption})
        return _alone(self.opened, self.adapter.conditions(args, kwargs))

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) of the pictures."""
        return int(self.arguments["height"]), int(self.arguments["width"])

    def encode(self, images: Tensor) -> Tensor:
        """The latents of `images` (n, 3, height, width) in [-1, 1], as the denoiser takes them."""
        return _packed(self.opened, self.autoencoder.encode(images), self.packed)

    def latents(self, pictures: ImageSet) -> Generator[Progress, None, Tensor]:
        """The latents of all `pictures`."""
        parts = []
        for rows in torch.split(torch.arange(len(pictures)), _AT_ONCE):
            yield Progress("latents", int(rows[0]), len(pictures))
            parts.append(self.encode(pictures.images(rows)))
        return torch.cat(parts)


def _guided(opened: Opened, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with which the pipeline draws pictures, of the very size that it is asked for. Raises UsageError."""
    known = takes(opened.pipe)
    if "prompt" not in known:
        raise UsageError(
            f"{opened.name} takes no prompt, so that captions tell it nothing",
            "Train on the pictures alone: --model diffusers --weights DIR --data FOLDER.",
        )
    if opened.changes_pictures:
        raise UsageError(
            f"{opened.name} is given a picture besides the text, so that captions do not tell it all",
            'Record its calls: --prompts FILE.jsonl, with {"prompt": "…", "image": {"file_name": "cat.png"}} in each line.',
        )
    if "prompt" in given:
        raise UsageError("record.arguments.prompt: the captions are the prompts", "Leave it out.")
    return {**given, **({"use_resolution_binning": False} if "use_resolution_binning" in known else {})}


def _without_guidance(opened: Opened) -> dict[str, float]:
    """The arguments that turn guidance off. Where the model itself is told how much guidance to imitate, that stays."""
    imitated = bool(getattr(opened.module, "config", {}).get("guidance_embeds"))
    names = ("true_cfg_scale",) if imitated else ("true_cfg_scale", "guidance_scale")
    return {name: 1.0 for name in names if name in takes(opened.pipe)}


def _size(opened: Opened, arguments: Mapping[str, Any], size: int | None) -> tuple[int, int]:
    """The (height, width) of the pictures: those that the user's arguments or `loading.size` say, else the pipeline's own."""
    said = [arguments[name] for name in ("height", "width") if arguments.get(name) is not None]
    if said and (len(said) == 1 or size is not None or not all(type(one) is int and one > 0 for one in said)):
        raise UsageError(
            f"record.arguments: height {arguments.get('height')}, width {arguments.get('width')}, loading.size {size}",
            "Give both height and width, or loading.size alone.",
        )
    if said or size is not None:
        return (said[0], said[1]) if said else (size or 0, size or 0)
    prepare: Any = getattr(opened.pipe, "prepare_latents", None)
    if not callable(prepare) or not {"height", "width"} <= set(inspect.signature(prepare).parameters):
        raise UsageError(f"{opened.name}: in which size it draws is not known here", "Set loading.size.")
    found: list[tuple[int, int]] = []

    def seen(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(prepare).bind(*args, **kwargs).arguments
        found.append((int(given["height"]), int(given["width"])))
        return prepare(*args, **kwargs)

    with _instead(opened.pipe, "prepare_latents", seen):
        _first_call(opened, arguments)
    return found[0]


@contextmanager
def _instead(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """`function` in the place of the method `name` of one object, until the block ends."""
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)


def _sampled(opened: Opened, arguments: Mapping[str, Any], keep: bool) -> Any:
    return sample(opened, Picture(arguments=dict(arguments), seed=0), _steps(opened), keep=keep)


def _steps(opened: Opened) -> int | None:
    return _STEPS if "num_inference_steps" in takes(opened.pipe) else None


def _first_call(opened: Opened, arguments: Mapping[str, Any]) -> tuple[Any, Any]:
    """The arguments of the first call of the denoiser, which does not take place."""
    return copied(first_call(opened, Picture(arguments=dict(arguments), seed=0), _steps(opened)))  # type: ignore[no-any-return]


def _autoencoder(opened: Opened) -> Autoencoder:
    vae: Any = getattr(opened.pipe, "vae", None)
    if not all(callable(getattr(vae, name, None)) for name in ("encode", "decode")):
        raise UsageError(f"{opened.name} has no autoencoder: vae", _RECORD)
    return Autoencoder(vae, next(vae.parameters()).device)


def _drawn(opened: Opened, arguments: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """What a run of the pipeline gave, with its calls, and what it gave its autoencoder to decode (n, c, h, w)."""
    found: list[Tensor] = []
    vae: Any = opened.pipe.vae
    own = vae.decode

    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(latents.detach().float().cpu())
        return own(latents, *args, **kwargs)

    with _instead(vae, "decode", decode):
        drawn = _sampled(opened, arguments, keep=True)
    if not drawn.calls or not drawn.latents or not found:
        raise UsageError(f"{opened.name}: it does not call its {opened.part}, scheduler and vae in turn", _RECORD)
    if found[0].dim() != 4:
        raise UsageError(f"{opened.name}: its latents are not those of pictures: {tuple(found[0].shape)}", _RECORD)
    return drawn, found[0]


def _alone(opened: Opened, told: Conditions) -> Conditions:
    """`told`, once it is of one sample."""
    if len(told.noisy) != 1:
        raise UsageError(
            f"{opened.name} asks for {len(told.noisy)} samples at once: its guidance could not be turned off", _RECORD
        )
    return told


def _check_answer(opened: Opened, adapter: Adapter, told: Conditions, call: Call) -> None:
    """Refuse a denoiser that does not answer to the same as the pipeline told it, taken apart and put together again."""
    one = Records("", {told.name: told.noisy, **told.arrays, **told.shared}, frozenset(told.shared), told.constants)
    inputs = {**one.take(torch.arange(1)), told.time_name: told.time}
    try:
        given = to_device(inputs, next(opened.module.parameters()).device)
        found = adapter.predict(opened.module, given).float().cpu()
    except Exception as error:  # whatever a model raises
        raise UsageError(
            f"{opened.name}: its {opened.part} cannot be asked again: {first_line(error)}", _RECORD
        ) from error
    expected = call.output.float()
    if expected.dim() == found.dim() and expected.shape[1] == 2 * found.shape[1]:  # the other half is a variance
        expected = expected[:, : found.shape[1]]
    if found.numel() != expected.numel() or not _alike(opened, found, expected.reshape(found.shape)):
        raise UsageError(f"{opened.name}: its {opened.part} does not answer again as it did", _RECORD)


def _alike(opened: Opened, found: Tensor, expected: Tensor) -> bool:
    """Whether both are the same beyond the rounding of the precision in which the pipeline is stored."""
    dtypes = {next(part.parameters()).dtype for part in (opened.module, opened.pipe.vae)}
    limit = max(_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in dtypes)
    scale = float(expected.square().mean().sqrt()) or 1.0
    return found.shape == expected.shape and float((found - expected).square().mean().sqrt()) <= limit * scale


def _packed(opened: Opened, latents: Tensor, packed: bool) -> Tensor:
    """`latents` (n, c, h, w) as the denoiser takes them: by the pipeline's own packing where they are rows of patches."""
    pack = getattr(opened.pipe, "_pack_latents", None)
    if not packed:
        return latents
    try:
        found: Tensor = pack(latents, *latents.shape) if callable(pack) else latents
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{opened.name}: latents {tuple(latents.shape)} cannot be packed: {first_line(error)}",
            "Choose another loading.size, such as a multiple of 32.",
        ) from error
    return found


def _nothing(
    opened: Opened, adapter: Adapter, arguments: Mapping[str, Any], told: Conditions
) -> Mapping[str, Tensor] | None:
    """What the denoiser is told beside `told` when the pipeline draws with its guidance: the one other row of its first calls."""
    output = {"output_type": "latent"} if "output_type" in takes(opened.pipe) else {}
    drawn = _sampled(opened, {**arguments, **output}, keep=True)
    others: list[dict[str, Tensor]] = []
    for call in (call for call in drawn.calls if call.step == 0):
        both = adapter.conditions(call.args, call.kwargs)
        if both.constants != told.constants or not _equal(both.shared, told.shared):
            raise UsageError(f"{opened.name}: guidance changes what all samples share", _RECORD)
        for row in range(len(both.noisy)):
            one = {name: array[row : row + 1] for name, array in both.arrays.items()}
            if not any(_equal(one, known) for known in (told.arrays, *others)):
                others.append(one)
    if len(others) > 1:
        raise UsageError(
            f"{opened.name}: for guidance it asks its {opened.part} in {len(others) + 1} ways, not in two", _RECORD
        )
    if others and {name: array.shape for name, array in others[0].items()} != {
        name: array.shape for name, array in told.arrays.items()
    }:
        raise UsageError(f"{opened.name}: for guidance it gives its {opened.part} arguments of other shapes", _RECORD)
    return others[0] if others else None


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        array.shape == other[name].shape and torch.allclose(array.float(), other[name].float(), rtol=1e-2, atol=1e-3)
        for name, array in one.items()
    )


def _joined(told: Mapping[str, Conditions]) -> Conditions:
    """The conditions of all captions, a row each. Raises UsageError where they do not go together."""
    (_, first), *others = told.items()
    shapes = {name: tuple(array.shape) for name, array in first.arrays.items()}
    for caption, one in others:
        own = {name: tuple(array.shape) for name, array in one.arrays.items()}
        if own != shapes:
            differs = next(name for name in {**shapes, **own} if own.get(name) != shapes.get(name))
            raise UsageError(
                f"caption {caption[:40]!r} comes to {differs} {own.get(differs)}, the first one to {shapes.get(differs)}",
                f"Captions must come to tensors of one shape. {_RECORD}",
            )
        if one.constants != first.constants or not _equal(one.shared, first.shared):
            raise UsageError(f"caption {caption[:40]!r} changes what all samples share", _RECORD)
    if others and all(_equal(one.arrays, first.arrays) for _, one in others):
        raise UsageError("all captions come to the same: the pipeline does not tell its model of them", _RECORD)
    return replace(first, arrays={name: torch.cat([one.arrays[name] for one in told.values()]) for name in shapes})
