"""Options of `loraswarm serve` for several replicas, as the command line declares them.

What they mean together: ClusterConfig. Imports nothing heavy.
"""

from __future__ import annotations

from typing import Annotated

import typer

Replicas = Annotated[
    int | None,
    typer.Option(help="Serve through so many engines on a Ray cluster [default: one, without Ray]"),
]
MinReplicas = Annotated[
    int | None, typer.Option(help="Fewest of them when load is low [default: --replicas]")
]
MaxReplicas = Annotated[
    int | None, typer.Option(help="Most of them when requests queue [default: --replicas]")
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="A running Ray cluster to join [default: one of our own, on this machine]"),
]
ReplicaBackend = Annotated[
    str, typer.Option(help="ray, or processes: child processes on this machine, without Ray.")
]
ReplicaCpus = Annotated[
    int | None, typer.Option(help="Cores of each replica [default: a share of this machine's]")
]
ReplicaGpus = Annotated[float, typer.Option(help="GPUs of each replica.")]
RouterName = Annotated[
    str,
    typer.Option(
        "--router",
        help="Which replica a request goes to: marginal (by what it costs there), least-loaded,"
        " round-robin, punica or dlora.",
    ),
]
