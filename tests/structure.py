"""Measures our modules by the limits of `test_structure.py`.

`structure.toml` beside this lists what is over a limit today, and only shrinks: a name that is over no limit
any more has to go. `python -m tests.structure` strikes these. After a merge in which both sides struck names,
take either side and run it.
"""

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
FOLDERS: Final = ("producer", "workers")
EXCEPTIONS: Final = Path(__file__).with_name("structure.toml")

MAX_FILE_LINES: Final = 400
MAX_BODY_LINES: Final = 50  # of a function, its docstring left out
MAX_METHODS: Final = 20
MAX_ATTRIBUTES: Final = 12

#: What an attribute's line does not begin with: read alone, as an editor shows it, such a line says nothing.
LEANING: Final = re.compile(
    "after|around|as|at|because|before|by|for|from|how|in|it|its|likewise|not|of|on|so|that|their|these|this|those"
    "|until|what|when|where|whether|which|who|whoever|whom|whose|why|with",
    re.IGNORECASE,
)

#: Over the limit for good, and why.
EXCUSED: Final = {
    "files": {
        "errors": "A list: one short class after the other, as its docstring draws them.",
    },
    "functions": {},
    "methods": {
        "Client": "It has the methods of `AsyncClient`, one line each.",
    },
    "attributes": {
        "GenerateOptions": "Options of one call, flat as callers write them.",
        "GenerationOptions": "The same options, flat as messages hold them.",
        "ModelInfo": "What the registry tells of a model.",
        "ModelSettings": "What the deployment's file says of a model.",
        "WorkerInfo": "What the registry tells of a worker.",
    },
    "docstrings": {},
}

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(*suffixes: str) -> list[Path]:
    """Return our modules, relative to the repository."""
    return [
        path.relative_to(ROOT)
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in suffixes
    ]


def over_limits() -> dict[str, dict[str, int]]:
    """Return by limit what is over it without an excuse, and by how much it measures."""
    return {
        limit: {name: n for name, n in names.items() if name not in EXCUSED[limit]}
        for limit, names in measured().items()
    }


@cache
def measured() -> dict[str, dict[str, int]]:
    """Return by limit all that is over it; modules by their bare names."""
    found: dict[str, Counter[str]] = {limit: Counter() for limit in EXCUSED}
    for path in modules(".py", ".lua", ".c"):
        text = (ROOT / path).read_text()
        if (n_lines := len(text.splitlines())) > MAX_FILE_LINES:
            found["files"][path.stem] = n_lines
        if path.suffix == ".py":
            _measure(ast.parse(text), found)
    return {limit: dict(sorted(names.items())) for limit, names in found.items()}


def _measure(tree: ast.Module, found: dict[str, Counter[str]]) -> None:
    for node, name in _definitions(tree):
        if isinstance(node, ast.ClassDef):
            if (n_methods := sum(isinstance(part, _Function) for part in node.body)) > MAX_METHODS:
                found["methods"][name] = n_methods
            if (n_attributes := len(_attributes(node))) > MAX_ATTRIBUTES:
                found["attributes"][name] = n_attributes
        elif (n_lines := _body_lines(node)) > MAX_BODY_LINES:
            found["functions"][name] = n_lines
        if n_leaning := len(leaning(ast.get_docstring(node) or "")):
            found["docstrings"][name] += n_leaning


def _definitions(parent: ast.AST, prefix: str = "") -> Iterator[tuple[ast.ClassDef | _Function, str]]:
    """Yield classes and functions with their names, those of classes like `Class.method`."""
    for node in ast.iter_child_nodes(parent):
        name = prefix
        if isinstance(node, ast.ClassDef | _Function):
            yield node, prefix + node.name
            name = f"{node.name}." if isinstance(node, ast.ClassDef) else prefix
        yield from _definitions(node, name)


def _body_lines(function: _Function) -> int:
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or first.lineno) - first.lineno + 1


def _attributes(class_: ast.ClassDef) -> set[str]:
    """Return names of fields and of what methods assign to `self`."""
    fields = {
        part.target.id
        for part in class_.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
    return fields | {
        node.attr
        for node in ast.walk(class_)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def leaning(docstring: str) -> list[str]:
    """Return the lines of its `Attributes` that lean on another line."""
    section, found = "", []
    for line in docstring.splitlines():
        if heading := re.fullmatch(r"(\w+):", line):
            section = heading[1]
        elif section == "Attributes" and (entry := re.match(r" {4}\w+(?:, \w+)*: (\w+)", line)):
            found += [line.strip()] if LEANING.fullmatch(entry[1]) else []
    return found


def exceptions() -> dict[str, dict[str, int | None]]:
    """Return by limit the names that may be over it; of docstrings, how many of their lines may."""
    listed = tomllib.loads(EXCEPTIONS.read_text())
    return {
        limit: names if isinstance(names, dict) else dict.fromkeys(names) for limit, names in listed.items()
    }


def shrunk(lines: Iterable[str], over: dict[str, dict[str, int]]) -> Iterator[str]:
    """Yield lines of `structure.toml`: without names that are over no limit, and with lower numbers."""
    limit, seen = "", set()
    for line in lines:
        if heading := re.fullmatch(r"(\w+) = \[|\[(\w+)\]", line):
            limit, seen = heading[1] or heading[2], set()
        elif entry := re.fullmatch(r'\s*"?([\w.]+)"?(?:,| = (\d+))', line):
            name = entry[1]
            if name in seen or name not in over[limit]:
                continue
            seen.add(name)
            if entry[2]:
                line = f"{name} = {min(int(entry[2]), over[limit][name])}"
        yield line


def main() -> None:
    """Strike stale exceptions, and lower numbers that shrank."""
    lines = EXCEPTIONS.read_text().splitlines()
    EXCEPTIONS.write_text("\n".join(shrunk(lines, over_limits())) + "\n")


if __name__ == "__main__":
    main()
