"""Which words are aligned: those that the host predicts, exactly or by their root, and those of some parts of speech."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from fitting import make, words_of
from starting import flags_of, start
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from lavender_min.data import Example
from lavender_min.maps import MapStore, StoredMaps
from lavender_min.toy import data
from lavender_min.tuning import grammar, memory, runs
from lavender_min.tuning.collator import Collator, MappedExamples
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.model import Predicted, by_root, word_rows
from lavender_min.words import find_words

# ------------------------------------------------------------------------------------------------- what the tagger says


@pytest.mark.parametrize(
    ("word", "lemma"),
    [
        ("dogs", "dog"), ("Dogs", "dog"), ("mice", "mouse"), ("sitting", "sit"), ("stood", "stand"), ("is", "be"),
        ("larger", "large"), ("best", "good"), ("child's", "child"), ("T-shirts", "t-shirt"), ("1,000.5", "1,000.5"),
    ],
)  # fmt: skip
def test_lemmas(word, lemma):
    """`sitting` may also be a noun of its own."""
    assert grammar.roots(word) - {word} == {lemma} - {word} and lemma in grammar.roots(word)


def test_a_words_part_of_speech_is_that_of_its_sentence():
    text = "A man's dog isn't happy: it paints the wooden paints red!"
    found = {word.text: grammar.parts_of_speech(text)[word.start] for word in find_words({"text": text})}
    assert {word: part for word, part in found.items() if part and word != "paints"} == {
        "man's": "noun", "dog": "noun", "happy": "adjective", "wooden": "adjective", "red": "adjective",
    }  # fmt: skip
    assert [grammar.parts_of_speech(text)[i] for i in (text.index("paints"), text.rindex("paints"))] == ["verb", "noun"]
    assert grammar.parts_of_speech(" .,") == {}


# ------------------------------------------------------------------------------------------------------- what is said

PIECES = [" dog", "s", " dogs", " do", "g", " and", " wom", "an", "en", " run", "ning", "ner", " T", "-", "shirt", "shirts",
          " Dogs", ".", "<end>", " cat"]  # fmt: skip


def spelling(ids, skip_special_tokens):
    return "".join(PIECES[i] for i in ids if not (skip_special_tokens and PIECES[i] == "<end>"))


SPELLS = SimpleNamespace(tokenizer=SimpleNamespace(decode=spelling))


@pytest.mark.parametrize(
    ("word", "said", "matches"),
    [
        (" dog", " dogs", True),
        (" dogs", " dog", True),
        (" dogs", " Dogs", True),
        (" dogs", " cat", False),
        (" dogs", ".", False),
        (" dogs", "<end>", False),
        (" dog|s", " dog| and", True),
        (" dog|s", " dog|<end>", True),
        (" dog|s", " dog|.", True),
        (" dog|s", " and| dog", False),
        # What follows the first wrong token answers the word's own tokens, not what was said.
        (" do|g", " dogs|g", True),
        (" dogs", " do", False),
        (" wom|en", " wom|an", True),
        (" run|ning", " run|s", True),
        (" run|ning", " run|ner", False),
        (" T|-|shirts", " T|-|shirt", True),
        (" T|-|shirts", " T| and|shirt", False),
        # Right already: that is exact match.
        (" dog|s", " dog|s", False),
    ],
)
def test_what_is_said_is_heard_up_to_its_first_wrong_token(word, said, matches):
    own, heard = ([PIECES.index(piece) for piece in pieces.split("|")] for pieces in (word, said))
    # Between a word that is right and one that has no row.
    found = by_root(
        torch.tensor([0, *heard, -1]),
        torch.tensor([0, *own, 0]),
        torch.tensor([1, len(own), 1]),
        grammar.same_root(SPELLS),
    )
    assert found.tolist() == [False, matches, False]


# ---------------------------------------------------------------------------------------------------- in a host's batch


@pytest.fixture
def batch(vlm_folder, store_folder):
    rows = MappedExamples(data.load("tune", 8), MapStore(store_folder))
    model, processor = make(vlm_folder)
    return model, processor, Collator(processor, model.family, model.base.config)([rows[i] for i in range(6)])


def says(made, changes):
    """A host that says every token right but at (text, token), where it says what `changes` give."""
    said = made["input_ids"].clone()
    for place, token in changes.items():
        said[place] = token
    wanted = torch.ones_like(said, dtype=torch.bool)
    vocabulary = int(said.max()) + 1
    return Predicted(wanted, F.one_hot(said.roll(-1, 1), vocabulary).float().flatten(0, 1))


def test_another_form_of_a_word_is_its_root_and_not_the_word(batch, vlm_folder):
    model, processor, made = batch
    by_the_flag, _ = make(vlm_folder, match="root")
    ids_of = processor.tokenizer.get_vocab()
    places = {}
    for text, tokens, _ in words_of(made):
        if len(tokens) == 1:
            places.setdefault(processor.tokenizer.decode(made["input_ids"][text, tokens]).strip(), (text, tokens[0]))
    # Another form of the word, and another word.
    predicted = says(made, {places["shape"]: ids_of["Ġshapes"], places["ring"]: ids_of["Ġcircle"]})
    kept = {}
    for match in ("exact", by_the_flag.match, "all"):
        model.match = match
        valid = model.matched(predicted, made["input_ids"], word_rows(made["words"]))
        kept[match] = [(text, tokens[0]) for (text, tokens, _), good in zip(words_of(made), valid, strict=True) if good]
    exact, root, every = kept.values()
    assert set(every) - set(root) == {places["ring"]} and set(root) - set(exact) == {places["shape"]}
    assert set(exact) < set(root) < set(every) and len(every) == len(words_of(made))


@pytest.mark.parametrize("agrees", [False, True])
def test_only_words_that_are_not_right_are_looked_up(batch, agrees):
    """A whole step; what is looked up is what the host's own logits say."""
    model, _, made = batch
    ids = made["input_ids"]
    guess = model.host(**{k: v for k, v in made.items() if k not in ("labels", "words")}).logits.argmax(-1)
    expected = []
    for text, tokens, _ in words_of(made):
        word, said = [int(ids[text, t]) for t in tokens], [int(guess[text, t - 1]) for t in tokens]
        wrong = [i for i in range(len(word)) if word[i] != said[i]]
        if wrong:
            expected.append((word[: wrong[0]] + [said[wrong[0]]], word))
    asked = []

    def same_root(said, word):
        asked.append((said, word))
        return agrees

    model.match = same_root
    kept = model(**made)["words"]
    assert asked == expected and max(len(word) for _, word in asked) > 1
    assert kept == len(words_of(made)) - len(expected) * (not agrees)


def test_exact_and_all_keep_the_words_they_kept(batch):
    """A last token said wrong takes a word out; what a host would have said elsewhere does not."""
    model, _, made = batch
    ids = made["input_ids"]
    predicted = says(made, {(text, tokens[-1]): 5 for text, tokens, _ in words_of(made)[1::3]})
    for match in ("exact", "all"):
        model.match = match
        valid = model.matched(predicted, ids, word_rows(made["words"]))
        assert valid.tolist() == [match == "all" or i % 3 != 1 for i in range(len(words_of(made)))]
    made["words"]["tokens"].fill_(-1)
    assert not model.matched(predicted, ids, word_rows(made["words"])).any()


# ------------------------------------------------------------------------------------------------------ parts of speech

QUESTION, ANSWER = "What color is the small ring?", "A large cross is right of a small ring."


def aligned(vlm_folder, fields, **options):
    """What the words are that the collator takes, each found again by its own map."""
    model, processor = make(vlm_folder)
    words = find_words({"question": QUESTION, "answer": ANSWER})
    maps = torch.rand(len(words), 32, 32, generator=torch.Generator().manual_seed(0))
    example = Example("made", data.load("tune", 1)[0].image, QUESTION, ANSWER)
    stored = StoredMaps(QUESTION, ANSWER, words, maps, 0.9)
    made = Collator(processor, model.family, model.base.config, words=fields, **options)([(example, stored)])
    spans = [tokens for _, tokens, _ in words_of(made)]
    texts = [processor.tokenizer.decode(made["input_ids"][0, tokens]).strip(" .?") for tokens in spans]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = (maps - low) / (high - low)
    nearest = [int((stretched - target).abs().amax((1, 2)).argmin()) for target in made["words"]["targets"]]
    assert [words[i].text for i in nearest] == texts
    return made, texts


@pytest.mark.parametrize(
    ("pos", "fields", "expected"),
    [
        ("noun", "answer", "cross ring"),
        ("adjective", "answer", "large small"),
        ("adjective,noun", "all", "color small ring large cross small ring"),
        ("verb,noun", "answer", "cross ring"),
    ],
)
def test_only_words_of_some_parts_of_speech_are_mapped(vlm_folder, pos, fields, expected):
    _, texts = aligned(vlm_folder, fields, pos=pos)
    assert [text for text in texts if text != "right"] == expected.split()


def test_without_a_part_of_speech_every_word_is_mapped_and_no_tagger_asked(vlm_folder, monkeypatch):
    monkeypatch.setattr(grammar, "tagger", None)
    assert aligned(vlm_folder, "all")[1] == [word.text for word in find_words({"q": QUESTION, "a": ANSWER})]


def test_a_text_without_such_a_word_counts_no_word(vlm_folder):
    model, processor = make(vlm_folder)
    stored = StoredMaps("", "of a", find_words({"answer": "of a"}), torch.rand(2, 32, 32), 0.9)
    example = Example("made", data.load("tune", 1)[0].image, "", "of a")
    made = Collator(processor, model.family, model.base.config, pos="noun")([(example, stored)])
    assert model(**made)["words"] == 0


# -------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--match", "lemma"], "argument --match: invalid choice: 'lemma'"),
        (["--pos", "adverb"], "--pos must name some of noun, adjective, verb, with commas between; got 'adverb'"),
        (["--pos", "noun,"], "--pos must name some of noun, adjective, verb, with commas between; got 'noun,'"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path, capsys, flags, message):
    assert start(flags_of("none", "none", tmp_path / "out", *flags)) == 2
    assert capsys.readouterr().err.startswith(f"train.py: {message}") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--match", "root"], ["--pos", "noun"]])
def test_without_the_tagger_the_flag_that_asks_for_it_is_named(tmp_path, capsys, monkeypatch, flags):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "HanTa" else find(name, *rest))
    assert start(flags_of("none", "none", tmp_path / "out", *flags)) == 2
    asks = " ".join(flags) if "root" in flags else flags[0]
    says = f"train.py: {asks} needs the package HanTa: pip install 'lavender-min[grammar]'"
    assert capsys.readouterr().err.strip() == says


def test_a_run_remembers_how_its_words_were_chosen(tmp_path):
    flags = ModelFlags("toy", match="root", pos="noun,verb")
    runs.remember(flags, tmp_path)
    assert runs.recall(tmp_path) == flags
    with pytest.raises(ValueError, match=r"other flags \(--match root ─► exact, --pos noun,verb ─► noun\)"):
        runs.remember(ModelFlags("toy", pos="noun"), tmp_path)


def test_a_run_follows_both_flags(vlm_folder, store_folder, tmp_path, capsys):
    """The host knows nothing, so that the run says how many words it looked at: those that a caption's nouns are."""
    nouns = 0
    for example in data.load("tune", 2)[:4]:
        nouns += list(grammar.parts_of_speech(example.answer).values()).count("noun")
    argv = flags_of(vlm_folder, store_folder, tmp_path / "out", "--match", "root", "--pos", "noun", "--limit", "4")
    assert start(argv) == 2
    assert f"predicts none of {nouns} mapped words in 4 examples" in capsys.readouterr().err


def test_the_planner_compares_no_words(vlm_folder, batch):
    """It has no processor to spell them."""
    empty = memory.build(ModelFlags(vlm_folder, match="root", aggregate="layer-mean"), torch.float32)
    meta = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), batch[2])
    assert callable(empty.match) and memory.simulate(empty, meta, 8, "adamw_torch", None).saved > 0
