"""The report: its JSON against the schema, its pages against hostile names and missing parts."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest
from PIL import Image
from pydantic import ValidationError

import compressor.report as report_package
from compressor.cost.timing import Times, ratio_interval
from compressor.errors import CompressorError
from compressor.lower.contest import Contest
from compressor.report import charts, render, schema, words
from compressor.report.compared import schema_text
from compressor.report.content import Report, gains
from compressor.report.further import direction, further
from compressor.report.in_short import summary
from compressor.report.limitations import limitations
from compressor.report.numbers import count, number, percent, seconds, share, size, times
from compressor.report.timings import speeds
from compressor.report.words import file_name
from compressor.runs.rows import trained_as
from compressor.runs.run import _skipped

HASH = "0123456789abcdef" * 4


def row(name: str, value: float, **changes: Any) -> dict[str, Any]:
    quality = {"metric": "fd-digits", "value": value, "ci95": [value - 1, value + 1], "samples": 64}
    latency = {"backend": "eager", "device": "cpu", "dtype": "float32", "batch": 16, "median_ms": 7.7, "iqr_ms": 0.2}
    latency["against"] = "eager"
    return {
        "name": name,
        "weights_sha256": HASH,
        "density": 0.5,
        "params": 598_020,
        "nonzero_params": 321_540,
        "size_bytes": 2_395_000,
        "macs_dense": 10_300_000,
        "macs_effective": 5_620_000,
        "macs_lowered": 10_300_000,
        "quality": [{**quality, "sampler_steps": 25, "seed": 1234}],
        "drift": [{"metric": "prediction_error", "value": 0.0447, "samples": 512}],
        "latency": [{**latency, "speedup_vs_dense": 1.01}],
        "train": {"steps": 20, "seconds": 9.8},
        **changes,
    }


def example() -> dict[str, Any]:
    layer = {"name": "mid_block.attn.qkv.weight", "shape": [288, 96], "pattern": "2:4", "density": 0.5}
    return {
        "schema_version": 1,
        "method": "sparsedm",
        "model": "uvit-digits",
        "pattern": "2:4",
        "seed": 0,
        "settings": {"decay": 0.0002, "pattern": "2:4"},
        "weights_sha256": HASH,
        "data": {"name": "digits", "sha256": HASH, "samples": 1797},
        "sampler": "DPM-Solver++ 2M",
        "metric": {
            "name": "fd-digits",
            "extractor_sha256": HASH,
            "floor": {"value": 1.05, "ci95": [0.5, 1.7], "samples": 898},
        },
        "rows": [row("dense", 3.7), row("one-shot", 68.5), row("sparsedm", 4.1)],
        "layers": [
            {**layer, "flips_per_weight": 0.02, "reason": None},
            {
                **layer,
                "name": "norm.weight",
                "pattern": None,
                "density": 1.0,
                "flips_per_weight": None,
                "reason": "why",
            },
        ],
        "environment": {"versions": {"torch": "2.13.0"}, "hardware": "a processor, 2 threads", "platform": "Linux"},
        "recipe": {"evaluate": {"sampler_steps": 25, "samples": 64, "seed": 1234}},
        "repeat": "compressor run --config recipe.yaml --out DIR",
        "limitations": ["Not lowered."],
    }


def typed(report: dict[str, Any]) -> Report:
    return Report.model_validate(report)


def written(run: Path, report: dict[str, Any], steps: int = 30) -> Path:
    run.mkdir(exist_ok=True)
    (run / "report.json").write_text(json.dumps(report), encoding="utf-8")
    if steps:
        line = {"loss": 0.2, "noise_loss": 0.18, "teacher_loss": 0.02, "lr": 1e-3, "grad_norm": 1.0, "flip_rate": 0.01}
        lines = [json.dumps({"step": n + 1, "steps": steps, **line}) for n in range(steps)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (run / "samples").mkdir(exist_ok=True)
        for entry in report["rows"]:
            Image.new("L", (16, 16)).save(run / "samples" / f"{file_name(entry['name'])}.png")
    return run


def test_the_schema_is_that_of_the_types():
    """Where this fails after a change to the types: `make schema`."""
    written = (Path(report_package.__file__).parent / "schema.json").read_text(encoding="utf-8")
    assert written == schema_text()


def test_the_example_obeys_the_schema():
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(example(), schema())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("weights_sha256"),
        lambda r: r.update(extra=1),
        lambda r: r.update(seed="0"),
        lambda r: r["rows"][0].pop("macs_effective"),
        lambda r: r["rows"][0].update(density=1.5),
        lambda r: r["rows"][0]["latency"][0].pop("speedup_vs_dense"),
        lambda r: r["rows"][0]["quality"][0].update(ci95=[1.0]),
        lambda r: r["layers"][0].update(reason=3),
        lambda r: r.update(rows=[]),
    ],
)
def test_a_spoilt_report_does_not_obey_it(spoil):
    report = example()
    spoil(report)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, schema())
    with pytest.raises(ValidationError):
        typed(report)


def test_the_same_report_gives_the_same_bytes(tmp_path):
    pages = []
    for name in ("one", "two"):
        run = written(tmp_path / name, example())
        render(run)
        pages.append(((run / "report.html").read_bytes(), (run / "report.md").read_bytes()))
    assert pages[0] == pages[1]


def test_the_page_needs_nothing_from_outside(tmp_path):
    run = written(tmp_path / "run", example())
    render(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and page.count("<svg") == 3
    assert (
        not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page)
        and "<script" not in page
        and not re.search(r"url\((?!#)", page)
    )
    assert all(text in page for text in ("fd-digits", "4.10", "68.5", "skips no zeros", "Not lowered.", HASH))


def test_names_cannot_carry_markup(tmp_path):
    report, evil = example(), "<script>alert(1)</script>|x\u202egnp"
    report["model"] = report["method"] = report["layers"][0]["name"] = report["rows"][2]["name"] = evil
    report["settings"] = {evil: evil}
    report["limitations"] = [evil, f"`{evil}`"]
    report["data"]["name"] = evil
    run = written(tmp_path / "run", report)
    render(run)
    for page in ("report.html", "report.md"):
        text = (run / page).read_text(encoding="utf-8")
        assert "<script" not in text and "\u202e" not in text and "xgnp" in text


def test_commands_in_sentences_are_code_on_the_page_and_as_they_are_in_markdown(tmp_path):
    report = example()
    report["limitations"] = ["Say `compressor lower` & measure."]
    run = written(tmp_path / "run", report)
    render(run)
    assert "<li>Say <code>compressor lower</code> &amp; measure.</li>" in (run / "report.html").read_text(
        encoding="utf-8"
    )
    assert "Say `compressor lower` & measure." in (run / "report.md").read_text(encoding="utf-8")


def test_missing_parts_are_left_out(tmp_path):
    report = example()
    report["metric"], report["pattern"] = None, None
    for entry in report["rows"]:
        entry.update(quality=[], drift=[], latency=[])
    run = written(tmp_path / "run", report, steps=0)
    render(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<svg" not in page and "<img" not in page and "quality was not measured" in page
    assert "()" not in (run / "report.md").read_text(encoding="utf-8")  # a row that says nothing of what it is


def test_a_run_that_drew_nothing_says_first_how_far_its_predictions_are(tmp_path):
    report = example()
    report["metric"] = None
    for entry in report["rows"]:
        entry["quality"] = []
    run = written(tmp_path / "run", report)
    render(run)
    assert "% prediction error; quality was not measured" in (run / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", [None, "{}", "[]", "nonsense", '{"rows": NaN}'])
def test_a_directory_without_a_report_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(CompressorError, match=re.escape(str(tmp_path / "report.json"))):
        render(tmp_path)


def test_a_speed_up_is_claimed_only_from_three_per_cent_and_beyond_its_interval():
    report = copy.deepcopy(example())
    report["rows"][2]["macs_lowered"] = 6_000_000
    entry = report["rows"][2]["latency"][0]
    entry["backend"] = "lowered"
    for ratio, interval, text in (
        (1.029, None, "1.029x, within noise"),
        (1.031, None, "1.03x"),
        (0.97, None, "0.97x, slower"),
        (0.98, None, "0.98x, within noise"),
        (1.2, [0.99, 1.4], "1.20x [0.99, 1.40], within noise"),
        (1.2, [1.05, 1.4], "1.20x [1.05, 1.40]"),
        (0.8, [0.7, 1.01], "0.80x [0.70, 1.01], within noise"),
    ):
        entry["speedup_vs_dense"] = ratio
        entry["speedup_ci95"] = interval
        jsonschema.validate(report, schema())
        speedups = next(cells for title, _, cells in words.columns(typed(report)) if title == "speed-up")
        assert speedups == ["—", "no gain: skips no zeros", text]


def test_kernels_that_skip_no_zeros_gain_nothing_from_sparsity():
    report = lowered_example()
    final = report["rows"][2]
    engine = {**final["latency"][0], "backend": "ONNX Runtime", "against": "ONNX Runtime", "speedup_vs_dense": 1.46}
    final["latency"] += [engine, {**engine, "backend": "ONNX Runtime, gathered"}]
    [(_, lines)] = speeds(typed(report))
    said = {form: (eager, dense) for row, form, _, _, eager, dense in lines if row == "sparsedm"}
    assert said["ONNX Runtime"] == said["eager"] == ("—", "no gain: skips no zeros")
    assert said["ONNX Runtime, gathered"][1] == "1.46x over ONNX Runtime"
    final["macs_dense"] //= 2  # a smaller model is less work for every kernel
    [(_, lines)] = speeds(typed(report))
    assert ("sparsedm", "ONNX Runtime", "1.46x over ONNX Runtime") in [(*line[:2], line[-1]) for line in lines]


def test_a_form_of_an_earlier_timing_says_so_and_is_not_divided_by_a_newer_one():
    report = lowered_example()
    dense = report["rows"][0]
    for row in report["rows"]:
        row["latency"] = [{**entry, "timed": 2} for entry in row["latency"]]
    engine = {
        **dense["latency"][0],
        "backend": "ONNX Runtime",
        "against": "ONNX Runtime",
        "timed": 1,
        "speedup_vs_dense": 1.0,
    }
    dense["latency"].append(engine)
    jsonschema.validate(report, schema())
    [(_, lines)] = speeds(typed(report))
    forms = {form: eager for row, form, _, _, eager, _ in lines if row == "dense"}
    assert forms["eager"] == "1.00x" and forms["ONNX Runtime, timed before"] == "—"
    assert sum("timed before" in line[1] for line in lines) == 1
    bare = next(row for row in report["rows"] if row["name"] == "one-shot")
    bare["latency"] = [{**dense["latency"][0], "timed": 1}]
    _, _, times = next(entry for entry in words.columns(typed(report)) if entry[0] == "latency")
    assert ["timed before" in text for text in times] == [False, True, False]


def test_a_row_of_the_table_has_one_batch_size_and_dense_at_its_best():
    report = lowered_example()
    dense, final = report["rows"][0], report["rows"][2]
    lowered = {**final["latency"][1], "batch": 1, "of_plan": True, "median_ms": 2.0, "against": "ONNX Runtime"}
    final["latency"].append(lowered)
    dense["latency"] += [
        {**dense["latency"][0], "batch": 1, "median_ms": 4.0},
        {**dense["latency"][0], "batch": 1, "backend": "ONNX Runtime", "median_ms": 2.8},
    ]
    table = {title: cells for title, _, cells in words.columns(typed(report))}
    assert "latency" not in table
    for batch, first in ((1, "2.80 ms (IQR 0.200; ONNX Runtime,"), (16, "7.70 ms (IQR 0.200; eager,")):
        cells = table[f"latency, batch {batch}"]
        assert cells[0].startswith(first) and all(cell == "—" or f"batch {batch})" in cell for cell in cells), cells
    assert table["speed-up, batch 1"] == ["—", "—", "1.40x over ONNX Runtime dense"]


def test_a_ratio_has_an_interval_of_paired_rounds():
    """Against scipy-free truth: the interval of ranks that a fair coin leaves with 95%, for 15 rounds the 4th and the 12th."""
    times = [Times(0.0, 0.0, tuple(own)) for own in ([float(n) for n in range(1, 16)], [1.0] * 15)]
    assert ratio_interval(*times) == (4.0, 12.0)
    assert ratio_interval(Times(1, 0, (1.0,) * 5), Times(1, 0, (1.0,) * 5)) is None
    assert ratio_interval(Times(1, 0, (1.0,) * 6), Times(1, 0, (1.0,) * 7)) is None
    assert ratio_interval(Times(1, 0, (3.0,) * 6), Times(1, 0, (2.0,) * 6)) == (1.5, 1.5)
    drawn, held = Random(0), 0
    for _ in range(1000):
        rounds = [(drawn.lognormvariate(0, 0.3) * noise, noise) for noise in (1 + drawn.random() for _ in range(15))]
        low, high = ratio_interval(*(Times(0, 0, own) for own in zip(*rounds, strict=True)))
        held += low <= 1 <= high
    assert 950 <= held <= 990  # 96.5% by the binomial distribution; noise that rounds share leaves it alone


def test_equal_refusals_are_said_once(tmp_path):
    report = lowered_example()
    layer = report["lowering"]["layers"][0]
    report["lowering"]["layers"] = [{**layer, "name": f"blocks.{n}"} for n in range(40)]
    report["layers"] += [{**report["layers"][1], "name": f"norm.{n}.weight"} for n in range(40)]
    run = written(tmp_path / "run", report)
    render(run)
    for name in ("report.md", "report.html"):
        text = (run / name).read_text()
        assert text.count("too few rows") == 1 and "(all 40 layers)" in re.sub("<[^>]+>", "", text), name
    assert (run / "report.md").read_text().count("why") == 2  # a title, and a reason of 41 layers


def test_a_narrow_page_keeps_its_words_and_names_break_at_dots_alone(tmp_path):
    run = written(tmp_path / "run", lowered_example())
    render(run)
    page = (run / "report.html").read_text()
    narrow = page[page.index("@media (max-width: 40rem)") : page.index("@media print")]
    assert "display: none" not in narrow and "attr(data-of)" in narrow
    assert "mid_block.<wbr>attn.<wbr>qkv.<wbr>weight" in page and ".layers code { overflow-wrap: normal; }" in page
    assert page.count('data-of="sparsedm"') == page.count('data-of="dense"') > 10
    assert page.count('type="checkbox"') == 6 and "(log scale)" in page


def test_a_summary_says_what_a_manager_asks():
    said = dict(summary(typed(lowered_example())))
    assert "4.10 against the dense model's 3.70, lower is better: not told apart" in said["Quality"]
    assert "Without fine-tuning it would be 68.5" in said["Quality"] and "2.40 MB" in said["Size"]
    assert said["Speed"] == "Batch 16: 7.70 ms, 1.40x as fast as dense at its best (prepacked)."
    assert dict(summary(typed(example())))["Speed"].startswith("None is gained on this machine")
    worse = example()
    worse["rows"][2]["quality"][0].update(value=9.0, ci95=[8.0, 10.0])
    assert "worse than the dense model" in dict(summary(typed(worse)))["Quality"]


def test_what_counts_as_a_gain_is_the_same_for_a_layer_and_for_a_report():
    for dense_ms, counts in ((1.031, True), (1.029, False)):
        choice = Contest.of({"eager": (dense_ms,) * 25, "sparse": (1.0,) * 25}, {"sparse"}).verdict().choice
        entry = typed(example()).final.latency[0].model_copy(update={"speedup_vs_dense": dense_ms})
        assert (choice == "sparse") is entry.is_gain is gains(dense_ms) is counts


def lowered_example() -> dict[str, Any]:
    report = copy.deepcopy(example())
    final = report["rows"][2]
    final["macs_lowered"] = 6_000_000
    final["latency"].append(
        {**final["latency"][0], "backend": "lowered", "against": "prepacked", "speedup_vs_dense": 1.4}
    )
    candidates = [
        {"backend": "eager", "median_ms": 2.0, "error": 0.0, "refused": None},
        {"backend": "vnm", "median_ms": 0.5, "error": 1e-7, "refused": None},
        {"backend": "gathered", "median_ms": None, "error": None, "refused": "<b>too few rows</b>"},
    ]
    layer = {
        "name": "blocks.<i>0</i>", "kind": "linear", "weights": ["w"], "shapes": [[8, 4, 4]], "patterns": ["4:2:4"],
        "dtype": "float32", "gflop": 1e-6, "candidates": candidates, "choice": "vnm", "reason": "4.00x", "skips_zeros": True,
    }  # fmt: skip
    report["lowering"] = {
        "choice": "lowered", "reason": "1.40x", "layers": [layer], "forms": [{"name": "lowered", "error": 1e-7}],
        "left_out": {"conv.weight": "<u>stride</u>"}, "setting": {"hardware": "a CPU", "threads": 2},
    }  # fmt: skip
    return report


def test_the_headline_says_how_much_faster_only_where_it_is():
    report = lowered_example()
    assert words.headline(typed(report)).endswith("Lowered, it runs 1.40x as fast as dense at its best (prepacked).")
    report["rows"][2]["latency"][1]["speedup_vs_dense"] = 1.02
    assert words.headline(typed(report)).endswith("lower is better.")
    assert words.headline(typed(example())).endswith("lower is better.")


def test_a_lowered_report_has_bars_in_proportion_and_escapes_names(tmp_path):
    report = lowered_example()
    jsonschema.validate(report, schema())
    run = written(tmp_path / "run", report)
    render(run)
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert "width:100.0%" in page and "width:25.0%" in page and 'class="bar sparse"' in page
    assert "blocks.&lt;i&gt;0" in page and "<i>0" not in page and "<b>too few" not in page and "<u>stride" not in page
    assert "| 2.00 | 0.500 |" in text and "<i>" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (3.70799, "3.71"), (68.54, "68.5"), (1234.5, "1,234"), (0.0447, "0.0447"), (5e-5, "5.00e-05")),
        *((9.996, "10.0"), (99.97, "100"), (0.9996, "1.00"), (-0.5, "-0.500"), (-0.0, "0"), (math.inf, "inf")),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_nothing_is_rounded_to_nothing_to_all_or_to_a_gain():
    assert [share(n) for n in (0, 0.004, 0.55, 0.9951, 1)] == ["0%", "0.400%", "55%", "99.5%", "100%"]
    assert [percent(n) for n in (0, 1e-6, 0.5525, 0.9997, 1, 1.003)] == [
        "0%",
        "1.00e-04%",
        "55.2%",
        "99.97%",
        "100%",
        "100%",
    ]
    assert [times(n) for n in (0.004, 0.97, 1.0249, 1.0251, 1.02999, 1.03)] == [
        *("0.00400x", "0.97x", "1.02x", "1.025x", "1.029x", "1.03x")
    ]
    assert [seconds(n) for n in (0, 0.04, 12.3)] == ["0 s", "0.0400 s", "12 s"]


def test_an_interval_of_few_draws_is_said_to_be_one():
    for draws, said in ((0, False), (2, True), (39, True), (40, False)):
        report = typed(example())
        report = report.model_copy(update={"recipe": {**report.recipe, "evaluate": {"bootstrap": draws}}})
        assert (f"from {draws} draws of the bootstrap, too few for 95%" in " ".join(limitations(report))) == said


def test_a_batch_larger_than_the_data_is_said():
    for steps, batch, said in ((3, 9, True), (3, 8, False), (0, 9, False)):
        report = typed(example())
        recipe = {**report.recipe, "train": {"steps": steps, "batch_size": batch}}
        report = report.model_copy(update={"recipe": recipe, "data": report.data.model_copy(update={"samples": 8})})
        assert ("each step learned from all 8 samples" in " ".join(limitations(report))) == said


def test_steps_that_were_skipped_are_said(tmp_path):
    lines = [{"loss": 1.0, "grad_norm": 2.0}, {"loss": None, "grad_norm": 2.0}, {"loss": 1.0, "grad_norm": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, skipped = typed(example()), _skipped(tmp_path / "metrics.jsonl")
    assert skipped == 2
    said = {"train": {"steps": 3, "seconds": 1.0, "flipped": {}, "skipped": skipped}}
    row = report.final.model_copy(update={"train": trained_as(said)})
    changed = report.model_copy(update={"rows": (*report.rows[:-1], row)})
    assert "2 of 3 steps changed nothing" in " ".join(limitations(changed))
    assert ", 2 of them skipped" in str(words.columns(changed))
    assert "changed nothing" not in " ".join(limitations(report))


def test_counts_and_sizes_round_into_the_next_unit():
    assert [count(n) for n in (999, 598_929, 999_499, 999_500)] == ["999", "599 k", "999 k", "1.00 M"]
    assert [size(n) for n in (950, 2_404_112)] == ["950 B", "2.40 MB"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r["rows"].pop(1), "against 3.70 dense; lower"),
        (lambda r: r["rows"][0].update(quality=[]), "against 68.5 one-shot; lower"),
        (lambda r: r.update(rows=r["rows"][2:], recipe={}), "fd-digits 4.10 [3.10, 5.10]; lower"),
    ],
)
def test_the_headline_compares_only_what_was_measured(tmp_path, change, text):
    report = example()
    change(report)
    jsonschema.validate(report, schema())
    run = written(tmp_path / "run", report)
    render(run)
    assert text in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda r: r.update(rows=5), "rows: input should be a valid tuple, found 5"),
        (lambda r: r["rows"][0].pop("density"), "rows.0.density: field required"),
        (lambda r: r["rows"][2].update(name="other"), "the method sparsedm"),
        (lambda r: r["rows"][1].update(name="dense"), "each once"),
        (lambda r: r.update(lowering={"choice": "eager"}), "lowering.reason: field required"),
    ],
)
def test_a_report_of_another_form_is_named_and_nothing_written(tmp_path, spoil, field):
    report = example()
    run = written(tmp_path / "run", report)
    spoil(report)
    (run / "report.json").write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(CompressorError) as caught:
        render(run)
    assert str(run / "report.json") in caught.value.message and field in caught.value.message
    assert not (run / "report.html").exists() and not (run / "report.md").exists()


def test_a_fault_of_our_own_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    def broken(report: Report) -> str:
        raise KeyError("gone")

    monkeypatch.setattr(words, "headline", broken)
    with pytest.raises(KeyError):
        render(written(tmp_path / "run", example()))


def test_the_latency_of_the_plan_stands_for_a_row_wherever_it_lies():
    report = lowered_example()
    final = report["rows"][2]
    lowered = final["latency"][1]
    final["latency"] += [{**lowered, "batch": 99, "of_plan": True}]
    assert typed(report).final.standing.batch == 99
    del final["latency"][2]["of_plan"]  # files of earlier versions: the first lowered one
    assert typed(report).final.standing.batch == lowered["batch"]


def test_names_in_charts_are_taken_as_they_are():
    point = ("_a$x$", 0.5, 1.0, None)
    for chart in (charts.scatter_chart([point], "x", "y"), charts.curve_chart([("_a$x$", [0, 1], [1, 2])], "x", "y")):
        assert "_a$x$" in chart


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"step": 1}'])
def test_metrics_of_another_form_are_named(tmp_path, line):
    run = written(tmp_path / "run", example())
    (run / "metrics.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(CompressorError, match=re.escape(str(run / "metrics.jsonl"))):
        render(run)


def test_a_step_that_is_not_finite_leaves_the_rest_of_its_curve():
    values = [1.0, math.nan, 3.0, math.inf, 5.0]
    assert charts._running_mean(values, 2) == [1.0, 1.0, 3.0, 3.0, 5.0]
    assert charts._running_mean([2.0, 4.0, 6.0], 2) == [2.0, 3.0, 5.0]


@pytest.mark.parametrize("window", [1, 2, 3, 7, 40])
def test_a_running_mean_is_that_of_its_window_whatever_was_before(window):
    values = [0.1 * (index % 7) for index in range(31)]
    values[9], values[20] = 1e25, math.nan
    windows = [values[max(0, at - window + 1) : at + 1] for at in range(len(values))]
    known = [[value for value in own if math.isfinite(value)] for own in windows]
    expected = [sum(own) / len(own) if own else math.nan for own in known]
    assert charts._running_mean(values, window) == pytest.approx(expected, nan_ok=True)


def test_charts_name_total_noise_and_teacher_and_no_id_twice(tmp_path):
    run = written(tmp_path / "run", example())
    render(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(f">{name}</text>" in page for name in ("total", "noise", "teacher", "optimizer step"))
    drawn = re.findall(r'<g id="([^"]+)"', page)
    assert not drawn and "figure svg text { fill: currentColor; }" in page


def with_further_measures() -> dict[str, Any]:
    report = example()
    for entry in report["rows"]:
        first = entry["quality"][0]
        entry["quality"] += [
            {**first, "metric": "kid-digits", "value": 0.712, "ci95": [0.52, 0.91]},
            {**first, "metric": "recall-digits", "value": 0.885, "ci95": None},
        ]
    return report


def test_further_measures_are_a_table_with_their_direction(tmp_path):
    report = with_further_measures()
    jsonschema.validate(report, schema())
    run = written(tmp_path / "run", report)
    render(run)
    sentence = "Lower is better for kid-digits; higher is better for recall-digits."
    for name in ("report.html", "report.md"):
        text = (run / name).read_text(encoding="utf-8")
        assert text.count("Further measures") == 1 and sentence in text
        assert text.count("0.712 [0.520, 0.910]") == text.count("0.885") == 3
    lines = (run / "report.md").read_text(encoding="utf-8").splitlines()
    table = lines[lines.index("### Further measures") :][4:8]
    assert [line.count("|") for line in table] == [5] * 4, table


def test_a_further_measure_that_a_row_lacks_is_a_dash():
    report = with_further_measures()
    report["rows"][1]["quality"] = []
    assert [(name, cells[1]) for name, _, cells in further(typed(report))] == [
        ("kid-digits", "—"),
        ("recall-digits", "—"),
    ]


def test_a_report_of_the_metric_alone_has_no_further_measures(tmp_path):
    run = written(tmp_path / "run", example())
    render(run)
    assert further(typed(example())) == [] and direction(typed(example())) == ""
    assert "Further measures" not in (run / "report.html").read_text(encoding="utf-8")


def test_a_plugins_own_measure_is_shown_without_a_direction():
    report = with_further_measures()
    report["rows"][0]["quality"][1]["metric"] = "loveliness"
    assert further(typed(report))[0][:2] == ("loveliness", "") and "loveliness" not in direction(typed(report))


def test_runs_are_shown_side_by_side_and_only_what_can_be_compared_is(cli, tmp_path):
    first, second = example(), example()
    second["seed"] = 7
    second["rows"][2]["quality"][0].update(value=9.5, ci95=[8.0, 11.0])
    written(tmp_path / "a", first)
    written(tmp_path / "b", second)
    before = sorted(path.name for path in (tmp_path / "a").rglob("*"))
    outcome = cli("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both")
    assert outcome.code == 0, outcome.err
    assert "b: fd-digits worse than a, by more than the drawing of samples explains." in outcome.out
    found = json.loads(cli("report", tmp_path / "a", tmp_path / "b", "--json").out)
    lines = {title: cells for title, _, cells in found["columns"]}
    assert found["names"] == ["dense", "a", "b"] and lines["seed"] == ["—", "0", "7"]
    assert lines["fd-digits"] == ["3.70 [2.70, 4.70]", "4.10 [3.10, 5.10]", "9.50 [8.00, 11.0]"]
    page = (tmp_path / "both" / "report.html").read_text()
    assert (
        "9.50 [8.00, 11.0]" in page
        and "<script" not in page
        and "fd-digits" in (tmp_path / "both/report.md").read_text()
    )
    assert sorted(path.name for path in (tmp_path / "a").rglob("*")) == before
    for row in second["rows"]:
        row["latency"] = []
    written(tmp_path / "b", second)
    found = json.loads(cli("report", tmp_path / "a", tmp_path / "b", "--json").out)
    assert [title for title, _, cells in found["columns"] if set(cells) == {"—"}] == []  # no "latency" that neither has


def test_scores_of_other_networks_are_not_shown_side_by_side(cli, tmp_path):
    for name, network in (("a", "0" * 64), ("b", "1" * 64), ("c", "0" * 64)):
        report = example()
        score = {"name": "clip-score", "value": 21.0, "ci95": None, "samples": 4, "extractor_sha256": network}
        for row in report["rows"]:
            row["scores"] = [score]
        written(tmp_path / name, report)
    differ, same = (json.loads(cli("report", tmp_path / "a", tmp_path / other, "--json").out) for other in "bc")
    assert differ["refused"] == ["scores differ: clip-score 000000000000 in a, clip-score 111111111111 in b"]
    assert "clip-score" not in [title for title, _, _ in differ["columns"]]
    assert not same["refused"] and "clip-score" in [title for title, _, _ in same["columns"]]


def test_pages_of_runs_side_by_side_replace_no_others(cli, tmp_path):
    runs = [written(tmp_path / name, {**example(), "seed": seed}) for seed, name in enumerate("ab")]
    render(runs[0])
    pages = {path: path.read_bytes() for path in runs[0].iterdir() if path.is_file()}
    outcome = cli("report", *runs, "--out", runs[0])
    assert outcome.code == 2 and "a has report.json: it holds a run" in outcome.err, outcome.err
    assert {path: path.read_bytes() for path in runs[0].iterdir() if path.is_file()} == pages
    for name in ("report.md", "report.html"):
        mine = tmp_path / "mine" / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("# My own")
        outcome = cli("report", *runs, "--out", mine.parent)
        assert outcome.code == 2 and f"{name} is there already, and is not of runs side by side" in outcome.err
        outcome = cli("report", *runs, "--out", mine)
        assert outcome.code == 2 and f"{name} is a file" in outcome.err
        assert mine.read_text() == "# My own" and len(list(mine.parent.iterdir())) == 1
        mine.unlink()
    for _ in range(2):  # its own are written anew
        assert cli("report", *runs, "--out", tmp_path / "mine").code == 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r: r["data"].update(sha256="1" * 64, name="shapes"), "data differ: digits 0123456789ab in a, shapes"),
        (lambda r: r.update(model="other"), "models differ: uvit-digits in a, other in b"),
        (lambda r: r["rows"][0].update(weights_sha256="1" * 64), "dense weights differ"),
        (lambda r: r["rows"][2]["quality"][0].update(samples=8), "numbers of samples differ: 64 in a, 8 in b"),
        (lambda r: r.update(sampler="DDIM"), "samplers differ"),
        (lambda r: r["metric"].update(extractor_sha256="1" * 64), "metrics differ"),
    ],
)
def test_quality_of_different_things_is_not_compared(cli, tmp_path, spoil, said):
    other = example()
    spoil(other)
    written(tmp_path / "a", example())
    written(tmp_path / "b", other)
    outcome = cli("report", tmp_path / "a", tmp_path / "b")
    assert outcome.code == 0 and f"quality is not compared: {said}" in outcome.out
    found = json.loads(cli("report", tmp_path / "a", tmp_path / "b", "--json").out)
    titles = [title for title, _, _ in found["columns"]]
    assert "fd-digits" not in titles and "prediction error" not in titles and "file" in titles
    assert found["names"] == ["a", "b"] and found["verdict"] == []


def test_what_cannot_stand_side_by_side_is_named(cli, tmp_path):
    run = written(tmp_path / "a", example())
    (tmp_path / "empty").mkdir()
    comparison = Path(__file__).parent / "before" / "comparison"
    for arguments, code, said in (
        ((run, run), 2, "the same run twice"),
        ((run, tmp_path / "empty"), 1, "no such file"),
        ((run, comparison), 2, "is a comparison"),
        ((run, "--out", tmp_path / "x"), 2, "--out with one run"),
    ):
        outcome = cli("report", *arguments)
        assert outcome.code == code and said in outcome.err, outcome.err
