"""Conversations about a picture: a JSON list with a picture and its turns an entry. Two dialects of it are about:

    {"id", "image", "conversations": [{"role": "user"|"assistant", "content": …}, …]}     the paper's authors'
    {"id", "image", "conversations": [{"from": "human"|"gpt", "value": …}, …]}            LLaVA's and ShareGPT's

A pair of turns is a question and its answer. A content may be a list of parts, of which those with text are joined. The mark
"<image>", at either end of a question, says where the picture stood, and is taken off; a system's turn is left away.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

from typing_extensions import TypedDict

from lavender_min.data.texts import Text, keep, numbered, read_json
from lavender_min.failing import shaped

KIND = "a list of conversations"
ASKING, ANSWERING, SYSTEM = ("user", "human"), ("assistant", "gpt"), "system"
IMAGE_MARK = re.compile(r"\A(\s*<image>)+|(<image>\s*)+\Z")


class Part(TypedDict):
    text: NotRequired[Text]


Content = Text | list[Part | Text]
Turn = TypedDict("Turn", {"from": str, "value": Content, "role": str, "content": Content}, total=False)


class Entry(TypedDict):
    id: NotRequired[Text | int]
    image: Text
    conversations: list[Turn]


class Conversation(NamedTuple):
    # "<file>, row <number>"
    where: str
    # The entry's own; the name of the picture where it has none.
    id: str
    # The path of the picture, as the file has it.
    image: str
    # (question, answer) for each pair of turns.
    turns: list[tuple[str, str]]


def read(file: Path, kind: str = KIND) -> list[Conversation]:
    """All conversations of a file, but those that lack a picture, say. `kind` is what an error says the file should be."""
    return of(read_json(file, kind), file, kind)


def of(entries: Any, file: Path, kind: str = KIND) -> list[Conversation]:
    """The same of a file that has been read."""
    return keep(numbered(entries, file, kind), _conversation)


def _conversation(entry: Any, where: str) -> Conversation:
    row = shaped(entry, Entry, where)
    said = [turn for turn in row["conversations"] if (turn.get("role") or turn.get("from")) != SYSTEM]
    questions = [_text(turn, ASKING, where) for turn in said[::2]]
    answers = [_text(turn, ANSWERING, where) for turn in said[1::2]]
    if len(questions) != len(answers):
        raise ValueError(f"{where}, conversations: expected an answer to every question; got {len(said)} turns")
    turns = [(IMAGE_MARK.sub("", q).strip(), a.strip()) for q, a in zip(questions, answers, strict=True)]
    return Conversation(where, str(row.get("id", row["image"])), row["image"], turns)


def _text(turn: Turn, roles: tuple[str, str], where: str) -> str:
    role = turn.get("role") or turn.get("from")
    if role not in roles:
        raise ValueError(f"{where}, conversations: expected a turn of {' or '.join(roles)}; got {role!r}")
    content = turn.get("content") if "role" in turn else turn.get("value")
    if isinstance(content, list):
        return "\n".join(part if isinstance(part, str) else part.get("text", "") for part in content).strip()
    if content is None:
        raise ValueError(f"{where}, conversations: a turn of {role} has no text")
    return content
