"""BLEU and CIDEr against numbers made by hand and from the papers' formulas; `evaluate.py --text` from end to end."""

import json
import math
from collections import Counter

import pytest
from PIL import Image

from lavender_min import data
from lavender_min.data import Example
from lavender_min.evaluation import command, text_quality
from lavender_min.evaluation.flags import Flags
from lavender_min.toy import data as toy
from lavender_min.tuning.parts import share_out


def test_words_are_those_of_cocos_evaluation():
    # What the Java tokenizer gives for these, its own marks (-LRB-) left out.
    assert text_quality.words_of("A man (left), two dogs; it is WET.") == "a man left two dogs it is wet"
    assert text_quality.words_of('A sign: "stop" - at 3.5 m') == "a sign stop at 3.5 m"


def test_bleu_of_papinenis_example():
    # Candidate 1 of the paper's first example: 17/18, 10/17, 7/16 and 4/15 of its n-grams are in a reference; 18 words against
    # 16, 18 and 16, so no penalty.
    said = "It is a guide to action which ensures that the military always obeys the commands of the party."
    references = [
        "It is a guide to action that ensures that the military will forever heed Party commands.",
        "It is the guiding principle which guarantees the military forces always being under the command of the Party.",
        "It is the practical guide for the army always to heed the directions of the party.",
    ]
    expected = (17 / 18 * 10 / 17 * 7 / 16 * 4 / 15) ** 0.25
    assert text_quality.bleu([said], [references]) == pytest.approx(100 * expected, rel=1e-6)
    # Too short: exp(1 − 10/5); pictures with fewer references; case and marks do not count.
    assert text_quality.bleu(["a b c d e"], [["A b c, d e f g h i j."]]) == pytest.approx(100 * math.exp(-1), rel=1e-6)
    assert text_quality.bleu(["a b c d", "e f g h"], [["x y", "a b c d"], ["e f g h"]]) == pytest.approx(100)
    # Nothing of four words in common is 0, not smoothed.
    assert text_quality.bleu(["a b c x"], [["a b c d"]]) == 0


def cider_d(replies, references, sigma=6.0):
    """Eq. 1, 2 and the D variant (clipping, length penalty, × 10) of Vedantam, Zitnick and Parikh 2015."""

    def counts(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def score(reply, of, n):
        def weighted(text):
            found = counts(text, n)
            return {g: c * math.log(len(references) / max(1, sum(any(counts(r, n)[g] for r in rs) for rs in references)))
                    for g, c in found.items()}  # fmt: skip

        def norm(vector):
            return math.sqrt(sum(value * value for value in vector.values()))

        total = 0.0
        for one in of:
            a, b = weighted(reply), weighted(one)
            dot = sum(min(value, b.get(g, 0)) * b.get(g, 0) for g, value in a.items())
            delta = len(reply.split()) - len(one.split())
            if norm(a) and norm(b):
                total += dot / norm(a) / norm(b) * math.exp(-delta * delta / (2 * sigma * sigma))
        return total / len(of)

    each = [sum(score(reply, of, n) for n in (1, 2, 3, 4)) / 4 for reply, of in zip(replies, references, strict=True)]
    return 10 * sum(each) / len(each)


def test_cider_by_hand_and_by_its_formula():
    references = [
        ["a man rides a red bike", "someone on a bike"],
        ["two dogs play in the snow"],
        ["a child eats the cake"],
    ]
    # Every reply its picture's only reference, and nothing shared between pictures: similarity 1 for each n, times 10.
    alone = [["one two three four five"], ["six seven eight nine"]]
    assert text_quality.cider([of[0] for of in alone], alone) == pytest.approx(1000)
    # Of three words there are no four: three quarters of it.
    short = [["one two three"], ["six seven eight nine"]]
    assert text_quality.cider([of[0] for of in short], short) == pytest.approx(100 * (7.5 + 10) / 2)
    replies = ["a man on a bike", "two dogs in the deep snow", "the dog eats"]
    assert text_quality.cider(replies, references) == pytest.approx(100 * cider_d(replies, references), rel=1e-9)
    # Of one picture every word is in all pictures' references, so it weighs nothing.
    assert text_quality.cider(["a man"], [["a man"]]) == 0


def test_captions_are_grouped_by_picture():
    def example(id, picture, question, answer):
        return Example(id, lambda: Image.new("RGB", (8, 8)), question, answer, picture=picture)

    rows = [example("a", "p", "", "one"), example("b", "q", "", "two"), example("c", "p", "", "three")]
    found = text_quality.captions_of([*rows, example("d", "p", "why", "so")])
    assert found.examples == [rows[0], rows[1]] and found.references == [["one", "three"], ["two"]]
    assert text_quality.caption_numbers([], []) == {}


def test_end_to_end_with_the_true_texts_in_a_models_mouth(tmp_path, vlm_folder, monkeypatch, capsys):
    """The untuned host, whose replies are replaced: captions said as they are score the most, one answer of two is right."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(folder / name)
    rows = [
        {"image": "a.png", "text": "four words are here"},
        {"image": "b.png", "text": "and four other ones"},
        {"image": "a.png", "question": "what", "answer": "Red"},
        {"image": "b.png", "question": "what", "answer": "blue"},
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer(model, processor, examples, batch_size, what):
        assert model.host is not None and batch_size == 3
        return ["red" if example.question else example.answer for example in examples]

    monkeypatch.setattr(text_quality.models, "answer", answer)
    monkeypatch.setitem(data.SOURCES, "folder", data.SOURCES["folder"]._replace(vlm=vlm_folder))
    argv = [
        "--data",
        "folder",
        "--text",
        "all",
        "--data_root",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--batch_size",
        "3",
    ]
    assert command.main(argv) == 0
    out, err = capsys.readouterr()
    assert "has 2 pictures, fewer than --scenes 100: all are taken" in err
    assert "BLEU-4 (captions), %" in out and "100.0" in out and "1000.0" in out and "50.0" in out
    content = json.loads((tmp_path / "out" / "text.json").read_text())
    assert content["models"]["untuned"][0]["answers.all"] == 0.5 and content["replies"][0]["answers"] == ["red", "red"]


def test_a_share_names_what_training_held_out_and_errors_are_one_line(tmp_path, capsys, monkeypatch):
    found = text_quality.held_out(Flags(data="toy", text="0.02", scenes=3))
    true = share_out(toy.load("tune"), 0.02).held_out
    assert [example.id for example in found] == [example.id for example in true[:6]] and len(true) == 22
    for argv, message in (
        (["--text", "1.5"], "--text must be a split, or a share above 0 and below 1; got 1.5"),
        (["--text", "val", "--seeds", "2"], "--text compares finished runs"),
        (["--data_root", "x"], "--data toy takes no --data_root"),
        (["--text", "nowhere"], "--split of the toy data is "),
    ):
        assert command.main([*argv, "--out", str(tmp_path)]) == 2
        err = capsys.readouterr().err.strip()
        assert message in err and "\n" not in err
    find = text_quality.importlib.util.find_spec
    monkeypatch.setattr(
        text_quality.importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else find(name)
    )
    assert command.main(["--text", "heldout"]) == 2
    assert "--text needs the package sacrebleu: pip install 'lavender-min[text]'" in capsys.readouterr().err
