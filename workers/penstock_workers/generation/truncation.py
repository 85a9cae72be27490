"""Make a conversation fit into the context window: drop its oldest turns, or cut its longest ones."""

import bisect
from collections.abc import Callable, Sequence

from penstock.conversation import Message
from penstock.errors import InputTooLongError
from penstock.request import GenerationOptions
from penstock_workers.generation.chat import Chat

Encode = Callable[[Sequence[Message]], list[int]]
"""Returns the tokens of a conversation."""


def fit(
    name: str, chat: Chat, turns: list[Message], limit: int, options: GenerationOptions, encode: Encode
) -> tuple[list[int], int]:
    """Return the tokens of a conversation, leaving out as much as `options.truncation` allows and it needs.

    Args:
        name: name of the model, for errors.
        chat: counts tokens, and cuts texts.
        turns: turns of the conversation.
        limit: most tokens to return.
        options: options of the request.
        encode: returns the tokens of a conversation.

    Returns:
        At most `limit` tokens; and how many are left out.

    Raises:
        InputTooLongError: what may not be left out is too long.
    """
    ids = encode(turns)
    n_whole = len(ids)
    if n_whole > limit and options.truncation == "oldest_turns":
        ids = _drop_oldest(turns, limit, encode) or ids
    elif n_whole > limit and options.truncation == "middle":
        ids = _cut_middle(chat, turns, limit, encode, ids)
    if len(ids) > limit:
        raise InputTooLongError(name, len(ids), limit)
    return ids, n_whole - len(ids)


def _cut_middle(chat: Chat, turns: list[Message], limit: int, encode: Encode, ids: list[int]) -> list[int]:
    """Cut the longest turn of user or tool, again and again, until all fits or nothing is left to cut."""
    lengths = {
        i: chat.n_tokens(turn.content) for i, turn in enumerate(turns) if turn.role in ("user", "tool")
    }
    while len(ids) > limit:
        longest = max(lengths, key=lambda place: lengths[place])
        shorter = chat.cut_middle(turns[longest].content, len(ids) - limit)
        if shorter is None:
            break
        lengths[longest] = chat.n_tokens(shorter)
        turns = [*turns]
        turns[longest] = turns[longest].model_copy(update={"content": shorter})
        ids = encode(turns)
    return ids


def _drop_oldest(turns: list[Message], limit: int, encode: Encode) -> list[int]:
    """Return the tokens of the longest end of the conversation that fits, else of the shortest."""
    n_head = next(i for i, turn in enumerate(turns) if turn.role != "system")
    # An answer goes with its question: what is kept begins with a turn of the user.
    starts = [i for i in range(n_head + 1, len(turns)) if turns[i].role == "user"]

    def ids_from(start: int) -> list[int]:
        return encode([*turns[:n_head], *turns[start:]])

    # By bisection: each trial renders a conversation, which for hundreds of turns takes a while.
    best = bisect.bisect_left(starts, True, key=lambda start: len(ids_from(start)) <= limit)
    return ids_from(starts[min(best, len(starts) - 1)]) if starts else []
