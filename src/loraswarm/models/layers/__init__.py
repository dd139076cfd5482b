"""The parts of a decoder layer.

Adapters reach them as a batch's tiles (linears, embedding, lm_head) and as its overlays (norms,
embedding, lm_head).
"""
