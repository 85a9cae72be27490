"""How requests to a model can share forward passes."""

from enum import StrEnum


class BatchMode(StrEnum):
    """How requests to a model share forward passes, best first. `ModelInfo.batching` announces the value."""

    CONTINUOUS = "continuous"
    """Requests come and go between any two passes; prefill may be chunked or begin with a cached prefix."""
    WHOLE_PROMPTS = "continuous, prompts whole"
    """Requests join and leave, but a prompt is one forward pass."""
    STATIC = "static"
    """Requests begin together; they can only leave."""
    ALONE = "one at a time"
    """Batch mates would change the answer."""

    @property
    def is_continuous(self) -> bool:
        """Whether requests join others that are running."""
        return self in (BatchMode.CONTINUOUS, BatchMode.WHOLE_PROMPTS)

    @property
    def can_chunk(self) -> bool:
        """Whether a prompt can be prefilled in chunks, and begin with a copy of another prompt's prefix."""
        return self is BatchMode.CONTINUOUS
