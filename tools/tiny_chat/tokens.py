"""The tokenizer of tiny-chat: whole words that it has met often, and bytes for all else."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tools.tiny_chat.text import Conversation, conversations
from tools.tiny_chat.words import REAL_NAMES

VOCAB = 960
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
ASSISTANT = "<|assistant|>"
_ROLES = ["<|system|>", "<|user|>", ASSISTANT]

# A word keeps the space before it, every digit stands alone.
_PIECES = r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\p{N}|\s"

_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('tiny-chat knows the roles system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(*, seed: int, n_conversations: int = 40_000) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose vocabulary holds the pieces most frequent in training conversations.

    Names are left out: they are spelled letter by letter, so that a name never met is no exception.
    """
    splitter = _splitter()
    drawn = islice(conversations(seed, "train"), n_conversations)
    counted = Counter(piece for text in _texts(drawn) for piece, _ in splitter.pre_tokenize_str(text))
    names = {name.lower() for name in REAL_NAMES}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [PAD, BEGIN, END, *_ROLES, *letters]
    # Ties are broken by the text, so that one seed gives one vocabulary.
    for piece, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0])):
        if len(piece) > 1 and piece.lstrip("Ġ").lower() not in names:
            tokens.append(piece)
    vocab = {token: token_id for token_id, token in enumerate(tokens[:VOCAB])}
    return _wrap(vocab, splitter)


def _wrap(vocab: dict[str, int], splitter: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    # Without merges a piece is either one token of the vocabulary or its bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (PAD, BEGIN, END, *_ROLES)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=_ROLES,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _texts(drawn: Iterable[Conversation]) -> Iterator[str]:
    for conversation in drawn:
        yield from (message.content for message in conversation.messages)
        yield conversation.answer
