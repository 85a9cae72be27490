"""LightRAG over Penstock: insert documents, then ask in each of its modes. Run it while `make up` runs.

    .venv/bin/python examples/lightrag_demo.py

The default chat model, tiny-chat, is a stand-in: it repeats facts that it is told, and has a window of 1,024
tokens, where LightRAG's prompt for extraction alone takes 7,400. A constraint would not help: it makes any
model fill LightRAG's formats, this one with nonsense. So here, for this model only,

- the graph is written below, and goes in by `ainsert_custom_kg`, while the documents go the usual way without
  extraction;
- so are the keywords of each question; what the model itself makes of one is printed once: two lists of
  nonsense in valid JSON;
- the prompts are cut down to the texts that were found.

With a real model, served under the name `qwen`, LightRAG does all of it, with its own prompts:

    .venv/bin/python examples/lightrag_demo.py --llm qwen --extract

The exit code is 1 if a document failed or a question found nothing: LightRAG itself records both and goes on.
"""

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from lightrag import LightRAG, QueryParam
from lightrag.base import DocStatus
from lightrag.prompt import PROMPTS
from lightrag.utils import Tokenizer

from penstock import PenstockError
from penstock.adapters.lightrag import LightRAGModels
from penstock.client import DEFAULT_URL

DOCUMENTS: Final = {
    "gate": "The gate is blue.",
    "pump": "The pump is red.",
    "hall": "The pump is in the hall.",
    "key": "Ada has the key.",
}
ENTITIES: Final = {
    "Gate": ("equipment", "The gate closes the penstock.", "gate"),
    "Pump": ("equipment", "The pump lifts water.", "pump"),
    "Hall": ("place", "The hall houses the pump.", "hall"),
    "Ada": ("person", "Ada keeps the key.", "key"),
    "Key": ("equipment", "The key opens the hall.", "key"),
}
RELATIONS: Final = (
    ("Pump", "Hall", "location", "The pump stands in the hall.", "hall"),
    ("Ada", "Key", "possession", "Ada keeps the key.", "key"),
    ("Key", "Hall", "access", "The key opens the hall.", "key"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, in which mode, and with which keywords where the model finds none."""

    mode: Literal["naive", "local", "global", "hybrid", "mix"]
    text: str
    specific: tuple[str, ...] = ()
    broad: tuple[str, ...] = ()


QUESTIONS: Final = (
    Question(mode="naive", text="What colour is the gate?"),
    Question(mode="local", text="What colour is the pump?", specific=("Pump",)),
    Question(mode="global", text="Who has the key?", broad=("possession",)),
    Question(mode="hybrid", text="Where is the pump?", specific=("Pump",), broad=("location",)),
    Question(mode="mix", text="Who has the key?", specific=("Ada", "Key"), broad=("possession",)),
)

SHORT_PROMPTS: Final = dict.fromkeys(("naive_query_context", "kg_query_context"), "{text_chunks_str}")


class FourCharacters:
    """Tokens of four characters: LightRAG counts by them, and its usual tokenizer wants the network."""

    def encode(self, content: str) -> list[int]:
        """Return the characters of each token in one number, 21 bits each."""
        return [
            sum(ord(character) << 21 * place for place, character in enumerate(content[start : start + 4]))
            for start in range(0, len(content), 4)
        ]

    def decode(self, tokens: list[int]) -> str:
        """Undo `encode`."""
        characters = [token >> 21 * place & (1 << 21) - 1 for token in tokens for place in range(4)]
        return "".join(map(chr, filter(None, characters)))


async def run(models: LightRAGModels, folder: Path, *, extract: bool) -> list[str]:
    """Insert and ask; returns what went wrong."""
    rag = LightRAG(
        working_dir=str(folder),
        tokenizer=Tokenizer("four-characters", FourCharacters()),
        **models.arguments(),
    )
    await rag.initialize_storages()
    try:
        if not extract:
            PROMPTS.update(SHORT_PROMPTS)
        failed = await insert(rag, extract=extract)
        if not failed and not extract:
            await rag.ainsert_custom_kg(written_graph())
            print("keywords by the model:", str(await keywords(models, QUESTIONS[0].text))[:100], "...")
        return failed or [problem for each in QUESTIONS if (problem := await ask(rag, each, extract=extract))]
    finally:
        await rag.finalize_storages()


async def insert(rag: LightRAG, *, extract: bool) -> list[str]:
    """Insert the documents; returns those that failed."""
    track_id = await rag.apipeline_enqueue_documents(
        list(DOCUMENTS.values()),
        ids=list(DOCUMENTS),
        file_paths=[f"{name}.txt" for name in DOCUMENTS],
        process_options="F" if extract else "F!",  # `!` leaves extraction out
    )
    await rag.apipeline_process_enqueue_documents()
    found = await rag.aget_docs_by_track_id(track_id)
    for name in DOCUMENTS:
        print(f"document {name}: {found[name].status.value if name in found else 'missing'}")
    return [
        f"document {name} failed: {found[name].error_msg if name in found else 'missing'}"
        for name in DOCUMENTS
        if name not in found or found[name].status != DocStatus.PROCESSED
    ]


async def ask(rag: LightRAG, question: Question, *, extract: bool) -> str | None:
    """Ask one question and print the answer; returns what went wrong."""
    known = {} if extract else {"ll_keywords": [*question.specific], "hl_keywords": [*question.broad]}
    param = QueryParam(mode=question.mode, enable_rerank=bool(rag.rerank_model_func), **known)
    if not extract:
        param.top_k = param.chunk_top_k = 2
    short = "{content_data}" if question.mode == "naive" else "{context_data}"
    answer = await rag.aquery(question.text, param, None if extract else short)
    print(f"{question.mode}: {question.text} {answer}")
    if not isinstance(answer, str) or not answer or "[no-context]" in answer:
        return f"{question.mode}: nothing was found"
    return None


async def keywords(models: LightRAGModels, text: str) -> dict[str, Any]:
    """Return what the model makes of LightRAG's keyword call."""
    answer = await models.llm_model_func(text, keyword_extraction=True, max_tokens=800)
    found: dict[str, Any] = json.loads(str(answer))
    return found


def written_graph() -> dict[str, Any]:
    """Return the graph in the form of `ainsert_custom_kg`."""
    return {
        "chunks": [
            {"content": text, "source_id": name, "file_path": f"{name}.txt"}
            for name, text in DOCUMENTS.items()
        ],
        "entities": [
            {"entity_name": name, "entity_type": kind, "description": text, "source_id": source}
            for name, (kind, text, source) in ENTITIES.items()
        ],
        "relationships": [
            {"src_id": one, "tgt_id": other, "keywords": words, "description": text, "source_id": source}
            for one, other, words, text, source in RELATIONS
        ],
    }


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description="LightRAG over Penstock; see the head of this file.")
    parser.add_argument("--url", default=DEFAULT_URL, help="Redis that holds the queues")
    parser.add_argument("--llm", default="chat", help="name of the chat model")
    parser.add_argument("--embedding", default="minilm", help="name of the embedding model")
    parser.add_argument("--rerank", help="name of a cross-encoder")
    parser.add_argument("--extract", action="store_true", help="let the chat model do all that LightRAG asks")
    given = parser.parse_args()
    for name in ("lightrag", "nano-vectordb", "penstock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with (
            LightRAGModels(
                given.url, llm=given.llm, embedding=given.embedding, rerank=given.rerank
            ) as models,
            tempfile.TemporaryDirectory(prefix="penstock-lightrag-") as folder,
        ):
            problems = asyncio.run(run(models, Path(folder), extract=given.extract))
    except PenstockError as error:
        problems = [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
