"""A run as a folder for the hub: the saved model, samples, and a model card made from the report."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from compressor import files, saving
from compressor.errors import CompressorError, UsageError, first_line, how_to_finish, printable
from compressor.report import read_report
from compressor.report.content import Report
from compressor.report.in_short import glossary, summary
from compressor.report.numbers import seconds
from compressor.report.words import columns, file_name, headline
from compressor.saving import hub

_MOST_SAMPLES = 8


def folder_for_hub(run: Path, out: Path, name: str | None = None) -> list[str]:
    """Write what `compressor push` uploads of the finished `run` into the new folder `out`: the model's files, which
    `compressor.load` reads, `samples/` and `README.md`, the card. The names of its files.

    Raises CompressorError where `run` is not finished, or `out` is there already.
    """
    if not (run / "report.json").is_file() or not (run / "model").is_dir():
        raise CompressorError(
            f"{run}: no report.json and model/",
            how_to_finish(run),
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CompressorError(f"{out} is there already", "Choose another folder.")
    report = read_report(run / "report.json")
    model = saving.model_folder(run)
    files.verify(model, needs=saving.MODEL_FILES)
    if saving.read_config(model).weights_sha256 != report.final.weights_sha256:
        raise CompressorError(
            f"{run}: the report is of other weights than model/", "`compressor evaluate` makes it anew."
        )
    (out / "samples").mkdir(parents=True)
    for file in hub.FILES:
        if (model / file).is_file():
            shutil.copyfile(model / file, out / file)
    rows = {file_name(row.name): row.name for row in report.rows}
    pictures = {}
    for path in sorted((run / "samples").glob("*.png"))[:_MOST_SAMPLES]:
        shutil.copyfile(path, out / "samples" / path.name)
        pictures[path.name] = rows.get(path.stem, path.stem)
    if not pictures:
        (out / "samples").rmdir()
    files.write_text(out / "README.md", card(report, pictures, name, piped=(run / "pipeline").is_dir()))
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def card(report: Report, pictures: dict[str, str] | None = None, name: str | None = None, piped: bool = False) -> str:
    """The model card: what was done, what was measured on what, what it is not good for. `pictures`: rows by file in `samples/`;
    `piped`: whether the run left a pipeline of diffusers, too."""
    cell = _plain
    rows = [cell(row.name) for row in report.rows]
    table = [f"| |{' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    table += [
        f"| {cell(title)} ({cell(about)}) | {' | '.join(map(cell, cells))} |" for title, about, cells in columns(report)
    ]
    settings = ", ".join(f"`{cell(key)}={cell(value)}`" for key, value in report.settings.items()) or "none"
    train = report.recipe.get("train", {})
    budget = ", ".join(f"{key} {train[key]}" for key in ("steps", "batch_size", "lr", "dtype") if key in train)
    where = name or "FOLDER"
    recipe = {"method": report.method, **{key: report.recipe[key] for key in _RECIPE if key in report.recipe}}
    parts = [
        _front(report, name),
        f"# {cell(report.method)} on {cell(report.model)}",
        f"{cell(headline(report))}",
        *[f"- **{about}**: {cell(found)}" for about, found in summary(report)],
        "## Use",
        f'```python\nimport compressor\n\nmodel = compressor.load("{cell(where)}")\n```',
        "It takes safetensors and JSON alone; nothing in the repository is run. Other libraries do not read packed weights.",
        *([_PIPED] if piped else []),
        "## How it was made",
        f"- method: {cell(report.method)}, settings {settings}",
        f"- pattern: {cell(report.pattern or 'no mask')}",
        f"- fine-tuning: {cell(budget) or 'none'}, seed {report.seed}; {seconds(report.final.train.seconds)}",
        f"- pretrained weights: `{report.weights_sha256}`",
        f"- data: {cell(report.data.name)}, {report.data.samples} {report.data.kind}, `{report.data.sha256}`",
        f"- this model's weights: `{report.final.weights_sha256}`",
        "The settings of the recipe, without its paths:",
        f"```json\n{json.dumps(recipe)}\n```",
        "## What was measured",
        "\n".join(table),
        *[
            f"- {cell(term)}: {cell(about)}"
            for term, about in glossary(
                report.metric.name if report.metric else None, [t for t, _, _ in columns(report)]
            )
        ],
        "## Hardware",
        f"{cell(report.environment.hardware)}; {cell(report.environment.platform)}; "
        + ", ".join(f"{cell(key)} {cell(value)}" for key, value in report.environment.versions.items()),
        "## Limitations",
        *[f"- {cell(line)}" for line in (*report.limitations, *_LIMITS)],
    ]
    if pictures:
        parts += [
            "## Samples from the same initial noise",
            *[f"![{cell(row)}](samples/{file})" for file, row in pictures.items()],
        ]
    return _joined(parts)


_PIPED = (
    "The run left a pipeline of diffusers with the same weights, unpacked, in its folder `pipeline/`. It is not in this repository; "
    "`DiffusionPipeline.from_pretrained(…).push_to_hub(…)` puts it into one of its own."
)
_LIMITS = (
    "It draws what its data show, with their gaps and leanings; nobody has looked for harmful pictures.",
    "The licences of the pretrained weights and of the data hold for it too.",
)


_RECIPE = ("settings", "pattern", "targets", "ignore", "train")


def _front(report: Report, name: str | None) -> str:
    """What the hub reads: tags, and the metric. YAML takes JSON's texts and numbers."""
    metrics = ""
    if report.metric is not None and report.final.quality and report.data.kind == "images":
        named, data, metric = (
            json.dumps(printable(text), ensure_ascii=False)
            for text in (name or report.model, report.data.name, report.metric.name)
        )
        metrics = (
            f"model-index:\n- name: {named}\n  results:\n"
            f"  - task: {{type: unconditional-image-generation}}\n    dataset: {{name: {data}, type: {data}}}\n"
            f"    metrics:\n    - {{type: {metric}, name: {metric}, value: {report.final.quality[0].value:.6f}}}\n"
        )
    tags = [
        "compressor",
        "diffusion",
        "sparse",
        *([re.sub(r"[^\w.:-]", "-", report.pattern)] if report.pattern else []),
    ]
    return "---\nlibrary_name: compressor\ntags:\n" + "".join(f'- "{tag}"\n' for tag in tags) + metrics + "---"


def _joined(parts: list[str]) -> str:
    """Lines of a list stay together; all else has an empty line between."""
    text = ""
    for before, part in zip(["", *parts], parts, strict=False):
        text += ("" if not text else "\n" if before.startswith("- ") and part.startswith("- ") else "\n\n") + part
    return text + "\n"


def _plain(value: object) -> str:
    """A text of others in Markdown: one line, no tag, no link, no cell of its own."""
    text = printable(" ".join(str(value).split())).replace("<", "&lt;").replace("|", "\\|").replace("`", "'")
    return re.sub(r"\](?=[(:\[])", "]\\\\", text)


def push(folder: Path, name: str, private: bool, message: str, revision: str | None = None) -> str:
    """Upload `folder` to the repository OWNER/NAME, which is made where it is not there; the address. Raises CompressorError."""
    hub.checked_name(name)
    if hub.is_offline():
        raise CompressorError(
            f"{name}: HF_HUB_OFFLINE is set", "Unset it to push; --folder DIR writes the folder alone."
        )
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True, repo_type="model")
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=message, revision=revision)
    except Exception as error:  # the hub's own errors, and those of the network beneath
        raise CompressorError(
            f"{name}: {first_line(error)}",
            "Check the name, the network and your token (`hf auth login`); --folder DIR writes the folder alone.",
        ) from error
    return str(getattr(done, "commit_url", "") or name)


def checked(name: str | None, folder: Path | None) -> None:
    """Raise UsageError where there is nothing to do, or two things."""
    if (name is None) == (folder is None):
        raise UsageError("push: OWNER/NAME or --folder DIR", "Give one of them.")
