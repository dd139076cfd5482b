"""`loraswarm simulate` and its commands, as the command line has them.

Imports what a command needs when it runs, so that `--help` stays instant.
"""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Policies on a fake clock, over a cost model.", rich_markup_mode=None)


CostModel = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="What `loraswarm bench calibrate` wrote [default: one of four CPU cores]",
    ),
]
ClusterPolicies = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        help="Of round-robin, least-loaded, punica, dlora-dispatch, dlora, marginal and ours"
        " [default: all]",
    ),
]
Utilization = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Gaps are scaled so that replicas are busy for this share of the time"
        " [default: 0.8; a file's are left as they are]",
    ),
]
Json = Annotated[str | None, typer.Option(metavar="FILE", help="Write the figures here.")]
Plot = Annotated[str | None, typer.Option(metavar="FILE", help="Write a picture here: .png.")]


@app.callback()
def _simulate() -> None:
    """Policies on a fake clock, over a cost model."""


@app.command("merging")
def simulate_merging(
    cost_model: CostModel = None,
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
    json: Json = None,
    plot: Plot = None,
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


@app.command("cluster")
def simulate_cluster(
    replicas: Annotated[int, typer.Option(help="Equal replicas, up to 1,000.")] = 64,
    adapters: Annotated[
        int, typer.Option(help="Adapters of a generated trace, up to 100,000.")
    ] = 500,
    requests: Annotated[int, typer.Option(help="Requests of a generated trace.")] = 10_000,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Of code, conversation, on-off, drifting-zipf and slora, or a file as"
            " `loraswarm bench` reads; may be repeated [default: code]",
        ),
    ] = None,
    policies: ClusterPolicies = None,
    seed: Annotated[int, typer.Option(help="Makes the generated traces, and ranks.")] = 0,
    cost_model: CostModel = None,
    utilization: Utilization = None,
    seats: Annotated[int, typer.Option(help="Requests that a replica runs at once.")] = 32,
    step_tokens: Annotated[int, typer.Option(help="The most tokens of a step.")] = 512,
    pool: Annotated[
        str, typer.Option(metavar="BYTES", help="Pages of a replica, for K/V and adapters.")
    ] = "4GiB",
    host_cache: Annotated[
        str, typer.Option(metavar="BYTES", help="Adapters in host memory of a replica.")
    ] = "4GiB",
    link: Annotated[
        str, typer.Option(metavar="BYTES", help="Between two replicas, in one second.")
    ] = "1250MB",
    count_solving: Annotated[
        bool, typer.Option(help="Let moves wait for as long as this machine takes to find them.")
    ] = False,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Compare policies of which replica serves what, by latency on traces."""
    from loraswarm.commands.simulate_cluster import ClusterOptions, cluster

    cluster(
        ClusterOptions(
            replicas=replicas,
            adapters=adapters,
            requests=requests,
            traces=tuple(trace or ()),
            policies=policies,
            seed=seed,
            cost_model=cost_model,
            utilization=utilization,
            seats=seats,
            step_tokens=step_tokens,
            pool=pool,
            host_cache=host_cache,
            link=link,
            count_solving=count_solving,
            json=json,
            plot=plot,
        )
    )
