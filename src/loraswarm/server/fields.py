"""Request fields that OpenAI or vLLM know and this server does not act on.

A field that would change the answer is refused unless its value asks for nothing; one that cannot
change it is accepted and dropped. Used by schema.
"""

from __future__ import annotations

from typing import Any

from loraswarm.errors import InvalidRequest

# name -> values that ask for nothing; null is always one
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "documents": ([],),
    "early_stopping": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "prompt_embeds": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "web_search_options": (),
}
IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "user",
    }
)


def drop_inert_fields(body: dict[str, Any]) -> dict[str, Any]:
    """`body` without nulls and without the fields of this module.

    Raises   InvalidRequest naming a field that asks for what is not supported.
    """
    kept = {}
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name not in UNSUPPORTED:
            kept[name] = value
        elif value not in UNSUPPORTED[name]:
            raise InvalidRequest(f"{name} is not supported", name)
    return kept
