"""The `moe-plugin` command."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_plugin.cli.bench import app as bench
from moe_plugin.cli.doctor import doctor
from moe_plugin.cli.explain import explain
from moe_plugin.cli.generate import generate
from moe_plugin.cli.serve import serve
from moe_plugin.cli.tune import tune
from moe_plugin.cli.warmup import warmup

app = typer.Typer(name="moe-plugin", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (serve, generate, explain, doctor, tune, warmup):
    app.command()(command)
app.add_typer(bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        from moe_plugin import __version__

        typer.echo(f"moe-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """A mixture-of-experts backend for any inference server."""


def main() -> None:
    """Entry point of the console script."""
    app()
