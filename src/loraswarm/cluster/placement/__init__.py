"""Which replicas should hold which adapters: forecast, number of copies, places, prefetches.

No ray, no torch. A `Planner` sees a ClusterView and the forecast's rates and answers a `Plan`; the
front carries it out, the simulator asks the same.
"""

from __future__ import annotations

from loraswarm.cluster.placement.forecast import ForecastRules, LoadForecast, Rates
from loraswarm.cluster.placement.planner import PlacementRules, Plan, Planner, Prefetch

__all__ = [
    "ForecastRules",
    "LoadForecast",
    "PlacementRules",
    "Plan",
    "Planner",
    "Prefetch",
    "Rates",
]
