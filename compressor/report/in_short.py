"""What a report comes to, for readers who have a minute: a few sentences, and what its measures mean."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.report import timings
from compressor.report.content import ONE_SHOT, Latency, Quality, Report
from compressor.report.numbers import number, percent, size, times


def summary(report: Report) -> list[tuple[str, str]]:
    """(what about, what was found) of a run."""
    final, dense = report.final, report.dense
    found = []
    if (quality := _quality(report)) is not None:
        found.append(("Quality", quality))
    zeros = f"{percent(1 - final.nonzero_params / final.params)} of its parameters are zero. " if final.params else ""
    if dense is None or dense is final:
        found.append(("Size", f"The file has {size(final.size_bytes)}."))
    else:
        share = final.size_bytes / dense.size_bytes if dense.size_bytes else 1.0
        fewer = (
            "" if final.params == dense.params else f"It has {percent(final.params / dense.params)} of the parameters. "
        )
        found.append(
            (
                "Size",
                f"{fewer}{zeros}The file has {size(final.size_bytes)}, {percent(share)} of the dense model's "
                f"{size(dense.size_bytes)}.",
            )
        )
        found.append(("Speed", _speed(report)))
    return found


def _quality(report: Report) -> str | None:
    final, dense, bare = report.final, report.dense, report.row(ONE_SHOT)
    if not final.quality:
        error, alike = final.drift_by("prediction_error"), final.drift_by("ssim")
        if error is None or dense is final:
            return None
        pictures = (
            "No picture was measured"
            if alike is None
            else f"Pictures have an SSIM of {number(alike.value)} to the dense model's"
        )
        return f"{pictures}; predictions differ from the dense model's by {percent(error.value)}, relative."
    own = final.quality[0]
    text = f"{own.metric} is {number(own.value)}; lower is better."
    if dense is not None and dense is not final and dense.quality:
        text = f"{own.metric} is {number(own.value)} against the dense model's {number(dense.quality[0].value)}, lower is better: "
        text += f"{against(own, dense.quality[0])}."
    if bare is not None and bare is not final and bare.quality and final.train.steps:
        text += f" Without fine-tuning it would be {number(bare.quality[0].value)}."
    return text


def against(own: Quality, other: Quality, called: str = "the dense model") -> str:
    """What two values say: their 95% intervals over samples overlap, or they do not."""
    if own.ci95 is None or other.ci95 is None:
        return f"without intervals, nobody knows whether it differs from {called}"
    if own.ci95[0] > other.ci95[1]:
        return f"worse than {called}, by more than the drawing of samples explains"
    if own.ci95[1] < other.ci95[0]:
        return f"better than {called}, by more than the drawing of samples explains"
    return f"not told apart from {called}, as their intervals overlap"


def _speed(report: Report) -> str:
    final = report.final
    entries = [entry for batch in timings.sizes([final]) if (entry := timings.at(report, final, batch)) is not None]
    if not entries:
        return "Not measured."
    if not any(timings.skips(report, final, entry) for entry in entries):
        why = "was not lowered" if report.lowering is None else "runs on kernels that skip no zeros"
        slower = [_sentence(entry, True) for entry in entries if entry.is_loss]
        return " ".join([f"None is gained on this machine: the model {why}.", *slower])
    return " ".join(_sentence(entry, timings.skips(report, final, entry)) for entry in entries)


def _sentence(entry: Latency, less_work: bool) -> str:
    where = f"Batch {entry.batch}: {number(entry.median_ms)} ms, "
    if not less_work and not entry.is_loss:
        return f"{where}no zeros skipped, no gain."
    shown = times(entry.speedup_vs_dense)
    if entry.is_gain:
        return f"{where}{shown} as fast as dense at its best ({entry.against})."
    if entry.is_loss:
        return f"{where}slower than dense at its best ({entry.against}, {shown})."
    return f"{where}as fast as dense at its best ({entry.against}): the difference is within the noise."


def glossary(metric: str | None, shown: Sequence[str]) -> list[tuple[str, str]]:
    """What the measures of a report mean; `shown` are the titles of its table."""
    found = []
    if metric is not None:
        found.append((metric, _about(metric)))
    titles = " ".join(shown)
    return found + [(term, about) for term, about in _TERMS if term in titles or term in _ALWAYS]


def _about(metric: str) -> str:
    if metric.startswith(("fd-", "fid")):
        features = "an Inception network" if metric.startswith("fid") else f"the extractor of `{metric}`"
        return (
            f"Fréchet distance: generated and real pictures are put through {features}, and the means and covariances of its features "
            "are compared. Lower is better; not even real pictures score 0, but the floor. Values hold only beside others of "
            "the same features, number of samples and sampler."
        )
    return "The measure that the methods are judged by. Lower is better."


_ALWAYS = ("95% interval",)
_TERMS = (
    (
        "95% interval",
        "In square brackets: where the value would lie in 95 of 100 repetitions. What overlaps may be the same.",
    ),
    (
        "prediction error",
        "How far the noise that the model predicts is from the dense model's, as a share of its mean square. 0: the same.",
    ),
    (
        "sample RMSE",
        "How far pictures from the same noise are from the dense model's, in pixel values from -1 to 1. Lower is nearer.",
    ),
    ("SSIM", "Likeness of pictures from the same noise; 1 is the same. Higher is nearer."),
    ("MACs, effective", "Multiplications that are not by zero. They become time only where a kernel skips the others."),
    ("latency", "The median over rounds in which all forms take turns; IQR is the spread of the middle half of them."),
    (
        "speed-up",
        "Dense time over this time, round by round. Less than 3% or an interval that reaches 1 is within the noise, and no gain.",
    ),
)
