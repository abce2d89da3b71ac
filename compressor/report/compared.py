"""What the report of a comparison holds, and what its jobs leave; and the schema of both kinds of `report.json`.

`schema.json` is made from these types and those of `content`: `make schema` writes it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from compressor.report.content import (
    Count,
    DataFacts,
    Drift,
    Environment,
    Interval,
    Latency,
    Layer,
    List,
    MetricFacts,
    Quality,
    Report,
    Row,
    Sha256,
    Share,
    TrainSummary,
    Value,
)


class Judged(Value):
    """What a finished job of a comparison leaves in `row.json`. The dense one has the metric, a cell of the first seed the rest."""

    row: Row
    by_steps: dict[str, Quality] = Field(description="the metric at other numbers of sampler steps")
    metric: MetricFacts | None = None
    seen_sha256: Sha256 | None = Field(default=None, description="of what the dense model drew and predicted, a file")
    patterns: List[str] | None = None
    one_shot: Row | None = None
    layers: List[Layer] = ()
    sensitivity: dict[str, float] = Field(default_factory=dict)
    host: str | None = None
    environment: Environment | None = None


class Summary(Value):
    """A mean over `n` seeds, with its 95% interval."""

    mean: float
    ci95: Interval
    n: int


class Difference(Summary):
    """The mean of a - b over the seeds that both have. The intervals of all pairs hold together with 95%."""

    a: str
    b: str
    significant: bool | None = Field(description="null where nothing can be said")


class CellResult(Value):
    """One training: an entry with one seed."""

    seed: int
    folder: str
    weights_sha256: Sha256
    quality: List[Quality]
    drift: List[Drift]
    train: TrainSummary
    by_steps: dict[str, Quality]
    costs: dict[str, int | float] = Field(
        default={}, description="of its own weights, where they are not those of the entry's first cell"
    )
    host: str | None = Field(
        default=None, description="the computer that made it, of several that shared the comparison"
    )
    environment: Environment | None = Field(
        default=None,
        description="in which it was made, where that is not the same for all cells, or computers shared them",
    )


class DenseRow(Row):
    """The row of the dense model."""

    by_steps: dict[str, Quality]


class Entry(Value):
    """A compared method, over its seeds. Costs, latency, layers and sensitivity are those of its first seed's weights."""

    label: str
    method: str
    pattern: str | None
    settings: dict[str, Any]
    recipe_train: dict[str, Any]
    quality: Summary | None
    drift: dict[str, Summary]
    by_steps: dict[str, Summary]
    one_shot: Row | None
    params: Count
    nonzero_params: Count
    size_bytes: Count
    macs_dense: int
    macs_effective: int
    density: Share
    latency: List[Latency]
    layers: List[Layer]
    sensitivity: dict[str, float] = Field(description="prediction error where this weight alone is pruned, by weight")
    cells: Annotated[tuple[CellResult, ...], Field(strict=False, min_length=1)]


class Match(Value):
    """What methods that can be told their cost share."""

    by: str
    settings: dict[str, dict[str, float]]


class LearningRates(Value):
    """The rates that were searched, and those chosen."""

    grid: List[float]
    chosen: dict[str, float]


class ComparisonReport(Value):
    """The report of a comparison."""

    schema_version: Literal[1]
    kind: Literal["comparison"]
    title: str
    model: str
    seeds: List[int]
    weights_sha256: Sha256
    data: DataFacts
    sampler: str
    metric: MetricFacts | None
    match: Match
    learning_rates: LearningRates
    dense: DenseRow
    entries: List[Entry]
    compared_by: str = Field(description="the metric, or prediction_error where none was measured")
    differences: List[Difference]
    failed: dict[str, str]
    environment: Environment
    evaluate: dict[str, Any]
    differing: dict[str, dict[str, Any]] = Field(
        default={},
        description="settings besides each method's own in which the entries' recipes differ: by setting, the value of each entry",
    )
    max_error: float | None = Field(
        default=None, description="how far lowered models may be from the weights that were judged; null: rounding"
    )
    limitations: List[str]


def schema_text() -> str:
    """The text of `schema.json`: a report of a run, or of a comparison."""
    made = TypeAdapter(Report | ComparisonReport).json_schema()
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "compressor report"}
    return json.dumps({**head, **made}, indent=1, ensure_ascii=False) + "\n"
