"""2:4 on a GPU: every form of a model against the fastest dense one of the same precision, each written as soon as it is timed.

    python benchmarks/gpu/lowering.py --cells "dit-xl 64,uvit-h 16" --backends cusparselt,cusparselt-fp8
    python benchmarks/gpu/lowering.py --imitate          # anywhere: the same steps with an imitated GPU; its times mean nothing

A cell is one model at one batch, with random weights. Its products are timed alone first, dense and 2:4, in every precision. Then
forms of the whole model, each a CUDA graph: dense ones (as they are, channels last, compiled, and with `--autotune` by
`max-autotune`), in bfloat16 and in 8 bits; then 2:4, compiled, with every layer that the library takes on it (`everywhere`) and with
each layer on what is fastest alone in that precision (`chosen`). In 8 bits, layers that are not 2:4 are on the dense kernel of that
precision, so that the dense form and the 2:4 one have the same layers in 8 bits. A form takes turns with the fastest dense form of its
precision and with the fastest in bfloat16, so that every ratio is of the same rounds. What is compiled is a model's repeated block,
once for all of them, on both sides alike: the whole of a large model takes minutes. What the GPU's file has is not measured again,
whatever code it was measured with (each session's first line says which); a form that fails is noted and left.
README.md has more.
"""

from __future__ import annotations

import copy
import gc
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from blocks import compiled, convolutional
from lines import Line, Session, lines_of, out_option
from subjects import SUBJECTS, Subject, Tensors, made_sparse
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compressor import registry
from compressor.cost.timing import interleaved, iqr_ms, median_ms
from compressor.lower import Backend
from compressor.lower.chooser import choose, groups, prepare, relative
from compressor.lower.contest import Contest
from compressor.lower.cusparselt_tuning import SECONDS_VARIABLE
from compressor.lower.forms import channels_last
from compressor.lower.graphs import Captured
from compressor.lower.job import in_dtype, prepared
from compressor.lower.plan import Cache, LayerPlan
from compressor.lower.units import Found, find_units, put, put_unit

CELLS = "dit-xl 64,uvit-h 16,dit-xl 16,uvit-h 64,uvit-h 1,dit-xl 1,uvit-l 64,uvit-s 64,ddpm-cifar10 64"
"""In order of what they would teach: where 2:4 should gain most comes first, and what should gain nothing last."""
BF16 = "bfloat16"
DENSE = {"dense-fp8": "fp8", "dense-int8": "int8"}
EIGHT_BITS = {precision: name for name, precision in DENSE.items()}
WIDE = {"eager": BF16, "dense-gelu": BF16}
SPARSE = {
    **{"cusparselt": BF16, "cusparselt-fp8": "fp8", "cusparselt-int8": "int8"},
    "torchao-fp8": "fp8",  # an optional package: a line says where it is missing
    "cusparselt-direct": BF16,  # another
}
UNCOMPILED = {"cusparselt-direct": "cusparselt"}
"""Its plans are numbered by layer, so that no block would be compiled as another one is; and what it is to be faster than."""
TOLERANCE = 0.12
"""The largest relative error of a layer: what fp8 with a scale for each token and channel comes to, and more."""
LARGEST_ERROR = 0.2
ROUNDS = 15
ALIKE = 4
"""Layers of one shape that are timed alone, with a weight each, for all that are like them."""
SUSTAINED_S = 1.0
"""Of one form alone: a card that is at its power limit slows down, which short turns do not show."""


Form = Callable[[], object]


@dataclass
class Cell:
    """One model at one batch: its forms, made when they are asked for, and the fastest dense one of each precision."""

    name: str
    subject: Subject
    batch: int
    session: Session
    best: dict[str, tuple[str, Form, float]] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
    products: list[dict[str, Any]] = field(default_factory=list)

    def prepare(self) -> None:
        """Its weights and inputs, and what float32 gives for a part of the batch."""
        device = self.session.device
        model = Tensors(made_sparse(self.subject, device))
        self.inputs = tree_map_only(Tensor, lambda x: x.to(device), self.subject.inputs(self.batch))
        self.step = max(1, self.batch // 16)  # float32 takes twice the memory: a part of the batch is enough
        self.wanted = model(*tree_map_only(Tensor, lambda x: x[:: self.step], self.inputs)).double().cpu()
        self.dense = in_dtype(model, torch.bfloat16)
        self.cast = tree_map_only(Tensor, lambda x: x.bfloat16() if x.dim() > 1 else x, self.inputs)
        for one in find_units(self.dense, lambda: self.dense(*self.cast), fuse=True)[0]:
            if one.fused:  # on both sides: every form is made from this one
                self.dense = put_unit(self.dense, one, one.unit.module)
        self.found, _ = find_units(self.dense, lambda: self.dense(*self.cast))

    def forms(self, backends: list[str], autotune: bool) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
        """Name, precision and how it is made, of every form: dense ones first."""
        yield "dense", BF16, lambda: self.dense
        if convolutional(self.dense):
            yield "dense, channels last", BF16, lambda: channels_last(self.dense)
        yield "dense, compiled", BF16, lambda: compiled(self.dense)
        if self.fits("dense-gelu"):
            yield "dense-gelu, compiled", BF16, lambda: compiled(self.on("dense-gelu"))
        if autotune:
            yield "dense, autotuned", BF16, lambda: compiled(self.dense, "max-autotune-no-cudagraphs")
        wanted = {SPARSE[backend] for backend in backends}
        for backend, precision in DENSE.items():
            if precision in wanted:
                yield f"{backend}, compiled", precision, lambda backend=backend: compiled(self.on(backend))  # type: ignore[misc]
        for backend in backends:
            if backend in UNCOMPILED:  # beside what it is to be faster than, which is not compiled either
                for name in (backend, UNCOMPILED[backend]):
                    yield f"{name} everywhere", SPARSE[name], lambda name=name: self.on(name)  # type: ignore[misc]
            else:
                beside = EIGHT_BITS.get(SPARSE[backend])
                name = backend if beside is None else f"{backend} and {beside}"
                yield (
                    f"{name} everywhere, compiled",
                    SPARSE[backend],
                    lambda backend=backend: compiled(self.on(backend)),
                )  # type: ignore[misc]
        for precision in dict.fromkeys(SPARSE[backend] for backend in backends) if self.products else ():
            choices = self.fastest(precision)
            used = set(choices.values()) & set(SPARSE)
            if used and not any(choices == self.choices(backend) for backend in used):
                yield (
                    f"2:4 {precision} chosen, compiled",
                    precision,
                    lambda choices=choices: compiled(self.put_on(choices)),  # type: ignore[misc]
                )

    def on(self, backend: str) -> nn.Module:
        """The model with every unit that `backend` takes on it."""
        takes = registry.backend(backend)
        if reason := takes.unavailable(self.session.device):
            raise RuntimeError(reason)
        takes.prepare([one.unit for one in self.units(takes)])  # all in one process, where it searches algorithms
        return self.put_on(self.choices(backend))

    def choices(self, backend: str) -> dict[str, str]:
        """Every unit that `backend` takes, on it; what a sparse one in 8 bits does not take, on the dense one of its precision."""
        beside = EIGHT_BITS.get(SPARSE.get(backend, ""))
        others = {} if beside is None else self.choices(beside)
        return {**others, **{one.at: backend for one in self.units(registry.backend(backend))}}

    def put_on(self, choices: Mapping[str, str]) -> nn.Module:
        """The model with the units of `choices` on the backend that each names."""
        backends = {name: registry.backend(name) for name in set(choices.values())}
        form = copy.deepcopy(self.dense)
        for one in self.found:
            if one.at in choices:
                form = put(form, one.at, backends[choices[one.at]].build(one.unit))
        return form

    def units(self, takes: Backend) -> list[Found]:
        """Those of the model that a backend takes."""
        return [one for one in self.found if one.unit.kind in takes.takes and takes.refusal(one.unit) is None]

    def fits(self, backend: str) -> bool:
        """Whether `backend` takes anything of the model."""
        return bool(self.units(registry.backend(backend)))

    def time_products(self, backends: list[str]) -> None:
        """Every layer alone, in every backend, once; a line for those that run alike, as they are timed, until the time is over."""
        known = [
            one["products"] for one in self.session.lines.all if one.get("cell") == self.name and "products" in one
        ]
        done = {tuple(one["at"]): one for line in known for one in line}
        rivals = [name for name, precision in DENSE.items() if precision in {SPARSE[one] for one in backends}]
        job = prepared(self.dense, self.cast, [*WIDE, *rivals, *backends], None, None, quantising=True)
        alike = groups(job.found)
        missing = [group for group in alike if tuple(one.at for one in group) not in done]
        if missing:
            prepare(job)
        store = Cache(job.setting, read=False)
        for group in missing:
            if self.session.over:
                return  # what is chosen of a part of the layers would be another form each time
            found = summary(group, choose(group[:ALIKE], job, TOLERANCE, store)[0])
            self.session.lines.add({"cell": self.name, "products": [found]})
            done[tuple(found["at"])] = found
        self.products = [done[tuple(one.at for one in group)] for group in alike]

    def fastest(self, precision: str) -> dict[str, str]:
        """The backend that is fastest alone for each layer, of those in `precision`, dense ones included."""
        own = {name for name, its in (SPARSE | DENSE | WIDE).items() if its == precision}
        found = {}
        for one in self.products:
            times = {name: ms for name, ms in one["ms"].items() if name in own}
            if times:
                found |= dict.fromkeys(one["at"], min(times, key=times.__getitem__))
        return found

    def error(self, form: nn.Module) -> float:
        """Relative, against float32."""
        return relative(form(*self.cast)[:: self.step].cpu(), self.wanted)

    def call(self, form: nn.Module) -> Form:
        """It as a graph on a GPU: a replay, without the copies in and out."""
        if self.session.device.type != "cuda":
            return lambda: form(*self.cast)
        return Captured(lambda given: form(*given), self.cast).replay

    def measure(self, name: str, precision: str, call: Form, error: float) -> None:
        """Time a form in turns with its opponents, and write it."""
        device, sparse = self.session.device, name.split(maxsplit=1)[0] in {*SPARSE, "2:4"}
        rivals = {key: self.best[key] for key in dict.fromkeys((precision, BF16)) if key in self.best}
        calls = {name: call, **{rival: its for rival, its, _ in rivals.values()}}
        seconds = dict(zip(calls, interleaved(list(calls.values()), ROUNDS, device), strict=True))
        rounds = {key: tuple(1000 * one for one in own) for key, own in seconds.items()}
        against = Contest.of(rounds, [name]).against[name]
        median = median_ms(seconds[name])
        self.session.add(
            self.name,
            name,
            **{
                "precision": precision,
                "sparse": sparse,
                "median_ms": median,
                "iqr_ms": iqr_ms(seconds[name]),
                "error": error,
            },
            sustained_ms=sustained(call, device, self.session.sustained_s),
            against={rival: one.model_dump() for rival, one in against.items()},
            peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        )
        if not sparse and (precision not in self.best or median < self.best[precision][2]):
            self.best[precision] = (name, call, median)


def summary(group: Sequence[Found], first: LayerPlan) -> dict[str, Any]:
    """What was timed of layers that run alike, of the first of them."""
    return {
        **{"at": [one.at for one in group], "shapes": first.shapes, "gflop": first.gflop, "patterns": first.patterns},
        "ms": {one.backend: one.median_ms for one in first.candidates if one.median_ms is not None},
        "error": {one.backend: one.error for one in first.candidates if one.error is not None},
        "refused": {one.backend: one.refused for one in first.candidates if one.refused is not None},
    }


def sustained(call: Form, device: torch.device, seconds: float) -> float:
    """Milliseconds of a call while it runs alone for `seconds`."""
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for _ in range(10):
            call()
        count += 10
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - begin) / count


@torch.no_grad()
def run(
    name: str,
    subject: Subject,
    batch: int,
    session: Session,
    backends: list[str],
    autotune: bool,
    alone: bool,
    only: str,
) -> None:
    """Measure what is missing of one cell: of its forms those whose names `only` matches, and the dense ones."""
    asked = {"backends": sorted(backends), "autotune": autotune, "alone": alone, "forms": only}
    if session.lines.complete(name, asked):
        return
    done = session.lines.done(name)
    cell = Cell(name, subject, batch, session)
    cell.prepare()
    if alone:
        try:
            cell.time_products(backends)
        except Exception as failure:
            session.failed(name, "products alone", failure)
    for form, precision, make in cell.forms(backends, autotune):
        wanted = re.search(only, form) is not None
        if form in done:
            wanted = _needed(form, precision, done, cell.best) and (wanted or not done[form]["sparse"])
        if session.over or not wanted:
            continue
        if session.lines.ended(name, form):
            session.add(name, form, failed="the process ended twice while it was tried")
            continue
        session.lines.add({"cell": name, "begun": form})
        if session.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(session.device)
        try:
            made = make()
            error = cell.error(made)
            if not error < LARGEST_ERROR:
                raise RuntimeError(f"its output differs by {error:.1e}")
            call = cell.call(made)
            if form in done and not done[form]["sparse"]:
                cell.best[precision] = (form, call, done[form]["median_ms"])
            else:
                cell.measure(form, precision, call, error)
        except Exception as failure:  # a form that does not run is one result among others
            session.failed(name, form, failure)
        except SystemExit:  # the time is over
            session.lines.add({"cell": name, "stopped": form})
            raise
        made = call = None
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
    torch.compiler.reset()
    if not session.over:
        session.lines.add({"cell": name, "complete": asked})


def _needed(form: str, precision: str, done: Mapping[str, Line], best: Mapping[str, tuple[str, Form, float]]) -> bool:
    """Whether a form that is done is made again: the fastest dense one of its precision, as others are timed against it; and the
    fastest sparse one, where it did not take turns with that."""
    own = {name: line for name, line in done.items() if line.get("precision") == precision}
    if form not in own:
        return False
    kind = [name for name in own if own[name]["sparse"] == own[form]["sparse"]]
    if form != min(kind, key=lambda name: own[name]["median_ms"]):
        return False
    return not own[form]["sparse"] or (precision in best and best[precision][0] not in own[form]["against"])


@click.command()
@click.option("--cells", default=CELLS, show_default=True, help="Models, each with a batch.")
@click.option("--backends", default=",".join(name for name in SPARSE if name not in UNCOMPILED), show_default=True)
@click.option("--autotune/--no-autotune", default=True, show_default=True, help="A dense form by `max-autotune`.")
@click.option(
    "--alone/--whole",
    default=True,
    show_default=True,
    help="Products alone, too; without them there are no `chosen` forms.",
)
@click.option(
    "--forms", "only", default="", help="A regular expression: of a cell's forms those whose names it is found in."
)
@click.option("--search-seconds", default=2, show_default=True, help="To search algorithms for a product.")
@click.option("--seconds", default=540.0, show_default=True, help="No form is begun after this.")
@click.option(
    "--imitate", is_flag=True, help="With an imitated GPU and small models: tries the steps, measures nothing."
)
@out_option
def main(
    cells: str,
    backends: str,
    autotune: bool,
    alone: bool,
    only: str,
    search_seconds: int,
    seconds: float,
    imitate: bool,
    out: Path,
) -> None:
    """Time 2:4 models against dense ones, form by form."""
    wanted = [tuple(part.rsplit(" ", 1)) for part in cells.split(",")]
    chosen = [name for name in backends.split(",") if name]
    if unknown := ({name for name, *_ in wanted} - set(SUBJECTS)) | (set(chosen) - set(SPARSE)):
        there = ", ".join([*SUBJECTS, *SPARSE])
        raise click.UsageError(f"unknown {', '.join(sorted(unknown))}; there are {there}")
    if imitate:
        from imitation import imitated, small

        context, subjects, device = imitated(sys.modules[__name__]), small(), torch.device("cpu")
    else:
        context, subjects, device = nullcontext(), SUBJECTS, torch.device("cuda", 0)
        if not torch.cuda.is_available():
            raise click.ClickException("torch finds no CUDA GPU")
        if reason := registry.backend("cusparselt").unavailable(device):
            raise click.ClickException(reason)
    os.environ.setdefault(SECONDS_VARIABLE, str(search_seconds))
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # it would run the rest as it is, and not say so
    lines = lines_of("lowering", out, device, imitate)
    session = Session(device, lines, time.monotonic() + seconds, 0.01 if imitate else SUSTAINED_S)
    versions = lines.about["versions"]
    click.echo(
        f"{lines.about['hardware']}; torch {versions['torch']}, cuSPARSELt {versions['cusparselt']}; into {lines.path}"
    )
    with context:
        for name, batch in wanted:
            if session.over:
                click.echo(f"{name} {batch}: no time left; the same call again goes on")
                continue
            run(f"{name} {batch}", subjects[name](), int(batch), session, chosen, autotune, alone, only)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a form under way is noted as stopped
    main()
