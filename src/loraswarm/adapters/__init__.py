"""From adapter files to checked host weights, and the names under which adapters are served.

Knows the base model only by its sizes; knows nothing of pages, batches or requests. Importing
`adapter`, `peft` or `catalog` does not import torch; reading weights does.
"""
