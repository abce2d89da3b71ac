"""The command line: the only file that prints or exits. Heavy imports wait until a command needs them.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 usage or recipe, 3 a gate failed,
4 directory in use, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from compressor import __version__
from compressor.errors import CompressorError, UsageError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from compressor.recipe import Recipe
    from compressor.runs.inputs import Inputs
    from compressor.runs.speed import Benched

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Number = TypeVar("_Number", int, float)


class _Group(click.Group):
    """A group that suggests what a mistyped command may have meant."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise UsageError(f"no command {args[0]!r}", did_you_mean(args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


def _output_options(command: _Command) -> _Command:
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("--quiet", "-q", is_flag=True, help="No progress."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ):
        command = option(command)
    return command


def _model_options(command: _Command) -> _Command:
    for option in (
        click.option("--ignore", multiple=True, metavar="RULE", help="Leave these layers dense. May be repeated."),
        click.option(
            "--targets",
            multiple=True,
            metavar="RULE",
            help="Prune only these layers: a name, a class, a shell pattern, or re:REGEX. May be repeated.",
        ),
        click.option("--pattern", metavar="PATTERN", help="2:4, 4:2:4, unstructured:0.5, …"),
    ):
        command = option(command)
    return command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="compressor")
def app() -> None:
    """Make diffusion models sparse, keep their quality, and see what it cost.

    Start with: compressor run --method sparsedm
    """


def _options(*options: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    """One decorator of several, shown in their order."""

    def decorated(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


_INPUT_OPTIONS = (
    click.option(
        "--model", metavar="NAME", help="The model (`compressor list models`), or FILE.py:NAME, an adapter of your own."
    ),
    click.option(
        "--weights", metavar="FILE|DIR|OWNER/NAME", help="Pretrained: .safetensors, .pth, a diffusers folder, the hub."
    ),
    click.option(
        "--vae", metavar="DIR", help="An AutoencoderKL of diffusers, for models of latents: it encodes pictures."
    ),
    click.option(
        "--data",
        metavar="PATH|NAME",
        help="A folder of pictures, CIFAR, .npz, .npy, hf:OWNER/NAME, … (docs/data.md), or a bundled set. "
        "Default: the model's.",
    ),
    click.option(
        "--inception-weights", metavar="FILE", help="Measure FID with these weights of Inception (docs/metrics.md)."
    ),
)
_TRAINING_OPTIONS = (
    click.option("--steps", type=int, help="Fine-tuning steps; 0 is one-shot pruning."),
    click.option("--seed", type=int, help="Seed of everything random."),
    click.option("--device", help="auto, cpu, cuda, cuda:1, …"),
    click.option("--dtype", help="auto, float32 or bfloat16 (autocast)."),
    click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, e.g. train.lr=1e-4."),
)


_recipe_options = _options(
    click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="A recipe (YAML)."),
    click.option("--method", metavar="NAME", help="The pruning method; `compressor list pruners` shows all."),
    click.option("--pruner", metavar="FILE.py:CLASS", help="A pruner of your own, instead of --method."),
    *_INPUT_OPTIONS,
    _model_options,
    *_TRAINING_OPTIONS,
)
"""The options that make a recipe."""


@app.command()
@_recipe_options
@click.option("--out", "-o", type=click.Path(path_type=Path), metavar="DIR", help="Default: runs/MODEL-METHOD.")
@click.option("--lower", is_flag=True, default=None, help="At the end, lower the model and report its measured speed.")
@click.option("--overwrite", is_flag=True, help="Replace a former run in DIR; other files in it stay.")
@click.option("--resume", "resume_run", is_flag=True, help="Continue the run in DIR.")
@_output_options
def run(
    config: Path | None,
    assignments: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    resume_run: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Prune a model, fine-tune it, and report.

    Without options: the bundled U-ViT, 2:4, SparseDM, on bundled images, in a few minutes on a CPU.
    """
    with _errors(debug):
        if resume_run:
            if out is None:
                raise UsageError("--resume needs the run's directory", "Give it with --out DIR.")
            if config or assignments or overwrite or _flag_settings(flags):
                raise UsageError("--resume takes the settings of the run", "Give it with --out alone.")
            _resume(out, as_json, quiet)
            return
        from compressor.runs import directory, inputs
        from compressor.runs import run as runs

        recipe = _recipe(config, assignments, flags)
        method = recipe.pruner.rpartition(":")[2] if recipe.pruner else recipe.method
        out = out if out is not None else _free_directory(Path("runs") / f"{recipe.model}-{method}")
        directory.refuse_busy_directory(out)
        directory.refuse_used_directory(out, overwrite)
        found = inputs.load_inputs(recipe)
        _name_extractor(found)
        _warn_of_idle_rules(found.model, recipe.ignore)
        if found.data.skipped:
            _say(f"warning: {found.data.skipped} damaged pictures are left out", err=True)
        _drive(runs.execute(found, out, overwrite=overwrite), out, quiet)
        _show_report(out, as_json)


@app.command()
@_recipe_options
@click.option("--lower/--no-lower", default=True, show_default=True, help="Time the lowered model on this machine.")
@_output_options
def plan(
    config: Path | None,
    assignments: tuple[str, ...],
    lower: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """What a run will cost and may bring, before any training.

    Takes the options of `run`: which layers qualify, what is left of parameters, bytes and multiply-accumulates, how fast the
    lowered model is on this machine, and how long fine-tuning will take, by a few steps of it.
    """
    with _errors(debug):
        from compressor.runs import inputs
        from compressor.runs.estimate import planned_run

        found = inputs.load_inputs(_recipe(config, assignments, flags))
        _warn_of_idle_rules(found.model, found.recipe.ignore)
        facts = _watch(planned_run(found, lower), quiet)
        if as_json:
            _print_json(facts)
            return
        from compressor.console import plain_table, planning_lines

        left = [layer for layer in facts["layers"] if layer["reason"]]
        if left and not quiet:
            cells = [(layer["name"], str(tuple(layer["shape"])), layer["reason"]) for layer in left]
            _print_table(plain_table(("left dense", "shape", "why"), cells))
        removed = "; channels or blocks are removed" if facts["removed"] else ""
        click.echo(f"{len(facts['layers']) - len(left)} of {len(facts['layers'])} layers get a mask{removed}")
        for line in planning_lines(facts):
            _say(line)


@app.command("check-plugin")
@click.argument("name", metavar="NAME|FILE.py:CLASS")
@_output_options
def check_plugin(name: str, as_json: bool, quiet: bool, debug: bool) -> None:
    """Whether a pruner keeps the promises of its interface, on tiny models of three families. Exits with 1 where not."""
    with _errors(debug):
        from compressor import registry, testing

        cls = registry.pruner_class_from_file(name) if registry.is_file_reference(name) else registry.pruner_class(name)
        found = []
        for finding in testing.findings(cls):
            found.append(finding)
            if not as_json and (finding.fault is not None or not quiet):
                _say(f"{'ok  ' if finding.fault is None else 'FAIL'} {finding.family}: {finding.check}")
                if finding.fault is not None:
                    for line in finding.fault.splitlines():
                        _say(f"     {line}")
        broken = [finding for finding in found if finding.fault is not None]
        if as_json:
            _print_json([vars(finding) for finding in found])
        else:
            _say(f"{name}: {len(found) - len(broken)} of {len(found)} checks hold")
        if broken:
            raise click.exceptions.Exit(1)


def _recipe(config: Path | None, assignments: Sequence[str], flags: Mapping[str, Any]) -> Recipe:
    """The resolved recipe of a command's options."""
    from compressor import recipe as recipes
    from compressor.runs import inputs

    if flags["pruner"] and flags["method"]:
        raise UsageError("--method and --pruner name two methods", "Give one of them.")
    file = recipes.read(config) if config is not None else {}
    settings = recipes.merged(file, _flag_settings(flags), *map(recipes.assignment, assignments))
    return inputs.resolve(settings, str(config) if config is not None else "recipe")


@app.command()
@click.option(
    "--methods", metavar="NAME,NAME,…", help="Methods (`compressor list pruners`). Default: all but depth and nni."
)
@click.option(
    "--config",
    "configs",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A recipe to compare; may be repeated.",
)
@click.option("--preset", metavar="NAME", help="Entries by name: sparsedm-ablation, sparsedm-best.")
@click.option("--seeds", type=int, default=3, show_default=True, help="Seeds of training for each.")
@_options(*_INPUT_OPTIONS)
@_model_options
@click.option(
    "--match",
    default="macs",
    show_default=True,
    metavar="macs|density|latency|none",
    help="What methods that can be told their cost share with the first mask.",
)
@click.option(
    "--lr-grid",
    metavar="RATE,RATE,…",
    help="Learning rates to choose from, for every method alike. Default: no search.",
)
@click.option("--sampler-steps", metavar="N,N,…", help="Judge at these numbers of sampler steps too.")
@click.option("--lower", is_flag=True, help="Also time the lowered models.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Processes. Default: one for each GPU, else one.")
@_options(*_TRAINING_OPTIONS)
@click.option("--out", "-o", type=click.Path(path_type=Path), metavar="DIR", help="Default: runs/compare-MODEL.")
@click.option("--overwrite", is_flag=True, help="Start anew; a former comparison in DIR is removed.")
@_output_options
def compare(
    methods: str | None,
    configs: tuple[Path, ...],
    preset: str | None,
    seeds: int,
    match: str,
    lr_grid: str | None,
    sampler_steps: str | None,
    lower: bool,
    workers: int,
    assignments: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Compare methods: equal budgets, data, noise and evaluation, several seeds, one report.

    What is finished is kept: interrupted, the same command goes on; with more seeds or methods, it adds to what is there.
    """
    with _errors(debug):
        from compressor import comparison
        from compressor import recipe as recipes

        common = recipes.merged(_flag_settings(flags), *map(recipes.assignment, assignments))
        if out is None:
            first = recipes.merged(recipes.read(configs[0]), common) if configs and not methods else common
            out = Path("runs") / f"compare-{first.get('model', recipes.Recipe().model)}"
        wanted = comparison.planned(
            [name.strip() for name in methods.split(",")] if methods else [],
            configs,
            preset,
            common,
            seeds=seeds,
            match=match,
            rates=_numbers(lr_grid, float, "--lr-grid 5e-4,1e-3"),
            sampler_steps=_numbers(sampler_steps, int, "--sampler-steps 10,50"),
            lower=lower,
            known={} if overwrite else comparison.matched_before(out),
        )
        _drive(comparison.conduct(wanted, out, workers, overwrite), out, quiet, "the same command")
        _show_comparison(out, as_json)


def _show_comparison(out: Path, as_json: bool) -> None:
    from compressor.report import read_comparison

    found = read_comparison(out / "report.json")
    if as_json:
        _print_json(found.as_json())
    else:
        from compressor.comparison.words import columns, headline, rows
        from compressor.console import plain_table

        lines = [(label, *cells) for label, _, cells in rows(found)]
        _print_table(plain_table((found.title, *columns(found)), lines))
        _say(headline(found))
        _say(f"report: {out / 'report.html'}")
    if found.failed:
        for name, reason in found.failed.items():
            _say(f"failed: {name}: {reason}", err=True)
        raise click.exceptions.Exit(1)


def _numbers(text: str | None, kind: type[_Number], example: str) -> tuple[_Number, ...]:
    """The numbers above zero in `text`, with commas between them."""
    try:
        found = tuple(kind(part) for part in text.split(",")) if text else ()
    except ValueError:
        found = (kind(0),)
    if not all(0 < number < float("inf") for number in found):
        raise UsageError(f"{text!r} are not numbers above zero", f"Write it like {example}")
    return found


@app.command()
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@_output_options
def resume(directory: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """Continue an interrupted run, to the same result as if it had not been interrupted."""
    with _errors(debug):
        _resume(directory, as_json, quiet)


@app.command()
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@_output_options
def report(directory: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """Write the pages of a run's or a comparison's report again, and show the table."""
    with _errors(debug):
        if _is_comparison(directory):
            from compressor.comparison.page import render as render_comparison

            render_comparison(directory)
            _show_comparison(directory, as_json)
            return
        from compressor.report import render

        render(directory)
        _show_report(directory, as_json)


def _is_comparison(directory: Path) -> bool:
    from compressor import files

    path = directory / "report.json"
    return path.is_file() and files.read_json(path).get("kind") == "comparison"


def _speed_options(command: _Command) -> _Command:
    for option in (
        click.option("--fresh", is_flag=True, help="Measure again, also what was measured on this machine before."),
        click.option("--dtype", default="auto", metavar="DTYPE", help="auto (the model's own), float32 or bfloat16."),
    ):
        command = option(command)
    return command


@app.command()
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--batch", type=click.IntRange(1), help="Batch size to tune for. Default: the run's evaluate.latency_batch."
)
@click.option("--compiled", is_flag=True, help="Also try forms under torch.compile; takes minutes.")
@_speed_options
@_output_options
def lower(
    directory: Path, batch: int | None, compiled: bool, dtype: str, fresh: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Choose the fastest kernel of this machine for every layer of a finished run, and time the whole model.

    The plan is saved as lowering.json, and the times in the run's report. Never slower than dense: where sparse kernels do
    not pay, the plan keeps the best dense form and says so.
    """
    with _errors(debug):
        plan = _measured(directory, [batch] if batch else [], dtype, compiled, False, fresh, quiet).plan
        if as_json:
            _print_json(plan.model_dump(mode="json"))
            return
        from compressor.console import plan_tables

        for table in plan_tables(plan):
            _print_table(table)
        _say(f"{plan.choice}: {plan.reason}")
        for note in plan.notes:
            _say(f"note: {note}", err=True)
        _say(f"report: {directory / 'report.html'}")


@app.command()
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--batches", default="1,4,16", show_default=True, metavar="N,N,…", help="Batch sizes.")
@click.option(
    "--compiled/--no-compiled", default=True, show_default=True, help="Forms under torch.compile; take minutes."
)
@click.option("--onnx/--no-onnx", default=None, help="ONNX Runtime. Default: where it is installed.")
@_speed_options
@_output_options
def bench(
    directory: Path,
    batches: str,
    compiled: bool,
    onnx: bool | None,
    dtype: str,
    fresh: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Time a finished run's model in every form, side by side: dense eager, prepacked and compiled, lowered, ONNX Runtime."""
    with _errors(debug):
        if not all(part.strip().isdecimal() for part in batches.split(",")):
            raise UsageError(f"--batches {batches!r}", "Write sizes with commas between them: 1,4,16")
        sizes = [int(part) for part in batches.split(",")]
        if onnx is None:
            from importlib.util import find_spec

            onnx = all(find_spec(name) is not None for name in ("onnx", "onnxscript", "onnxruntime"))
        found = _measured(directory, sizes, dtype, compiled, onnx, fresh, quiet)
        if as_json:
            _print_json(found.as_json())
            return
        from compressor.console import plain_table
        from compressor.report.words import speeds

        for setting, lines in speeds(found.report):
            columns = (setting, "form", "median", "over eager dense", "over the best dense form")
            _print_table(plain_table(columns, lines))
        _say(f"report: {directory / 'report.html'}")


def _measured(
    directory: Path, batches: list[int], dtype: str, compiled: bool, onnx: bool, fresh: bool, quiet: bool
) -> Benched:
    """Lower and time a run's model."""
    from compressor.runs import speed
    from compressor.runs.directory import locked

    if not directory.is_dir():
        raise CompressorError(f"{directory}: no such directory", "Give the directory of a finished run.")
    with locked(directory):
        found = speed.finished(directory)
        sizes = batches or [found.batch]
        done: Benched = _watch(speed.bench(found, sizes, dtype, compiled, onnx, cache=not fresh), quiet)
    return done


@app.command()
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, metavar="FORMAT", help="onnx.")
@click.option("--out", "-o", type=click.Path(path_type=Path), metavar="FILE", help="Default: RUN/model.onnx.")
@click.option("--form", default="dense", show_default=True, metavar="dense|gathered", help="See docs/onnx.md.")
@click.option("--int8", is_flag=True, help="Quantize the weights of matrix products to int8.")
@click.option("--overwrite", is_flag=True, help="Replace FILE.")
@_output_options
def export(
    directory: Path,
    target: str,
    out: Path | None,
    form: str,
    int8: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Write the model of a run, or of a saved model's folder, for another engine, and check it there.

    --form dense keeps the zeros, for engines that look for them (TensorRT). --form gathered leaves them out by itself, for
    engines that do not (ONNX Runtime on CPUs); it takes patterns with V of 64 or more.
    """
    with _errors(debug):
        if target != "onnx":
            raise UsageError(f"no format {target!r}", did_you_mean(target, ["onnx"]))
        from compressor import saving
        from compressor.export import onnx as exports
        from compressor.runs import saved
        from compressor.sparsity.notation import parse

        path = out if out is not None else directory / "model.onnx"
        exports.refuse(path, form, int8, overwrite)
        adapter, model = saved.saved_model(directory)
        patterns = saving.read_config(saving.model_folder(directory)).patterns
        if not quiet:
            _say(f"exporting {adapter.name} to {path}", err=True)
        done = exports.export_onnx(
            model,
            adapter,
            path,
            form=form,
            int8=int8,
            patterns={name: parse(text) for name, text in patterns.items()},
            overwrite=overwrite,
        )
        if as_json:
            _print_json(done.as_json())
            return
        for line in done.lines():
            _say(line)


@app.command()
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--n", "count", type=click.IntRange(1), default=64, show_default=True, help="Images.")
@click.option("--out", "-o", type=click.Path(path_type=Path), metavar="DIR", help="Default: RUN/drawn.")
@click.option(
    "--sampler", metavar="NAME", help="ddim, ddpm, dpm-solver++, unipc, euler-maruyama. Default: the model's."
)
@click.option("--spacing", metavar="NAME", help="Of ddim's timesteps: uniform, trailing, quadratic.")
@click.option("--steps", type=click.IntRange(1, 1000), default=50, show_default=True, help="Sampler steps.")
@click.option("--guidance", type=click.FloatRange(0), help="Scale of classifier-free guidance; 1 is none.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Images per batch.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option(
    "--processes", type=click.IntRange(1, 256), default=1, show_default=True, help="Share the batches; one GPU each."
)
@click.option("--vae", metavar="DIR", help="An AutoencoderKL of diffusers, for models of latents.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
@click.option("--overwrite", is_flag=True, help="Replace former samples in DIR.")
@_output_options
def sample(
    directory: Path,
    count: int,
    out: Path | None,
    sampler: str | None,
    spacing: str | None,
    steps: int,
    guidance: float | None,
    batch: int,
    seed: int,
    processes: int,
    vae: str | None,
    device: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Draw images from the model of a run, or of a saved model's folder: a PNG each, and a sheet of the first 64.

    The images depend on the seed and the batch size, not on the number of processes.
    """
    with _errors(debug):
        from compressor.adapter import Sampling
        from compressor.runs import drawing

        if not directory.is_dir():
            raise CompressorError(f"{directory}: no such directory", "Give a run's directory or a saved model's.")
        target = out if out is not None else directory / "drawn"
        how = Sampling(sampler, spacing, guidance)
        wanted = drawing.Draw(str(directory), count, steps, batch, seed, how, device, vae)
        _watch(drawing.draw(wanted, target, processes, overwrite), quiet)
        if as_json:
            click.echo((target / drawing.FILE).read_text(encoding="utf-8"), nl=False)
            return
        _say(f"{count} images: {target}")


@app.command("list")
@click.argument("kind", default="", metavar="[pruners|models|data|metrics|backends]")
@_output_options
def list_plugins(kind: str, as_json: bool, quiet: bool, debug: bool) -> None:
    """Show the methods, models, data sets, metrics and lowering backends that are installed.

    `compressor list models` has more of each: its size, data, licence, and how to get weights.
    """
    with _errors(debug):
        from compressor import registry

        if kind and kind not in registry.KINDS:
            raise UsageError(f"nothing is called {kind!r}", did_you_mean(kind, registry.KINDS))
        found = {name: registry.listing(name) for name in ([kind] if kind else registry.KINDS)}
        if as_json:
            _print_json({name: [asdict(line) for line in lines] for name, lines in found.items()})
            return
        from compressor.console import plain_table

        for name, lines in found.items():
            details = ("size", "data", "licence", "weights") if name == kind == "models" else ()
            cells = [
                (
                    line.name,
                    f"cannot be loaded: {line.error}" if line.error else line.summary,
                    *[line.about.get(key, "") for key in details],
                )
                for line in lines
            ]
            _print_table(plain_table((name, "what it is", *details), cells))


@app.command()
@click.argument("model", metavar="MODEL")
@click.option("--weights", metavar="FILE", help="Check that this file fits the model.")
@_model_options
@_output_options
def inspect(
    model: str,
    weights: str | None,
    pattern: str | None,
    targets: tuple[str, ...],
    ignore: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Show every layer of MODEL: its shape, its share of the MACs, and whether the pattern fits, or why not."""
    with _errors(debug):
        from compressor.runs.inspection import inspect_model

        found = inspect_model(model, weights, pattern or "2:4", targets or None, ignore or None)
        _warn_of_idle_rules(found.pop("module"), ignore)
        if as_json:
            _print_json(found)
            return
        from compressor.console import plain_table

        cells = [
            (
                layer["name"],
                str(tuple(layer["shape"])),
                f"{layer['macs_share']:.1%}",
                layer["reason"] or found["pattern"],
            )
            for layer in found["layers"]
        ]
        _print_table(plain_table(("weight", "shape", "MACs", "pattern"), cells))
        click.echo(
            f"{found['model']}: {found['params']:,} parameters, {found['macs_dense']:,} MACs per sample; {found['pattern']} on "
            f"{sum(layer['reason'] is None for layer in found['layers'])} of {len(found['layers'])} layers leaves "
            f"{found['macs_effective'] / found['macs_dense']:.1%} of the MACs effective"
        )


def main() -> NoReturn:
    """The console script."""
    code = 0
    try:
        code = app.main(standalone_mode=False) or 0  # the code of an Exit is returned, not raised
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        code = 130
    except CompressorError as error:
        code = _complain(error)
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "compressor"
        _say(f"error: {error.format_message()}", err=True)
        _say(f"See {where} --help", err=True)
        code = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Let an error through with its traceback where `debug`; else without, and unexpected ones in one line."""
    try:
        yield
    except (CompressorError, click.ClickException, click.exceptions.Exit, KeyboardInterrupt, BrokenPipeError) as error:
        if debug and isinstance(error, CompressorError):
            import traceback

            traceback.print_exc()
        raise
    except OSError as error:  # a path that cannot be used; the places that know more say more
        if debug:
            raise
        raise CompressorError(f"{error.filename}: {error.strerror}", "Choose another path.") from error
    except Exception as error:
        if debug:
            raise
        if _interrupted(error):
            raise KeyboardInterrupt from error
        message = f"unexpected {type(error).__name__}: {error}"
        raise CompressorError(message, "Run again with --debug for the traceback, and please report it.") from error


def _interrupted(error: BaseException) -> bool:
    """Whether a Ctrl-C is behind it: some libraries raise an error of their own for everything that ends their work."""
    behind = error.__cause__ or error.__context__
    return behind is not None and (isinstance(behind, KeyboardInterrupt) or _interrupted(behind))


def _complain(error: CompressorError) -> int:
    for line in f"error: {error}".splitlines():
        _say(line, err=True)
    return error.exit_code


def _say(text: str, err: bool = False) -> None:
    from compressor.console import printable

    click.echo(printable(text), err=err)


def _warn_of_idle_rules(model: nn.Module, ignore: Sequence[str] | None) -> None:
    """Each rule of the user's that leaves nothing out is likely a mistake."""
    from compressor.sparsity.layers import survey, unmatched
    from compressor.sparsity.pattern import Unstructured

    for rule in unmatched(survey(model, Unstructured(1.0)), ignore or ()):
        _say(f"warning: --ignore {rule!r} matches no layer", err=True)


def _name_extractor(found: Inputs) -> None:
    """Say which weights of the user's a metric is measured with."""
    settings = found.recipe.evaluate
    if found.metric is not None and settings.inception_weights is not None and settings.samples:
        _say(f"{found.metric.name}: {settings.inception_weights}, sha256 {found.metric.sha256}", err=True)


def _flag_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, as recipe settings."""
    given = {key: value for key, value in flags.items() if value is not None and value != ()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}


def _free_directory(base: Path) -> Path:
    """`base`, or the first of base-2, base-3, … that is not there yet."""
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 100_000))
    return next(path for path in candidates if not path.exists())


def _resume(out: Path, as_json: bool, quiet: bool) -> None:
    from compressor import recipe as recipes
    from compressor.runs import inputs
    from compressor.runs import run as runs

    if (out / "report.json").is_file() and (out / "report.html").is_file():
        if not quiet:
            _say(f"{out} is finished", err=True)
    else:
        recipe = inputs.resolve(recipes.read(out / "recipe.yaml"), str(out / "recipe.yaml"))
        found = inputs.load_inputs(recipe)
        _name_extractor(found)
        _drive(runs.execute(found, out, resume=True), out, quiet)
    _show_report(out, as_json)


def _drive(events: Iterator[Any], out: Path, quiet: bool, again: str | None = None) -> None:
    """Iterate over a run's progress. The first Ctrl-C or SIGTERM ends it after a checkpoint, a second Ctrl-C at once.

    `again` is what continues it; by default, `compressor resume`.
    """
    from compressor.console import Ticker
    from compressor.runs.directory import resume_command
    from compressor.runs.run import Interrupted

    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Ticker(_console(stderr=True), quiet) as ticker:
            for event in events:
                ticker.show(event)
                if received:
                    events.throw(Interrupted(128 + received[0]))  # type: ignore[attr-defined]
    except Interrupted as interrupted:
        _say(f"stopped; continue with: {again or resume_command(out)}", err=True)
        raise click.exceptions.Exit(interrupted.exit_code) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(events: Iterator[Any], quiet: bool) -> Any:
    """Show the progress of `events`, and give what it returns."""
    from compressor.console import Ticker

    with Ticker(_console(stderr=True), quiet) as ticker:
        while True:
            try:
                ticker.show(next(events))
            except StopIteration as finished:
                return finished.value


def _show_report(out: Path, as_json: bool) -> None:
    from compressor.report import read_report

    loaded = read_report(out / "report.json")
    if as_json:
        _print_json(loaded.as_json())
        return
    from compressor.console import rows_table

    _print_table(rows_table(loaded))
    if loaded.metric:
        floor = loaded.metric.floor
        click.echo(f"floor (real against real, {floor.samples} images each): {floor.value:.2f}")
    _say(f"report: {out / 'report.html'}")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def _print_table(table: Table) -> None:
    _console(stderr=False).print(table)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 400  # a file or pipe has no width of its own to be cut to
    return console


if __name__ == "__main__":
    main()
