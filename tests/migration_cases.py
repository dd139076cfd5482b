"""Problems of migration: drawn at random in three kinds, for tests and benchmarks.

Seconds are those of about a 7B model on a GPU; see `Kind`. A seed says everything.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from loraswarm.cluster.migration.problem import (
    MigrationProblem,
    NeededAdapter,
    OpenRequest,
    ReplicaRoom,
)

MEBIBYTE = 2**20
TOKEN_BYTES = MEBIBYTE // 8
ROW_TOKEN_S = 0.0012
"""Of a decode step of 32 rows, the part of one row."""
PREFILL_TOKEN_S = 0.0002
LINK_BYTE_S = 1 / 5e9


@dataclass(frozen=True)
class Kind:
    """What is scarce: `skew` is the exponent of a Zipf law over replicas, by which requests are
    where they are; `pool_share` is all pools over what the requests' K and V take."""

    name: str
    skew: float
    pool_share: float
    adapters_per_replica: float
    adapter_limit_share: float = 0.5


KINDS = (
    Kind("queue", skew=1.0, pool_share=3.0, adapters_per_replica=2.0),
    Kind("memory", skew=0.6, pool_share=0.9, adapters_per_replica=2.0),
    Kind("adapters", skew=0.8, pool_share=2.0, adapters_per_replica=6.0, adapter_limit_share=0.2),
)


def draw_problem(kind: Kind, num_replicas: int, num_requests: int, seed: int) -> MigrationProblem:
    chance = random.Random(f"{kind.name} {num_replicas} {num_requests} {seed}")
    num_adapters = max(1, round(kind.adapters_per_replica * num_replicas))
    names = [f"a{k}" for k in range(num_adapters)]
    adapters = {name: _draw_adapter(chance, name) for name in names}
    ids = [f"r{j}" for j in range(num_replicas)]
    order = chance.sample(ids, num_replicas)
    places = chance.choices(order, _zipf(num_replicas, kind.skew), k=num_requests)
    wanted = chance.choices(names, _zipf(num_adapters, 1.1), k=num_requests)
    requests = [
        _draw_request(chance, f"q{i}", place, name if chance.random() < 0.9 else None)
        for i, (place, name) in enumerate(zip(places, wanted, strict=True))
    ]
    pool_bytes = kind.pool_share * sum(each.memory_bytes for each in requests) / num_replicas
    pool_bytes = max(1.0, pool_bytes)
    held = _draw_tiers(chance, requests, ids, names)
    replicas = tuple(
        ReplicaRoom(
            replica_id=replica_id,
            pool_bytes=round(pool_bytes),
            adapter_bytes=round(kind.adapter_limit_share * pool_bytes),
            accepts=chance.random() < 0.95 or replica_id == ids[0],
            tiers=held[replica_id],
        )
        for replica_id in ids
    )
    return MigrationProblem(
        requests=tuple(requests),
        replicas=replicas,
        adapters=adapters,
        overflow_byte_s=PREFILL_TOKEN_S / TOKEN_BYTES,
    )


def _zipf(count: int, exponent: float) -> list[float]:
    return [(place + 1) ** -exponent for place in range(count)]


def _draw_adapter(chance: random.Random, name: str) -> NeededAdapter:
    num_bytes = chance.choices((20, 40, 80, 160), (0.35, 0.35, 0.2, 0.1))[0] * MEBIBYTE
    copy_s = 0.001 + num_bytes / 10e9
    return NeededAdapter(
        name=name,
        num_bytes=num_bytes,
        share_s=chance.uniform(50, 300) * num_bytes / 1.5e12,
        copy_s=copy_s,
        load_s=copy_s + num_bytes / 0.5e9,
    )


def _draw_request(
    chance: random.Random, request_id: str, replica_id: str, adapter: str | None
) -> OpenRequest:
    """A third of them wait: nothing of theirs is computed."""
    prompt = round(min(8000.0, chance.lognormvariate(6.3, 0.9))) + 1
    left = round(min(1500.0, chance.lognormvariate(5.0, 0.8))) + 1
    waits = chance.random() < 1 / 3
    held = 0 if waits else prompt + chance.randrange(200)
    work_s = left * ROW_TOKEN_S + (prompt * PREFILL_TOKEN_S if waits else 0.0)
    return OpenRequest(
        request_id=request_id,
        replica_id=replica_id,
        adapters=() if adapter is None else (adapter,),
        work_s=work_s,
        memory_bytes=(max(held, prompt) + left // 2) * TOKEN_BYTES,
        kv_move_s=0.003 + held * TOKEN_BYTES * LINK_BYTE_S,
        prefill_move_s=0.001 + held * PREFILL_TOKEN_S,
    )


def _draw_tiers(
    chance: random.Random, requests: list[OpenRequest], ids: list[str], names: list[str]
) -> dict[str, dict[str, str]]:
    """What a replica needs it mostly has in pages; of the rest it has some."""
    held: dict[str, dict[str, str]] = {replica_id: {} for replica_id in ids}
    for replica_id in ids:
        for name in chance.sample(names, max(1, len(names) // len(ids))):
            held[replica_id][name] = chance.choice(("device", "host"))
    for request in requests:
        for name in request.adapters:
            if chance.random() < 0.9:
                held[request.replica_id][name] = "device"
    return held
