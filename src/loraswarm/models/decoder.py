"""One decoder for every family: embeddings, layers, final norm, logits.

Owns the base weights, which nothing writes after the loader. Knows neither adapters (its layers do)
nor sequences; told by engine/model_runner to run a Batch, under torch.inference_mode.
Legend: T tokens, D hidden, V vocabulary, Z logit rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from loraswarm.core.base_shape import EMBEDDING, FINAL_NORM, LM_HEAD
from loraswarm.models.batch import Batch
from loraswarm.models.config import DecoderConfig
from loraswarm.models.layers.attention import Attention
from loraswarm.models.layers.backend import Backend
from loraswarm.models.layers.embedding import Embedding
from loraswarm.models.layers.head import LmHead
from loraswarm.models.layers.linear import LoraLinear
from loraswarm.models.layers.mlp import MLP
from loraswarm.models.layers.norm import RMSNorm
from loraswarm.models.layers.rope import RopeTable, Rotation
from loraswarm.models.layers.weight import Weight


class DecoderLayer:
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, backend: Backend, config: DecoderConfig, layer: int) -> None:
        path, size, eps = f"model.layers.{layer}", config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(backend, f"{path}.input_layernorm", size, eps)
        self.attention = Attention(backend, config, layer)
        self.post_norm = RMSNorm(backend, f"{path}.post_attention_layernorm", size, eps)
        self.mlp = MLP(backend, config, layer)

    def forward_(
        self, x_TD: Tensor, delta_TD: Tensor | None, rotation: Rotation, batch: Batch
    ) -> Tensor:
        """Add `delta` and what attention makes of it to the residual stream, in place; returns
        what the feed-forward would add, [T, D]: the next norm does."""
        normed_TD = self.input_norm.forward(x_TD, delta_TD, batch.overlays, batch.pool)
        delta_TD = self.attention.forward(normed_TD, rotation, batch)
        normed_TD = self.post_norm.forward(x_TD, delta_TD, batch.overlays, batch.pool)
        return self.mlp.forward(normed_TD, batch)

    def linears(self) -> tuple[LoraLinear, ...]:
        """In the order of TARGETS, fused."""
        return self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and tensors."""
        for part in (self.input_norm, self.attention, self.post_norm, self.mlp):
            yield from part.weights()


class Decoder:
    """A causal language model. Built with uninitialised weights; `models/loader` fills them.

    With tied embeddings `lm_head` holds the table of embeddings itself until it is packed, which
    makes it a second copy, unless tokens can be looked up in it (`share_head`). `weight` and `bias`
    are the BaseWeights that methods are read with whose update depends on the base.
    """

    def __init__(self, backend: Backend, config: DecoderConfig) -> None:
        self.config = config
        self._kernels = backend.kernels
        self.dtype = backend.dtype
        table_VD = backend.allocate(config.vocab_size, config.hidden_size)
        self._table_VD: Tensor | None = table_VD
        self.layers = [DecoderLayer(backend, config, layer) for layer in range(config.num_layers)]
        self.norm = RMSNorm(backend, FINAL_NORM, config.hidden_size, config.rms_norm_eps)
        lm_head_VD = table_VD
        if not config.ties_embeddings:
            lm_head_VD = backend.allocate(config.vocab_size, config.hidden_size)
        self.lm_head = Weight(lm_head_VD)
        self.shape = shape = config.shape()
        self.embedding = Embedding(backend, shape, table_VD)
        self.head = LmHead(backend, shape, self.lm_head)
        self.rope = RopeTable(backend, config)
        self._has_own_head = not config.ties_embeddings
        num_bytes = self.rope.table_LE.nbytes + sum(tensor.nbytes for _, tensor in self.weights())
        own = self.matrices() if self._has_own_head else self.matrices()[:-1]
        self._other_bytes = num_bytes - sum(weight.nbytes for weight in own)
        self._linears = {
            path: (linear, rows)
            for layer in self.layers
            for linear in layer.linears()
            for path, rows in linear.parts()
        }
        self._unpacked: tuple[Weight, Tensor] | None = None

    def forward(self, batch: Batch) -> Tensor:
        """Logits of the batch's logit rows; K and V of all its tokens are now in its pages.

        Shapes       [Z, V] float32, a new tensor.
        Numerics     as transformers with eager attention in the weights' dtype, except that
                     attention probabilities stay in float32; logits are rounded to the weights'
                     dtype first.
        """
        self._unpacked = None
        x_TD = self.embedding.forward(batch)
        rotation = self.rope.rotation(batch.positions)
        with self._kernels.recording():
            delta_TD = None
            for layer in self.layers:
                delta_TD = layer.forward_(x_TD, delta_TD, rotation, batch)
            last_ZD = self.norm.forward(
                x_TD, delta_TD, batch.head_overlays, batch.pool, batch.logit_rows
            )
            return self.head.forward(last_ZD, batch)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor a checkpoint must hold: its name there and where its values go.

        Fused weights appear as the slices their parts fill, or as copies of the same bits once
        packed; a tied lm_head does not appear.
        """
        yield "model.embed_tokens.weight", self.embedding_VD
        for layer in self.layers:
            yield from layer.weights()
        yield from self.norm.weights()
        if not self.config.ties_embeddings:
            yield "lm_head.weight", self.lm_head.rows

    def matrices(self) -> list[Weight]:
        """Every weight that tokens are multiplied by, for packing."""
        linears = [linear for layer in self.layers for linear in layer.linears()]
        return [*(linear.weight for linear in linears), self.lm_head]

    def replace_lm_head(self, weight: Weight) -> None:
        """Multiply by `weight`, of other values than the embedding's, in the lm_head's place."""
        self.lm_head = self.head.weight = weight
        self._has_own_head = True

    @property
    def embedding_VD(self) -> Tensor:  # noqa: N802
        """[V, D], the table of embeddings, or a copy of the same bits once it is shared."""
        return self.lm_head.rows if self._table_VD is None else self._table_VD

    def share_head(self) -> None:
        """Look tokens up in the packed lm_head, if it is tied and its order allows, and keep no
        table beside it."""
        panels = self.lm_head.panels
        if self._table_VD is None or panels is None or self._has_own_head:
            return
        self._other_bytes -= self._table_VD.nbytes
        self._table_VD, self.embedding.table = None, panels

    def weight(self, path: str) -> Tensor:
        """The weight at `path`, a linear, the embedding or the lm_head, in the base's dtype.

        Shapes    [out, in]; of the embedding [V, D], a row for each token, as checkpoints have it.

        Not to be written to. Rows of a packed weight are a copy: the last fused weight that was
        unpacked is kept until another is asked for or a batch runs, so that the parts of one are
        best asked for one after the other.
        """
        if path == EMBEDDING or (path == LM_HEAD and not self._has_own_head):
            return self._rows(self.lm_head) if self._table_VD is None else self._table_VD
        if path == LM_HEAD:
            return self._rows(self.lm_head)
        assert path in self._linears, path
        linear, rows = self._linears[path]
        return self._rows(linear.weight)[rows]

    def bias(self, path: str) -> Tensor | None:
        """[out] of the linear at `path`, not to be written to; None if it has none."""
        if path in (EMBEDDING, LM_HEAD):
            return None
        assert path in self._linears, path
        linear, rows = self._linears[path]
        return None if linear.bias_O is None else linear.bias_O[rows]

    def num_bytes(self) -> int:
        """Bytes of all weights and of the rope table, shared tensors once."""
        matrices = self.matrices()
        if self.config.ties_embeddings and not self.lm_head.is_packed:
            matrices.pop()  # it is the embedding
        return self._other_bytes + sum(weight.nbytes for weight in matrices)

    def _rows(self, weight: Weight) -> Tensor:
        if self._unpacked is None or self._unpacked[0] is not weight:
            self._unpacked = None
            self._unpacked = weight, weight.rows
        return self._unpacked[1]
