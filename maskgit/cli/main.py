"""The `maskgit` command."""

from __future__ import annotations

from typing import Annotated

import typer

from maskgit import __version__
from maskgit.cli import options as common
from maskgit.cli.audit import audit
from maskgit.cli.edit import edit
from maskgit.cli.generate import generate
from maskgit.cli.profile import profile
from maskgit.cli.train import evaluate, train_app

app = typer.Typer(
    name="maskgit",
    help="Masked-token generation: sample, edit, train, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(train_app, name="train")
app.command("edit")(edit)
app.command("audit")(audit)
app.command("profile")(profile)
app.command("evaluate")(evaluate)
app.command("generate")(generate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Masked-token generation: sample, edit, train, measure."""


PASS_THROUGH = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


@app.command()
@common.user_errors
def env(as_json: common.JsonOption = False) -> None:
    """Say which versions, devices and backends are here, and why others are not."""
    from maskgit.cli.environment import show

    show(as_json)


@app.command()
@common.user_errors
def presets(as_json: common.JsonOption = False) -> None:
    """List the decode rules by preset name, with the codebases they follow."""
    from maskgit.cli.presets import show

    show(as_json)


@app.command(context_settings=PASS_THROUGH)
def bench(context: typer.Context) -> None:
    """Measure kernels: `maskgit bench --help` lists what."""
    try:
        from maskgit.benchmarks.cli import app as bench_app
    except ImportError as error:
        if common.is_lacking(error):
            raise
        typer.echo(f"Error: the benchmarks are not available here ({error})", err=True)
        raise typer.Exit(1) from error
    typer.main.get_command(bench_app).main(args=context.args, prog_name="maskgit bench")
