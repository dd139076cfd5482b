"""Small tokenizers made on the spot: byte-level as in Llama 3, byte-fallback as in Llama 2."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from loraswarm.text.token_bytes import BYTE_OF_CHARACTER
from loraswarm.text.tokenizer import Tokenizer

BOS, EOS, USER = "<|begin|>", "<|end|>", "<|user|>"
SPECIAL_TOKENS = [BOS, EOS, USER]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<|user|>' + message['role'] + ':' + message['content'] }}"
    "{% if not loop.last or add_generation_prompt %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' + (tone or '') }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Hello world! Hello there, how are you? Good morning, world.",
    "SELECT name, age FROM people WHERE age > 30 ORDER BY name;",
    "Grüße aus München: 你好, 世界 — ça va? Ещё раз 🙂🚀",
] * 5


@cache
def byte_level_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return backend


@cache
def byte_level() -> Tokenizer:
    """Every byte is a token; a beginning-of-text token is added; has a chat template."""
    return Tokenizer(_wrap(byte_level_backend(), CHAT_TEMPLATE))


@cache
def without_template() -> Tokenizer:
    return Tokenizer(_wrap(byte_level_backend(), None))


@cache
def straddling() -> Tokenizer:
    """Ids 0 to 255 are the bytes; 256 is the end of one character and the beginning of the next."""
    character_of_byte = {byte: c for c, byte in BYTE_OF_CHARACTER.items()}
    names = [character_of_byte[byte] for byte in range(256)]
    pair = (names[0xA0], names[0xE4])
    vocabulary = {name: i for i, name in enumerate([*names, "".join(pair)])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[pair]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


@cache
def byte_fallback() -> Tokenizer:
    """Words with a leading space as in SentencePiece; the first loses it; others are bytes."""
    words = ["▁hello", "▁world", "▁the", "▁a", "he", "llo", "▁", "a", "b", "c", "x", ".", "é"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = Backend(
        models.Unigram([(name, -float(i)) for i, name in enumerate(names)], 0, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Prepend("▁"),
            normalizers.Replace(" ", "▁"),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def save_byte_level(directory: Path) -> None:
    """Write the byte-level tokenizer as a model directory holds it."""
    _wrap(byte_level_backend(), CHAT_TEMPLATE).save_pretrained(directory)


def _wrap(backend: Backend, template: str | None) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = template
    return wrapped
