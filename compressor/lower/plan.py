"""What was measured and chosen when a model was lowered: values that can be saved, read and applied again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from compressor import files
from compressor.environment import cache_folder
from compressor.errors import CompressorError
from compressor.validation import validated

FILE = "lowering.json"
_DAY_MS = 86_400_000.0

_Positive = Annotated[float, Field(gt=0)]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Against(_Value):
    """A form beside another in the same rounds: the other's time over its own, the median of single rounds, and how many of the
    `rounds` it won."""

    ratio: _Positive
    wins: int
    rounds: int


class Candidate(_Value):
    """One backend for one layer: its median time and its error against the dense layer, or why it was not measured.

    `error` is the root mean square difference from the dense layer in float64, relative to that layer's output. `against` has
    the dense backends that took turns with it; plans from before have none.
    """

    backend: str
    median_ms: _Positive | None = None
    error: float | None = None
    refused: str | None = None
    against: dict[str, Against] = Field(default_factory=dict)


class LayerPlan(_Value):
    """How one layer, feed-forward pair or attention runs. `shapes` has M, N and K of each product: rows of input, output channels,
    products per output. `fused` names the layers that take the same tensor and are one product, but in the model as it is."""

    name: str
    kind: Literal["linear", "pair", "convolution", "attention"]
    weights: tuple[str, ...]
    shapes: tuple[tuple[int, int, int], ...]
    patterns: tuple[str | None, ...]
    dtype: str
    gflop: float
    candidates: tuple[Candidate, ...]
    choice: str
    reason: str
    skips_zeros: bool
    fused: tuple[str, ...] = ()

    def candidate(self, backend: str) -> Candidate | None:
        """The candidate of that backend."""
        return next((c for c in self.candidates if c.backend == backend), None)


class Form(_Value):
    """One form of the whole model. `speedup` is over the fastest dense form, the median of single rounds; `error` is against the dense
    model."""

    name: str
    dense: bool
    median_ms: _Positive
    iqr_ms: float
    speedup: float
    error: float | None = None
    against: dict[str, Against] = Field(default_factory=dict)
    products: tuple[str, ...] = ()
    """What it multiplies in besides the model's dtype, as far as backends say: "int8"."""


class Search(_Value):
    """What was measured while layers were chosen for an error of the whole model (relative, root mean square, on the example).

    `free` with every layer in the form that is fastest for it alone, `error` as planned, `alone` with one layer in that form and all
    others dense, by layer; empty where every layer fitted in. `slower` is the same with its slower forms in few bits, by layer and
    backend. None where an output was not finite, or the model did not run.
    """

    max_error: _Positive
    free: float | None
    error: float | None
    alone: dict[str, float | None] = Field(default_factory=dict)
    slower: dict[str, dict[str, float | None]] = Field(default_factory=dict)

    @property
    def remark(self) -> str:
        """It in words."""
        free, error = ("not finite" if value is None else f"{value:.1e}" for value in (self.free, self.error))
        return f"error of the whole model: {error}, up to {self.max_error:.1e} was asked; {free} with each layer at its fastest"


class Setting(_Value):
    """What a measured time depends on besides the layer. `cores` are those that the process may use, parts of them too where its time
    is limited; None in plans from before. `versions` has what restricts torch too."""

    device: str
    hardware: str
    threads: int
    versions: dict[str, str]
    cores: float | None = None

    def other_than(self, now: Setting) -> tuple[str, object, object] | None:
        """What this says that is otherwise in `now`: its name, as it is here, and as it is there. What a plan from before does not say
        is not compared."""
        for name in ("device", "hardware", "threads", "cores"):
            if (was := getattr(self, name)) is not None and was != (found := getattr(now, name)):
                return name, was, found
        for name, version in self.versions.items():
            if version != (found := now.versions.get(name)):
                return name, version, found
        return None


class Plan(_Value):
    """How a model was lowered: every layer's choice, the forms of the whole model that were timed, and the one chosen."""

    schema_version: Literal[1] = 1
    weights_sha256: str
    dtype: str
    input_shapes: tuple[tuple[int, ...], ...]
    setting: Setting
    layers: tuple[LayerPlan, ...]
    left_out: dict[str, str]
    forms: tuple[Form, ...]
    choice: str
    reason: str
    notes: tuple[str, ...] = ()
    search: Search | None = None
    """Where an error of the whole model was given."""
    tolerance: Annotated[float, Field(gt=0, le=1)] | None = None
    """The error that each layer may have, where one was given."""
    exact: tuple[str, ...] = ()
    """Layers whose form in the dense form `dense` quantises nothing: the whole model's error would be above what is allowed."""
    alike: bool = False
    """Whether no layer of the dense form is less exact than its choice, for the same reason."""
    backends: dict[str, str] = Field(default_factory=dict)
    """The versions of the backends that were timed: of compiled kernels the instruction set and a digest of their files."""
    taken: Annotated[float, Field(ge=0, le=1)] | None = None
    """The share of the time in which other programs had the cores while the model's forms were timed; None where it is not known, and
    where it does not matter: with one thread, with more threads than cores, and on a GPU."""

    @property
    def lowered(self) -> bool:
        """Whether the chosen form has a sparse kernel in it."""
        return self.choice.startswith("lowered") and any(layer.skips_zeros for layer in self.layers)

    @property
    def fused(self) -> tuple[tuple[str, ...], ...]:
        """The layers that are one product in every form but the model as it is (`eager`), group by group."""
        return tuple(layer.fused for layer in self.layers if layer.fused)

    def skipping(self) -> set[str]:
        """The names of the weights whose zeros are really left out."""
        return {name for layer in self.layers if layer.skips_zeros for name in layer.weights} if self.lowered else set()

    @property
    def dense_in_few_bits(self) -> tuple[str, ...]:
        """The dense forms that multiply some layers in fewer bits than the model has."""
        return tuple(form.name for form in self.forms if form.dense and form.products)

    def only(self, names: Collection[str]) -> Plan:
        """The plan with the forms of these names alone."""
        return self.model_copy(update={"forms": tuple(form for form in self.forms if form.name in names)})

    def form(self, name: str) -> Form | None:
        """The form of that name."""
        return next((form for form in self.forms if form.name == name), None)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, in one step. Raises CompressorError where the disk does not take it."""
        files.write_text(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """The plan saved at `path` (the file, or the folder of a run). Raises CompressorError where it is not one."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        return validated(cls, files.read_json(path), str(path), "Lower the model again: its plan has what is allowed.")


class Cache:
    """Measured times on disk, one small file per measurement, named by everything that the times depend on.

    In `environment.cache_folder`. A file that cannot be read or written is no error. Without `read`, only written.
    """

    def __init__(self, setting: Setting, folder: Path | None = None, read: bool = True) -> None:
        self.folder = folder or cache_folder("timings")
        self.setting, self.read = setting, read
        self.used = False
        """Whether a choice was made by times from here."""
        self.busy = 0.0
        """The largest share of the time that other programs had the cores while layers were timed, where that makes them doubtful."""

    def get(self, key: str) -> dict[str, tuple[float, ...]] | None:
        """The times stored for `key`: milliseconds by backend, of each round."""
        try:
            found = files.read_json(self._path(key)) if self.read else {}
        except CompressorError:
            return None
        times = found.get("rounds_ms")
        if found.get("key") != key or not isinstance(times, dict) or not all(_are_times(own) for own in times.values()):
            return None
        return {name: tuple(own) for name, own in times.items()} if len(set(map(len, times.values()))) == 1 else None

    def put(self, key: str, times: Mapping[str, Sequence[float]]) -> None:
        """Store the times of `key`."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, {"key": key, "setting": self.setting.model_dump(), "rounds_ms": times})
        except (OSError, CompressorError):
            return

    def _path(self, key: str) -> Path:
        text = json.dumps([self.setting.model_dump(), key], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _are_times(own: object) -> bool:
    return isinstance(own, list) and bool(own) and all(isinstance(ms, float) and 0 < ms < _DAY_MS for ms in own)
