"""What is computed: a decoder described by its config, its weights, one forward pass of a Batch.

Does not know requests, schedules or adapters. `config` and `families` import no torch.
"""
