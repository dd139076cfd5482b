"""`loraswarm simulate` and its command `merging`, as the command line has them.

Imports what a command needs when it runs, so that `--help` stays instant.
"""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="The engine's scheduler and policies on a fake clock.", rich_markup_mode=None
)


@app.callback()
def _simulate() -> None:
    """The engine's scheduler and policies on a fake clock."""


@app.command("merging")
def simulate_merging(
    cost_model: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="What `loraswarm bench calibrate` wrote [default: one of four CPU cores]",
        ),
    ] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="A generated trace, or a file as `loraswarm bench` reads; may be repeated"
            " [default: all that can be generated]",
        ),
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Of never, always-head, dlora, cost and oracle [default: all]",
        ),
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests of a generated trace.")] = 300,
    seed: Annotated[int, typer.Option(help="Makes the generated traces.")] = 0,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the figures here.")
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a picture here: .png.")
    ] = None,
) -> None:
    """Compare policies of which adapter is merged when, by latency on traces."""
    from loraswarm.commands.simulate import SimulateOptions, merging

    merging(
        SimulateOptions(
            cost_model=cost_model,
            traces=tuple(trace or ()),
            policies=policies,
            requests=requests,
            seed=seed,
            json=json,
            plot=plot,
        )
    )
