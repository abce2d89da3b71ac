"""A pipeline of diffusers and the part of it that is worked on."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.data.outsized import check_pipeline
from compressor.data.single_file import refuse_single_file
from compressor.data.variants import outline_of, refuse_codes, variant_of
from compressor.environment import quiet_libraries, usual_torch
from compressor.errors import CompressorError, UsageError, did_you_mean, first_line
from compressor.files import read_json
from compressor.foreign.loaded import refuse_partly_loaded, reported
from compressor.foreign.sound import refuse_quantised_config
from compressor.weights import unwrapped

DENOISERS = ("unet", "transformer", "prior")
"""What pipelines call the model that denoises."""
_DAMAGED = (
    "The folder is incomplete or damaged, or a package that it needs is not installed: "
    'pip install "diffusion-compressor[pipelines]".'
)
_OWN_CODE = (
    "Code in a folder is not run here. Read it, load the pipeline in Python with trust_remote_code=True, and give that: "
    "compressor.record(pipe, …), compressor.prune(pipe, …)."
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Opened:
    """A pipeline in memory, the part of it that is worked on (`unet`, `transformer`, `vae.decoder`), and the folder that it is of."""

    pipe: Any
    part: str
    source: Path | None = None

    @property
    def module(self) -> nn.Module:
        """The part itself."""
        return part_of(self.pipe, self.part)

    @property
    def component(self) -> str:
        """The name of the pipeline's component that has the part."""
        return self.part.partition(".")[0]

    @property
    def name(self) -> str:
        """The pipeline's class."""
        return type(self.pipe).__name__

    @property
    def changes_pictures(self) -> bool:
        """Whether diffusers knows the pipeline for changing or completing pictures, and not for drawing them of text alone."""
        from diffusers.pipelines import auto_pipeline as known

        of_pictures = (
            *known.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.values(),
            *known.AUTO_INPAINT_PIPELINES_MAPPING.values(),
        )
        return type(self.pipe) in {*of_pictures} - {*known.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}

    @property
    def left_dense(self) -> str | None:
        """In words, which other components are of the class of the part, such as the second of two models that share the times."""
        own = type(unwrapped(self.module))
        modules = [name for name, value in self.pipe.components.items() if type(unwrapped(value)) is own]
        others = [name for name in modules if name != self.part]
        if self.part not in modules or not others:
            return None
        return f"{' and '.join(others)}, of the class of {self.part}, left dense: each is pruned as a part of its own"

    @contextmanager
    def having(self, module: nn.Module) -> Iterator[Any]:
        """The pipeline, with `module` in the place of the part until the block ends."""
        before = self.module
        put(self.pipe, self.part, module)
        try:
            yield self.pipe
        finally:
            put(self.pipe, self.part, before)


@contextmanager
def must_be_called(opened: Opened) -> Iterator[None]:
    """Raises CompressorError at the end of a block in which a picture was drawn, and the part in the pipeline was not called."""
    calls: list[None] = []
    handle = opened.module.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise CompressorError(
            f"{opened.name} draws pictures without its {opened.part}: it holds that model in another place, too",
            "Nothing can be said of its pictures. Record, prune and apply the pipeline that calls the model itself.",
        )


@usual_torch()
def open_pipeline(source: str | Path, part: str | None = None, device: torch.device | str = "cpu") -> Opened:
    """The pipeline in the folder `source`, or of that name on the hub; each component in the precision that it is stored in.

    `part` is a component, or a module inside one by its path; None is the model that denoises. Raises CompressorError where
    there is no pipeline, or nothing of that name in it.
    """
    import diffusers

    library: Any = diffusers  # it has few annotations
    folder = Path(source)
    if folder.is_file():
        refuse_single_file(folder, anyway=True)
    if not folder.is_dir():
        if folder.exists() or len(folder.parts) != 2:
            raise UsageError(
                f"{source}: no such folder", "Give the folder of a pipeline (with model_index.json), or OWNER/NAME."
            )
        try:
            folder = Path(library.DiffusionPipeline.download(str(source)))
        except Exception as error:  # offline, not found, not allowed: a type each
            raise UsageError(
                f"{source}: no such folder, and not to be had from the hub: {type(error).__name__}", "Give a folder."
            ) from error
    if not (folder / "model_index.json").is_file():
        raise UsageError(
            f"{folder}: no model_index.json", "Give the folder of a whole pipeline, as save_pretrained writes it."
        )
    check_pipeline(folder)  # diffusers opens whatever is there, and builds it
    index = read_json(folder / "model_index.json")
    _refuse_code(folder, index)
    components = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    part = part if part is not None else next((name for name in DENOISERS if name in components), None)
    if part is None or part.partition(".")[0] not in components:
        raise _no_part(part, components, str(folder))
    if (own := folder / part.partition(".")[0] / "config.json").is_file():
        refuse_quantised_config(read_json(own), own)
    pipe = _loaded(folder, components, str(index.get("_class_name")))
    return opened(pipe.to(device), part, folder)


def _loaded(folder: Path, components: Sequence[str], kind: str) -> Any:
    """The pipeline of the class `kind` in `folder`, with each of its `components` in the precision that it is stored in."""
    import diffusers

    library: Any = diffusers
    variant = _variant(folder)
    outlines = {name: outline_of(folder / name, variant) for name in components}
    for name, outline in outlines.items():
        own = folder / name / "config.json"
        if own.is_file() and not read_json(own).get("quantization_config"):
            refuse_codes(outline, own.parent)
    dtypes = {name: dtype for name, outline in outlines.items() if (dtype := _usual_dtype(outline)) is not None}
    given: dict[str, Any] = {}
    if dtypes:  # the argument's name changed in 0.42
        name = "dtype" if _version(library.__version__) >= (0, 42) else "torch_dtype"
        given[name] = {**dtypes, "default": torch.float32}
    if variant is not None:
        given["variant"] = variant
    try:
        with quiet_libraries(), reported() as loaded:
            pipe = library.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **given)
    except Exception as error:  # a dozen types, from missing files and packages to damaged ones
        raise CompressorError(f"{folder}: {kind} cannot be opened: {first_line(error)[:300]}", _DAMAGED) from error
    for path, model, report in loaded:
        refuse_partly_loaded(model, report, path)
    return pipe


def _refuse_code(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise CompressorError where the class of the pipeline or of a component is code in the folder: diffusers 0.37 runs it."""
    own = index.get("_class_name")
    found = [f"{own[0]}.py"] if isinstance(own, list) and own else []
    named = {name: value[0] for name, value in index.items() if isinstance(value, list) and value}
    found += [f"{name}/{module}.py" for name, module in named.items() if (folder / name / f"{module}.py").is_file()]
    if found:
        raise CompressorError(f"{folder} contains custom code in {found[0]}", _OWN_CODE)


def opened(pipe: Any, part: str | None = None, source: Path | None = None) -> Opened:
    """The pipeline `pipe` of diffusers, in memory. Raises UsageError where it is none, or has no such part."""
    if not is_pipeline(pipe):
        raise UsageError(f"a {type(pipe).__name__} is no pipeline of diffusers", "Give a DiffusionPipeline.")
    names = [name for name, value in pipe.components.items() if isinstance(value, nn.Module)]
    part = part if part is not None else next((name for name in DENOISERS if name in names), None)
    if part is None or part.partition(".")[0] not in names:
        raise _no_part(part, names, type(pipe).__name__)
    part_of(pipe, part)
    return Opened(pipe, part, source)


def is_pipeline(value: Any) -> bool:
    """Whether `value` is a pipeline, by what pipelines have: it is called, and has components."""
    return (
        callable(value)
        and not isinstance(value, (nn.Module, type))
        and isinstance(getattr(value, "components", None), Mapping)
    )


def part_of(pipe: Any, part: str) -> nn.Module:
    """The module of that name in `pipe`. Raises UsageError."""
    component, _, path = part.partition(".")
    found: Any = getattr(pipe, component, None)
    try:
        if isinstance(found, nn.Module):
            return found.get_submodule(path)
    except AttributeError as error:
        inner = [name for name, _ in found.named_children()]
        raise UsageError(f"{component} has no part {path!r}", did_you_mean(path, inner)) from error
    raise _no_part(part, list(pipe.components), type(pipe).__name__)


def put(pipe: Any, part: str, module: nn.Module) -> None:
    """Put `module` into the place of `part`, in place; also in the pipelines that `pipe` is combined from, which hold its components
    by themselves."""
    component, _, path = part.partition(".")
    before = getattr(pipe, component)
    if path:
        before.set_submodule(path, module)
        return
    setattr(pipe, component, module)
    for inner in _combined(pipe, {id(pipe)}):
        for name in [name for name, value in vars(inner).items() if value is before]:
            setattr(inner, name, module)


def _combined(pipe: Any, seen: set[int]) -> Iterator[Any]:
    """The pipelines that `pipe` holds, and those that they hold."""
    for value in vars(pipe).values():
        if id(value) not in seen and is_pipeline(value):
            seen.add(id(value))
            yield value
            yield from _combined(value, seen)


def takes(pipe: Any) -> frozenset[str]:
    """The names of the arguments that the pipeline is called with. A class that passes on what it does not name (`**kwargs`) takes
    what the class takes that it is made from."""
    found: set[str] = set()
    for call in (vars(kind)["__call__"] for kind in type(pipe).__mro__ if "__call__" in vars(kind)):
        parameters = inspect.signature(call).parameters.values()
        found |= {one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return frozenset(found) - {"self"}


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def _no_part(part: str | None, names: list[str], where: str) -> UsageError:
    if part is None:
        return UsageError(f"{where}: no {' or '.join(DENOISERS)} among {', '.join(names)}", "Name a part with --part.")
    return UsageError(f"{where}: no part {part!r}", did_you_mean(part, names))


def _usual_dtype(outline: Mapping[str, Tensor]) -> torch.dtype | None:
    """The floating-point type that most tensors of a component have in its files; None where it has none."""
    counts = Counter(value.dtype for value in outline.values() if value.dtype in _DTYPES)
    return counts.most_common(1)[0][0] if counts else None


def _variant(folder: Path) -> str | None:
    """The variant (`fp16`) that some component's weights are stored as alone; of others it is opened where they have it."""
    found = {variant_of(inner) for inner in folder.iterdir() if inner.is_dir()} - {None}
    return found.pop() if len(found) == 1 else None
