"""Many replicas on a fake clock: the router, placement and migration of loraswarm.cluster are the
real ones; a replica is a light model that steps by a cost model's seconds. No torch."""
