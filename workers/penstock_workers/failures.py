"""What an error that ended a job holds besides its words, and how it is let go of.

An error's traceback holds frames, and these prompts, formats and batches; a frame that is under way holds the
error in turn. Such rings lie in memory until Python looks for rings, which it does by counting objects: it
does not see that one of them holds 60 MB.
"""


def forget_frames(error: BaseException) -> BaseException:
    """Let go of where an error, and those that led to it, were raised; return it."""
    seen: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or any(one is other for other in seen):
            continue
        seen.append(one)
        left += [one.__cause__, one.__context__]
        one.__cause__ = one.__context__ = one.__traceback__ = None
    return error
