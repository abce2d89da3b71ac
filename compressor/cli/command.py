"""What all commands share: --json, --quiet and --debug, one way to fail, and recipe settings in one dictionary."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from compressor import discovery
from compressor.cli.streams import ResultsAlone
from compressor.cli.terminal import RESULTS, Output, errors
from compressor.errors import UsageError, first_line
from compressor.processes import ranks, refuse_ranks, terminated, together

_KINDS = {"method": "pruners", "model": "models", "data": "data", "metric": "metrics"}


def suggested(_: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What the tab key offers for a value: files, where it may be one, and what is registered."""
    kind, form = _KINDS.get(parameter.name or ""), parameter.metavar or ""
    files = (
        [CompletionItem(incomplete, type="file")]
        if re.search("FILE|DIR|PATH|PIPELINE", form) or kind == "models"
        else []
    )
    return files + [
        CompletionItem(name) for name in (discovery.names(kind) if kind else ()) if name.startswith(incomplete)
    ]


class Setting(click.Option):
    """An option whose name is that of a recipe's setting. Commands get those that were given as `settings`."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **({"shell_complete": suggested} | attributes))


class Place(click.Path):
    """A path that is looked at before the command begins."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def check(self, path: Path, option: str) -> None:
        """Raise UsageError where `path`, given by `option`, cannot be meant."""


class Folder(Place):
    """A folder that is there; the `hint` says which. What is none is wrong usage, with every command alike."""

    def __init__(self, hint: str) -> None:
        super().__init__()
        self.hint = hint

    def check(self, path: Path, option: str) -> None:
        try:
            found = "" if stat.S_ISDIR(path.stat().st_mode) else "a file, not a directory"
        except OSError as error:
            missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
            found = "no such directory" if missing else error.strerror or first_line(error)
        if found:
            raise UsageError(f"{path}: {found}", self.hint)


class Made(Place):
    """The name of a folder that is to be made, or that may be written to. A file may not have that name, nor be likely to."""

    def check(self, path: Path, option: str) -> None:
        if os.path.exists(path) and not os.path.isdir(path):
            raise UsageError(f"{path} is a file", f"Choose a folder with {option}.")
        if _OF_FILES.fullmatch(path.suffix) and not os.path.isdir(path):
            raise UsageError(
                f"{path} is the name of a file, and several are written",
                f"Choose a folder with {option}, by another name.",
            )


_OF_FILES = re.compile(
    r"\.(png|jpe?g|webp|gif|np[zy]|safetensors|pth?|ckpt|bin|onnx|json|yaml|csv|html|md|pdf|zip)", re.IGNORECASE
)


class Command(click.Command):
    """A command that takes --json, --quiet and --debug, and whose errors end up in one line.

    Its function is called with `output`, an `Output`; with `settings`, where it has options of the class `Setting`; and with
    its other options by their names. Where it is `shared`, the processes of a launch (torchrun) do it together.
    """

    def __init__(
        self,
        name: str | None,
        *,
        params: list[click.Parameter] | None = None,
        shared: bool = False,
        **attributes: Any,
    ) -> None:
        self.shared = shared
        own = [
            click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON."),
            click.Option(["--quiet", "-q"], is_flag=True, help="No progress."),
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        ]
        super().__init__(name, params=[*(params or []), *own], **attributes)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; an empty one is refused: of an unset variable of a shell, `--data "$DATA"`, nobody means that."""
        for before, given in zip([self.name or "", *args], args, strict=False):
            if not given:
                raise UsageError(f"the value after {before} is empty", "Leave both out, or give it a value.")
            if re.fullmatch(r"--[\w-]+=", given):
                raise UsageError(f"{given[:-1]} is empty", "Leave it out, or give it a value.")
        self._refuse_contrary(args)
        self._refuse_twice(ctx, args)
        return super().parse_args(ctx, args)

    def _refuse_twice(self, ctx: click.Context, args: list[str]) -> None:
        """Raise UsageError where an option names two things and takes one: the first would be left out without a word. Of two
        numbers the last one wins, as of two values for --set."""
        seen: set[click.Parameter] = set()
        for option in self.make_parser(ctx).parse_args(args=list(args))[2]:
            named = isinstance(option.type, (click.Path, click.types.StringParamType))
            if isinstance(option, click.Option) and named and not option.is_flag and not option.multiple:
                if option in seen:
                    raise UsageError(f"{option.opts[0]} is given twice", "Give it once.")
                seen.add(option)

    def _refuse_contrary(self, args: list[str]) -> None:
        """Raise UsageError where flags set one option in two ways, of which the last would win."""
        args = args[: args.index("--")] if "--" in args else args
        found: dict[str | None, str] = {}
        for option in self.params:
            if not isinstance(option, click.Option) or not option.is_flag:
                continue
            for spellings in (option.opts, option.secondary_opts):
                given = next((one for one in spellings if one in args), None)
                if given is not None and (other := found.setdefault(option.name, given)) != given:
                    raise UsageError(f"{other} with {given}", "Give one of them.")

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command's function. In one of several processes that were launched together, those that are `shared`, `list` and
        `doctor` work."""
        values = ctx.params
        debug = values.pop("debug")
        quiet = values.pop("quiet") or ranks()[0] > 0
        values["output"] = Output(as_json=values.pop("as_json"), quiet=quiet)
        if names := {option.name for option in self.params if isinstance(option, Setting) and option.name}:
            values["settings"] = _given({name: values.pop(name) for name in sorted(names)})
        with errors(debug):
            if self.name not in ("list", "doctor") and not self.shared:
                refuse_ranks(f"compressor {self.name}")
            alone = ResultsAlone() if values["output"].as_json else nullcontext()
            ctx.meta[RESULTS] = alone if isinstance(alone, ResultsAlone) else None
            with alone, together(click.exceptions.Exit) if self.shared else nullcontext(), terminated():
                self._check_places(values)
                return super().invoke(ctx)

    def _check_places(self, values: Mapping[str, Any]) -> None:
        for option in self.params:
            given = values.get(option.name or "")
            for path in given if isinstance(given, tuple) else (given,):
                if isinstance(option.type, Place) and path is not None:
                    option.type.check(path, option.opts[0])


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given: those of several values as lists."""
    given = {name: value for name, value in values.items() if value is not None and value != ()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
