"""Conversations derived from the train split: a docstring asks, the code it documents answers.

Every documented function and class of moderate size becomes one conversation, so the models have
seen the roles and turn marks of the chat template. Nothing here reads the held-out split.
"""

from __future__ import annotations

import ast
import random
import textwrap
import warnings
from collections.abc import Iterator, Sequence

from examples.models.corpus import SourceFile

Message = dict[str, str]

MIN_CODE_CHARS = 60
MAX_CODE_CHARS = 1800
MAX_SUMMARY_CHARS = 300
SYSTEM_PROMPT = "You write Python code."

_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def chat_documents(files: Sequence[SourceFile], max_bytes: int, seed: int) -> list[list[Message]]:
    """A seeded choice of conversations, about `max_bytes` of text in all."""
    pairs = [pair for file in files for pair in documented_code(file)]
    rng = random.Random(seed)
    rng.shuffle(pairs)
    chosen: list[list[Message]] = []
    used = 0
    for question, answer in pairs:
        if used >= max_bytes:
            break
        used += len(question.encode()) + len(answer.encode())
        chosen.append(conversation(question, answer, with_system=rng.random() < 0.25))
    return chosen


def conversation(question: str, answer: str, *, with_system: bool) -> list[Message]:
    """The messages of one exchange."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if with_system:
        messages.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
    return messages


def documented_code(file: SourceFile) -> Iterator[tuple[str, str]]:
    """(question, answer) for every documented definition of moderate size in `file`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(file.text)
    except SyntaxError:
        return
    lines = file.text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, _Documented):
            continue
        summary = _summary(ast.get_docstring(node))
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if summary and MIN_CODE_CHARS <= len(code) <= MAX_CODE_CHARS:
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield f"Write a Python {kind} `{node.name}`. {summary}", code


def _summary(docstring: str | None) -> str:
    """The docstring's first paragraph on one line, empty if there is none of fitting length."""
    if not docstring:
        return ""
    summary = " ".join(docstring.split("\n\n")[0].split())
    return summary if len(summary) <= MAX_SUMMARY_CHARS else ""
