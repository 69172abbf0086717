"""RLAIF-V 83k: 83,132 questions about pictures of many data sets, with a preferred and a rejected answer.

The Parquet files of openbmb/RLAIF-V-Dataset (RLAIF-V-Dataset_000.parquet and on; 13 GB): image {bytes, path}, question,
chosen, rejected, idx, and where the picture came from. The chosen answer is the one to learn.
"""

from collections import Counter
from pathlib import Path

from lavender_min.data import Example, parquet


def load(root: Path) -> list[Example]:
    """One example a row; its id is "<idx>#<n>", n counting the rows that share an idx."""
    files = parquet.find(root)
    if not files:
        raise FileNotFoundError(
            f"no RLAIF-V in {root}: looked for Parquet files; download openbmb/RLAIF-V-Dataset and pass --data_root, or "
            "have it downloaded (--data_root openbmb/RLAIF-V-Dataset), or try --data toy"
        )
    examples, seen = [], Counter[str]()
    for _, row, image in parquet.read(files, "image", ("question", "chosen", "idx")):
        id = f"{row['idx']}#{seen[row['idx']]}"
        seen[row["idx"]] += 1
        examples.append(Example(id, image, (row["question"] or "").strip(), (row["chosen"] or "").strip()))
    return examples
