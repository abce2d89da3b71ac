"""The commands as one group, and the console script."""

from __future__ import annotations

import atexit
import signal
import sys
from typing import Any, NoReturn

import click

from compressor import __version__
from compressor.cli.check_plugin import check_plugin
from compressor.cli.compare import compare
from compressor.cli.doctor import doctor
from compressor.cli.evaluate import evaluate
from compressor.cli.export import export
from compressor.cli.inspect import inspect
from compressor.cli.list import list_plugins
from compressor.cli.lower import bench, lower
from compressor.cli.merge_lora import merge_lora
from compressor.cli.plan import plan
from compressor.cli.push import push
from compressor.cli.record import record
from compressor.cli.report import report
from compressor.cli.run import resume, run
from compressor.cli.sample import sample
from compressor.cli.streams import flushed, hushed, settle
from compressor.cli.terminal import complain, say
from compressor.cli.train import train
from compressor.errors import CompressorError, UsageError, did_you_mean


class _Group(click.Group):
    """A group that suggests what a mistyped command may have meant."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise UsageError(f"no command {args[0]!r}", did_you_mean(args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's, which says an empty line at Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.Abort from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands, each with its whole first sentence: click cuts them at the width of the terminal."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(1000)) for name, command in sorted(self.commands.items())]
            )


@click.group(
    cls=_Group,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="compressor")
@click.pass_context
def app(context: click.Context) -> None:
    """Make diffusion models sparse, keep their quality, and see what it cost.

    Start with: compressor run --method sparsedm
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


for _command in (
    run,
    train,
    record,
    plan,
    check_plugin,
    compare,
    resume,
    evaluate,
    report,
    lower,
    bench,
    export,
    sample,
    list_plugins,
    inspect,
):
    app.add_command(_command)
app.add_command(merge_lora)
app.add_command(doctor)
app.add_command(push)


def main() -> NoReturn:
    """The console script, and `python -m compressor`."""
    settle()
    with hushed():
        code = _ended()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C while Python ends is no traceback
        sys.exit(flushed() or code)


def _ended() -> int:
    """Do what the arguments say; the exit code."""
    code = 0
    try:
        code = app.main(prog_name="compressor", standalone_mode=False) or 0  # the code of an Exit is returned
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        code = 130
    except CompressorError as error:
        code = complain(error)
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "compressor"
        say(f"error: {error.format_message()}", err=True)
        say(f"See {where} --help", err=True)
        code = error.exit_code
    return code
