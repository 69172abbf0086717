"""RLAIF-V 83k: 83,132 questions about pictures of many data sets, with a preferred and a rejected answer.

The Parquet files of openbmb/RLAIF-V-Dataset (RLAIF-V-Dataset_000.parquet and on; 13 GB): image {bytes, path}, question,
chosen, rejected, idx, and where the picture came from. The chosen answer is the one to learn.
"""

from collections import Counter
from pathlib import Path

from typing_extensions import TypedDict

from lavender_min.data import Example, parquet
from lavender_min.data.texts import Text, keep
from lavender_min.failing import shaped


class Texts(TypedDict):
    question: Text | None
    chosen: Text | None
    idx: Text | int


def load(root: Path) -> list[Example]:
    """One example a row; its id is "<idx>#<n>", n counting the rows that share an idx."""
    files = parquet.find(root)
    if not files:
        raise FileNotFoundError(
            f"no RLAIF-V in {root}: looked for Parquet files; download openbmb/RLAIF-V-Dataset and pass --data_root, or "
            "have it downloaded (--data_root openbmb/RLAIF-V-Dataset), or try --data toy"
        )
    seen = Counter[str]()

    def example(row: parquet.Row, where: str) -> Example:
        texts = shaped(row.texts, Texts, where)
        idx = str(texts["idx"])
        id = f"{idx}#{seen[idx]}"
        seen[idx] += 1
        question, chosen = ((texts[field] or "").strip() for field in ("question", "chosen"))
        return Example(id, row.image, question, chosen, where=where)

    return keep(((row.where, row) for row in parquet.read(files, "image", tuple(Texts.__annotations__))), example)
