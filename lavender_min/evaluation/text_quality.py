"""How well the models write, on the held-out part of any data set: no maps and no regions are needed.

    python evaluate.py --data flickr30k --text val --plain runs/a --lavender runs/b
    python evaluate.py --data folder --text 0.05 --plain runs/a --lavender runs/b       what train.py --eval_share 0.05 held out

Captions are measured against all captions of their picture by BLEU-4 (Papineni 2002, computed by sacrebleu) and CIDEr (Vedantam
2015, computed by pycocoevalcap, in the variant CIDEr-D that papers report), as in the paper's Fig. 9 and 10. Answers to questions
are right or wrong.

Texts are cut into words by sacrebleu's tokenizer "13a", in lower case, without the punctuation that COCO's evaluation drops.
COCO's own tokenizer is a Java program. The two differ in rare cases only, so numbers are close to published ones, but not equal to
the digit.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

from lavender_min import data
from lavender_min.data import SOURCES, Example
from lavender_min.evaluation import models, tables
from lavender_min.evaluation.compare import base_of, recall_all
from lavender_min.evaluation.flags import Flags
from lavender_min.evaluation.metrics import answer_numbers
from lavender_min.evaluation.names import UNTUNED, Numbers, title
from lavender_min.evaluation.sheet import first_pictures, picture_of
from lavender_min.failing import say
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.parts import share_out

# The punctuation that COCO's evaluation leaves out of captions (PUNCTUATIONS in pycocoevalcap's ptbtokenizer.py).
MARKS = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", "(", ")", "{", "}", '"'}


class Captions(NamedTuple):
    """Pictures to be described."""

    # One example a picture.
    examples: list[Example]
    # All captions that people gave to each picture.
    references: list[list[str]]


def compare_texts(flags: Flags, command: str) -> None:
    """Prints the table, and writes it and every reply to OUT/text.md and OUT/text.json.

    `command` is its command line, for the reader. Raises ValueError, in one line, if a library is missing.
    """
    require()
    examples = held_out(flags)
    captions, questions = captions_of(examples), [example for example in examples if example.question]
    finished = recall_all(flags.plain, flags.lavender)
    base = base_of(finished) or ModelFlags(SOURCES[flags.data].vlm)
    subjects: list[tuple[str, ModelFlags, str | None]] = [(UNTUNED, base, None)]
    subjects += [(run.report.name, run.flags, run.report.folder) for run in finished]
    found: tables.Models = {}
    said: list[dict[str, str | list[str]]] = []
    for name, of, folder in subjects:
        loaded = models.load(of, models.half_of_gpu(), folder)
        replies = {
            what: models.answer(loaded.model, loaded.processor, some, flags.batch_size, f"{folder or name}: {what}")
            for what, some in (("captions", captions.examples), ("answers", questions))
        }
        numbers = caption_numbers(replies["captions"], captions.references)
        found.setdefault(name, []).append(numbers | answer_numbers(questions, replies["answers"]))
        said.append({"model": folder or name, **replies})

    columns = {key: title(key) for key in found[UNTUNED][0]}
    parts = [tables.models_table(found, "", columns), tables.differences_table(found)]
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    count = f"{len(captions.examples)} captions, {len(questions)} questions of --data {flags.data} --text {flags.text}"
    (out / "text.md").write_text("\n\n".join(filter(None, ["# Texts", count, *parts, f"```\n{command}\n```"])) + "\n")
    ids = {"captions": [example.id for example in captions.examples], "answers": [example.id for example in questions]}
    content = {"command": command, "models": found, "examples": ids, "replies": said}
    (out / "text.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print("\n\n".join(filter(None, parts)))


def require() -> None:
    """Raises ValueError, in one line, if a library that --text needs is not installed."""
    for name in ("sacrebleu", "pycocoevalcap"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--text needs the package {name}: pip install 'lavender-min[text]'")


def held_out(flags: Flags) -> list[Example]:
    """The examples of the first --scenes pictures of the part that --text names, with all captions of each.

    That part is a split, "all" of a data set without splits, or the share that train.py --eval_share held out.
    """
    part, options = str(flags.text), SOURCES[flags.data].options
    # A single caption a picture would compare a model with the wording of one person.
    captions = "all" if "captions" in options else None
    share = flags.text_share
    whole = share is not None or (part == "all" and "split" not in options)
    examples = data.load(flags.data, flags.data_root, None if whole else part, captions)
    if share is not None:
        examples = share_out(examples, share).held_out
    pictures = len({picture_of(example) for example in examples})
    if pictures < flags.scenes:
        say(f"--text {part} has {pictures} pictures, fewer than --scenes {flags.scenes}: all are taken")
    return first_pictures(examples, min(flags.scenes, pictures))


def captions_of(examples: list[Example]) -> Captions:
    """The captions among the examples, put together by picture; pictures keep their order."""
    of_picture: dict[str, list[Example]] = {}
    for example in examples:
        if not example.question:
            of_picture.setdefault(picture_of(example), []).append(example)
    groups = list(of_picture.values())
    return Captions([group[0] for group in groups], [[example.answer for example in group] for group in groups])


def words_of(text: str) -> str:
    """The words of a caption, with spaces between.

    >>> words_of("A dog, brown; it's wet.")
    "a dog brown it's wet"
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return " ".join(word for word in Tokenizer13a()(text.lower()).split() if word not in MARKS)


def bleu(replies: list[str], references: list[list[str]]) -> float:
    """BLEU-4 of all replies together, in percent. `references` are the captions of each reply's picture.

    Brevity is penalised: the length of all replies is compared with that of the references nearest in length to each.
    """
    from sacrebleu.metrics import BLEU

    # sacrebleu wants the first references of all pictures, then the second ones, …; None where a picture has no more.
    longest = max(map(len, references))
    streams: list[Any] = [[words_of(of[i]) if i < len(of) else None for of in references] for i in range(longest)]
    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    return float(metric.corpus_score(list(map(words_of, replies)), streams).score)


def cider(replies: list[str], references: list[list[str]]) -> float:
    """CIDEr-D: 100 times its mean over pictures, as papers print it; at most 1,000.

    An n-gram weighs less the more pictures have it in their references, and nothing if all have it. So CIDEr of a single picture
    is 0.
    """
    from pycocoevalcap.cider.cider import Cider

    said = {i: [words_of(reply)] for i, reply in enumerate(replies)}
    true = {i: [words_of(one) for one in of] for i, of in enumerate(references)}
    return 100 * float(Cider().compute_score(true, said)[0])


def caption_numbers(replies: list[str], references: list[list[str]]) -> Numbers:
    """BLEU and CIDEr; {} where there are no captions."""
    if not replies:
        return {}
    return {"bleu.captions": bleu(replies, references), "cider.captions": cider(replies, references)}
