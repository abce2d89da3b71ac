"""What the documents show works: their Python runs, their links lead somewhere, their settings exist."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.shell_completion import ShellComplete
from PIL import Image
from pydantic import BaseModel

import compressor
from compressor import registry
from compressor.export import engines

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*/*/README.md")),
    *sorted(ROOT.glob("examples/README.md")),
    ROOT / "wheels" / "DESCRIPTION.md",  # what an index of packages shows
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the comment before it: `tested: NAME` or `not run: REASON`."""

    language: str
    text: str
    tested: str
    reason: str


FENCE = re.compile(r"^(?:<!-- (tested|not run): (.+?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[Block]:
    return [
        Block(language, text, what if kind == "tested" else "", what if kind == "not run" else "")
        for kind, what, language, text in FENCE.findall(page.read_text(encoding="utf-8"))
    ]


def python_blocks(page: Path) -> list[str]:
    return [block.text for block in blocks(page) if block.language == "python"]


def runs(block: Block) -> bool:
    return block.language == "python" and not block.tested and not block.reason


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_block_is_run_or_says_why_not(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(blocks(page)), "a fence that is indented, or not closed"
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for block in blocks(page):
        assert block.language in ("python", "console", "bash", "json", "toml", "yaml", "text"), block
        if block.tested:
            assert f"def {block.tested}(" in written, block.tested
        elif block.language == "json":
            json.loads(block.text)
        elif block.language != "python" and page.name != "README.md":  # whose commands are a new user's whole walk
            assert block.reason, f"say why this is not run: <!-- not run: … -->\n{block.text}"
        assert all((ROOT / path).is_file() for path in re.findall(r"\b(?:tests|examples)/\w+\.py", block.reason)), block


def commands(page: Path) -> list[str]:
    """What a page shows of `compressor`, command by command, as a shell would see it."""
    lines = [line for block in blocks(page) if block.language == "console" for line in block.text.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("compressor ")]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_the_commands_in_the_page_exist_with_their_options(page):
    from compressor.cli.app import app

    for line in commands(page):
        name, *arguments = shlex.split(line, comments=True)[1:]
        command = app.commands[name]
        # with its parent: a command keeps the help option that the first context gives it, for all later ones of the process
        context = click.Context(command, parent=click.Context(app, **app.context_settings), info_name=name)
        command.parse_args(context, arguments)  # raises for options and choices that are none


LONG = {"deployment.md", "index.md", "extending.md"}
"""Pages whose Python takes more than a few seconds; README.md, writing_a_pruner.md and lowering.md are looked at at once."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.name in LONG else (), id=page.relative_to(ROOT).as_posix())
        for page in PAGES
        if any(map(runs, blocks(page)))
    ],
)
def test_python_in_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for number in range(9):  # what the page about data calls photos
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (40, 36), (20 * number, 90, 120)).save(tmp_path / "photos" / f"{number}.png")
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in filter(runs, blocks(page)):
        if found := re.match(r"# file: (\S+)\n", block.text):
            (tmp_path / found[1]).write_text(block.text, encoding="utf-8")
        with engines._signal_stack_kept():  # of pages that use OpenVINO
            exec(compile(block.text, str(page), "exec"), names)  # the page is ours


@pytest.mark.slow
def test_the_commands_of_the_quick_start_run(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    (shown,) = [block for block in blocks(ROOT / "docs" / "index.md") if block.tested]
    smaller = ("evaluate.samples=8", "evaluate.sampler_steps=2", "evaluate.latency_rounds=0", "evaluate.bootstrap=0")
    settings = [part for one in smaller for part in ("--set", one)]
    for line in shown.text.splitlines():
        name, *arguments = shlex.split(line)[1:]
        outcome = cli(name, *arguments, *(settings if name == "run" else ["--steps", "2"]))
        assert outcome.code == 0, outcome.err
    assert (tmp_path / "runs" / "first" / "report.html").is_file()


@pytest.mark.slow
def test_the_metric_of_the_page_judges_a_run(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    page = blocks(ROOT / "docs" / "extending.md")
    (metric,) = [block.text for block in page if block.text.startswith("# file: mine.py")]
    (shown,) = [block.text for block in page if block.tested == "test_the_metric_of_the_page_judges_a_run"]
    (tmp_path / "mine.py").write_text(metric, encoding="utf-8")
    smaller = ("evaluate.samples=8", "evaluate.sampler_steps=2", "evaluate.latency_rounds=0", "train.batch_size=8")
    outcome = cli(*shlex.split(shown)[1:], *(part for one in smaller for part in ("--set", one)))
    assert outcome.code == 0, outcome.err
    rows = json.loads((tmp_path / "judged" / "report.json").read_text(encoding="utf-8"))["rows"]
    assert all(row["quality"][0]["metric"] == "fd-quarters" for row in rows)


def test_the_recipe_of_the_page_is_one():
    from compressor.recipe import Recipe, merged, parse_yaml

    (shown,) = [block.text for block in blocks(ROOT / "docs" / "recipe.md") if block.language == "yaml"]
    recipe = Recipe.model_validate(merged(parse_yaml(shown, "page")))
    assert recipe.pattern == "2:4" and recipe.train.lr == 1e-4 and recipe.evaluate.samples == 512


def test_the_shell_completes_commands_and_options():
    from compressor.cli.app import app

    complete = ShellComplete(app, {}, "compressor", "_COMPRESSOR_COMPLETE")
    assert "inspect" in [item.value for item in complete.get_completions([], "ins")]
    assert "--method" in [item.value for item in complete.get_completions(["run"], "--me")]
    assert [item.value for item in complete.get_completions(["run", "--method"], "sp")] == ["sparsedm"]
    (model, *_), (weights,) = (complete.get_completions(["run", name], "") for name in ("--model", "--weights"))
    assert model.type == weights.type == "file"
    assert [item.type for item in complete.get_completions(["record"], "pipe")] == ["file"]


def test_the_adapter_of_the_page_runs_from_the_command_line(tmp_path, monkeypatch, cli):
    block, _ = python_blocks(ROOT / "docs" / "adapters.md")
    assert len([line for line in block.splitlines() if line.strip() and not line.startswith("#")]) <= 30
    (tmp_path / "mine.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    outcomes = [
        cli.run(Path("run"), "--model", "mine.py:Mine", "--data", "digits", "--set", "evaluate.samples=0"),
        cli("lower", "run"),
        cli("export", "run", "--to", "onnx"),
    ]
    assert [(outcome.code, outcome.err) for outcome in outcomes if outcome.code] == []
    assert (tmp_path / "run" / "model.onnx").is_file()


def test_the_diffusers_model_of_the_page_is_pruned(tmp_path, monkeypatch):
    import diffusers
    import torch

    _, block = python_blocks(ROOT / "docs" / "adapters.md")
    monkeypatch.chdir(tmp_path)
    pipeline = Path("path/to/pipeline")
    diffusers.DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(pipeline / "scheduler")
    (pipeline / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16,),
        cross_attention_dim=16,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    ).save_pretrained(pipeline / "unet")
    names: dict[str, object] = {"latents": torch.zeros(2, 4, 8, 8), "text": torch.zeros(2, 7, 16)}
    exec(compile(block.replace("steps=1000", "steps=2"), "adapters.md", "exec"), names)
    assert len(names["result"].masks) > 10


def test_the_page_on_pipelines_runs(tmp_path, monkeypatch):
    import tiny_pipelines

    monkeypatch.chdir(tmp_path)
    pipe = tiny_pipelines.made("sd", tmp_path / "files")
    pipe.set_progress_bar_config(disable=True)
    names: dict[str, object] = {"pipe": pipe, "prompts": tiny_pipelines.PROMPTS}
    for block in blocks(ROOT / "docs" / "pipelines.md"):
        if block.tested == "test_the_page_on_pipelines_runs":
            exec(compile(block.text, "pipelines.md", "exec"), names)
    assert len(names["result"].masks) > 10 and names["picture"].size == (16, 16)


def test_the_pruner_of_the_page_runs_from_the_command_line(tmp_path, monkeypatch):
    block = next(
        b for b in python_blocks(ROOT / "docs" / "writing_a_pruner.md") if b.startswith("# file: my_pruner.py")
    )
    assert len([line for line in block.splitlines() if line.strip() and not line.startswith("#")]) <= 15
    (tmp_path / "my_pruner.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    arguments = [
        "compressor",
        "run",
        "--pruner",
        "my_pruner.py:MyPruner",
        "--pattern",
        "4:8",
        "--steps",
        "2",
        "--quiet",
    ]
    for setting in ("train.batch_size=8", "evaluate.samples=8", "evaluate.sampler_steps=2", "evaluate.bootstrap=2"):
        arguments += ["--set", setting]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", "out"])
    from compressor.cli import main

    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 0
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_tests_that_the_page_on_reliability_names_are_there():
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 40 and [name for name in named if f"def {name}(" not in written] == []


@pytest.mark.parametrize("method", registry.names("pruners"))
def test_every_setting_of_a_method_is_on_its_card(method):
    from compressor.registry import pruner_class
    from compressor.training.pruner import setting_names

    cls = pruner_class(method)
    card = (ROOT / "plugins" / cls.__module__.rpartition(".")[2] / "README.md").read_text(encoding="utf-8")
    for name in setting_names(cls):
        if name != "estimator":
            assert f"`{name}`" in card, f"{name} is not explained"


def test_every_setting_is_documented_with_its_default():
    from compressor.recipe import SECTIONS, Recipe, parse_yaml

    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    top, *rest = re.split(r"^## `(\w+)`$", page, flags=re.MULTILINE)
    for name in Recipe.model_fields.keys() - SECTIONS.keys():
        assert f"| `{name}` |" in top, name
    for section, text in zip(rest[::2], rest[1::2], strict=True):
        fields: dict[str, Any] = {}
        for name, field in SECTIONS[section].model_fields.items():
            inner = field.annotation if isinstance(field.annotation, type) else object
            nested = inner.model_fields if issubclass(inner, BaseModel) else None
            fields |= {name: field} if nested is None else {f"{name}.{key}": one for key, one in nested.items()}
        for name, field in fields.items():
            line = re.search(rf"^\| `{name}`[^|]*\|([^|]*)\|", text, re.MULTILINE)
            assert line, name
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            if field.default_factory is not None:  # an empty mapping, which a cell leaves blank
                continue
            assert default is None or parse_yaml(f"it: {line[1]}", name)["it"] == default, name


def load_tables():
    if (folder := str(ROOT / "benchmarks")) not in sys.path:  # as for a script
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    return table


@pytest.mark.parametrize("place", [(page, marker) for page, marker, _, _ in load_tables().TABLES], ids=" ".join)
def test_a_table_in_a_page_is_the_committed_measurement(place):
    tables = load_tables()
    ((name, marker, results, make),) = (entry for entry in tables.TABLES if entry[:2] == place)
    page = (ROOT / name).read_text(encoding="utf-8")
    written = tables.written(results, make)
    assert written in page and tables.replaced(page, marker, written) == page
    assert tables.replaced(page, marker, "x") != page


def speed_ups(page: str, marker: str) -> dict[str, tuple[str, str]]:
    """By model, what few bits gain over the fastest other engine, and float32 over the fastest that is no less exact."""
    (table,) = re.findall(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", page, re.DOTALL)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    few, exact = (
        next(row for row in rows if row[0].startswith(f"*lowered, {form}*: over the {over}"))
        for form, over in (("8 bits", "fastest other engine"), ("float32", "best that is no less exact"))
    )
    return {name: (few[at].split()[0], exact[at].split()[0]) for at, name in enumerate(rows[0]) if at}


@pytest.mark.parametrize(
    ("machine", "marker"),
    [
        ("Zen 4, AVX-512 with VNNI", "opponents-vnni"),
        ("Zen 5, AVX-512 with VNNI", "opponents-zen5"),
        ("Zen 5 kept to AVX-VNNI", "opponents-avx-vnni"),
        ("Zen 4 kept to AVX2", "opponents"),
    ],
)
def test_what_is_said_of_cpus_is_in_the_tables_of_speed(machine, marker):
    found = speed_ups((ROOT / "docs" / "speed.md").read_text(encoding="utf-8"), marker)
    order = ["U-ViT-S/2, 32x32, batch 4, ms", "U-ViT-S/2, 32x32, batch 1, ms"]
    order += ["one block of DiT-XL/2, 1,024 tokens, batch 1, ms", "DDPM UNet, CIFAR-10, batch 4, ms"]
    cells = [", ".join(found[name]) for name in order]
    assert f"| {machine} | {' | '.join(cells)} |" in (ROOT / "README.md").read_text(encoding="utf-8")
    few, exact = (sorted(found[name][at] for name in order) for at in (0, 1))
    assert f"| {machine} | {few[0]} to {few[-1]} | {exact[0]} to {exact[-1]} |" in (
        ROOT / "docs" / "lowering.md"
    ).read_text(encoding="utf-8")


def test_what_the_readme_says_of_a_model_of_real_size_is_in_the_table():
    lowering, speed = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("lowering.md", "speed.md"))
    (few, exact), *others = speed_ups(speed, "opponents-sd15").values()
    assert not others
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"(256 pixels, Zen 4) is at {few}, {exact}" in readme
    assert f"stay dense, is at {few} and\n{exact} on the Zen 4" in lowering
    ((few, exact),) = speed_ups(speed, "opponents-decoder").values()
    assert f"The decoder of its autoencoder is at [{few}, {exact}]" in readme
    assert f"pruned decoder is {few[:-1]} times as fast as OpenVINO's int8" in speed


def test_what_is_said_of_a_whole_picture_is_in_its_table():
    page = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- whole-picture -->\n(.*?)<!-- /whole-picture -->\n(.*?)\n#", page, re.DOTALL)
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in table[0].splitlines() if "|" in line}
    ratio, exact = (rows[f"*lowered, 8 bits*: over the {other}"] for other in (
        "fastest other engine", "best that is no less exact"
    ))  # fmt: skip
    lowered, other = rows["lowered, 8 bits, 8:2:4"], rows["OpenVINO, int8, dense"]
    errors = [re.findall(r"\((.*)\)", row)[0] for row in (lowered, other)]
    here = int(other.split()[0]) / int(rows["prepacked, 8 bits, dense"].split()[0])
    for said in (
        f"{ratio.split('x')[0]} times as fast as with OpenVINO's int8, at {errors[0]} of error where that has {errors[1]}",
        f"{exact.split('x')[0]} times as fast as with OpenVINO in bfloat16",
        f"come to {here:.2f} of OpenVINO's speed",
    ):
        assert said in table[1]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"in 4 steps and 8 bits, at [{ratio.split()[0]}]" in readme


def load_gather():
    spec = importlib.util.spec_from_file_location("gather", ROOT / "docs" / "gather.py")
    gather = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gather)
    return gather


def in_navigation() -> list[str]:
    from compressor.recipe import parse_yaml

    def pages(entries: Any) -> list[str]:
        if isinstance(entries, str):
            return [entries]
        return [
            page
            for entry in entries
            for page in pages(next(iter(entry.values())) if isinstance(entry, dict) else entry)
        ]

    return pages(parse_yaml((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), "mkdocs.yml")["nav"])


def test_every_page_of_the_site_is_in_its_navigation_once():
    made = {page for page in load_gather().gathered() if not page.startswith("source/")}
    assert sorted(in_navigation()) == sorted(made)


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as the site and forges make them."""
    found: set[str] = set()
    for heading in re.findall(
        r"^#+ (.+)$", re.sub(r"^````?\w*\n.*?^````?$", "", text, flags=re.M | re.S), re.MULTILINE
    ):
        plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).strip()
        found |= {name.replace(" ", "-"), re.sub(r"[-\s]+", "-", name)}
    return found


def test_links_of_the_site_lead_to_pages_and_headings():
    gather = load_gather()
    made = gather.gathered()
    for page, text in made.items():
        for target, anchor in (
            gather.LINK.findall(re.sub(r"`[^`\n]*`", "", text)) if not page.startswith("source/") else ()
        ):
            if gather.is_outer(target):
                continue
            place = gather.normal(page, target)
            if f"docs/{place}" in gather.pictures():
                continue
            assert place in made, f"{page}: {target}"
            assert not anchor or anchor[1:] in anchors(made[place]), f"{page}: {target}{anchor}"
        for anchor in re.findall(r"\]\(#([^)]+)\)", text):
            assert page.startswith("source/") or anchor in anchors(text), f"{page}: #{anchor}"


def test_the_readme_is_short_and_says_in_this_order_what_a_stranger_asks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    asked = (
        "![",
        "<!-- methods -->",
        "## Install",
        "## Use",
        "## Which method",
        "## Is it faster",
        "## What it does not do",
    )
    places = [text.index(one) for one in asked]
    assert places == sorted(places)
    first, *_ = re.findall(r"^```console\ncompressor (.*?)^```$", text, re.M | re.S)
    assert len(first.splitlines()) == 4
    python = re.search(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert python is not None and len([line for line in python[1].splitlines() if line]) <= 8


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings")
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "plugins", "model_zoo", "benchmarks", "examples", "compressor", ".github", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    gather = load_gather()
    gather.PAGES = tmp_path / "build" / "pages"
    gather.main()
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "No issues found" in done.stdout + done.stderr, done.stdout + done.stderr
    page = (tmp_path / "build" / "site" / "api.html").read_text(encoding="utf-8")
    assert [name for name in compressor.__all__ if f'id="compressor.{name}"' not in page] == []


def test_the_page_of_the_api_lists_what_the_package_exports():
    listed = re.findall(
        r"^::: compressor\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(compressor.__all__)
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize("name", compressor.__all__)
def test_a_public_name_says_what_it_is(name):
    thing = getattr(compressor, name)
    assert thing.__dict__.get("__doc__") or (inspect.isroutine(thing) and thing.__doc__), name
    if not inspect.isclass(thing):
        return
    own = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
    for key, value in own.items():
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if inspect.isfunction(value) or isinstance(value, property):
            told = any((getattr(base, key, None).__doc__ or "").strip() for base in thing.__mro__ if hasattr(base, key))
            assert told, f"{name}.{key}"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NO_MODULES = {*PROJECT["entry-points"], "compressor.patterns", "compressor.fish"}
"""Groups of entry points, one of which has none here, and a shell's file."""


def is_there(name: str) -> bool:
    """Whether `name` leads, by modules and then by what is in them, to something."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[count:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_names_that_the_page_says_can_be_imported(page):
    text = page.read_text(encoding="utf-8")
    named = {name for name in re.findall(r"\bcompressor(?:\.[A-Za-z_]\w*)+", text) if name not in NO_MODULES}
    for module, names in re.findall(r"^\s*from (compressor[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        named |= {f"{module}.{name.split(' as ')[0].strip()}" for name in names.split(",")}
    assert not [name for name in sorted(named) if not is_there(name)]


def test_a_name_that_is_not_there_is_found():
    assert is_there("compressor.weights.read_weights") and is_there("compressor.Plan.read")
    assert not is_there("compressor.export.export_nothing") and not is_there("compressor.nothing.at_all")
