"""Replicas and requests for tests of routing, residency and placement; costs are cost_cases'."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from cost_cases import figures
from loraswarm.cluster.view import ClusterView, HeldTier, ReplicaLimits, ReplicaView, RoutedRequest

SIZES = {"small": 1_000_000, "large": 4_000_000, "other": 2_000_000}
LIMITS = ReplicaLimits(
    num_seats=4, max_step_tokens=64, num_pages=100, page_tokens=16, page_bytes=200_000
)


def view_of(
    num_replicas: int, sizes: Mapping[str, int] | None = None, limits: ReplicaLimits = LIMITS
) -> ClusterView:
    """Idle replicas r0, r1 ... that hold nothing."""
    view = ClusterView(figures(), SIZES if sizes is None else sizes)
    for index in range(num_replicas):
        view.replicas[f"r{index}"] = ReplicaView(f"r{index}", limits)
    return view


def request(
    request_id: str = "new",
    *adapters: str,
    prompt: int = 32,
    expected: int = 10,
    prefill: int | None = None,
) -> RoutedRequest:
    return RoutedRequest(
        request_id=request_id,
        adapters=adapters,
        prompt_tokens=prompt,
        expected_tokens=expected,
        prefill_tokens=prompt if prefill is None else prefill,
    )


def decoding(replica: ReplicaView, *adapters: str, prompt: int = 32, expected: int = 10) -> None:
    """One more request that is open there, with its prompt computed."""
    name = f"{replica.replica_id}-{replica.num_requests}"
    replica.add(request(name, *adapters, prompt=prompt, expected=expected, prefill=0))


def random_view(
    rng: Random, num_replicas: int, num_adapters: int, is_accepting: float = 0.7
) -> ClusterView:
    """Replicas of which a part accepts requests, with random residents and open requests."""
    names = [f"a{index}" for index in range(num_adapters)]
    view = view_of(num_replicas, {name: rng.randrange(1, 9) * 500_000 for name in names})
    tiers: tuple[HeldTier, ...] = ("device", "host")
    for replica in view.replicas.values():
        replica.accepts = rng.random() < is_accepting
        for name in rng.sample(names, rng.randrange(num_adapters)):
            view.set_tier(replica.replica_id, name, rng.choice(tiers))
        for _ in range(rng.randrange(8)):
            adapters = rng.sample(names, rng.randrange(3))
            decoding(replica, *adapters, prompt=rng.randrange(1, 200), expected=rng.randrange(90))
    return view
