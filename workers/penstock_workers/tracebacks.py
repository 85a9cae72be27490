"""What a job's error keeps in memory: for `batching` and `delivery`, which both end jobs with errors.

An error's traceback holds frames, and these prompts, formats and batches; a frame that still runs holds the
error in turn. Such cycles stay in memory until Python's garbage collector looks for them. It counts objects:
it does not see that one of them holds 60 MB.
"""


def forget_frames(error: BaseException) -> BaseException:
    """Drop the tracebacks of an error and of those that led to it; return the error."""
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
