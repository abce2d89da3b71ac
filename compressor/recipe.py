"""Recipes: the settings of a run, read from YAML, merged, validated and written back resolved.

Order: defaults, the model's own, the recipe file, flags, `--set`. A setting inside a section may be named without it
(`lr` for `train.lr`), in a file and with `--set` alike; a name that two sections have (`seed`) is then `train`'s.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ruamel.yaml import YAML, events
from ruamel.yaml.error import YAMLError

from compressor.data.settings import Loading, Record
from compressor.errors import UsageError
from compressor.foreign.bounded import read_bytes
from compressor.quality.settings import Evaluation
from compressor.training.settings import Training

_MAX_BYTES = 64 * 1024
_MAX_DEPTH = 8
_MAX_VALUES = 2000


_Error = Annotated[float, Field(gt=0, le=1)] | None


class Lowering(BaseModel):
    """How the model is lowered, where `lower` asks for it: the errors that are allowed of each layer (`tolerance`) and of the whole
    model, and whether Linears that take the same tensor are one product (None: on a GPU)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    tolerance: _Error = None
    max_error: _Error = None
    fuse_projections: bool | None = None


class Recipe(BaseModel):
    """One run. `settings` are the method's own; `pattern`, `targets` and `ignore` are None where the default holds. With
    `from_scratch` the model has random weights at the start, drawn from `train.seed`, and fits the data."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str = "uvit-digits"
    weights: str | None = None
    architecture: dict[str, Any] = Field(default_factory=dict)
    data: str | None = None
    vae: str | None = None
    pipeline: str | None = None
    part: str | None = None
    prompts: str | None = None
    records: str | None = None
    method: str = "sparsedm"
    pruner: str | None = None
    pattern: str | None = None
    targets: list[str] | None = None
    ignore: list[str] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    train: Training = Training()
    evaluate: Evaluation = Evaluation()
    loading: Loading = Loading()
    record: Record = Record()
    checkpoint_every: Annotated[int, Field(ge=1)] = 100
    lower: bool = False
    lowering: Lowering = Lowering()
    from_scratch: bool = False

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("train"), dict):
            betas = values["train"].get("betas")
            if isinstance(betas, list):  # YAML has no tuples
                values = {**values, "train": {**values["train"], "betas": tuple(betas)}}
        return values


SECTIONS: Mapping[str, type[BaseModel]] = {
    "train": Training,
    "evaluate": Evaluation,
    "loading": Loading,
    "record": Record,
    "lowering": Lowering,
}


def read(path: str | Path) -> dict[str, Any]:
    """The settings in a recipe file, not yet validated.

    Raises UsageError, with path and line, where the file is too large, is not YAML, or has a duplicate key. `2:4` and
    `1e-4` need no quotes here: this is YAML 1.2.
    """
    path = Path(path)
    try:
        text = read_bytes(path, _MAX_BYTES).decode("utf-8")
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror or error}", "A recipe is a text file of a few dozen lines."
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file", "A recipe is YAML in UTF-8.") from error
    try:
        return placed(parse_yaml(text, str(path)))
    except UsageError as error:
        if str(path) in error.message:
            raise
        raise UsageError(f"{path}: {error.message}", error.hint) from error


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping that a YAML text holds; see `read`."""
    loader = YAML(typ="safe", pure=True)
    try:
        for number, fault in _unplain(text):
            raise UsageError(f"{where}:{number}: {fault}", "Write plain keys, values and lists.")
        values = loader.load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise UsageError(
            f"{where}{line}: {problem}", "Each key stands once; the recipe.yaml of any run has all settings."
        ) from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise UsageError(f"{where}: {error}", "A recipe is YAML.") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{where}: not a mapping of names to settings", "Write `key: value` lines.")
    return values


def _unplain(text: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) for whatever in the text is more than a little plain data, before anything is built from it."""
    depth = 0
    for count, event in enumerate(YAML(typ="safe", pure=True).parse(io.StringIO(text))):
        line = event.start_mark.line + 1
        if isinstance(event, events.AliasEvent) or getattr(event, "anchor", None):
            yield line, "anchors and aliases are not used in recipes"
        if getattr(event, "tag", None) not in (None, "!"):
            yield line, "tags are not used in recipes"
        depth += isinstance(event, (events.MappingStartEvent, events.SequenceStartEvent))
        depth -= isinstance(event, (events.MappingEndEvent, events.SequenceEndEvent))
        if depth > _MAX_DEPTH:
            yield line, f"nested deeper than {_MAX_DEPTH} levels"
        if count > _MAX_VALUES:
            yield line, f"more than {_MAX_VALUES} keys and values"


def plain_assignment(text: str) -> dict[str, Any]:
    """`KEY=VALUE` as {KEY: value}, whatever the key; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{text!r}: not KEY=VALUE", "Write it like guidance_scale=3")
    return {key.strip(): parse_yaml(f"value: {value}" if value.strip() else "value: ''", key.strip())["value"]}


def plain_assignments(texts: Iterable[str], of: str) -> dict[str, Any]:
    """As `plain_assignment`, all of them together. Raises UsageError where a key stands twice: one value would be gone without a word;
    `of` is what has them."""
    found: dict[str, Any] = {}
    for text in texts:
        for key, value in plain_assignment(text).items():
            if key in found:
                raise UsageError(f"{of}: {key} is given twice", "Give it once.")
            found[key] = value
    return found


def assignment(text: str) -> dict[str, Any]:
    """`section.key=value` as nested settings; the value is read as YAML (`1e-4`, `true`, `2:4`, `[a, b]`)."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text!r}: not KEY=VALUE", "Write it like --set train.lr=1e-4")
    where = f"--set {key.strip()}"
    loaded = parse_yaml(f"value: {value}" if value.strip() else "value: ''", where)
    if set(loaded) != {"value"}:
        raise UsageError(f"{where}: more than one value", "Give --set once for each setting.")
    nested: Any = loaded["value"]
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return nested  # type: ignore[no-any-return]


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings laid over each other, later ones on top; sections are merged key by key."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in placed(layer).items():
            old = result.get(key)
            result[key] = _laid(old, value)
    return result


def _laid(below: Any, above: Any) -> Any:
    """`above` over `below`: key by key where both are sections, and so on inside of them."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _laid(below.get(key), value) for key, value in above.items()}}


def placed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with short names put into the section that they belong to."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        homes = [name for name, section in SECTIONS.items() if key in section.model_fields]
        if key in Recipe.model_fields or not homes:
            section_key, inner = key, value
        else:
            section_key, inner = homes[0], {key: value}
        old = result.get(section_key)
        if isinstance(old, dict) and isinstance(inner, dict):
            if twice := old.keys() & inner.keys():
                raise UsageError(f"{sorted(twice)[0]!r} is given twice", f"Write it once, under {section_key}.")
            inner = {**old, **inner}
        result[section_key] = inner
    return result


_LATER: Mapping[str, tuple[str, ...]] = {
    "": ("pipeline", "part", "prompts", "records", "record", "from_scratch", "lowering"),
    "evaluate": ("scores",),
    "train": ("mode", "lora", "gradient_checkpointing", "compiled", "optimizer", "offload", "parallel", "times"),
}
"""Settings that came after the first recipes were hashed, by section."""


def is_whole(settings: Mapping[str, Any]) -> bool:
    """Whether `settings` name every setting, as the recipe does that a run wrote, of this version or an earlier one."""
    return Recipe.model_fields.keys() - _LATER[""] <= settings.keys()


def identity(recipe: Recipe, evaluated: bool = False) -> dict[str, Any]:
    """The settings that make a run's model what it is, as JSON: all but how it is evaluated, which may change (`evaluated`: that too,
    as earlier versions had it, less the budget, which has done its work). Settings of later versions are left out where they have
    their default, so that the runs of earlier ones are still known."""
    found = recipe.model_dump(mode="json", exclude={"evaluate": {"budget"} if evaluated else True})
    default = Recipe().model_dump(mode="json")
    for section, names in _LATER.items():
        if section not in ("", *found):
            continue
        own, usual = (found, default) if not section else (found[section], default[section])
        for name in names:
            if own[name] == usual[name]:
                del own[name]
    return found


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `read` gives the same settings back."""
    writer = YAML()
    writer.default_flow_style = False
    text = io.StringIO()
    writer.dump(recipe.model_dump(mode="json"), text)
    return text.getvalue()
