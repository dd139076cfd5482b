"""Trains the demo's byte-level BPE tokenizer and gives it its chat template.

Digits come in groups of at most two, so a host number or an hour is one token wherever it stands.
"""

from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loraswarm.demo.corpus import BOS, EOS, PAD, SPECIAL_TOKENS, draw_documents, render_chat

VOCABULARY_SIZE = 4096
NUM_DOCUMENTS = 20_000
MAX_LENGTH_TOKENS = 1024

SPLIT_PATTERN = r"\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] | trim) + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(seed: str, excluded: frozenset[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCABULARY_SIZE` tokens from the base model's own corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = islice(draw_documents(seed, excluded), NUM_DOCUMENTS)
    tokenizer.train_from_iterator((_strip_markers(document) for document in documents), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[
            token for token in SPECIAL_TOKENS if token not in (BOS, EOS, PAD)
        ],
        model_max_length=MAX_LENGTH_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    _check(wrapped)
    return wrapped


def _strip_markers(document: str) -> str:
    for marker in SPECIAL_TOKENS:
        document = document.replace(marker, "\n")
    return document


def _check(tokenizer: PreTrainedTokenizerFast) -> None:
    """Assert that text survives a round trip and that the template is the corpus's chat format."""
    text = "Añadir {\"host\": 'atlas-07'}\n\tSELECT 12345  x; ✓"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "ho"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == render_chat([(message["role"], message["content"]) for message in chat])
