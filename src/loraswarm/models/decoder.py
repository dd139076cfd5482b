"""One decoder for every family: embeddings, layers, final norm, logits.

Owns the base weights, which nothing writes after the loader. Knows neither adapters (layers/linear
does) nor sequences; told by engine/model_runner to run a Batch, under torch.inference_mode.
Legend: T tokens, D hidden, V vocabulary, Z logit rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraswarm.models.batch import Batch
from loraswarm.models.config import DecoderConfig
from loraswarm.models.layers.attention import Attention
from loraswarm.models.layers.backend import Backend
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

    def forward_(self, x_TD: Tensor, rotation: Rotation, batch: Batch) -> None:
        """Add this layer's updates to the residual stream, in place."""
        x_TD.add_(self.attention.forward(self.input_norm.forward(x_TD), rotation, batch))
        x_TD.add_(self.mlp.forward(self.post_norm.forward(x_TD), batch))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names and tensors."""
        for part in (self.input_norm, self.attention, self.post_norm, self.mlp):
            yield from part.weights()


class Decoder:
    """A causal language model. Built with uninitialised weights; `models/loader` fills them.

    With tied embeddings `lm_head` holds `embedding_VD` itself until it is packed, which makes it a
    second copy: looking up rows needs them in order.
    """

    def __init__(self, backend: Backend, config: DecoderConfig) -> None:
        self.config = config
        self.embedding_VD = backend.allocate(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(backend, config, layer) for layer in range(config.num_layers)]
        self.norm = RMSNorm(backend, "model.norm", config.hidden_size, config.rms_norm_eps)
        lm_head_VD = self.embedding_VD
        if not config.ties_embeddings:
            lm_head_VD = backend.allocate(config.vocab_size, config.hidden_size)
        self.lm_head = Weight(lm_head_VD)
        self.rope = RopeTable(backend, config)
        self._num_bytes = self.rope.table_LE.nbytes
        self._num_bytes += sum(tensor.nbytes for _, tensor in self.weights())

    def forward(self, batch: Batch) -> Tensor:
        """Logits of the batch's logit rows; K and V of all its tokens are now in its pages.

        Shapes       [Z, V] float32, a new tensor.
        Numerics     as transformers with eager attention in the weights' dtype, except that
                     attention probabilities stay in float32; logits are rounded to the weights'
                     dtype first.
        """
        x_TD = F.embedding(batch.token_ids, self.embedding_VD)
        rotation = self.rope.rotation(batch.positions)
        for layer in self.layers:
            layer.forward_(x_TD, rotation, batch)
        last_ZD = self.norm.forward(x_TD[batch.logit_rows])
        return self.lm_head.multiply(last_ZD).float()

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
        layers = [(layer.attention, layer.mlp) for layer in self.layers]
        fused = [
            linear
            for attention, mlp in layers
            for linear in (attention.qkv, attention.o, mlp.gate_up, mlp.down)
        ]
        return [*(linear.weight for linear in fused), self.lm_head]

    def num_bytes(self) -> int:
        """Bytes of all weights and of the rope table, shared tensors once."""
        copies = self.config.ties_embeddings and self.lm_head.is_packed
        return self._num_bytes + (self.embedding_VD.nbytes if copies else 0)
