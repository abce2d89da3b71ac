"""What a user meets: one table of commands with their exit code and what they say; and that files of others steer nothing.

Each line of `TABLE` is read as a user reads it: where, what was found, what to do.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import save_file
from test_report import example, lowered_example, with_further_measures, written

from compressor.cli.tables import Ticker, plain_table
from compressor.comparison.page import _inner, _literal
from compressor.errors import CompressorError, printable
from compressor.files import LOCK
from compressor.progress import Progress
from compressor.report import environment_of
from compressor.report.charts import line_chart
from compressor.report.compared import ComparisonReport
from compressor.report.content import Report

TABLE: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    # names
    ("rnu", 2, ("no command 'rnu'", "Did you mean 'run'?")),
    ("run --method sparsdm", 2, ("unknown method 'sparsdm'", "Did you mean 'sparsedm'?", "Available: ")),
    ("run --model uvit-digit", 2, ("unknown model 'uvit-digit'", "Did you mean 'uvit-digits'?")),
    ("run --set train.stepz=3", 2, ("unknown setting 'train.stepz'", "'steps'")),
    ("run --set evaluate.metric=fd", 2, ("unknown metric 'fd'", "fd-digits")),
    ("run --set evaluate.metric=fid", 2, ("needs the weights of Inception", "--inception-weights PATH")),
    ("run --targets nothing.0", 2, ("'nothing.0'", "in_blocks.0")),
    ("inspect uvit-digit", 2, ("unknown model 'uvit-digit'", "Did you mean 'uvit-digits'?")),
    ("list pruner", 2, ("'pruner'", "Did you mean 'pruners'?")),
    ("export run --to onx", 2, ("no format 'onx'", "Did you mean 'onnx'?")),
    ("compare --preset sparsedm", 2, ("'sparsedm'", "sparsedm-ablation")),
    # values
    ("run --pattern 5:4", 2, ("5:4",)),
    ("run --steps -1", 2, ("steps", "found -1", "recipe.yaml")),
    (
        "train --model uvit --data digits --seed 18446744073709551616",
        2,
        ("train.seed", "less than 9223372036854775808"),
    ),
    ("run --set train.lr=nan", 2, ("train.lr", "nan")),
    ("run --dtype float8", 2, ("dtype", "float8", "bfloat16")),
    ("run --device abacus", 1, ("device 'abacus' cannot be used", "Use auto, cpu, cuda or cuda:0.")),
    ("run --no-such-flag", 2, ("No such option", "--no-such-flag", "See compressor run --help")),
    ("inspect", 2, ("Missing argument 'MODEL'", "See compressor inspect --help")),
    ("bench run --batches none", 2, ("'none' are not numbers above zero", "--batches 1,4,16")),
    # nothing given
    ("run --data=", 2, ("--data is empty", "Leave it out, or give it a value.")),
    ("run --data ''", 2, ("the value after --data is empty", "Leave both out, or give it a value.")),
    ("run --out ''", 2, ("the value after --out is empty",)),
    ("resume ''", 2, ("the value after resume is empty",)),
    # two things at once
    ("run --quick --full", 2, ("--quick with --full", "Give one of them.")),
    ("evaluate run --full --quick", 2, ("--quick with --full", "Give one of them.")),
    ("bench run --compiled --no-compiled", 2, ("--compiled with --no-compiled", "Give one of them.")),
    ("lower run --compiled --no-compiled", 2, ("--compiled with --no-compiled", "Give one of them.")),
    ("run --pipeline nowhere --model uvit-digits", 2, ("--model and --pipeline name two models", "Give one of them")),
    ("plan --pipeline nowhere --set model=dit", 2, ("--model and --pipeline name two models", "Give one of them")),
    ("compare --pipeline nowhere --model dit", 2, ("--model and --pipeline name two models", "Give one of them")),
    ("run --method magnitude --set pruner=mine.py:Mine", 2, ("--method and --pruner name two methods", "one of them")),
    ("run --data digits --data pictures-32", 2, ("--data is given twice", "Give it once.")),
    ("run --config twice.yaml --config two.yaml", 2, ("--config is given twice", "Give it once.")),
    ("compare --methods magnitude --methods wanda", 2, ("--methods is given twice", "Give it once.")),
    ("push run --folder new --public", 2, ("--public with --folder, which uploads nothing", "Leave one of them out.")),
    ("plan --no-lower --max-error 0.1", 2, ("lowering.max_error with --no-lower", "Leave one of them out.")),
    # what nothing would ask for
    ("run --set record.n=3", 2, ("record.n without a pipeline", "Give --pipeline DIR.")),
    ("run --method dense-continued --train lora", 2, ("the method masks no weight", "train.mode=full")),
    (
        "train --model uvit --data digits --set method=obs",
        2,
        ("--set method: a dense model is trained", "Leave it out."),
    ),
    ("train --model uvit --data digits --set from_scratch=false", 2, ("--set from_scratch:", "Leave it out.")),
    ("evaluate run --set seed=5", 2, ("seed is a setting of `train` too", "Write --set evaluate.seed=…")),
    ("compare --set method=obs", 2, ("--set method: all entries would be that method", "--methods")),
    ("compare --methods magnitude --set pruner=mine.py:Mine", 2, ("--set pruner: all entries would be", "--methods")),
    ("compare --methods magnitude --set lower=true", 2, ("magnitude: lower would not be asked for", "give --lower")),
    (
        "compare --methods magnitude --lower --max-error 0.1 --set lowering.tolerance=0.1",
        2,
        ("magnitude: lowering would not be asked for", "with --max-error, for all of them"),
    ),
    ("compare --methods magnitude --seeds 1001", 2, ("--seeds 1001", "at least 1, at most 1,000")),
    (
        "run --method structured --set settings.density=.5 --set settings.macs=.3",
        2,
        ("Structured: macs has no effect, as density says what stays", "Leave macs out."),
    ),
    ("run --method depth --set settings.seed=1", 2, ("Depth: seed has no effect, as score error draws nothing",)),
    (
        "run --set settings.teacher_only=true --set settings.teacher=.5",
        2,
        ("SparseDM: teacher has no effect, as teacher_only learns from the teacher alone",),
    ),
    ("run --method wanda --set settings.falls=late", 2, ("wanda: falls has no effect, as last_weight is 1",)),
    ("run --device meta", 1, ("device 'meta' cannot be used", "Use auto, cpu, cuda or cuda:0.")),
    (
        "merge-lora run other.safetensors --out others",
        2,
        ("others is not empty: it has notes.txt", "Choose another --out."),
    ),
    # files
    ("run --data nowhere.npz", 1, ("nowhere.npz",)),
    ("run --weights nowhere.pth", 1, ("nowhere.pth",)),
    ("run --config nowhere.yaml", 2, ("nowhere.yaml",)),
    ("run --config two.yaml", 2, ("pipeline and model: two sources", "A pipeline brings its model")),
    ("run --config half.yaml", 2, ("has half a character in it", "Write it in UTF-8.")),
    ("run --config twice.yaml", 2, ("twice.yaml:2: found duplicate key", "Each key stands once")),
    ("run --pruner mine.py:Mine", 2, ("mine.py:Mine", "no such file", "Looked for")),
    ("run --pruner broken.py:Mine", 1, ("broken.py failed to import: SystemExit: 0", "Run it with python.")),
    ("run --weights other.safetensors", 1, ("other.safetensors",)),
    ("inspect uvit-digits --weights other.safetensors", 1, ("other.safetensors",)),
    # folders
    ("compare --methods magnitude,", 2, ("--methods 'magnitude,': a name is empty", "--methods magnitude,sparsedm")),
    ("report begun", 1, ("begun/report.json: no such file", "the same `compressor compare` command goes on with it")),
    ("push begun owner/name", 1, ("begun", "the same `compressor compare` command goes on with it")),
    ("lower begun", 1, ("begun: no report.json", "It is a comparison")),
    ("report nowhere", 2, ("nowhere: no such directory", "Give the directory of a run.")),
    ("resume nowhere", 2, ("nowhere: no such directory", "Give the directory of a run.")),
    ("sample nowhere", 2, ("nowhere: no such directory", "Give the directory of a run, or a saved model's folder.")),
    ("lower nowhere", 2, ("nowhere: no such directory", "Give the directory of a run.")),
    ("run --out run", 2, ("run is not empty", "compressor resume run", "--overwrite")),
    ("run --out file", 2, ("file is a file", "Choose a folder with --out.")),
    ("run --out away", 2, ("away is a link to nowhere, which is not there", "Make that folder, or remove the link.")),
    ("run --out busy", 4, ("busy is in use by another process", "Wait for it, or choose another place (--out).")),
    ("run --resume", 2, ("--resume needs the run's directory", "Give it with --out DIR.")),
    ("sample run --out file", 2, ("file is a file", "Choose a folder with --out.")),
    ("push run --folder file", 2, ("file is a file", "Choose a folder with --folder.")),
    ("sample run --out sheet.PNG", 2, ("sheet.PNG is the name of a file, and several are written", "with --out")),
    ("merge-lora run other.safetensors --out merged.safetensors", 2, ("merged.safetensors is the name of a file",)),
    ("sample run --out others", 2, ("others has files of others: notes.txt", "Choose another --out.")),
    ("compare --out others", 2, ("others has files of others: notes.txt", "Choose another --out.")),
    # what would destroy something
    (
        "export run --to onnx --overwrite --out run/model/model.safetensors",
        2,
        ("model.safetensors is not called NAME.onnx",),
    ),
    ("export run --to onnx --overwrite --out run/report.json", 2, ("report.json is not called NAME.onnx",)),
    # done
    ("list pruners", 0, ()),
    ("report run --json", 0, ()),
    ("resume run", 0, ("run is finished",)),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, finished):
    """A folder with a finished run, and what can be wrong."""
    root = tmp_path_factory.mktemp("place")
    shutil.copytree(finished, root / "run")
    (root / "busy").mkdir()
    (root / "begun" / "cells").mkdir(parents=True)
    (root / "others").mkdir()
    (root / "others" / "notes.txt").write_text("mine")
    (root / "file").write_text("mine")
    (root / "away").symlink_to("nowhere")
    (root / "two.yaml").write_text("model: uvit-cifar10\npipeline: nowhere\nprompts: nowhere.txt\n")
    (root / "half.yaml").write_text('data: "a\\uD800b"\n')
    (root / "twice.yaml").write_text("train: {steps: 1}\ntrain: {steps: 2}\n")
    (root / "broken.py").write_text("raise SystemExit(0)\n")
    save_file({"unknown": torch.zeros(3)}, root / "other.safetensors")
    return root


def snapshot(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and not path.name.startswith(".lock")}


@pytest.mark.parametrize(("line", "code", "parts"), TABLE, ids=[line for line, _, _ in TABLE])
def test_a_command_says_what_a_user_needs(cli, place, monkeypatch, line, code, parts):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COMPRESSOR_CACHE", str(place.parent / "cache"))
    before = snapshot(place) if code else {}
    with FileLock(place / "busy" / LOCK):  # as another process would: this one's own may be taken again
        outcome = cli(*shlex.split(line))
    assert outcome.code == code, outcome.err
    for part in parts:
        assert part in outcome.err
    if code:
        assert outcome.out == "" and "Traceback" not in outcome.err and "unexpected" not in outcome.err
        assert outcome.err.startswith("error: ") and 1 <= outcome.err.count("\n") <= 3
        assert snapshot(place) == before


def test_every_exit_code_of_the_documentation_is_tried():
    """3, 129, 130 and 143 have tests of their own: of exports that differ, and of signals."""
    assert {code for _, code, _ in TABLE} == {0, 1, 2, 4}


# --- Names of others. ---

STEERING = "x\x1b]0;owned\x07[/bold][red]\u202e\u2066 ![p](http://evil/p.png) [l](javascript:alert(1)) [d]: javascript:1 <img src=x>|`"


def hostile(report, model):
    """`report` with every text that may be anything replaced by one that steers."""
    report = json.loads(json.dumps(report))

    def places(value, at=()):
        if isinstance(value, str):
            yield at
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in pairs:
            yield from places(inner, (*at, key))

    def owner(at):
        inner = report
        for key in at[:-1]:
            inner = inner[key]
        return inner

    count = 0
    for at in list(places(report)):
        inner, before = owner(at), owner(at)[at[-1]]
        if at[-1] in ("backend", "against", "name", "metric") and at[0] == "rows" and before in ("dense", "one-shot"):
            continue  # rows are told apart by these
        if at[-1] == "compared_by":
            continue  # it names a key of others
        inner[at[-1]] = STEERING
        try:
            model.model_validate(report)
            count += 1
        except ValidationError:
            inner[at[-1]] = before
    assert count > 20
    return report


def steers(text):
    return [letter for letter in text if letter != "\n" and unicodedata.category(letter) in ("Cc", "Cf", "Cs")]


def links(markdown):
    """What Markdown takes as a link, a picture or the address of one; our own pictures aside."""
    found = re.findall(r"(?<!\\)\](?:\([^)]*\)|\[)", markdown)
    found += re.findall(r"^[ *|>-]*\[[^\]]*\]:", markdown, re.MULTILINE)
    return [one for one in found if not re.fullmatch(r"\]\((samples|cells|dense)/[\w./-]*\.png\)", one)]


@pytest.mark.parametrize("made", [example, lowered_example, with_further_measures])
def test_a_report_of_others_steers_neither_terminal_nor_page(cli, tmp_path, made):
    report = hostile(made(), Report)
    written(tmp_path / "run", report)
    outcome = cli("report", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert steers(outcome.out) == steers(outcome.err) == []
    markdown = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "owned" in markdown and steers(markdown) == [] and links(markdown) == [] and "<img" not in markdown
    assert "<img src=x" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_progress_of_others_steers_nothing():
    for terminal in (True, False):
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=terminal, color_system=None, width=300)
        with Ticker(console, quiet=False) as ticker:
            ticker.show(Progress(STEERING, 0, 2, STEERING))
            ticker.show(Progress(STEERING, 2, 2, STEERING))
        assert "[/bold][red]" in shown.getvalue()
        assert "\x1b]0" not in shown.getvalue() and "\x07" not in shown.getvalue() and "\u202e" not in shown.getvalue()


def test_a_title_of_a_table_steers_nothing():
    shown = io.StringIO()
    Console(file=shown, width=500).print(plain_table([STEERING], [[STEERING]]))
    assert shown.getvalue().count("[/bold][red]") == 2 and steers(shown.getvalue()) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("häß 四 é", "häß 四 é"),
        ("a\x1b[31mb\x9b\r\n\tc", "a[31mbc"),
        ("\u202eabc\u2069\u200b\ufeff", "abc"),
        ("a\ud800b\u2028", "ab"),
    ],
)
def test_printable_leaves_letters_and_takes_what_steers(text, shown):
    assert printable(text) == shown
    shown.encode()


@pytest.mark.parametrize(
    "value",
    [
        "![a](http://evil)",
        "[a](javascript:1)",
        "[a]: javascript:1",
        "[a][b]",
        "[a\\](x)",
        "[[a]](b)",
        "[a]\n(b)",
        "[a]\r(b)",
    ],
)
def test_a_value_in_markdown_is_no_link(value):
    for template in ("{{ v }}", "- {{ v }}", "| {{ v | cell }} |"):
        assert links(environment_of(html=False).from_string(template).render(v=value)) == []
    assert environment_of(html=False).from_string("{{ v }}").render(v="1.5 [1.2, 1.8]") == "1.5 [1.2, 1.8]"


@pytest.mark.parametrize(
    ("cell", "kept"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd", "'+cmd"),
        ("@sum", "'@sum"),
        ("-x", "'-x"),
        (" =1", "' =1"),
        ("\t=1", "'=1"),
        ("-1.5", "-1.5"),
        ("+3", "+3"),
        ("2:4", "2:4"),
        (-1.5, -1.5),
        (3, 3),
        ("", ""),
    ],
)
def test_a_cell_of_a_csv_is_no_formula(cell, kept):
    assert _literal(cell) == kept


@pytest.mark.parametrize(
    "folder", ["../x", "/etc", "cells/../..", "cells/..", "cells/.hidden", "cells/a/b", "cells/a\0", "dense"]
)
def test_a_report_names_no_folder_but_its_own(folder):
    with pytest.raises(CompressorError, match="is not the folder of a cell"):
        _inner(folder)
    assert _inner("cells/sparsedm-seed-0") == "cells/sparsedm-seed-0"


def test_a_comparison_of_others_steers_neither_terminal_page_nor_spreadsheet(cli, tmp_path):
    stored = Path(__file__).parent / "before" / "comparison" / "report.json"
    report = hostile(json.loads(stored.read_text(encoding="utf-8")), ComparisonReport)
    report["entries"][0]["label"] = "=HYPERLINK(1)"
    for entry in report["entries"]:
        for number, one in enumerate(entry["cells"]):
            one["folder"] = f"cells/one-{number}"
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    outcome = cli("report", tmp_path)
    assert outcome.code in (0, 1) and "unexpected" not in outcome.err, outcome.err
    assert steers(outcome.out) == steers(outcome.err) == []
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "owned" in markdown and steers(markdown) == [] and links(markdown) == []
    cells = [cell for line in csv.reader(io.StringIO((tmp_path / "report.csv").read_text())) for cell in line]
    assert "'=HYPERLINK(1)" in cells and not any(cell.startswith(("=", "@")) for cell in cells)


def test_half_a_character_in_a_report_is_named(cli, tmp_path):
    report = example()
    report["model"] = "a\ud800"
    written(tmp_path / "run", report)
    outcome = cli("report", tmp_path / "run")
    assert outcome.code == 1 and "half a character" in outcome.err and "unexpected" not in outcome.err


def test_letters_that_a_font_lacks_are_no_warning():
    assert "\u56db" in line_chart([("\u56db", [1.0, 2.0]), ("\x1b", [1.0, 2.0])], "loss")  # warnings are errors here


NAME = "\udcc3\udca9"  # what Python makes of an e with an accent, in a locale that has ASCII alone


def test_a_name_that_the_locale_has_no_letters_for_is_shown_as_it_is(cli, place, monkeypatch, tmp_path):
    """It was shown without those letters, which is the name of another file; and ONNX Runtime's own words for it were no help."""
    monkeypatch.chdir(tmp_path)
    assert (printable(f"{NAME} \udcff"), printable(f"{NAME} \ud800")) == ("é ", " ")
    assert f"error: {'é'}: no such directory" in cli("report", NAME).err
    shutil.copytree(place / "run", NAME)
    assert "report: é/report.html" in cli("report", NAME).out
    for arguments, said in (
        (("export", NAME, "--to", "onnx"), "é/model.onnx: ONNX Runtime reads names in UTF-8 alone"),
        (
            ("run", "--data", f"{NAME}/pictures", "--model", "uvit-digits"),
            "'é/pictures' has letters that the locale has no",
        ),
    ):
        outcome = cli(*arguments)
        assert outcome.code == 2 and said in outcome.err and "Set a locale of UTF-8" in outcome.err, outcome.err


def test_a_report_of_another_version_says_so(cli, place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "run", "later")
    content = json.loads(Path("later/report.json").read_text())
    Path("later/report.json").write_text(json.dumps({**content, "schema_version": 2}))
    for arguments in (("report", "later"), ("report", place / "run", "later")):
        outcome = cli(*arguments)
        assert outcome.code == 1 and "schema_version: input should be 1, found 2" in outcome.err
        assert "Another version of the toolkit wrote it" in outcome.err
