"""`loraswarm bench` and its commands `compare` and `calibrate`, as the command line has them.

Imports what a command needs when it runs, so that `--help` stays instant.
"""

from __future__ import annotations

from typing import Annotated

import typer

from loraswarm.commands.bench_options import BenchOptions, command_of
from loraswarm.errors import ConfigError

app = typer.Typer(rich_markup_mode=None)


def _bench(context: typer.Context, options: BenchOptions) -> None:
    """Measure an OpenAI-compatible endpoint, or an engine in this process.

    Exit code 1 if a request failed, unless --allow-errors is given.
    """
    if context.invoked_subcommand is not None:
        if options != BenchOptions():
            raise ConfigError(
                f"options of `bench` have no meaning for {context.invoked_subcommand}"
            )
        return
    from loraswarm.commands.bench import bench

    raise typer.Exit(bench(options))


app.callback(invoke_without_command=True)(command_of(_bench))


@app.command()
def compare(
    files: Annotated[
        list[str], typer.Argument(help="Files of `loraswarm bench --json`.", metavar="FILE")
    ],
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write pictures here: .png or .html.")
    ] = None,
) -> None:
    """Print the ratios of each file's medians to those of the first."""
    from loraswarm.commands.bench import compare as run

    run(files, plot)
