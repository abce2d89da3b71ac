"""What the documents show works: their Python runs, their links lead somewhere, their settings exist."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from compressor import registry

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*/*/README.md")),
]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "docs" / "writing_a_pruner.md", ROOT / "docs" / "lowering.md"],
    ids=lambda p: p.name,
)
def test_python_in_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    blocks = python_blocks(page)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        if found := re.match(r"# file: (\S+)\n", block):
            (tmp_path / found[1]).write_text(block, encoding="utf-8")
        exec(compile(block, str(page), "exec"), names)  # the page is ours


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
    (block,) = python_blocks(ROOT / "docs" / "pipelines.md")
    names: dict[str, object] = {"pipe": pipe, "prompts": tiny_pipelines.PROMPTS}
    exec(compile(block, "pipelines.md", "exec"), names)
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
