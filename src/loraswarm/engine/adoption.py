"""What an engine takes over from a snapshot, and what it refuses: pure rules.

Knows neither queues nor pages. Called by engine/migration for what can be said at once, and by
engine/sequence_maker when the adapters are known.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

from loraswarm.adapters.adapter import AdapterInfo
from loraswarm.core.client import EngineInfo
from loraswarm.core.request import Request
from loraswarm.core.sequence import Sequence
from loraswarm.core.snapshot import KVPages, SequenceSnapshot
from loraswarm.errors import InvalidRequest


def check_snapshot(snapshot: SequenceSnapshot, info: EngineInfo, layout: str) -> None:
    """Raise InvalidRequest for what cannot be gone on with here, whatever the adapters are.

    `layout` is that of this engine's pages.
    """
    params, outputs = snapshot.request.params, snapshot.output_token_ids
    for token_id in outputs:
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequest(
                f"the snapshot has token id {token_id}; the vocabulary has {info.vocab_size:,}"
            )
    if outputs and params.seed is None and not params.is_greedy:
        raise InvalidRequest(
            "the snapshot has tokens that were drawn, but no seed to draw the next ones with",
            "seed",
        )
    if snapshot.kv is not None:
        _check_kv(snapshot, snapshot.kv, info, layout)


def check_adapters(
    snapshot: SequenceSnapshot, infos: Seq[AdapterInfo], named: Seq[AdapterInfo]
) -> None:
    """Raise InvalidRequest unless the adapters that act here are those of the snapshot.

    Who knows only which adapters the request names, all of which act or none, gives those.
    """
    digests = tuple(info.digest for info in infos)
    is_known_by_names = tuple(info.digest for info in named) == snapshot.adapter_digests
    if is_known_by_names and (infos or snapshot.kv is None):
        return
    if snapshot.adapter_digests is None and snapshot.kv is not None and infos:
        raise InvalidRequest("the snapshot has K and V, but not what adapters made them", "adapter")
    if snapshot.adapter_digests in (None, digests):
        return
    names = ", ".join(repr(name) for name, _ in snapshot.request.weighted_adapters)
    raise InvalidRequest(
        f"the answer was begun with other contents of {names} than this engine serves:"
        f" {', '.join(snapshot.adapter_digests or ('none that act',))}, here"
        f" {', '.join(digests or ('none that act',))}",
        "adapter",
    )


def request_to_serve(snapshot: SequenceSnapshot) -> Request:
    """The request without what has been reported already and need not be computed again."""
    request = snapshot.request
    if not snapshot.output_token_ids or request.params.prompt_logprobs is None:
        return request
    return replace(request, params=replace(request.params, prompt_logprobs=None))


def restore_(sequence: Sequence, snapshot: SequenceSnapshot) -> None:
    """Bring a new sequence to where the snapshot was taken.

    Raises   InvalidRequest if its answer has ended there.
    """
    sequence.token_ids += snapshot.output_token_ids
    if snapshot.prompt_logprobs:
        sequence.prompt_logprobs = list(snapshot.prompt_logprobs)
    sequence.queue_s = snapshot.queue_s
    sequence.num_cached = snapshot.num_cached_tokens
    sequence.brought = snapshot.kv
    num_output, params = sequence.num_output, sequence.request.params
    if num_output == 0:
        return
    is_stopped = num_output > params.min_tokens and sequence.token_ids[-1] in sequence.end_token_ids
    if is_stopped or num_output >= sequence.max_tokens:
        raise InvalidRequest(
            f"the snapshot's answer of {num_output:,} tokens has ended; nothing is left to do"
        )


def _check_kv(snapshot: SequenceSnapshot, kv: KVPages, info: EngineInfo, layout: str) -> None:
    if kv.layout != layout:
        raise InvalidRequest(
            f"the snapshot's K and V are laid out for {kv.layout!r}, this engine's pages for"
            f" {layout!r}; send it without"
        )
    num_pages = -(-kv.num_tokens // info.page_tokens)
    sizes = {len(page) for page in kv.pages}
    is_whole = len(kv.pages) == num_pages and sizes <= {info.page_bytes}
    if not is_whole or not 0 < kv.num_tokens < snapshot.num_tokens:
        raise InvalidRequest(
            f"the snapshot has {snapshot.num_tokens:,} tokens and K and V of {kv.num_tokens:,} in"
            f" {len(kv.pages):,} pages; it must be fewer tokens, in {num_pages:,} pages of"
            f" {info.page_bytes:,} bytes"
        )
    request = request_to_serve(snapshot)
    num_wanted = min(kv.num_tokens + 1, len(request.prompt_token_ids))
    if request.params.prompt_logprobs is not None and len(snapshot.prompt_logprobs) < num_wanted:
        raise InvalidRequest(
            f"the snapshot has {len(snapshot.prompt_logprobs):,} log-probabilities of its prompt;"
            f" with K and V of {kv.num_tokens:,} tokens it must have {num_wanted:,} or more",
            "prompt_logprobs",
        )
