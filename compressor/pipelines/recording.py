"""Recording: a pipeline is run as its user runs it, and every call of one of its parts is kept, whatever it is called with.

So what a model is told (time, noise, guidance, conditions, by whatever names) need not be known here to be right.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compressor import files
from compressor.adapter import dtype_taken
from compressor.data import calls as storage
from compressor.data.calls import Call, Index, Picture, Recording, answer
from compressor.errors import CompressorError, LockedError, UsageError, did_you_mean, first_line
from compressor.pipelines.opened import Opened, takes
from compressor.pipelines.prompts import COUNT, described
from compressor.pipelines.same import components_of, refuse_changed
from compressor.processes import team
from compressor.progress import Progress
from compressor.report.numbers import size
from compressor.seeds import generator
from compressor.weights import bare, weights_sha256

STAGE = "record"
_LEFTOVER = re.compile(rf"\.partial-\d+-({re.escape(storage.INDEX)}|picture-\d+\.safetensors)")
_SPARE = 64 * 2**20  # bytes that are left free on the disk
_TURN = RLock()
"""Held while a pipeline runs: threads share the class of a scheduler, which is watched, and the generator that all noise may be of."""


@dataclass(eq=False)
class Sampled:
    """What one run of a pipeline gave: its `images` (n, channels, height, width) in [-1, 1], the latents after each step of the
    scheduler, and the calls of the part, where they were asked for."""

    images: Tensor | None = None
    latents: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


@torch.no_grad()
def sample(opened: Opened, picture: Picture, steps: int | None, keep: bool = False) -> Sampled:
    """Run the pipeline for one `picture`, with noise of its seed alone. With `keep`, every call of the part is kept.

    Threads take turns. Raises UsageError for arguments that the pipeline does not take, and CompressorError where it fails.
    """
    pipe, known = opened.pipe, takes(opened.pipe)
    for name in picture.arguments:
        if name not in known:
            raise UsageError(f"{opened.name} takes no {name!r}", did_you_mean(name, known))
    given = dict(picture.arguments)
    if steps is not None:
        if COUNT not in known:
            raise UsageError(f"{opened.name} takes no number of steps", "Leave --steps out.")
        given[COUNT] = steps
    if "output_type" in known:
        given.setdefault("output_type", "np")
    if "generator" in known:
        given["generator"] = torch.Generator().manual_seed(picture.seed)
    found = Sampled()
    with _TURN, _quiet(pipe), _steps(pipe, found), _kept(opened.module, found, keep), torch.random.fork_rng(devices=[]):
        torch.manual_seed(picture.seed)  # for pipelines that draw some of their noise without the generator
        try:
            output = pipe(**given)
        except CompressorError:
            raise
        except Exception as error:  # whatever a pipeline raises
            raise CompressorError(
                f"{opened.name} fails: {type(error).__name__}: {first_line(error)[:300]}",
                "Run it in plain diffusers with the same arguments first.",
            ) from error
    found.images = None if given.get("output_type") == "latent" else _images(output)
    total = max(len(found.latents), 1)
    found.calls = [Call(c.args, c.kwargs, c.output, min(c.step, total - 1), total) for c in found.calls]
    return found


class _Enough(BaseException):
    """The first call has been seen; no error, so that nothing on the way takes it for one."""


def first_call(opened: Opened, picture: Picture, steps: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the part's first call when the pipeline draws `picture`; the call does not take place. Tensors are
    the pipeline's own. Raises CompressorError as `sample` does, and where the part is not called."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args, kwargs))
        raise _Enough

    handle = opened.module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        sample(opened, picture, steps)
    except _Enough:
        return found[0]
    finally:
        handle.remove()
        if callable(last := getattr(opened.pipe, "maybe_free_model_hooks", None)):
            last()  # a pipeline's last step: caches forget the picture, and what is offloaded goes back
    raise _never_called(opened)


def _never_called(opened: Opened) -> CompressorError:
    inner = [f"{opened.part}.{name}" for name, _ in opened.module.named_children()]
    hint = f" A part can be a module inside one: {', '.join(inner[:6])}." if inner else ""
    return CompressorError(f"{opened.name} never called {opened.part}", f"Name the part that is called.{hint}")


def index_of(opened: Opened, pictures: Sequence[Picture], steps: int | None, keep: int | None = None) -> Index:
    """What records of the part of `opened` for these `pictures` are of; `steps` of None is the pipeline's own number, and `keep` of
    None keeps every call of a picture.

    Raises CompressorError where the part is none that can be pruned, or something of the pipeline is not in memory.
    """
    module = bare(opened.module)
    components = components_of(opened)
    dtype = dtype_taken(module) or torch.float32
    return Index(
        pipeline=opened.name,
        part=opened.part,
        module=type(module).__name__,
        weights_sha256=weights_sha256(module),
        dtype=str(dtype).removeprefix("torch."),
        components=components,
        steps=steps,
        keep=keep,
        pictures=[p.model_copy(update={"arguments": described(p.arguments)}) for p in pictures],
    )


def recording(
    opened: Opened, index: Index, folder: Path, pictures: Sequence[Picture] | None = None
) -> Generator[Progress, None, Recording]:
    """Run the pipeline for all pictures of `index` and keep the calls of its part in `folder`. What is there already stays.

    `pictures` are those of `index` with their very arguments, where some are no JSON.

    The processes of a launch share the pictures; the first one writes.

    After the first picture, the disk space that all will take is told, and an error where there is less. Where another process
    records into `folder`, it is waited for. Raises CompressorError where `folder` has the records of another pipeline, other pictures
    or another number of steps, or where the part does not answer the first call that is there as it did.
    """
    here = team()
    if not here.shared(here.leads and _is_whole(folder, index)):
        with ExitStack() as stack:
            while here.leads and (reason := _busy(folder, stack)) is not None:
                yield Progress(STAGE, 0, len(index.pictures), f"waits: {reason}")
            yield from _recorded(opened, index, folder, pictures)
    yield Progress(STAGE, len(index.pictures), len(index.pictures))
    return Recording.opened(folder)


def _busy(folder: Path, stack: ExitStack) -> str | None:
    """Hold `folder` until `stack` ends; after a second in vain, who has it."""
    try:
        stack.enter_context(files.claimed(folder, wait=1.0))
    except LockedError as error:
        return error.message
    return None


def _is_whole(folder: Path, index: Index) -> bool:
    """Whether all that `index` asks for is in `folder`, which nobody may be able to write to."""
    if not (folder / storage.INDEX).is_file():
        return False
    refuse_other(folder, index)
    try:
        for number in range(len(index.pictures)):
            storage.outline(storage.shard(folder, number))
    except CompressorError:
        return False
    return True


def _recorded(
    opened: Opened, index: Index, folder: Path, pictures: Sequence[Picture] | None
) -> Generator[Progress, None, None]:
    """As `recording`, by who holds `folder`."""
    here, every = team(), list(index.pictures if pictures is None else pictures)
    if here.leads:
        begin(folder, index)
    known: set[str] = set()
    there = here.shared(_there(folder, len(every), known) if here.leads else [])
    lacking = [number for number in range(len(every)) if number not in there]
    if here.leads and there and lacking:
        before = Recording.opened(folder, only=there)
        if len(before := before if len(before) else before.unseen):
            refuse_changed(opened, before)
    told = False
    for first in range(0, len(lacking), here.size):  # as many at once as there are processes
        turn = lacking[first : first + here.size]
        yield Progress(STAGE, turn[0], len(every), f"picture {turn[0] + 1}")
        own = _calls(opened, index, every[turn[here.rank]]) if here.rank < len(turn) else []
        for number, calls in zip(turn, here.gathered(own), strict=False):
            path = storage.shard(folder, number)
            if here.leads:
                storage.write(path, calls, known)
            if here.leads and not told:
                told = True
                yield Progress(STAGE, number + 1, len(every), _told(folder, path, len(every) - number - 1))
    here.shared(None)  # the others read when all is written


def _there(folder: Path, count: int, known: set[str]) -> list[int]:
    """Which of `count` pictures are recorded in `folder` and not damaged; `known` gets the names of their tensors."""
    found = []
    for number in range(count):
        with suppress(CompressorError):
            _, names = storage.outline(storage.shard(folder, number))
            known.update(names)
            found.append(number)
    return found


def _calls(opened: Opened, index: Index, picture: Picture) -> Sequence[Call]:
    """The calls of `picture` that are kept."""
    found = sample(opened, picture, index.steps, keep=True)
    if not found.calls:
        raise _never_called(opened)
    return _some(found.calls, index.keep, picture.seed)


def _some(calls: Sequence[Call], keep: int | None, seed: int) -> Sequence[Call]:
    """`keep` of the `calls`, in their order; which, `seed` decides. All where they are no more, or where it is None."""
    if keep is None or keep >= len(calls):
        return calls
    chosen = torch.randperm(len(calls), generator=generator(seed, "calls"))[:keep].sort().values
    return [calls[number] for number in chosen.tolist()]


def begin(folder: Path, index: Index) -> None:
    """Make `folder` one of records of `index`, without what a process that died left in it. Raises CompressorError where it has
    others, or anything else. For who holds `folder`."""
    for leftover in folder.glob(".partial-*"):
        if _LEFTOVER.fullmatch(leftover.name):
            files.remove(leftover)
    if (folder / storage.INDEX).is_file():
        refuse_other(folder, index)
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already, and has no records", "Choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / storage.INDEX, index.model_dump(mode="json"))
    except (OSError, TypeError, ValueError) as error:
        raise CompressorError(
            f"{folder}: {getattr(error, 'strerror', None) or error}", "Choose another folder."
        ) from error


def refuse_other(folder: Path, index: Index) -> None:
    """Raise CompressorError where the records in `folder` are not those of `index`."""
    if what := other_than(storage.read_index(folder), index):
        raise CompressorError(f"{folder} has records of {what}", "Choose another folder, or remove this one.")


def other_than(there: Index, index: Index) -> str | None:
    """What records of `there` are of and those of `index` are not, in words; None where both are the same."""
    for name in ("pipeline", "part", "module", "dtype", "weights_sha256", "components", "steps", "keep", "pictures"):
        found, wanted = getattr(there, name), getattr(index, name)
        if found == wanted:
            continue
        if name == "pictures":
            return "other prompts, their number or their seed"
        if name == "components":
            others = sorted(one for one in {**found, **wanted} if found.get(one) != wanted.get(one))
            return f"another {' and '.join(others)}"
        if name == "weights_sha256":
            return f"other weights of {there.part}: {name} {found[:16]}…, not {wanted[:16]}…"
        return f"{name} {str(found)[:40]}, not {str(wanted)[:40]}"
    return None


def _told(folder: Path, first: Path, more: int) -> str:
    """What the rest will take on the disk. Raises CompressorError where there is less."""
    each = first.stat().st_size
    free = shutil.disk_usage(folder).free
    if each * more + _SPARE > free:
        raise CompressorError(
            f"{folder}: the records would take {size(each * (more + 1))}, and {size(free)} are free",
            "Record fewer pictures or steps, or choose another folder; the first picture is kept.",
        )
    return f"the records take about {size(each * (more + 1))} on the disk"


def _images(output: Any) -> Tensor | None:
    """The pictures (n, channels, height, width) in [-1, 1] of a pipeline's output, videos frame by frame; or None."""
    found = getattr(output, "images", None)
    found = getattr(output, "frames", None) if found is None else found
    if isinstance(found, Tensor):
        found = found.float().cpu().numpy().transpose(*range(found.dim() - 3), -2, -1, -3)
    elif isinstance(found, list) and found:
        found = np.stack([np.asarray(one) for one in found])
    if not isinstance(found, np.ndarray) or found.ndim < 4:
        return None
    if found.dtype == np.uint8:
        found = found / 255
    pixels = torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32)).flatten(0, -4)
    return pixels.permute(0, 3, 1, 2) * 2 - 1


@contextmanager
def _kept(module: nn.Module, found: Sampled, keep: bool) -> Iterator[None]:
    """Every call of `module` goes into `found.calls`, as it was before the call changed anything."""
    if not keep:
        yield
        return
    given: list[tuple[Any, Any]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(copied((args, kwargs)))

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        own_args, own_kwargs = given.pop()
        found.calls.append(Call(own_args, own_kwargs, copied(answer(output)), len(found.latents), 0))

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copied(value: Any) -> Any:
    """`value` with copies of its tensors, on the CPU."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), value)


@contextmanager
def _steps(pipe: Any, found: Sampled) -> Iterator[None]:
    """The latents after each step of the pipeline's scheduler go into `found.latents`."""
    scheduler: Any = getattr(pipe, "scheduler", None)
    # on the class: what a pipeline makes a copy of would step the one that it is of; unless the user gave this one a step of its own
    is_own = "step" in getattr(scheduler, "__dict__", {})
    holder: Any = scheduler if is_own else type(scheduler)
    own: Callable[..., Any] | None = getattr(holder, "step", None)
    if own is None:
        yield
        return

    @wraps(own)  # pipelines ask the step which arguments it takes, and leave out the others: eta, generator
    def step(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        if is_own or args[0] is scheduler:
            latents = output[0] if isinstance(output, tuple) else getattr(output, "prev_sample", None)
            kept = latents.detach().float().cpu().clone() if isinstance(latents, Tensor) else torch.zeros(0)
            found.latents.append(kept)
        return output

    inherited = "step" not in vars(holder)
    holder.step = step
    try:
        yield
    finally:
        if inherited:
            del holder.step
        else:
            holder.step = own


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own bar: progress is the caller's to show."""
    before: Mapping[str, Any] | None = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = dict(before or {})
