"""Recorded calls: what a part of a pipeline was called with and what it answered, in safetensors files that hold each tensor once.

A folder of records has `index.json`, what was recorded of which model, and a file per picture, `picture-00000.safetensors`. The
tensors in it are called by the SHA-256 of their kind, shape and bytes, and stand in the file of the first picture that has them. The
file's metadata says, as JSON, which calls were made of them: nested arguments keep their nesting.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from compressor import files, validation
from compressor.data.sets import SampleSet
from compressor.errors import CompressorError
from compressor.foreign.bounded import check_regular, mapping
from compressor.weights import raw

INDEX = "index.json"
_EARLIER = "(Earlier versions did not keep which scheduler, text encoder, … their records are of.)"
_AGAIN = "Record again: remove this file and repeat the command; the other pictures are kept."


class Picture(BaseModel):
    """One picture of a recording: the pipeline's own arguments, the seed of its noise, and whether fine-tuning leaves it out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    arguments: dict[str, Any]
    seed: int
    unseen: bool = False


def _of_torch(name: str) -> str:
    """The name of a dtype. Raises ValueError where PyTorch has none of that name."""
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError("not a dtype of PyTorch")
    return name


class Index(BaseModel):
    """What a recording is of: a part of a pipeline of the class `pipeline`, its `weights_sha256` and `dtype`, and hashes of all else
    in the pipeline, by `components`. `keep` is how many calls of each picture are kept, None for all."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[2] = 2
    pipeline: str
    part: str
    module: str
    weights_sha256: str
    dtype: Annotated[str, AfterValidator(_of_torch)]
    components: dict[str, str]
    steps: int | None
    keep: int | None = None
    pictures: list[Picture] = Field(min_length=1)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as PyTorch has it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def pipeline_sha256(self) -> str:
        """A hash of the pipeline beside the weights of the part."""
        return hashlib.sha256(json.dumps([self.pipeline, self.components], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Call:
    """One call: its arguments, the answer (batch, …), and where in sampling it was: `step` of `steps`, 0 being the first."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    step: int = 0
    steps: int = 1

    @property
    def time(self) -> float:
        """From 1, the start of sampling, where there is nothing but noise, to 0."""
        return 1 - (self.step + 0.5) / max(self.steps, 1)


def answer(output: Any) -> Tensor:
    """The tensor that a model's `output` comes to: it, the first value of a tuple or mapping, or a list of samples, stacked. Where
    other values are tensors too, as sound beside a video or the last part of a ControlNet's answer, the numbers of all of them (n,).

    Raises CompressorError where that is none.
    """
    values = list(
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
    )
    found = values[0] if values else None
    if isinstance(found, Tensor) and len(every := [value for value in values if isinstance(value, Tensor)]) > 1:
        return torch.cat([value.flatten() for value in every])
    if isinstance(found, (list, tuple)) and any(value is not None for value in values[1:]):
        leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        found = torch.cat([leaf.flatten() for leaf in leaves]) if leaves else found
    if isinstance(found, (list, tuple)) and found and all(isinstance(one, Tensor) for one in found):
        if len({one.shape for one in found}) > 1:
            raise CompressorError("the model answers samples of unlike shapes", "Record pictures of one size.")
        found = torch.stack(found)
    if not isinstance(found, Tensor):
        raise CompressorError(f"the model answers a {type(found).__name__}, not a tensor", "Record another part.")
    return found


def write(path: Path, calls: Sequence[Call], known: set[str]) -> None:
    """Write the calls of a picture to `path`, without the tensors in `known`, which gets their hashes.

    Raises CompressorError for an argument of a kind that cannot be kept, and where the disk does not take the file.
    """
    tensors: dict[str, Tensor] = {}
    own: set[str] = set()

    def keep(tensor: Tensor) -> str:
        value = tensor.detach().cpu().contiguous()
        digest = hash_of(value)
        if digest not in known and digest not in own:
            tensors[digest] = value.clone()
            own.add(digest)
        return digest

    listed = [
        {
            "args": _plain(list(call.args), keep, "argument"),
            "kwargs": _plain(dict(call.kwargs), keep, "argument"),
            "output": keep(call.output),
            "step": call.step,
            "steps": call.steps,
        }
        for call in calls
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as partial:
            # one key alone: safetensors leaves the order of several to chance, and the same calls shall give the same bytes
            save_file(tensors, partial, metadata={"calls": json.dumps(listed)})
            partial.chmod(0o644)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise CompressorError(
            f"{path}: cannot be written: {getattr(error, 'strerror', None) or error} ({size:,} bytes)",
            "Free some space or choose another folder; what was recorded before is kept, and the same command goes on.",
        ) from error
    known |= own


@dataclass(frozen=True, eq=False)
class Recording(SampleSet):
    """The calls in a folder of records: those that are fine-tuned on, or with `of_unseen` those that are held out.

    A batch is a list of `Call`. Raises CompressorError where a picture is missing or damaged.
    """

    folder: Path
    index: Index
    of_unseen: bool = False
    _listed: list[dict[str, Any]] = field(default_factory=list, repr=False)
    _homes: dict[str, Path] = field(default_factory=dict, repr=False)
    _whole: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def opened(cls, folder: str | Path, only: Sequence[int] | None = None) -> Recording:
        """The recording in `folder`; or, of its pictures `only`, the calls that are whole. No tensor is read yet."""
        folder = Path(folder)
        found = cls(folder, read_index(folder))
        for number in range(len(found.index.pictures)) if only is None else only:
            picture = found.index.pictures[number]
            path = shard(folder, number)
            listed, names = outline(path)
            found._homes.update((name, path) for name in names)
            found._listed.extend({**call, "unseen": picture.unseen} for call in listed)
        whole = [call for call in found._listed if all(ref in found._homes for ref in _references(call))]
        if only is not None:
            return replace(found, _listed=whole)
        if len(whole) < len(found._listed):
            raise CompressorError(f"{folder}: a tensor of its calls is in none of its files", _AGAIN)
        if not len(own := found.part_of(unseen=False)):
            raise CompressorError(
                f"{folder}: no calls to learn from: it has those of held-out pictures alone",
                "Record again: `compressor record --n N --unseen K` holds K of its pictures out, besides N.",
            )
        return own

    def part_of(self, unseen: bool) -> Recording:
        """The calls of the pictures that fine-tuning leaves out, or of the others."""
        return replace(self, of_unseen=unseen)

    @property
    def name(self) -> str:  # type: ignore[override]
        """What reports call these records."""
        return f"records of {self.index.part}"

    @property
    def unseen(self) -> Recording:
        held = self.part_of(unseen=True)
        return held if len(held) else self

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def _calls(self) -> list[dict[str, Any]]:
        return [call for call in self._listed if call["unseen"] == self.of_unseen]

    def take(self, indices: Tensor) -> list[Call]:
        """The calls at `indices` (k,)."""
        calls = self._calls
        return [self._read(calls[index]) for index in indices.tolist()]

    def near(self, time: float) -> Tensor:
        """The indices of the calls of the step whose time is nearest to `time`, from 0 (no noise) to 1."""
        times = torch.tensor([1 - (call["step"] + 0.5) / max(call["steps"], 1) for call in self._calls])
        distance = (times - time).abs()
        return (distance <= distance.min() + 1e-6).nonzero().flatten()

    @property
    def short(self) -> str | None:
        """A line where pictures have fewer calls than were to be kept of each; None where all have as many."""
        keep, found, of = self.index.keep, len(self._listed), len(self.index.pictures)
        few = keep is not None and found < keep * of
        return f"keep {keep}: the {of} pictures have {found} calls in all, fewer than that of each" if few else None

    @property
    def sha256(self) -> str:
        """The hash of all calls, by the hashes of their tensors; of the whole recording."""
        text = json.dumps([self.index.model_dump(exclude={"pipeline"}), self._listed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _read(self, call: Mapping[str, Any]) -> Call:
        made = _made(call["args"], self._tensor), _made(call["kwargs"], self._tensor)
        if not bool(self._tensor(call["output"]).isfinite().all()):
            raise CompressorError(
                f"{self._homes[call['output']]}: the model's answer in step {call['step']} holds NaN or infinity",
                "The pipeline failed there: record in float32 or bfloat16, or without that prompt.",
            )
        return Call(tuple(made[0]), made[1], self._tensor(call["output"]), call["step"], call["steps"])

    def _tensor(self, digest: str) -> Tensor:
        path = self._homes[digest]
        try:
            check_regular(path)
            with mapping(), safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(digest)
        except (SafetensorError, OSError) as error:
            raise CompressorError(f"{path}: {error}", _AGAIN) from error
        if digest not in self._whole:
            if hash_of(tensor) != digest:
                raise CompressorError(f"{path}: its bytes are not those that were recorded", _AGAIN)
            self._whole.add(digest)
        return tensor


def read_index(folder: Path) -> Index:
    """What the recording in `folder` is of."""
    return validation.from_file(
        Index, folder / INDEX, "an index of recorded calls", f"Record again into another folder. {_EARLIER}"
    )


def shard(folder: Path, number: int) -> Path:
    """The file of the calls of the picture `number`."""
    return folder / f"picture-{number:05d}.safetensors"


def outline(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(the calls, as they are written; the names of the tensors) in a picture's file. Raises CompressorError."""
    try:
        check_regular(path)
        with mapping(), safe_open(path, framework="pt") as file:
            calls = json.loads((file.metadata() or {})["calls"])
            names = list(file.keys())
        if not isinstance(calls, list) or not all(map(_is_call, calls)):
            raise ValueError("its calls are not what this toolkit writes")
    except FileNotFoundError as error:
        raise CompressorError(
            f"{path}: missing: the recording is not finished", "Repeat the command that records: it goes on from here."
        ) from error
    except (SafetensorError, OSError, ValueError, LookupError, RecursionError) as error:
        raise CompressorError(f"{path}: {error}", _AGAIN) from error
    return calls, names


_DEEPEST = 32
_LONGEST = 1_000_000


def _is_call(call: Any) -> bool:
    """Whether `call` is one as `write` lists it: arguments as `_plain` gives them, and a step of so many."""
    if not isinstance(call, dict) or not {"args", "kwargs", "output", "step", "steps"} <= set(call):
        return False
    step, steps, args, kwargs = call["step"], call["steps"], call["args"], call["kwargs"]
    counted = type(step) is int and type(steps) is int and 0 <= step <= _LONGEST and 0 <= steps <= _LONGEST
    placed = isinstance(args, dict) and set(args) == {"list"} and isinstance(kwargs, dict) and set(kwargs) == {"dict"}
    return counted and placed and isinstance(call["output"], str) and _is_plain(args, 0) and _is_plain(kwargs, 0)


def _is_plain(value: Any, depth: int) -> bool:
    """Whether `value` is what `_plain` gives."""
    if not isinstance(value, dict) or len(value) != 1 or depth > _DEEPEST:
        return False
    ((kind, held),) = value.items()
    if kind in ("list", "tuple"):
        return isinstance(held, list) and all(_is_plain(one, depth + 1) for one in held)
    if kind == "dict":
        return isinstance(held, dict) and all(_is_plain(one, depth + 1) for one in held.values())
    if kind == "dtype":
        return isinstance(held, str) and isinstance(getattr(torch, held, None), torch.dtype)
    if kind == "number":
        return held in ("nan", "inf", "-inf")
    return isinstance(held, str) if kind == "tensor" else kind == "value" and not isinstance(held, (dict, list))


def joined(answers: Sequence[Tensor]) -> Tensor:
    """`answers`, one after another along dim 0; as numbers (n,) where they differ in another dim, as those of unlike sizes do."""
    alike = all(
        answer.shape[1:] == answers[0].shape[1:] for answer in answers
    )  # sizes that torch.export follows have no hash
    return torch.cat([answer if alike else answer.flatten() for answer in answers])


def hash_of(tensor: Tensor) -> str:
    """The hash of a tensor: its dtype, its shape and its bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(raw(tensor))
    return digest.hexdigest()


def _plain(value: Any, keep: Any, where: str) -> Any:
    """`value` as JSON, a mark on everything that JSON does not have; tensors are handed to `keep`, which gives their hash."""
    if isinstance(value, Tensor):
        return {"tensor": keep(value)}
    if isinstance(value, (bool, int, float, str, type(None))):
        return {"value": value} if not isinstance(value, float) or math.isfinite(value) else {"number": str(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(one, keep, f"{where}.{key}") for key, one in value.items()}}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_plain(one, keep, f"{where}.{at}") for at, one in enumerate(value)]}
    raise CompressorError(
        f"{where}: a {type(value).__name__} cannot be kept",
        "Tensors, numbers, text, and lists and mappings of them can. Record the pipeline without it.",
    )


def _made(value: Any, take: Any) -> Any:
    """The inverse of `_plain`."""
    ((kind, held),) = value.items()
    match kind:
        case "tensor":
            return take(held)
        case "value":
            return held
        case "number":
            return float(held)
        case "dtype":
            return getattr(torch, held)
        case "dict":
            return {key: _made(one, take) for key, one in held.items()}
        case "list":
            return [_made(one, take) for one in held]
        case "tuple":
            return tuple(_made(one, take) for one in held)
    raise CompressorError(f"a recorded argument is a {kind}", "The records are of a newer version, or damaged.")


def _references(call: Mapping[str, Any]) -> Iterator[str]:
    """The hashes of all tensors of a call as it is written."""
    waiting: list[Any] = [call["args"], call["kwargs"], {"tensor": call["output"]}]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict) and set(value) == {"tensor"} and isinstance(value["tensor"], str):
            yield value["tensor"]
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
