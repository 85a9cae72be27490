"""Read a model's `generation_config.json`: check it, serve it, and name in the log what is not served."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import GenerationConfig

from penstock.errors import ModelLoadError
from penstock.request import GenerationOptions

logger = logging.getLogger(__name__)

_OPTIONS: Final = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
)
_SERVED: Final = frozenset(
    (
        *_OPTIONS,
        "do_sample",
        "stop_strings",
        "eos_token_id",
        "max_length",
        "min_length",
        "min_new_tokens",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
    )
)
# They change no token of an answer: formats of output, caches, speed, and ids that prompts come with.
_WITHOUT_EFFECT: Final = frozenset(
    (
        "pad_token_id",
        "bos_token_id",
        "decoder_start_token_id",
        "transformers_version",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "renormalize_logits",
        "low_memory",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "prefill_chunk_size",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "speculation_type",
        "use_mtp",
        "max_matching_ngram_size",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "early_stopping",  # these two are for beams, which are named themselves
        "length_penalty",
    )
)
_NEUTRAL_AT_ONE: Final = frozenset(
    (
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "typical_p",
        "guidance_scale",
        "encoder_repetition_penalty",
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForbiddenTokens:
    """Tokens that a model's configuration forbids, as transformers' logits processors do.

    Attributes:
        never: tokens that no answer has.
        never_first: tokens that no answer begins with.
        end_ids: tokens that end an answer; forbidden until `min_new_tokens` and `min_length` are reached.
        min_new_tokens: fewest tokens of an answer.
        min_length: fewest tokens of prompt and answer.
        ngram_size: number of tokens in a sequence that must not come twice in prompt and answer; 0 allows
            any.
        bad_words: sequences of tokens that no answer has.
    """

    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    min_length: int = 0
    ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()

    def restrict(self, logits: Tensor, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """Forbid in place what may not come next.

        Args:
            logits: logits of one row, float32, shape (vocab,).
            prompt: tokens of the prompt.
            tokens: tokens of the answer so far.
        """
        forbidden = set(self.never)
        if not tokens:
            forbidden.update(self.never_first)
        if len(tokens) < self.min_new_tokens or len(prompt) + len(tokens) < self.min_length:
            forbidden.update(self.end_ids)
        n_before = max([self.ngram_size, *map(len, self.bad_words)], default=1) - 1
        text = [*prompt, *tokens] if self.ngram_size else [*prompt[-n_before:], *tokens[-n_before:]]
        for *start, last in self.bad_words:
            if text[len(text) - len(start) :] == start:
                forbidden.add(last)
        if self.ngram_size:
            forbidden.update(_repeats(text, self.ngram_size - 1))
        if forbidden:
            logits[torch.tensor(sorted(forbidden), device=logits.device)] = -torch.inf


def _repeats(text: list[int], n_before: int) -> set[int]:
    """Return the tokens that followed the last `n_before` tokens wherever these came before."""
    last = text[len(text) - n_before :]
    return {text[i + n_before] for i in range(len(text) - n_before) if text[i : i + n_before] == last}


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnConfig:
    """A model's own configuration, in our terms.

    Attributes:
        options: default options; None where the configuration leaves one open.
        end_ids: tokens that end an answer.
        forbidden: tokens that it forbids; None if it forbids none.
        max_length: most tokens of prompt and answer, where nobody says how long an answer may be.
    """

    options: GenerationOptions
    end_ids: frozenset[int]
    forbidden: ForbiddenTokens | None
    max_length: int | None


def read_own_config(name: str, config: GenerationConfig, n_vocab: int) -> OwnConfig:
    """Check a model's `generation_config.json`; logs in one warning what is not served.

    Args:
        name: name of the model.
        config: configuration as transformers read it.
        n_vocab: number of tokens that the model has.

    Raises:
        ModelLoadError: a value is of another type, out of its range, or a token that the model has not.
    """
    fields = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    try:
        own = _read(fields, n_vocab, is_guessed=bool(config._from_model_config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        told = f"generation_config.json: {where}: {first['msg']}, not {str(first['input'])[:40]!r}"
        raise ModelLoadError(name, told) from None
    except ValueError as error:
        raise ModelLoadError(name, f"generation_config.json: {error}") from None
    if unserved := sorted(key for key, value in fields.items() if _is_unserved(key, value)):
        logger.warning(
            "model %s: generation_config.json asks for what is not served here: %s", name, ", ".join(unserved)
        )
    return own


def _read(fields: Mapping[str, Any], n_vocab: int, *, is_guessed: bool) -> OwnConfig:
    strings = fields.get("stop_strings")
    do_sample = fields.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise ValueError(f"do_sample: true or false, not {str(do_sample)[:40]!r}")
    values = {key: fields.get(key) for key in _OPTIONS}
    options = GenerationOptions.model_validate(values | {"stop": strings})
    temperature = (1.0 if options.temperature is None else options.temperature) if do_sample else 0.0
    end_ids = frozenset(_read_ids(fields, "eos_token_id", n_vocab, is_guessed=is_guessed))
    min_new_tokens, min_length = _read_count(fields, "min_new_tokens"), _read_count(fields, "min_length")
    forbidden = ForbiddenTokens(
        never=_read_ids(fields, "suppress_tokens", n_vocab),
        never_first=_read_ids(fields, "begin_suppress_tokens", n_vocab),
        end_ids=tuple(end_ids) if min_new_tokens or min_length else (),
        min_new_tokens=min_new_tokens,
        min_length=min_length,
        ngram_size=_read_count(fields, "no_repeat_ngram_size"),
        bad_words=_read_words(fields, n_vocab, end_ids),
    )
    if len({*forbidden.never, *forbidden.never_first}) >= n_vocab:
        raise ValueError("suppress_tokens: they leave no token to choose")
    return OwnConfig(
        options=options.model_copy(update={"temperature": temperature}),
        end_ids=end_ids,
        forbidden=None if forbidden == ForbiddenTokens() else forbidden,
        max_length=_read_count(fields, "max_length") or None,
    )


def _read_count(fields: Mapping[str, Any], key: str) -> int:
    value = fields.get(key)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise ValueError(f"{key}: a number from 0, not {str(value)[:40]!r}")
    return value


def _read_ids(
    fields: Mapping[str, Any], key: str, n_vocab: int, *, is_guessed: bool = False
) -> tuple[int, ...]:
    value = fields.get(key)
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ValueError(f"{key}: tokens' ids, not {str(token)[:40]!r}")
        if not 0 <= token < n_vocab and not is_guessed:
            raise ValueError(f"{key}: {token} is no token, the model has {n_vocab}")
    return tuple(token for token in ids if 0 <= token < n_vocab)


def _read_words(
    fields: Mapping[str, Any], n_vocab: int, end_ids: frozenset[int]
) -> tuple[tuple[int, ...], ...]:
    words = fields.get("bad_words_ids")
    if words is None:
        return ()
    if not isinstance(words, list | tuple) or not all(isinstance(word, list) and word for word in words):
        raise ValueError(f"bad_words_ids: lists of tokens' ids, not {str(words)[:40]!r}")
    read = [_read_ids({"bad_words_ids": word}, "bad_words_ids", n_vocab) for word in words]
    return tuple(word for word in read if not (len(word) == 1 and word[0] in end_ids))


def _is_unserved(key: str, value: object) -> bool:
    if key in _SERVED or key in _WITHOUT_EFFECT or value in (None, False, 0, "", [], {}, ()):
        return False
    return not (key in _NEUTRAL_AT_ONE and value == 1)
