"""A base whose matrices are kept as integers: the matrices, what fills them, what adapters see.

Weight-only: activations and all sums stay floats. Nothing here knows adapters or batches; used by
engine/setup, and by engine/loader_worker for the methods whose updates depend on the base.
"""
