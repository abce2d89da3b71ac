"""The options that several commands share, and what they mean together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from compressor.cli.command import Folder, Made, Setting
from compressor.errors import UsageError

if TYPE_CHECKING:
    from compressor.recipe import Recipe

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Number = TypeVar("_Number", int, float)


def options(*decorators: Callable[[Any], Any]) -> Callable[[_Function], _Function]:
    """One decorator of several options, shown in their order."""

    def decorate(function: _Function) -> _Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


setting = partial(click.option, cls=Setting)
"""An option that is a setting of the recipe: see `Command`."""

RUN = "Give the directory of a run."
MODEL = "Give the directory of a run, or a saved model's folder."


folder_option = partial(click.option, type=Made(), metavar="DIR")
"""An option that names the folder to write to."""

run_argument = click.argument("directory", metavar="RUN", type=Folder(RUN))
model_argument = click.argument("directory", metavar="RUN", type=Folder(MODEL))
"""As `run_argument`, where a saved model's folder does as well."""

model_options = options(
    setting("--pattern", metavar="PATTERN", help="2:4, 4:2:4, unstructured:0.5, …"),
    setting(
        "--targets",
        multiple=True,
        metavar="RULE",
        help="Prune only these layers: a name, a class, a shell pattern, or re:REGEX. May be repeated.",
    ),
    setting("--ignore", multiple=True, metavar="RULE", help="Leave these layers dense. May be repeated."),
)
"""Which layers get which pattern."""

input_options = options(
    setting(
        "--model", metavar="NAME", help="The model (`compressor list models`), or FILE.py:NAME, an adapter of your own."
    ),
    setting(
        "--weights", metavar="FILE|DIR|OWNER/NAME", help="Pretrained: .safetensors, .pth, a diffusers folder, the hub."
    ),
    setting("--vae", metavar="DIR", help="An AutoencoderKL of diffusers, for models of latents: it encodes pictures."),
    setting(
        "--data",
        metavar="PATH|NAME",
        help="A folder of pictures, CIFAR, .npz, .npy, hf:OWNER/NAME, … (docs/data.md), or a bundled set. "
        "Default: the model's.",
    ),
    setting(
        "--pipeline",
        metavar="DIR|OWNER/NAME",
        help="A pipeline of diffusers, not a --model: learns from its calls (--prompts) or captioned pictures (--data).",
    ),
    setting(
        "--prompts",
        metavar="FILE",
        help="Prompts for --pipeline: one a line, JSON objects of arguments (.jsonl), or a JSON list (.json).",
    ),
    setting(
        "--part",
        metavar="NAME",
        help="The part of the pipeline: unet, transformer, vae.decoder, … Default: what denoises.",
    ),
    setting("--records", metavar="DIR", help="Where its recorded calls are kept. Default: the user's cache folder."),
    setting(
        "--inception-weights", metavar="FILE", help="Measure FID with these weights of Inception (docs/metrics.md)."
    ),
)
"""Model, weights and data."""

run_options = options(
    setting("--seed", type=int, help="Seed of everything random."),
    setting("--device", help="auto, cpu, cuda, cuda:1, …"),
    setting("--dtype", help="auto, float32 or bfloat16 (autocast)."),
)
"""What a training draws from, where it runs, and in what."""

set_option = click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, e.g. train.lr=1e-4."
)
"""Any other setting."""

training_options = options(
    setting("--steps", type=int, help="Fine-tuning steps; 0 is one-shot pruning."),
    run_options,
    setting(
        "--train", "mode", metavar="full|lora", help="Train all, or adapters under the masks (lora.rank, lora.alpha)."
    ),
    set_option,
)
"""Training, and any other setting."""

tracking_option = click.option(
    "--log-with",
    multiple=True,
    metavar="NAME",
    help="Send the steps to tensorboard, wandb, trackio or mlflow too. May be repeated.",
)
"""Trackers beside metrics.jsonl."""

budget_options = options(
    setting(
        "--quick", "budget", flag_value="quick", help="A look: few samples, the metric alone, few rounds of timing."
    ),
    setting(
        "--full",
        "budget",
        flag_value="full",
        help="For publication: as many samples as real images, whatever it costs.",
    ),
)
"""How much is spent on evaluation."""

recipe_options = options(
    click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="A recipe (YAML)."),
    setting("--method", metavar="NAME", help="The pruning method; `compressor list pruners` shows all."),
    setting("--pruner", metavar="FILE.py:CLASS", help="A pruner of your own, instead of --method."),
    input_options,
    model_options,
    training_options,
    budget_options,
)
"""The options that make a recipe."""


def _lowering_options(option: Callable[..., Callable[[Any], Any]]) -> Callable[[_Function], _Function]:
    return options(
        option(
            "--tolerance",
            type=click.FloatRange(0, 1, min_open=True),
            help="How far a layer may be from dense (relative, root mean square): lets 8-bit kernels in, from about 0.01 on.",
        ),
        option(
            "--max-error",
            type=click.FloatRange(0, 1, min_open=True),
            help="How far the whole model's output may be from dense: lets 8-bit kernels in, as many as fit.",
        ),
        option(
            "--fuse-projections/--no-fuse-projections",
            default=None,
            help="Layers that take the same tensor (query, key, value) as one product. Default: on a GPU.",
        ),
    )


lowering_settings = _lowering_options(setting)
"""How a run's model is lowered."""

speed_options = options(
    click.option("--dtype", default="auto", metavar="DTYPE", help="auto (the model's own), float32 or bfloat16."),
    _lowering_options(click.option),
    click.option("--fresh", is_flag=True, help="Measure again, also what was measured on this machine before."),
)
"""How a finished run is timed."""


def name_of(model: Any, pipeline: Any) -> str:
    """What a directory is called by that is of this `model`, or of a part of this `pipeline`: one part of a path."""
    from compressor.discovery import is_file_reference

    if pipeline is not None:
        return Path(str(pipeline)).absolute().name
    return str(model).rpartition(":")[2] if is_file_reference(str(model)) else str(model)


def resolved_recipe(config: Path | None, settings: Mapping[str, Any], assignments: Sequence[str]) -> Recipe:
    """The recipe of `recipe_options`: the file's settings, then the options', then those of --set."""
    from compressor import recipe as recipes
    from compressor.runs.inputs import resolve
    from compressor.runs.unread import refuse_unread

    file = recipes.read(config) if config is not None else {}
    told = recipes.merged(settings, *map(recipes.assignment, assignments))
    if told.get("pruner") and told.get("method"):
        raise UsageError("--method and --pruner name two methods", "Give one of them.")
    if told.get("method"):
        told = {**told, "pruner": None}  # the file's, over which it is given
    merged = recipes.merged(file, told)
    refuse_two_models(told, merged)
    recipe = resolve(merged, str(config) if config is not None else "recipe")
    refuse_unread([recipe], told)
    refuse_unread([recipe], file, told)
    return recipe


def refuse_two_models(told: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise UsageError where a model is `told` and the `settings` name a pipeline, whose part is the model."""
    if told.get("model") and settings.get("pipeline"):
        raise UsageError(
            "--model and --pipeline name two models", "Give one of them; --part names a part of the pipeline."
        )


def numbers(text: str | None, kind: type[_Number], example: str) -> tuple[_Number, ...]:
    """The numbers above zero in `text`, with commas between them."""
    try:
        values = tuple(kind(part) for part in text.split(",")) if text else ()
    except ValueError:
        values = (kind(0),)
    if not all(0 < number < float("inf") for number in values):
        whole = "Whole numbers of at least 1: write" if kind is int else "Write"
        raise UsageError(f"{text!r} are not numbers above zero", f"{whole} it like {example}")
    return values
