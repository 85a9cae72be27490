"""A chat model that knows tools, for the adapters' tests."""

from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import pytest
from transformers import AutoTokenizer

from tests.deployment import ROOT, Server, WorkerProcess
from tests.models.test_chat import CALLS

TINY_CHAT = ROOT / "workers/penstock_workers/bundled/tiny_chat"
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ '<|system|>' + tools | tojson + eos_token }}{% endif %}"
    "{% for m in messages %}{{ '<|' + ('user' if m['role'] == 'tool' else m['role']) + '|>' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>"
    "{{ {'name': c['function']['name'], 'arguments': c['function']['arguments']} | tojson }}</tool_call>"
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOML = """
[models.caller]
task = "generate"
source = "{folder}"
generation = {{ max_new_tokens = 100, temperature = 0.0 }}
"""


@pytest.fixture(scope="session")
def caller(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Name a served model: tiny-chat, whose template shows tools and whose tokenizer reads calls."""
    folder: Path = tmp_path_factory.mktemp("caller")
    copytree(TINY_CHAT, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = CALLS
    tokenizer.save_pretrained(folder / "model")
    process = WorkerProcess(folder, server, toml=TOML.format(folder=folder / "model"), queues="cpu.caller")
    try:
        process.wait_until_ready()
        yield "caller"
    finally:
        process.stop()
