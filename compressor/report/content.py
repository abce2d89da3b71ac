"""What the report of a run holds: the types behind its `report.json`. Those of a comparison are in `compared`.

A field that may be left out is written only where it was given, so that files of earlier versions load, and new ones stay as
small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

DENSE, ONE_SHOT = "dense", "one-shot"
"""The names of the rows that every run has besides its method's."""

LOWERED, EAGER, PREPACKED = "lowered", "eager", "prepacked"
FEW_BITS = ", few bits"
"""What the names of dense forms end with that multiply some layers in fewer bits than the model has."""
PIPELINE, PIPELINE_LOWERED = "pipeline", "pipeline, lowered"
"""Backends of a latency that mean something to the report: the plan's choice, the model as it is or with its weights laid out for
their products, and a whole pipeline with the model lowered or not."""

ONNX, OPENVINO, TENSORRT = "ONNX Runtime", "OpenVINO", "TensorRT"
"""Engines: backends whose names begin so. After a comma, the precision of what is not in float32."""

GAIN = 1.03
"""A measured speed-up counts from here on: two timings of one thing differ by less."""


def gains(speedup: float) -> bool:
    """Whether a measured speed-up counts as one."""
    return speedup >= GAIN


Item = TypeVar("Item")
List = Annotated[tuple[Item, ...], Field(strict=False)]  # JSON has lists, not tuples
Pair = Annotated[tuple[float, float], Field(strict=False)]
Interval = Pair | None
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Value(BaseModel):
    """A part of a report: nothing but its fields, of exactly their types, finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def as_json(self) -> dict[str, Any]:
        """What the file holds: the fields that were given."""
        return self.model_dump(mode="json", exclude_unset=True)


class Quality(Value):
    """A measure of generated samples against real ones, with its 95% interval over the drawing of samples."""

    metric: str
    value: float
    ci95: Interval
    samples: int
    sampler_steps: int
    seed: int


class Scored(Value):
    """The mean of a score of pictures with their prompts, more being better; 95% interval over the drawing of pictures."""

    name: str
    value: float
    ci95: Interval
    samples: int
    extractor_sha256: Sha256


class Drift(Value):
    """A difference from the dense row, paired: same initial noise, same noised images."""

    metric: Literal["sample_rmse", "prediction_error", "ssim", "latent_error"]
    value: float
    samples: int
    by_time: List[Pair] | None = Field(default=None, description="(time, value); time 0 is the image, 1 the noise")


class Latency(Value):
    """The time of one forward pass of `batch` samples. Its setting is the backend, the device, the dtype and the batch size."""

    backend: str
    device: str
    dtype: str
    batch: int
    median_ms: float
    iqr_ms: float
    against: str = Field(description="the backend of the dense row that the speed-up is relative to")
    speedup_vs_dense: float = Field(description="measured on the weights of this row, interleaved with dense")
    speedup_ci95: Interval = Field(
        default=None, description="of the speed-up, from the rounds in which both took turns; null where they were few"
    )
    error: float | None = Field(
        default=None,
        description="root mean square difference from the same weights in eager float32, in standard deviations of the output",
    )
    of_plan: bool = Field(default=False, description="whether it is the form of the report's plan of lowering")
    timed: Count = Field(default=0, description="which timing of the run it is from: forms of one timing took turns")

    @property
    def setting(self) -> tuple[str, str, str, int]:
        return self.backend, self.device, self.dtype, self.batch

    @property
    def of_engine(self) -> bool:
        """Whether another engine than PyTorch ran it."""
        return self.backend.startswith((ONNX, OPENVINO, TENSORRT))

    @property
    def is_gain(self) -> bool:
        """Whether the speed-up is one: large enough, and above 1 with its whole interval."""
        return gains(self.speedup_vs_dense) and (self.speedup_ci95 is None or self.speedup_ci95[0] > 1)

    @property
    def is_loss(self) -> bool:
        """Whether it is slower, as surely as `is_gain` says that it is faster."""
        slower = 0 < self.speedup_vs_dense < 1 and gains(1 / self.speedup_vs_dense)
        return slower and (self.speedup_ci95 is None or self.speedup_ci95[1] < 1)


class TrainSummary(Value):
    """How long a model was fine-tuned."""

    steps: int
    seconds: float
    skipped: int = Field(default=0, description="steps that changed nothing, as their loss or gradient was not finite")


class Costs(Value):
    """What a model costs. Multiply-accumulates are of one forward pass of one sample, attention products included."""

    density: Share = Field(description="nonzero share of the pruned weights")
    params: Count
    nonzero_params: Count
    size_bytes: Count = Field(description="the saved weights file")
    macs_dense: int
    macs_effective: int = Field(description="without multiplications by a zero weight")
    macs_lowered: int = Field(description="without those that a kernel really skips")


class _Named(Value):
    name: str
    weights_sha256: Sha256


class Row(Costs, _Named):
    """A variant of the model. Every figure belongs to the weights of the hash."""

    quality: List[Quality] = Field(
        description="first the Fréchet distance, then the further measures in the same features"
    )
    drift: List[Drift]
    scores: List[Scored] = Field(default=(), description="of pictures with their prompts: rows of pipelines")
    latency: List[Latency]
    train: TrainSummary

    def drift_by(self, metric: str) -> Drift | None:
        """The drift of that name."""
        return next((entry for entry in self.drift if entry.metric == metric), None)

    @property
    def of_pipeline(self) -> Latency | None:
        """The time of the whole pipeline with these weights, lowered where it was."""
        found = [entry for entry in self.latency if entry.backend == PIPELINE_LOWERED]
        return next((entry for entry in (*found, *self.latency) if entry.backend in (PIPELINE, PIPELINE_LOWERED)), None)

    @property
    def standing(self) -> Latency | None:
        """The latency that stands for the row: that of the plan where it was lowered, else the first."""
        return self._first(self.latency)

    def standing_at(self, batch: int) -> Latency | None:
        """As `standing`, of the times with this batch size alone."""
        return self._first([entry for entry in self.latency if entry.batch == batch])

    @staticmethod
    def _first(entries: Sequence[Latency]) -> Latency | None:
        own = [entry for entry in entries if entry.backend not in (PIPELINE, PIPELINE_LOWERED)]
        planned = [entry for entry in own if entry.of_plan]
        older = [entry for entry in own if entry.backend == LOWERED]  # files from before `of_plan`
        return next(iter((*planned, *older, *own)), None)


class Layer(Value):
    """A layer of the model, and why it is dense where it is."""

    name: str
    shape: List[int]
    pattern: str | None
    density: Share
    flips_per_weight: float | None
    reason: str | None = Field(description="why the layer is dense; null where it is pruned")


class Floor(Value):
    """The distance between two disjoint halves of the real images, `samples` in each."""

    value: float
    ci95: Interval
    samples: int


class MetricFacts(Value):
    """The metric that `quality` begins with."""

    name: str
    extractor_sha256: Sha256
    floor: Floor


class DataFacts(Value):
    """The real images (or records)."""

    name: str
    sha256: Sha256
    samples: Annotated[int, Field(ge=1)]
    kind: Literal["images", "calls"] = "images"
    skipped: Count = Field(default=0, description="damaged pictures that were left out")


class Environment(Value):
    """The machine and the versions."""

    versions: dict[str, str]
    hardware: str
    platform: str


class _Part(Value):
    """A part of the plan of `compressor lower`: the fields that a report reads. The plan's own types have the others."""

    model_config = ConfigDict(extra="allow")


class LoweredBy(_Part):
    """A backend that was tried on a layer."""

    backend: str
    median_ms: float | None
    refused: str | None


class LoweredLayer(_Part):
    """How a layer runs."""

    name: str
    weights: List[str]
    shapes: List[List[int]]
    patterns: List[str | None]
    candidates: List[LoweredBy]
    choice: str
    reason: str
    skips_zeros: bool
    fused: List[str] = Field(
        default=(),
        description="the layers that are one product in all forms but `eager`; empty where it is one",
    )


class LoweredForm(_Part):
    """A form of the whole model."""

    name: str
    error: float | None


class LoweredOn(_Part):
    """Where the plan was measured."""

    hardware: str
    threads: int


class Lowering(_Part):
    """The plan of `compressor lower`."""

    choice: str
    reason: str
    layers: List[LoweredLayer]
    forms: List[LoweredForm]
    left_out: dict[str, str]
    setting: LoweredOn


class TradeOff(Value):
    """A whole pipeline with weights of a row in a form, a cache of diffusers, and a number of sampler steps: the time of one picture,
    and how far its pictures are from those of the first entry, from the same noise."""

    row: str
    form: str
    cache: str | None
    steps: int | None = Field(description="null for the pipeline's own number")
    median_ms: float
    iqr_ms: float
    sample_rmse: float
    ssim: float
    samples: int


class Report(Value):
    """The report of a run: a row for the dense model, one for the method without fine-tuning, one for its result."""

    schema_version: Literal[1]
    method: str = Field(description="the name of the row of the finished model")
    model: str
    pattern: str | None = Field(description="the pattern of the finished weights; null where nothing is masked")
    seed: Count
    settings: dict[str, Any] = Field(description="the method's own settings, resolved")
    weights_sha256: Sha256 = Field(description="the pretrained weights that the run started from")
    data: DataFacts
    sampler: str
    metric: MetricFacts | None
    rows: Annotated[tuple[Row, ...], Field(strict=False, min_length=1)]
    layers: List[Layer]
    environment: Environment
    recipe: dict[str, Any]
    repeat: str = Field(description="the command that repeats the run")
    lowering: Lowering | None = Field(default=None, description="null where the model was not lowered")
    trade_offs: List[TradeOff] = Field(
        default=(),
        description="weights, caches and steps of a pipeline, timed in turns; the first is what all are held against",
    )
    limitations: List[str]

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names) or self.method not in names:
            raise ValueError(
                f"rows are called {', '.join(names)}, the method {self.method}: each once, and the method's among them"
            )
        return self

    def row(self, name: str) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def dense(self) -> Row | None:
        return self.row(DENSE)

    @property
    def final(self) -> Row:
        """The row of the finished model."""
        return next(row for row in self.rows if row.name == self.method)

    def with_rows(self, *changed: Row) -> Report:
        """This report with `changed` in place of the rows of the same names."""
        new = {row.name: row for row in changed}
        return self.model_copy(update={"rows": tuple(new.get(row.name, row) for row in self.rows)})
