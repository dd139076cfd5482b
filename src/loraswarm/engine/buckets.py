"""The sizes of batch that decode steps are padded to, so that few CUDA graphs serve all.

Read by engine/graphs, which captures a step of each, and by engine/headroom, which leaves memory.
"""

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def buckets_of(max_rows: int) -> list[int]:
    """Those of steps of at most `max_rows` rows, ascending; the last is `max_rows`."""
    return [*(size for size in BUCKETS if size < max_rows), max_rows]
