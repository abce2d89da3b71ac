"""The command line: what it prints where, its exit codes, and that it touches nothing that it should not."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import SMALL, UNMEASURED
from rich.console import Console

import compressor
from compressor.cli import main as cli_main
from compressor.cli.tables import fitted, plain_table
from compressor.discovery import from_file
from compressor.runs import directory

PRUNER = """
from dataclasses import dataclass
from compressor import NM, Pattern, Pruner

@dataclass(frozen=True)
class Mine(Pruner):
    pattern: Pattern = NM(2, 4)
    largest: bool = True

    def masks(self, weights, progress, previous):
        sign = 1 if self.largest else -1
        return previous or {name: self.pattern.mask(sign * w.abs()) for name, w in weights.items()}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def copy(finished, here):
    """A finished run, to be changed."""
    return shutil.copytree(finished, here / "run")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Names. ---


@pytest.mark.parametrize(
    ("arguments", "unknown", "meant"),
    [
        (("run", "--method", "sparsdm"), "sparsdm", "sparsedm"),
        (("run", "--model", "uvit-digit"), "uvit-digit", "uvit-digits"),
        (("run", "--set", "train.stepz=3"), "train.stepz", "steps"),
        (("run", "--set", "settings.decays=3"), "decays", "decay"),
        (("run", "--set", "evaluate.metric=fd-digit"), "fd-digit", "fd-digits"),
        (("run", "--targets", "in_block.0"), "in_block.0", "in_blocks.0"),
        (("inspect", "uvit-digit"), "uvit-digit", "uvit-digits"),
        (("list", "pruner"), "pruner", "pruners"),
        (("rnu",), "rnu", "run"),
    ],
)
def test_an_unknown_name_is_a_usage_error_with_a_suggestion(cli, here, arguments, unknown, meant):
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert f"'{unknown}'" in outcome.err
    assert f"Did you mean '{meant}" in outcome.err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--pattern", "2 of 4"),
        ("run", "--pattern", "5:4"),
        ("run", "--steps", "-1"),
        ("run", "--dtype", "float8"),
        ("run", "--device", "abacus"),
        ("run", "--data", "nowhere.npz"),
        ("run", "--weights", "nowhere.pth"),
        ("run", "--config", "nowhere.yaml"),
        ("run", "--model", "uvit-cifar10"),
        ("run", "--targets", "re:("),
        ("run", "--no-such-flag"),
        ("inspect",),
        ("inspect", "uvit-digits", "--pattern", "half"),
        ("inspect", "uvit-digits", "--weights", "nowhere.pth"),
        ("report", "nowhere"),
        ("resume", "nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_and_creates_nothing(cli, here, arguments):
    outcome = cli(*arguments)
    assert outcome.code in (1, 2)
    assert outcome.out == ""
    assert outcome.err.strip()
    assert "unexpected" not in outcome.err
    assert "Traceback" not in outcome.err
    assert list(here.iterdir()) == []


# --- Patterns and rules. ---


@pytest.mark.parametrize("command", [("run", "--out", "out"), ("inspect", "uvit-digits")])
def test_a_pattern_that_fits_no_layer_is_refused_with_the_reasons(cli, here, command):
    outcome = cli(*command, "--pattern", "2:5")
    assert outcome.code == 2
    assert "2:5 fits no layer" in outcome.err
    assert "divisible by 5" in outcome.err
    assert "96" in outcome.err
    assert list(here.iterdir()) == []


def layers(outcome):
    assert outcome.code == 0, outcome.err
    return {layer["name"].removesuffix(".weight"): layer["reason"] for layer in json.loads(outcome.out)["layers"]}


def test_inspect_shows_every_layer_and_why(cli):
    outcome = cli("inspect", "uvit-digits")
    assert outcome.code == 0
    assert outcome.err == ""
    for part in ("in_blocks.0.attn.qkv.weight", "(288, 96)", "2:4", "not among the targets", "MACs"):
        assert part in outcome.out


def test_inspect_says_no_share_of_what_is_counted_in_the_total_alone(cli, tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\nfrom compressor import Adapter\n\n"
        "class Own(Adapter):\n    name = 'own'\n\n    def build(self):\n        return nn.MultiheadAttention(16, 2)\n\n"
        "    def noised(self, batch, rng):\n        return batch, batch\n\n"
        "    def predict(self, model, x):\n        return model(x, x, x)[0]\n\n"
        "    def example_inputs(self, n):\n        return torch.zeros(n, 3, 16)\n"
    )
    given = ("inspect", f"{tmp_path / 'own.py'}:Own", "--pattern", "2:4")
    packed, layer = json.loads(cli(*given, "--json").out)["layers"]
    assert (packed["name"], packed["macs"], packed["macs_share"]) == ("in_proj_weight", None, None)
    assert layer["name"] == "out_proj.weight" and 0 < layer["macs_share"] < 1 and layer["reason"] is None
    line = next(line for line in cli(*given).out.splitlines() if "in_proj_weight" in line)
    assert " — " in line and "not of a Linear or convolution" in line


def test_inspect_prints_json(cli):
    found = json.loads(cli("inspect", "uvit-digits", "--pattern", "4:2:4", "--json").out)
    assert (found["model"], found["pattern"]) == ("uvit-digits", "4:2:4")
    assert sum(layer["macs"] for layer in found["layers"]) <= found["macs_dense"]
    kept = sum(layer["macs"] * (0.5 if layer["reason"] is None else 1) for layer in found["layers"])
    assert found["macs_effective"] == found["macs_dense"] - sum(layer["macs"] for layer in found["layers"]) + kept


@pytest.mark.parametrize(
    ("rule", "picked"),
    [
        ("mid_block.mlp.fc1", {"mid_block.mlp.fc1"}),
        ("mid_block.mlp", {"mid_block.mlp.fc1", "mid_block.mlp.fc2"}),
        ("mid_block.*.fc?", {"mid_block.mlp.fc1", "mid_block.mlp.fc2"}),
        (r"re:^mid_block.*(qkv|fc2)$", {"mid_block.attn.qkv", "mid_block.mlp.fc2"}),
    ],
)
def test_a_rule_names_layers(cli, rule, picked):
    chosen = layers(cli("inspect", "uvit-digits", "--json", "--targets", rule))
    assert {name for name, reason in chosen.items() if reason is None} == picked
    left = layers(cli("inspect", "uvit-digits", "--json", "--targets", "mid_block", "--ignore", rule))
    assert {name for name, reason in left.items() if reason == "ignored by a rule"} == picked


def test_rules_may_be_repeated_and_ignore_wins(cli):
    rules = ("--targets", "mid_block.mlp", "--targets", "in_blocks.0.mlp", "--ignore", "re:fc2")
    chosen = layers(cli("inspect", "uvit-digits", "--json", *rules))
    assert {name for name, reason in chosen.items() if reason is None} == {"mid_block.mlp.fc1", "in_blocks.0.mlp.fc1"}


def test_a_layer_that_is_named_and_does_not_fit_is_refused_with_the_way_out(cli):
    outcome = cli("inspect", "uvit-digits", "--targets", "final_layer", "--targets", "mid_block")
    assert outcome.code == 2
    assert "final_layer.weight" in outcome.err
    assert "--ignore final_layer" in outcome.err


def test_rules_that_leave_nothing_are_refused(cli):
    outcome = cli("inspect", "uvit-digits", "--ignore", "*")
    assert outcome.code == 2
    assert "ignored by a rule" in outcome.err


def test_an_ignore_rule_that_matches_nothing_is_warned_of(cli):
    outcome = cli("inspect", "uvit-digits", "--ignore", "nowhere")
    assert outcome.code == 0
    assert "'nowhere' matches no layer" in outcome.err


# --- Lists and plugins. ---


def test_list_shows_every_kind(cli):
    outcome = cli("list")
    assert outcome.code == 0
    for name in ("sparsedm", "magnitude", "dense-continued", "uvit-digits", "uvit-cifar10", "digits", "fd-digits"):
        assert name in outcome.out


def test_list_shows_one_kind(cli):
    outcome = cli("list", "pruners")
    assert "sparsedm" in outcome.out
    assert "uvit" not in outcome.out


def test_list_prints_json(cli):
    found = json.loads(cli("list", "--json").out)
    assert set(found) == {"pruners", "models", "data", "metrics", "backends"}
    assert {"name", "distribution", "summary", "error"} <= found["pruners"][0].keys()
    assert {line["name"] for line in found["pruners"]} >= {"sparsedm", "magnitude"}
    assert all(line["summary"].endswith(".") and line["error"] is None for lines in found.values() for line in lines)


def test_a_narrow_terminal_breaks_lines_and_cuts_nothing(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert re.search("│ uvit-imagenet512-h +│", cli("list", "models").out)  # names in whole
    layers = cli("inspect", "uvit-digits", "--pattern", "2:4").out
    assert "…" not in layers
    assert "out_blocks.0.skip_linear.weight" in "".join(
        line.split("│")[1].strip() for line in layers.splitlines() if "│" in line
    )


def test_a_broken_plugin_is_shown_and_is_not_fatal(cli, install):
    install("brittle", "raise SystemExit('out of paper')", pruners={"glass": "Glass"})
    outcome = cli("list", "pruners")
    assert outcome.code == 0
    (line,) = [line for line in outcome.out.splitlines() if "glass" in line]
    assert "cannot be loaded" in line
    assert "sparsedm" in outcome.out
    (entry,) = [e for e in json.loads(cli("list", "--json").out)["pruners"] if e["name"] == "glass"]
    assert "out of paper" in entry["error"]


def test_a_broken_plugin_that_is_asked_for_is_named(cli, install, here):
    install("brittle", "1 / 0", pruners={"glass": "Glass"})
    outcome = cli("run", "--method", "glass")
    assert outcome.code == 1
    for part in ("glass", "brittle", "ZeroDivisionError"):
        assert part in outcome.err
    assert list(here.iterdir()) == []


# --- A pruner in a file. ---


def test_a_pruner_of_fifteen_lines_in_a_file_runs(cli, here):
    assert len([line for line in PRUNER.splitlines() if line.strip()]) <= 15
    (here / "my_pruner.py").write_text(PRUNER)
    outcome = cli.trial(
        here / "out", "--pruner", "my_pruner.py:Mine", "--pattern", "1:4", "--set", "settings.largest=false"
    )
    assert outcome.code == 0, outcome.err
    report = json.loads((here / "out" / "report.json").read_text())
    assert (report["method"], report["pattern"]) == ("Mine", "1:4")
    assert report["settings"]["largest"] is False
    assert compressor.load(here / "out") is not None


def test_a_method_that_is_given_wins_over_the_pruner_of_the_recipe(cli, here):
    (here / "my_pruner.py").write_text(PRUNER)
    (here / "own.yaml").write_text("pruner: my_pruner.py:Mine\nevaluate: {samples: 0, latency_rounds: 0}\n")
    for arguments, method in ((("--method", "magnitude"), "magnitude"), ((), "Mine")):
        assert cli("run", "--config", "own.yaml", "--steps", 0, *arguments, "--out", method).code == 0
        assert json.loads((here / method / "report.json").read_text())["method"] == method
    trained = ("--model", "uvit", "--data", "digits", "--set", "batch_size=4", "--set", "architecture.embed_dim=32")
    assert cli("train", "--config", "own.yaml", "--steps", 1, *trained, "--out", "dense").code == 0
    assert json.loads((here / "dense" / "report.json").read_text())["method"] == "dense-continued"


def test_rules_of_a_method_that_prunes_nothing_are_warned_of(cli, here):
    none = ("--set", "evaluate.samples=0", "--set", "evaluate.latency_rounds=0", "--steps", 0, "--out", "out")
    outcome = cli("run", "--method", "dense-continued", "--ignore", "in_blocks.0", *none)
    assert outcome.code == 0
    assert "targets and ignore say what is pruned, and dense-continued prunes nothing" in outcome.err


BESIDE = """
from compressor import NM, Pruner
from {module} import SIGN


class Mine(Pruner):
    pattern = NM(2, 4)

    def masks(self, weights, progress, previous):
        return {{name: self.pattern.mask(SIGN * weight.abs()) for name, weight in weights.items()}}
"""


def test_a_file_imports_what_lies_beside_it_and_resume_compares_that_too(cli, here):
    for folder, sign in (("a", 1.0), ("b", -1.0)):
        (here / folder).mkdir()
        (here / folder / "p.py").write_text(BESIDE.format(module="beside_it"))
        (here / folder / "beside_it.py").write_text(f"SIGN = {sign}")
    for folder, sign in (("a", 1.0), ("b", -1.0), ("a", 1.0)):
        assert from_file(f"{folder}/p.py:SIGN", "--pruner") == sign
    assert str(here / "a") not in sys.path
    assert cli.trial(here / "out", "--pruner", "a/p.py:Mine").code == 0
    (here / "out" / "report.json").unlink()
    assert cli("resume", here / "out").code == 0
    (here / "out" / "report.json").unlink()
    (here / "a" / "beside_it.py").write_text("SIGN = -1.00")
    outcome = cli("resume", here / "out")
    assert outcome.code == 1 and "the recipe changed" in outcome.err


def test_a_file_beside_it_takes_no_librarys_place(here):
    (here / "click.py").write_text("raise SystemExit('not this one')")
    (here / "einops.py").write_text("raise SystemExit('not this one')")
    (here / "p.py").write_text("import click, einops\n\nEINOPS = einops.__file__")
    assert Path(from_file("p.py:EINOPS", "--pruner")).parent.name == "einops"
    ended = subprocess.run(
        [sys.executable, "-m", "compressor", "--version"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0 and "compressor" in ended.stdout, ended.stderr


NOISY = """
import ctypes
import os
from compressor import NM, Pruner

print("noise at import")


class Noisy(Pruner):
    pattern = NM(2, 4)

    def masks(self, weights, progress, previous):
        print("noise")
        os.write(1, b"noise\\n")
        os.system("echo noise")
        ctypes.CDLL(None).puts(b"noise")
        return {name: self.pattern.mask(weight.abs()) for name, weight in weights.items()}
"""


def test_json_is_alone_on_stdout_whatever_a_plugin_prints(cli, here):
    (here / "noisy.py").write_text(NOISY)
    arguments = ("run", "--pruner", "noisy.py:Noisy", *SMALL, *UNMEASURED, "--steps", "1", "--quiet", "--json")
    command = [sys.executable, "-m", "compressor", *arguments, "--out", "out"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["method"] == "Noisy" and ended.stderr.count("noise") > 4
    here_too = cli("plan", "--pruner", "noisy.py:Noisy", "--json", "--quiet")
    assert here_too.code == 0 and json.loads(here_too.out) and "noise at import" in here_too.err


@pytest.mark.parametrize(
    ("source", "reference", "parts"),
    [
        (PRUNER, "p.py:Mina", ("'Mina'", "Did you mean 'Mine'?")),
        (PRUNER, "p.py:NM", ("not a subclass",)),
        (PRUNER, "q.py:Mine", ("no such file", "q.py")),
        (PRUNER, "p.py", ("FILE.py:NAME",)),
        (PRUNER, "p.txt:Mine", ("FILE.py:NAME",)),
        (PRUNER, "p.py:", ("FILE.py:NAME",)),
        ("import nowhere", "p.py:Mine", ("p.py", "ModuleNotFoundError", "nowhere")),
        ("raise SystemExit(0)", "p.py:Mine", ("p.py", "SystemExit")),
        ("def broken(:", "p.py:Mine", ("p.py", "SyntaxError")),
        ("from compressor import Pruner\nclass Mine(Pruner): pass", "p.py:Mine", ("Mine", "masks")),
    ],
)
def test_a_file_without_such_a_pruner_is_refused(cli, here, source, reference, parts):
    (here / "p.py").write_text(source)
    outcome = cli("run", "--pruner", reference)
    assert outcome.code in (1, 2)
    for part in parts:
        assert part in outcome.err
    assert "unexpected" not in outcome.err
    assert [path.name for path in here.iterdir() if path.name != "__pycache__"] == ["p.py"]


# --- The output directory. ---


def test_a_directory_that_is_not_empty_is_refused_and_left_alone(cli, here):
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    outcome = cli("run", "--out", "out")
    assert outcome.code == 2
    assert "notes.txt" in outcome.err
    assert "--overwrite" in outcome.err
    assert contents(here) == {(here / "out" / "notes.txt").relative_to(here): b"mine"}


def test_a_file_is_no_directory(cli, here):
    (here / "out").write_text("mine")
    for out in ("out", "out/below"):
        outcome = cli("run", "--out", out, "--overwrite")
        assert outcome.code in (1, 2)
        assert "unexpected" not in outcome.err
    assert (here / "out").read_text() == "mine"


def test_overwrite_replaces_a_run_and_keeps_what_is_not_its_own(cli, copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "checkpoints").mkdir()
    (copy / "checkpoints" / "mine.pt").write_text("mine")
    (copy / "checkpoint-99").mkdir()
    outcome = cli.trial(copy, "--overwrite", "--steps", 2)
    assert outcome.code == 0, outcome.err
    assert (copy / "notes.txt").read_text() == (copy / "checkpoints" / "mine.pt").read_text() == "mine"
    assert not (copy / "checkpoint-99").exists()
    assert not (copy / "samples").exists()  # of the former run; this one draws none
    assert len((copy / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("folder", ["model", "samples"])
def test_overwrite_keeps_folders_that_are_no_runs(cli, here, folder):
    (here / folder).mkdir()
    (here / folder / "mine.py").write_text("mine")
    cli.trial(here, "--overwrite", "--steps", 0)
    assert (here / folder / "mine.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "pipeline", "name"),
    [
        ("uvit", None, "uvit"),
        ("/somewhere/else/mine.py:Mine", None, "Mine"),
        ("../../mine.py:Mine", None, "Mine"),
        ("uvit", "pipes/sd/", "sd"),
        ("uvit", "owner/name", "name"),
    ],
)
def test_a_directory_is_called_by_its_model_and_lies_where_it_should(model, pipeline, name):
    from compressor.cli.options import name_of

    assert name_of(model, pipeline) == name


def test_compare_of_a_model_of_ones_own_writes_into_runs(cli, tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    seen = []
    monkeypatch.setattr("compressor.comparison.sharing", lambda out, *_: seen.append(out) or 1 / 0)
    cli("compare", "--model", "../../mine.py:Mine", "--methods", "magnitude")
    cli("compare", "--pipeline", "../sd", "--methods", "magnitude")
    assert seen == [Path("runs/compare-Mine"), Path("runs/compare-sd")]


def test_without_out_each_run_gets_a_directory_of_its_own(here):
    from compressor.cli.run import free_directory

    base = here / "runs" / "uvit-digits-sparsedm"
    assert free_directory(base) == base
    base.mkdir(parents=True)
    assert free_directory(base).name == "uvit-digits-sparsedm-2"


def test_the_way_out_can_be_pasted_into_a_shell(cli, here):
    (here / "my run").mkdir()
    (here / "my run" / "recipe.yaml").write_text("steps: 3\n")
    command = cli("run", "--out", "my run").err.split("`")[1]
    assert shlex.split(command) == ["compressor", "resume", "my run"]


@contextmanager
def somebody_in(out):
    """The lock of `out` is held, by another thread of this process."""
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with directory.locked(out):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(60)
    yield
    leave.set()
    thread.join()


@pytest.mark.parametrize("option", [(), ("--overwrite",), ("--resume",)])
def test_a_directory_in_use_is_refused_and_the_holder_named(cli, copy, option):
    (copy / "report.json").unlink()
    before = contents(copy)
    with somebody_in(copy):
        outcome = cli("run", "--out", copy, *option)
    assert outcome.code == 4
    assert "in use by process" in outcome.err
    assert {path: data for path, data in contents(copy).items() if not path.name.startswith(".lock")} == {
        path: data for path, data in before.items() if not path.name.startswith(".lock")
    }


def test_an_empty_directory_in_use_is_refused(cli, here):
    with somebody_in(here / "out"):
        assert cli("run", "--out", "out").code == 4


# --- Output. ---


def test_json_and_quiet_leave_nothing_but_the_report(cli, here):
    outcome = cli.trial(here / "out", "--json", "--quiet")
    assert outcome.code == 0
    assert outcome.err == ""
    assert json.loads(outcome.out) == json.loads((here / "out" / "report.json").read_text())


def test_progress_goes_to_stderr_and_results_to_stdout(cli, here):
    outcome = cli.trial(here / "out")
    assert outcome.code == 0
    assert "fine-tune 4/4" in outcome.err
    assert "fine-tune 4/4" not in outcome.out
    for part in ("one-shot", "sparsedm", "report.html"):
        assert part in outcome.out


def test_quiet_resume_of_a_finished_run_is_silent(cli, finished):
    assert cli("resume", finished, "--quiet", "--json").err == ""


def test_report_shows_the_table_and_the_floor(cli, copy):
    outcome = cli("report", copy)
    assert outcome.code == 0, outcome.err
    for part in ("fd-digits", "floor", "dense", "sparsedm"):
        assert part in outcome.out


@pytest.mark.parametrize("width", ["40", "200", "0"])
def test_a_table_fits_any_terminal(cli, finished, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    for arguments in (("list",), ("inspect", "uvit-digits"), ("resume", finished)):
        outcome = cli(*arguments)
        assert outcome.code == 0, outcome.err
        table = [line for line in outcome.out.splitlines() if line[:1] in "│┃┏└┡"]
        assert table
        assert max(map(len, table)) <= (int(width) or 400)  # 0 is no width


@pytest.mark.parametrize("several", ["row", "methods, of which there are several"])
@pytest.mark.parametrize("width", range(24, 110, 7))
def test_a_table_breaks_no_word_and_loses_no_cell_at_any_width(width, several):
    titles = (
        "methods, of which there are several",
        "fd-digits, mean; lower is better",
        "error",
        "file",
        "latency",
        "steps",
    )
    lines = [
        (f"a method {n}", f"6{n}.2 [65.0, 73.4]", "13.3%", "1.36 MB", f"6.{n}0 ms, IQR 0.22", "3 steps") for n in (1, 2)
    ]
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(fitted(plain_table(titles, lines), width))
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    words = set(re.findall(r"[^\s│┃]+", shown))
    missing = {word for line in lines for cell in line for word in cell.split() if len(word) <= 8} - words
    assert not missing


ESCAPE = "\x1b]0;owned\x07"


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--method", f"a{ESCAPE}"),
        ("run", "--out", f"full{ESCAPE}"),
        ("run", "--weights", f"a{ESCAPE}.pth"),
        ("run", "--pruner", f"a{ESCAPE}.py:Mine"),
        ("run", "--set", f"a{ESCAPE}=1"),
        ("run", f"--a{ESCAPE}"),
        ("inspect", f"a{ESCAPE}"),
        ("list", f"a{ESCAPE}"),
        (f"a{ESCAPE}",),
    ],
)
def test_escape_codes_in_a_name_do_not_reach_the_terminal(cli, here, arguments):
    (here / f"full{ESCAPE}").mkdir()
    (here / f"full{ESCAPE}" / "notes.txt").write_text("mine")
    outcome = cli(*arguments)
    assert outcome.code in (1, 2)
    assert "owned" in outcome.err
    assert "\x1b" not in outcome.err + outcome.out
    assert "\x07" not in outcome.err + outcome.out


def test_escape_codes_in_a_directory_do_not_reach_the_terminal(cli, copy):
    out = copy.rename(copy.with_name(f"run{ESCAPE}"))
    outcome = cli("resume", out)
    assert outcome.code == 0
    assert "\x1b" not in outcome.err + outcome.out


def test_escape_codes_and_markup_of_a_plugin_do_not_reach_the_terminal(cli, install):
    install(
        "gaudy", f'class Gaudy:\n    """Paints{ESCAPE} [bold]everything[/bold]."""', pruners={f"g{ESCAPE}audy": "Gaudy"}
    )
    outcome = cli("list", "pruners")
    assert outcome.code == 0
    assert "[bold]everything[/bold]" in outcome.out
    assert "\x1b" not in outcome.out


def test_debug_shows_the_traceback_and_nothing_else_does(cli, here):
    assert "Traceback" not in cli("run", "--method", "nope").err
    outcome = cli("run", "--method", "nope", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert "error: unknown method 'nope'" in outcome.err


def test_an_error_that_nobody_foresaw_is_one_line_and_a_file(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path))

    def broken(kind):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("compressor.registry.listing", broken)
    outcome = cli("list", "pruners")
    assert outcome.code == 1
    assert outcome.err.startswith("error: unexpected ZeroDivisionError: division by zero\n")
    (crash,) = (tmp_path / "compressor" / "crashes").iterdir()
    assert str(crash) in outcome.err and outcome.err.count("\n") == 2
    told = crash.read_text(encoding="utf-8")
    for part in (
        "compressor 0.1.0, ",
        "torch ",
        "['compressor', 'list', 'pruners']",
        "Traceback",
        "line ",
        "division by",
    ):
        assert part in told


def test_where_no_crash_file_can_be_written_debug_is_named(cli, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("compressor.registry.listing", lambda kind: 1 / 0)
    outcome = cli("list", "pruners")
    assert outcome.code == 1 and "--debug" in outcome.err and "Traceback" not in outcome.err
    assert "ZeroDivisionError" in cli("list", "pruners", "--debug").err


def test_ctrl_c_in_a_library_that_wraps_it_is_ctrl_c(cli, monkeypatch):
    def wrapping(kind):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("export failed") from error

    monkeypatch.setattr("compressor.registry.listing", wrapping)
    outcome = cli("list", "pruners")
    assert (outcome.code, outcome.err.strip()) == (130, "stopped")


def test_the_help_of_all_says_what_each_command_does_in_whole_sentences(cli):
    said = " ".join(cli("--help").out.partition("Commands:")[2].split())
    assert "..." not in said
    assert (
        "compare Compare methods: equal budgets, data, noise and evaluation, several seeds, one report. doctor" in said
    )


def test_without_a_command_the_help_is_shown_as_it_is(cli):
    outcome = cli()
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.strip() == cli("--help").out.strip()


@pytest.mark.parametrize("arguments", [("--version",), ("-h",), ("run", "--help")])
def test_help_and_version_are_results(cli, arguments):
    outcome = cli(*arguments)
    assert outcome.code == 0
    assert outcome.out
    assert outcome.err == ""


@pytest.mark.parametrize(
    "command",
    [
        *("resume {}", "run --resume --out {}", "evaluate {}", "report {}", "report {} {}", "lower {}", "bench {}"),
        *("export {} --to onnx", "sample {}", "merge-lora {} lora.safetensors", "push {} --folder out"),
    ],
)
@pytest.mark.parametrize("name", ["missing", "file", "file/in"])
def test_a_run_that_is_no_directory_is_wrong_usage_everywhere(cli, here, command, name):
    (here / "file").write_text("text")
    outcome = cli(*command.replace("{}", name).split())
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {name}: ") or outcome.err.startswith(f"error: {name} is a file")
    assert [path.name for path in here.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "place", ["compressor.cli.app.main", "compressor.cli.app.settle", "compressor.cli.app.app.make_context"]
)
def test_ctrl_c_at_any_moment_is_one_line(monkeypatch, capfd, place):
    """While the command line was imported, or began, it was a traceback; and click said an empty line besides."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    with pytest.raises(SystemExit) as ended:
        cli_main()
    assert ended.value.code == 130
    assert capfd.readouterr().err.split() == ["stopped"]


def test_ctrl_c_says_no_empty_line(cli, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("compressor.registry.listing", interrupted)
    outcome = cli("list", "models")
    assert (outcome.code, outcome.err) == (130, "stopped\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_breaks_an_import_is_no_error(cli, monkeypatch, number, code):
    """NumPy, half imported, lacked a name later, and that was reported as an unexpected error, with a crash file."""

    def half(*_):
        with suppress(BaseException):
            os.kill(os.getpid(), number)
            time.sleep(5)  # which it ends
        raise AttributeError("module 'numpy' has no attribute 'iterable'")

    monkeypatch.setattr("compressor.registry.listing", half)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes that share out tests may ignore it
    try:
        outcome = cli("list", "models")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.code, outcome.err) == (code, "stopped\n")


@pytest.mark.parametrize(
    "name", ["drawn/mine.png", "trackers/mine.txt", "samples/mine.txt", "model/mine.txt", "drawn/in/x"]
)
def test_overwrite_takes_no_files_of_the_users_from_a_runs_folders(cli, copy, name):
    mine = copy / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    (copy / "trackers" / "compressor").mkdir(parents=True, exist_ok=True)
    for own in ("compressor/events.out", "failed.txt"):
        (copy / "trackers" / own).write_text("the run's")
    mine.write_text("mine")
    before = contents(copy)
    outcome = cli.trial(copy, "--overwrite")
    assert outcome.code == 2
    assert f"run/{name} is none of the run's files, and would be removed with them" in outcome.err
    assert contents(copy) == before
    mine.unlink()
    assert cli.trial(copy, "--overwrite").code == 0
    assert not (copy / "trackers").exists()
