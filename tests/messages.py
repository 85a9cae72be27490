"""Messages of our client that somebody has changed before they are pushed."""

import json
from typing import Any

from penstock.messages import encode_message
from penstock.request import EmbedRequest, Priority


def message(
    job_id: str = "job",
    *,
    model: str = "m",
    text: str = "a",
    reply_to: str = "penstock:reply:1",
    tenant: str = "",
    n_tokens: int | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Return a good message as JSON, with changes at `section__name`."""
    made: dict[str, Any] = json.loads(
        encode_message(
            EmbedRequest(model=model, texts=[text]),
            job_id=job_id,
            queue=f"cpu.{model}",
            priority=Priority.DEFAULT,
            tenant=tenant,
            reply_to=reply_to,
            origin="tests",
            n_tokens=n_tokens,
        )
    )
    for path, value in changes.items():
        section, _, name = path.partition("__")
        if name:
            made[section][name] = value
        else:
            made[section.replace("_", "-")] = value
    return made
