"""What a comparison's report says: sentences and table cells made from its facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from compressor.comparison.differing import told
from compressor.quality.intervals import t_quantile
from compressor.report.compared import ComparisonReport, DenseRow, Entry, Summary
from compressor.report.content import LOWERED
from compressor.report.limitations import QUADRATIC, few_draws
from compressor.report.numbers import NONE, count, number, percent, seconds, share, size, with_interval
from compressor.report.timings import ratio
from compressor.report.words import file_name

_Point = tuple[str, float, float, Sequence[float] | None]


def headline(report: ComparisonReport) -> str:
    """The verdict: who is better than whom by more than the seeds' noise, and nothing more."""
    metric, pruned = report.compared_by, [e for e in _scored(report) if _pruned(report, e)]
    if not pruned:
        return f"{len(report.entries)} methods on {report.model}, none of which removes a multiplication."
    scores = {e.label: _score(report, e) for e in pruned}
    ordered = sorted(scores, key=lambda label: scores[label].mean)
    wins = {(p.a, p.b) if p.mean < 0 else (p.b, p.a) for p in report.differences if p.significant}
    # where seeds are missing, the lowest mean may be of other seeds than those on which it loses
    best = next((one for one in ordered if not any((other, one) in wins for other in ordered)), ordered[0])
    called = metric.replace("_", " ")
    dense = f"; dense has {number(report.dense.quality[0].value)}" if report.dense.quality else ""
    n = len(report.seeds)
    pairs_told = [bool({(a, b), (b, a)} & wins) for at, a in enumerate(ordered) for b in ordered[at + 1 :]]
    beaten = [label for label in ordered if (best, label) in wins]
    level = [best, *(label for label in ordered if label not in (best, *beaten))]
    low, high = scores[ordered[0]], scores[ordered[-1]]
    if len(ordered) == 1:
        found = f"{called} {_interval(low, metric)}{_over(low)}, lower is better{dense}"
        return f"{best} on {report.model}: {found}. No other pruned method is there."
    ends = (
        f"{_mean(low, metric)} ({_seen(ordered[0], low, n)}) to {_mean(high, metric)} ({_seen(ordered[-1], high, n)})"
    )
    reach = f"{called} lies from {ends}, lower is better{dense}."
    if n == 1:
        return f"No verdict on {report.model}: one seed cannot tell methods apart. Their {reach}"
    if not any(pairs_told):
        count_of = (
            f"0 of {len(pairs_told)} differences between pruned methods {'is' if len(pairs_told) == 1 else 'are'}"
        )
        return f"No winner on {report.model}: {count_of} larger than the noise of {n} seeds. Their {reach}"
    if len(level) == 1:
        own = scores[best]
        found = f"{called} {_interval(own, metric)}{_over(own)}, lower is better{dense}"
        beats = "It beats each of the others by more than the seeds' noise."
        return f"{best} is the best of the pruned methods on {report.model}: {found}. {beats}"
    if not beaten:
        return f"No winner on {report.model}: {n} seeds do not tell {best}, the lowest, from any other pruned method. Their {reach}"
    return (
        f"No single winner on {report.model}: {_listed(level[1:])} cannot be told apart from {best} over {n} seeds. "
        f"{best} beats {_listed(beaten)} by more than the seeds' noise. Their {reach}"
    )


def summary(report: ComparisonReport) -> list[tuple[str, str]]:
    """(what about, what was found), beside the verdict."""
    found = []
    pruned = [entry for entry in report.entries if _pruned(report, entry)]
    if report.dense.quality:
        value = report.dense.quality[0].value
        groups: dict[str, list[str]] = {}
        known = [(entry.label, entry.quality) for entry in pruned if entry.quality is not None]
        for label, own in known:
            groups.setdefault(_beside(own, value, len(known)), []).append(label)
        said = "; ".join(f"{what}: {_listed(labels, 12)}" for what, labels in groups.items())
        if said:
            found.append(("Against dense", f"{said[0].upper()}{said[1:]}. The dense model has {number(value)}."))
    if report.failed:
        found.append(("Failed", _missing(report)))
    if pruned:
        macs = _reach([entry.macs_effective / report.dense.macs_dense for entry in pruned])
        sizes = _reach([entry.size_bytes / report.dense.size_bytes for entry in pruned])
        found.append(("Cost", f"Pruned methods keep {macs} of the multiplications and {sizes} of the file."))
    timed = [entry for entry in pruned if entry.latency]
    if timed:
        gained = [e.label for e in timed if less_work(report, e) and e.latency[-1].is_gain]
        others = [e.label for e in timed if e.label not in gained]
        text = [f"faster than dense: {_listed(gained, 12)}"] if gained else []
        text += [f"no gain beyond the noise on this machine: {_listed(others, 12)}"] if others else []
        sentence = "; ".join(text)
        found.append(("Speed", f"{sentence[0].upper()}{sentence[1:]}."))
    return found


def less_work(report: ComparisonReport, entry: Entry) -> bool:
    """Whether the form that an entry was timed in can be faster for what was pruned: dense kernels skip no zeros."""
    return entry.latency[-1].backend == LOWERED or entry.macs_dense < report.dense.macs_dense


def _missing(report: ComparisonReport) -> str:
    """Which entries are not there at all, and which cells of the others."""
    entries = {file_name(entry.label) for entry in report.entries}  # as cells are called
    of = {name: name.rpartition("-seed-")[0] for name in report.failed}
    gone = sorted({entry for entry in of.values() if entry not in entries})
    cells = [name for name, entry in of.items() if entry in entries]
    text = [f"no cell of {_listed(gone, 12)}"] if gone else []
    text += [f"without {_listed(cells, 12)}"] if cells else []
    return f"This report has {' and is '.join(text)}." if gone else f"This report is {text[0]}."


def _beside(own: Summary, dense: float, comparisons: int) -> str:
    """What an entry is beside the `dense` value, by an interval that holds for all `comparisons` at once."""
    if own.ci95 is None:
        return "no interval over seeds"
    wider = t_quantile(1 - 0.025 / comparisons, own.n - 1) / t_quantile(0.975, own.n - 1)
    low, high = (own.mean + wider * (end - own.mean) for end in own.ci95)
    return (
        "worse beyond the seeds' noise"
        if low > dense
        else "better beyond the seeds' noise"
        if high < dense
        else "not told apart"
    )


def _reach(shares: Sequence[float]) -> str:
    low, high = share(min(shares)), share(max(shares))
    return low if low == high else f"{low} to {high}"


def _listed(labels: Sequence[str], most: int = 4) -> str:
    shown = list(labels[:most])
    if len(labels) > most:
        shown.append(f"{len(labels) - most} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _over(found: Summary) -> str:
    return f" over {found.n} seed{'s' if found.n > 1 else ''}"


def _seen(label: str, found: Summary, seeds: int) -> str:
    return label if found.n == seeds else f"{label},{_over(found)}"


def _mean(found: Summary, metric: str) -> str:
    return percent(found.mean) if metric == "prediction_error" else number(found.mean)


def _score(report: ComparisonReport, entry: Entry) -> Summary:
    return entry.quality or entry.drift[report.compared_by]


def _scored(report: ComparisonReport) -> list[Entry]:
    """The entries that were measured by what they are compared by."""
    return [entry for entry in report.entries if entry.quality or report.compared_by in entry.drift]


def rows(report: ComparisonReport) -> list[tuple[str, str, list[str]]]:
    """The table: for dense and each entry (label, what it is, cells)."""
    dense = report.dense
    found = [("dense", "as it was given", _cells(report, dense))]
    for entry in report.entries:
        what = ", ".join(
            [entry.pattern or "no mask", *(f"{key}={value}" for key, value in _told(report, entry).items())]
        )
        shown = f"{entry.method}: {what}" if entry.method != entry.label else what
        found.append((entry.label, shown, _cells(report, entry)))
    return found


def columns(report: ComparisonReport) -> list[str]:
    """The titles of the cells of `rows`."""
    metric = report.metric.name if report.metric else "quality"
    timed = report.dense.latency
    kind = f", {timed[-1].backend}, batch {timed[-1].batch}" if timed else ""
    first = [f"{metric}, mean [95%]; lower is better", f"one-shot {metric}", "prediction error", "SSIM with dense"]
    return [*first, "nonzero", "file", "MACs, effective", f"latency{kind}", "fine-tuning"]


def _cells(report: ComparisonReport, shown: Entry | DenseRow) -> list[str]:
    dense, entry = report.dense, shown if isinstance(shown, Entry) else None
    score = bare = error = alike = latency = train = NONE
    if isinstance(shown, DenseRow) and shown.quality:
        score = with_interval(shown.quality[0])
    if entry is not None:
        if entry.quality:
            score = _interval(entry.quality)
            if entry.quality.n < len(report.seeds):
                score += f", n = {entry.quality.n}"
        if entry.one_shot is not None and entry.one_shot.quality:
            bare = number(entry.one_shot.quality[0].value)
        if "prediction_error" in entry.drift:
            error = percent(entry.drift["prediction_error"].mean)
        if "ssim" in entry.drift:
            alike = number(entry.drift["ssim"].mean)
        took = sum(cell.train.seconds for cell in entry.cells) / len(entry.cells)
        lost = sum(cell.train.skipped for cell in entry.cells)
        train = f"{entry.cells[0].train.steps:,} steps, {seconds(took)}" + f", {lost} steps skipped" * bool(lost)
    macs = f"{count(shown.macs_effective)} ({share(shown.macs_effective / dense.macs_dense)})"
    if shown.latency:
        time = shown.latency[-1]
        gain = "" if entry is None else f" ({ratio(time, less_work(report, entry))})"
        latency = f"{number(time.median_ms)} ms{gain}, IQR {number(time.iqr_ms)}"
    nonzero = share(shown.nonzero_params / dense.params)
    return [score, bare, error, alike, nonzero, size(shown.size_bytes), macs, latency, train]


def _told(report: ComparisonReport, entry: Entry) -> dict[str, Any]:
    rate = report.learning_rates.chosen.get(entry.label)
    return {**entry.settings, **({} if rate is None else {"lr": f"{rate:g}"})}


def pairs(report: ComparisonReport) -> list[tuple[str, str, str]]:
    """(the two, their difference, what it means), those that differ first."""
    said = {True: "differ", False: "not told apart", None: "no spread"}
    ordered = sorted(report.differences, key=lambda pair: (pair.significant is not True, -abs(pair.mean)))
    return [(f"{p.a} − {p.b}", _interval(p, report.compared_by), said[p.significant]) for p in ordered]


def by_steps(report: ComparisonReport) -> tuple[list[str], list[tuple[str, list[str]]]] | None:
    """The metric by number of sampler steps: (titles, (label, cells)); None where only one number was used."""
    usual = int(report.evaluate["sampler_steps"])
    steps = sorted({int(key) for key in report.dense.by_steps} | {usual})
    if len(steps) < 2:
        return None
    dense = report.dense
    given = [dense.quality[0] if step == usual else dense.by_steps[str(step)] for step in steps]
    lines = [("dense", [with_interval(quality) for quality in given])]
    for entry in report.entries:
        found = [entry.quality if step == usual else entry.by_steps.get(str(step)) for step in steps]
        cells = [NONE if summary is None else _interval(summary) for summary in found]
        lines.append((entry.label, cells))
    return [f"{step} steps" for step in steps], lines


def layers(report: ComparisonReport) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """Sensitivity, density and flips by layer: (titles, (weight, sensitivity of the first mask alone, density and flips))."""
    masked = [entry for entry in report.entries if any(layer.pattern for layer in entry.layers)]
    if not masked:
        return [], []
    names = [layer.name for layer in masked[0].layers if layer.pattern]
    by_label = {e.label: {layer.name: layer for layer in e.layers} for e in masked}
    lines = []
    for name in names:
        alone = masked[0].sensitivity.get(name)
        cells = []
        for own in by_label.values():
            layer = own.get(name)
            flips = None if layer is None else layer.flips_per_weight
            shown = NONE if layer is None else share(layer.density)
            cells.append(shown if not flips else f"{shown}, {number(flips)} flips")
        lines.append((name, NONE if alone is None else percent(alone), cells))
    lines.sort(key=lambda line: -(masked[0].sensitivity.get(line[0]) or 0.0))
    return [f"alone ({masked[0].label})", *by_label], lines


def trade_offs(report: ComparisonReport) -> list[tuple[str, str, str, list[_Point]]]:
    """(title, explanation, horizontal axis, points) of quality against each cost."""
    dense = report.dense
    if not dense.quality:
        return []
    scored = [(entry, entry.quality) for entry in report.entries if entry.quality]
    ringed = "Rings: no other is better in both."

    def points(cost: Callable[[Entry | DenseRow], float]) -> list[_Point]:
        known: list[_Point] = [("dense", cost(dense), dense.quality[0].value, None)]
        return known + [(entry.label, cost(entry), quality.mean, quality.ci95) for entry, quality in scored]

    found = [
        (
            "Quality and multiply-accumulates",
            ringed,
            "effective MACs, of dense",
            points(lambda e: e.macs_effective / dense.macs_dense),
        ),
        ("Quality and bytes", ringed, "file, of dense", points(lambda e: e.size_bytes / dense.size_bytes)),
    ]
    if dense.latency and all(entry.latency for entry, _ in scored):
        kind = dense.latency[-1].backend
        within = (
            "" if report.max_error is None else f" within {report.max_error:g} of the weights judged, 8 bits allowed"
        )
        about = f"{kind}{within}, batch {dense.latency[-1].batch}, weights of the first seed. {ringed}"
        latency = points(lambda e: e.latency[-1].median_ms)
        found.append(("Quality and latency", about, "median, ms", latency))
    return found


def error_by_time(report: ComparisonReport) -> list[tuple[str, list[float], list[float]]]:
    """(label, times, prediction error averaged over seeds)."""
    lines = []
    for entry in report.entries:
        series = [drift.by_time for cell in entry.cells for drift in cell.drift if drift.by_time is not None]
        if series:
            at = [time for time, _ in series[0]]
            lines.append((entry.label, at, [sum(s[i][1] for s in series) / len(series) for i in range(len(at))]))
    return lines


def limitations(report: ComparisonReport) -> tuple[str, ...]:
    """What the reader must know, from the facts of this comparison."""
    entries, n = report.entries, len(report.seeds)
    found = []
    if report.failed:
        cells = "1 cell failed and is" if len(report.failed) == 1 else f"{len(report.failed)} cells failed and are"
        found.append(f"{cells} missing: {'; '.join(f'{name} ({why})' for name, why in report.failed.items())}.")
    if fewer := [e.label for e in entries if len(e.cells) < n]:
        found.append(
            f"Not every seed is there of {', '.join(fewer)}: means are of other seeds than those of the others; differences are of "
            "common ones."
        )
    if same := [e.label for e in entries if len(e.cells) > 1 and len({c.weights_sha256 for c in e.cells}) == 1]:
        found.append(f"Every seed gives the same weights with {', '.join(same)}: no interval over training.")
    found += _places(report)
    grid = report.learning_rates.grid
    edge = [label for label, rate in report.learning_rates.chosen.items() if grid and rate in (min(grid), max(grid))]
    if edge and len(grid) > 2:
        found.append(
            f"The best learning rate is at the edge of the grid for {', '.join(edge)}: the best may lie beyond."
        )
    unsteady = [e.label for e in entries if e.latency and e.latency[-1].iqr_ms > 0.1 * e.latency[-1].median_ms]
    if unsteady:
        found.append(
            f"Latencies were unsteady, half of the rounds spread over more than 10% of the median, for {', '.join(unsteady)}."
        )
    if n < 5:
        found.append(
            f"{n} seed{'s' if n > 1 else ''}: {'no interval over training' if n == 1 else 'intervals over so few are wide'}."
        )
    budgets = {tuple(entry.recipe_train[key] for key in ("steps", "batch_size")) for entry in entries}
    if len(budgets) > 1:
        found.append(f"Budgets differ: (steps, batch) are {', '.join(str(b) for b in sorted(budgets))}.")
    found += told(report)
    if not report.learning_rates.grid and len({entry.recipe_train["lr"] for entry in entries}) == 1:
        found.append(
            f"Every method has the same learning rate, {entries[0].recipe_train['lr']:g}, tuned for none; --lr-grid searches."
        )
    backends = {time.backend for entry in entries for time in entry.latency}
    sparse = [entry for entry in entries if entry.pattern]
    if sparse and backends == {"eager"}:
        found.append("Sparse weights were not lowered: their latency is that of dense kernels. --lower measures it.")
    elif sparse and "lowered" in backends:
        slow = [e.label for e in sparse if e.latency and not e.latency[-1].is_gain]
        if slow:
            found.append(f"Lowering gains nothing on this machine for {', '.join(slow)}.")
    shares = {round(entry.macs_effective / report.dense.macs_dense, 2) for entry in entries if _pruned(report, entry)}
    if shares and max(shares) - min(shares) > 0.03:
        found.append(
            f"Methods keep different shares of the multiply-accumulates, {share(min(shares))} to {share(max(shares))}: "
            "compare along the charts."
        )
    control = next((entry for entry in entries if not _pruned(report, entry)), None)
    if control is None and report.dense.quality:
        found.append("Without dense-continued, nobody knows what the same training does to the dense model.")
    return (*found, *_of_the_metric(report))


def _of_the_metric(report: ComparisonReport) -> list[str]:
    """What holds for its figures."""
    if not report.dense.quality or report.metric is None:
        return []
    found = [
        f"{report.metric.name} is measured on {report.evaluate['samples']} samples against "
        f"{report.data.samples} real images; compare it only with values of the same setting.",
        *(few_draws(report.metric.name, report.evaluate) if report.dense.quality[0].ci95 else ()),
    ]
    if "quadratic" in report.sampler:
        found.append(f"{QUADRATIC}; figures that diffusers can repeat come from `--set evaluate.spacing=trailing`.")
    return found


def _places(report: ComparisonReport) -> list[str]:
    """What differs between the computers on which cells were made, where several made them."""
    made = [cell.environment for entry in report.entries for cell in entry.cells if cell.environment is not None]
    found = []
    if len(hardware := sorted({place.hardware for place in made})) > 1:
        found.append(
            f"Cells were made on different hardware, {'; '.join(hardware)}: seconds of training cannot be compared."
        )
    versions = {tuple(sorted(place.versions.items())) for place in made}
    if len(versions) > 1:
        names = sorted({name for one in versions for name, _ in one if len({dict(v).get(name) for v in versions}) > 1})
        found.append(
            f"Cells were made with different versions of {', '.join(names)}: a part of a difference may be theirs."
        )
    return found


def _pruned(report: ComparisonReport, entry: Entry) -> bool:
    return bool(entry.macs_effective < report.dense.macs_dense)


def _interval(found: Summary, metric: str = "") -> str:
    text = percent if metric == "prediction_error" else number
    if found.ci95 is None:
        return text(found.mean)
    low, high = found.ci95
    return f"{text(found.mean)} [{text(low)}, {text(high)}]"
