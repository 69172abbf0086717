"""Several data sets in one run: what an epoch draws of each, which maps go with what, and what a run remembers."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image
from starting import flags_of, start, weights

from lavender_min import data
from lavender_min.geometry import MAP_SIDE
from lavender_min.maps import MapStore, MapWriter
from lavender_min.tuning import parts, tune
from lavender_min.tuning.collator import MappedExamples
from lavender_min.tuning.flags import Flags
from lavender_min.tuning.mixing import Mixture, shares
from lavender_min.tuning.trainer import LavenderTrainer
from lavender_min.words import find_words


def own_set(folder, n, frame="whole"):
    """Pictures and maps of a user's own. Every such set has the ids 0, 1, 2 …, and other texts and maps."""
    folder.mkdir()
    lines = []
    for i in range(n):
        Image.new("RGB", (20 + i, 30), (9 * i, 99, 50)).save(folder / f"{i}.png")
        lines.append(
            json.dumps({"id": str(i), "image": f"{i}.png", "text": f"a red square in {folder.name} {'so ' * i}"})
        )
    (folder / "data.jsonl").write_text("\n".join(lines))
    generator = torch.Generator().manual_seed(n)
    with MapWriter(folder / "maps", {"frame": frame}) as writer:
        for example in data.load("folder", folder):
            words = find_words(example.fields)
            maps = torch.rand(len(words), MAP_SIDE, MAP_SIDE, generator=generator)
            writer.add(example.id, "", example.answer, words, maps, 0.5, data.picture_digest(example))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Five examples and nine."""
    root = tmp_path_factory.mktemp("sets")
    return [own_set(root / "mine", 5), own_set(root / "yours", 9)]


@pytest.fixture
def sets(folders):
    return [MappedExamples(data.load("folder", root), MapStore(root / "maps")) for root in folders]


@pytest.fixture
def command(vlm_folder, folders):
    """train.py on both."""

    def of(out, *more, weighted=("folder:0.7", "folder:0.3")):
        argv = flags_of(vlm_folder, "", out, *more)
        argv[argv.index("--maps") : argv.index("--maps") + 2] = ["--maps", *(root / "maps" for root in folders)]
        argv[argv.index("--data") : argv.index("--data") + 2] = ["--data", *weighted, "--data_root", *folders]
        return argv

    return of


@pytest.mark.parametrize(
    ("given", "total", "expected"),
    [
        ([0.7, 0.3], 10, [7, 3]),
        ([0.7, 0.3], 14, [10, 4]),  # 9.8 and 4.2
        ([7, 3], 14, [10, 4]),
        ([1, 1, 1], 11, [4, 4, 3]),
        ([5, 3, 1], 7, [4, 2, 1]),  # 3.89, 2.33 and 0.78
        ([5, 9], 14, [5, 9]),
        ([2.5, 1e-9], 5, [5, 0]),
    ],
)
def test_shares_go_to_the_largest_remainders(given, total, expected):
    assert shares(given, total) == expected


# --------------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(("given", "counts"), [([0.7, 0.3], [10, 4]), ([1, 1], [7, 7]), ([0.1, 0.9], [1, 13])])
def test_an_epoch_is_as_long_as_all_together_and_holds_the_shares(sets, given, counts):
    mixture = Mixture(sets, given, seed=3)
    assert len(mixture) == 14
    drawn = Counter(mixture.places)
    for which, (one, count) in enumerate(zip(sets, counts, strict=True)):
        times = [drawn[which, i] for i in range(len(one))]
        # As evenly as whole numbers can be.
        assert sum(times) == count and max(times) - min(times) <= 1


def test_the_draw_follows_from_the_seed(sets):
    places = [Mixture(sets, [1, 1], seed).places for seed in (3, 3, 4)]
    assert places[0] == places[1] != places[2]
    # Mixed, not one after the other; and another seed leaves out other examples.
    assert places[0] != sorted(places[0]) and set(places[0]) != set(places[2])


def test_without_weights_every_example_is_taken_once(sets):
    assert sorted(Mixture(sets, None, 0).places) == [(0, i) for i in range(5)] + [(1, i) for i in range(9)]


def test_each_example_comes_with_the_maps_of_its_own_set(sets, folders):
    """The ids are the same in both."""
    mixture, lengths = Mixture(sets, [1, 2], 0), []
    for (which, i), (example, stored) in zip(mixture.places, (mixture[k] for k in range(len(mixture))), strict=True):
        assert example.id == str(i) and f" in {folders[which].name} " in example.answer
        assert torch.equal(stored.maps, MapStore(folders[which] / "maps")[str(i)].maps)
        assert example.image().size == (20 + i, 30)
        lengths.append(len(example.answer))
    assert mixture.lengths() == lengths and len(set(lengths)) > 3


def test_a_broken_picture_is_stood_in_for_within_its_set(sets, capsys):
    def broken():
        raise OSError("cut")

    sets[1].examples[2] = sets[1].examples[2]._replace(image=broken)
    mixture = Mixture(sets, None, 0)
    example, _ = mixture[mixture.places.index((1, 2))]
    assert example.id == "3" and " yours " in example.answer and mixture.unreadable.sum() == 1
    assert "broken picture" in capsys.readouterr().err


def test_maps_of_two_frames_do_not_mix(sets, tmp_path):
    crop = own_set(tmp_path / "crop", 3, frame="crop")
    with pytest.raises(ValueError, match=r"different parts of a picture \(whole in .*mine/maps, crop in .*crop/maps\)"):
        Mixture([sets[0], MappedExamples(data.load("folder", crop), MapStore(crop / "maps"))], [1, 1], 0)


def test_a_set_of_no_share_is_refused(sets):
    with pytest.raises(ValueError, match="leave a data set none of 14 examples: raise its weight, or leave it out"):
        Mixture(sets, [1, 1e-3], 0)


# -------------------------------------------------------------------------------------------------------- flags and parts


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "toy", "imagenet"], "--data must be one of flickr30k, laion50k, rlaifv83k, ocrvqa30k, "),
        (["--data", "toy:0.5"], "--data toy:0.5: a weight is a share among several data sets, and this is the only one"),
        (["--data", "toy:0.5", "folder"], "--data toy:0.5 folder: give each of them a weight"),
        (["--data", "toy:0.5", "folder:0"], "--data folder:0: a weight is a number above 0, such as 0.7"),
        (["--data", "toy:nan", "folder:1"], "--data toy:nan: a weight is a number"),
        (["--data", "toy:1", "folder:inf"], "--data folder:inf: a weight is a number"),
        (["--data", "toy:", "folder:1"], "--data toy:: a weight is a number"),
        (["--data", "toy:a", "folder:1"], "--data toy:a: a weight is a number"),
        (["--data", "toy", "folder", "--maps", "m"], "--maps wants one value for each of 2 data sets, in the order of --data"),
        (["--data", "toy", "--data_root", "a", "b"], "--data_root wants one value for each of 1 data sets"),
        (["--data", "folder", "folder", "--data_root", "a", "b"], "--maps: 2 data sets cannot share a store, maps/folder"),
        (["--data", "toy", "folder", "--maps", "m", "m"], "--maps: 2 data sets cannot share a store, m; give each its own"),
        (["--data", "toy", "folder", "--split", "tune", "x"], "--data folder takes no --split"),
    ],
)  # fmt: skip
def test_a_mix_that_cannot_be_is_one_line(capsys, argv, message):
    assert start(argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_every_missing_store_has_its_command(folders, capsys):
    roots = [str(root) for root in folders]
    argv = ["--data", "folder", "folder", "toy", "--data_root", *roots, "", "--captions", "all", "", ""]
    assert start([*argv, "--maps", "no/a", str(folders[1] / "maps"), "no/c d"]) == 2
    said = capsys.readouterr().err
    assert (
        f"no maps in no/a, no/c d; make them first: python extract.py --data folder --data_root {roots[0]} --captions all "
        "--maps no/a && python extract.py --data toy --maps 'no/c d'"
    ) in said and said.count("\n") == 1


def test_every_set_holds_out_its_own(folders):
    mine, yours = (str(root) for root in folders)
    of = {"data": ["folder", "folder"], "data_root": [mine, yours], "maps": ["a", "b"]}
    found = parts.load(Flags(**of, eval_share=0.2))
    assert [(len(part.train), len(part.held_out)) for part in found] == [(4, 1), (7, 2)]
    found = parts.load(Flags(data=["toy", "folder"], data_root=["", mine], eval_split=["heldout", ""], limit=4))
    assert [len(part.train) for part in found] == [4, 4] and not found[1].held_out
    assert {example.id.partition("-")[0] for example in found[0].held_out} == {"heldout"}


def test_what_a_mix_goes_by():
    flags = Flags(data=["toy:2", "folder:1"], maps=["", "elsewhere"])
    assert [one.maps for one in flags.sets] == ["maps/toy", "elsewhere"] and [s.weight for s in flags.sets] == [2, 1]
    assert flags.output_dir == "runs/toy+folder-lora" and flags.vlm == data.SOURCES["toy"].vlm and not flags.validates


# ---------------------------------------------------------------------------------------------------------------- a run


def test_one_set_is_what_it_was(store_folder):
    """Its examples in their order, with no draw, and remembered under the names that older runs have."""
    flags = Flags(data=["toy"], maps=[store_folder], limit=12)
    examples = data.load("toy")[:12]
    from lavender_min.tuning.arguments import Training, settle

    settle(args := Training(use_cpu=True), flags)
    found = tune.read(flags, args, parts.load(flags))
    assert isinstance(found.train, MappedExamples) and found.held_out is None
    assert [example.id for example in found.train.examples] == [example.id for example in examples]
    decides = tune.decided(flags, args, *found)
    assert decides["--data"] == "toy" and decides["the maps' frame"] == "whole"
    assert decides["the examples"] == MappedExamples(examples, MapStore(store_folder)).digest()


def test_a_mix_goes_on_as_if_unbroken_and_is_remembered(command, tmp_path, monkeypatch, capsys):
    """Cut in the second epoch of 3 steps. Both sets are held out in part, and validated."""
    more = ["--save_steps", "4", "--eval_share", "0.2", "--max_steps", "5"]
    assert start(command(tmp_path / "whole", *more)) == 0
    assert "an epoch draws 8 from the 4 of " in capsys.readouterr().out
    history = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss_att" in entry for entry in history)
    step = LavenderTrainer.training_step

    def cut(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise OSError("the power is gone")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LavenderTrainer, "training_step", cut)
        assert start(command(tmp_path / "broken", *more)) == 2
    assert start(command(tmp_path / "broken", *more)) == 0
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")

    decides = json.loads((tmp_path / "whole" / "lavender.json").read_text())["decides"]
    assert decides["--data"] == "folder:0.7 folder:0.3" and decides["the maps' frame of data set 2"] == "whole"
    assert decides["the examples"].startswith("11 drawn from 4 with sha256 ")
    capsys.readouterr()
    assert start(command(tmp_path / "whole", *more, weighted=("folder:0.6", "folder:0.4"))) == 2
    assert "--data folder:0.7 folder:0.3 ─► folder:0.6 folder:0.4" in capsys.readouterr().err
