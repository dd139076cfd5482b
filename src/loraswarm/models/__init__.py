"""What is computed: a decoder described by its config, its weights, one forward pass of a Batch.

Does not know requests or schedules, and of adapters only tiles and rows that lie in pages. `config`
and `families` import no torch.
"""
