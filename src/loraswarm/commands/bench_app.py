"""`loraswarm bench` and its commands `compare` and `calibrate`, as the command line has them.

Imports what a command needs when it runs, so that `--help` stays instant.
"""

from __future__ import annotations

from typing import Annotated

import typer

from loraswarm.commands.bench_options import BenchOptions, command_of
from loraswarm.commands.options import parse_bytes
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


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory, or a hub id.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Write the cost model here.")
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            help="A store of adapters to measure with; may be repeated"
            " [default: random ones of ranks 8, 16, 32 and 64]"
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), bfloat16, float16 or float32.")
    ] = "auto",
    quantize: Annotated[str | None, typer.Option(help="int8 or int4.")] = None,
    num_threads: Annotated[
        int | None, typer.Option(help="CPU threads [default: physical cores]")
    ] = None,
    pool_bytes: Annotated[
        str | None, typer.Option(help="Size of the pool of pages, e.g. 4GiB [default: auto]")
    ] = None,
    max_step_tokens: Annotated[int, typer.Option(help="Most tokens in one step.")] = 512,
    rounds: Annotated[int, typer.Option(help="How often every step is timed.")] = 3,
) -> None:
    """Measure what serving MODEL costs on this machine, for `serve --cost-model`; minutes."""
    from loraswarm.bench.calibrate import CalibrateOptions
    from loraswarm.bench.calibrate import calibrate as run
    from loraswarm.commands.bench_outputs import check_outputs

    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}; it must be >= 1")
    check_outputs({"--output": output})
    engine = {
        "dtype": dtype,
        "quantize": quantize,
        "num_threads": num_threads,
        "pool_bytes": parse_bytes("--pool-bytes", pool_bytes),
        "max_step_tokens": max_step_tokens,
    }
    options = CalibrateOptions(
        model=model,
        adapters=tuple(adapters or ()),
        num_rounds=rounds,
        engine=tuple(engine.items()),
    )
    run(options, print).write(output)
