"""The toy hosts: what they are trained on lies where they see it, and the shipped ones know their world."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from einops import rearrange
from transformers import AutoModelForImageTextToText

from lavender_min.data import CAPTION_PROMPT
from lavender_min.hosts import processors
from lavender_min.toy import data, fitting, hosts, models, pretrain_hosts, talks
from lavender_min.toy.pretrain_hosts import CELLS, TRAININGS
from lavender_min.toy.talks import Chats

CORPUS = [CAPTION_PROMPT, "user", "assistant", "User:", "Assistant:", "what color is the star?", "a red star"] * 200


@pytest.fixture(scope="module", params=list(hosts.HOSTS))
def named(request):
    torch.manual_seed(0)
    return request.param, hosts.HOSTS[request.param](CORPUS)


def test_patches_are_named_in_the_order_in_which_the_tower_gives_them(named, monkeypatch):
    """Without attention a patch's state depends on its own pixels alone: a painted cell changes just its own."""
    name, built = named
    how = TRAININGS[name]
    tower = how.tower(built.model)
    for module_name, module in tower.named_modules():
        if module_name.endswith(("out_proj", "o_proj", "attn.proj")):
            torch.nn.init.zeros_(module.weight)
    # A cell by its number, in place of what it shows.
    numbers = {side: np.arange(side * side).reshape(1, side, side) for side in (CELLS, pretrain_hosts.TILE_CELLS)}
    monkeypatch.setattr(pretrain_hosts, "patch_kinds", lambda scene, side: numbers[side].repeat(3, 0))
    shown = how.shown(data.scene_of(0))[0]
    grey = np.full((1, hosts.SIDE, hosts.SIDE, 3), 120, np.uint8)
    with torch.no_grad():
        before = how.look(built.model, pretrain_hosts.process(built, grey)).patches
        assert before.shape[1] == len(shown)
        for cell in (0, 37, 130, CELLS * CELLS - 1):
            painted = grey.copy()
            cells = rearrange(painted, "1 (y i) (x j) k -> (y x) i j k", y=CELLS, x=CELLS)
            cells[cell] = (250, 20, 200)
            painted[0] = rearrange(cells, "(y x) i j k -> (y i) (x j) k", y=CELLS)
            after = how.look(built.model, pretrain_hosts.process(built, painted)).patches
            moved = (after - before)[0].norm(dim=-1)[: CELLS * CELLS]
            assert shown[int(moved.argmax())] == cell
            assert (moved > 0.5 * moved.max()).sum() == 1


def test_conversations_are_as_the_processor_writes_them(named):
    name, built = named
    scene = data.scene_of(3)
    turns = talks.listed(scene) + talks.asked(scene, np.random.default_rng(0))
    text = Chats(built).batch([turns[:1], turns])
    messages = []
    for turn in turns:
        picture = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    said, picture = built.processor.apply_chat_template(messages), data.example("pretrain-00003-color").image()
    if name == "idefics":
        before, after = said.removeprefix("<s>").split("<image>")
        expected = built.processor(text=[[before, picture, after]])["input_ids"]
    else:
        expected = built.processor(text=[said], images=[[picture]], add_special_tokens=False)["input_ids"]
    assert text.ids[1].tolist() == list(map(int, expected[0]))
    # A short conversation is the beginning of a long one, and filled up.
    short = int(text.mask[0].sum())
    assert text.ids[0][:short].tolist() == text.ids[1][:short].tolist() and short < len(expected[0])
    tokenizer = built.processor.tokenizer
    for row, told in enumerate((turns[:1], turns)):
        labelled = text.ids[row][text.labels[row] != talks.NO_LABEL]
        said_there = "".join(tokenizer.decode(labelled, skip_special_tokens=True).split())
        assert said_there == "".join(turn.answer for turn in told).replace(" ", "")


def test_a_conversation_asks_nothing_twice_and_is_true():
    assert talks.listed(data.scene_of(3)) == talks.single_turn(data.example("pretrain-00003-caption"))
    kinds = set()
    for i in range(40):
        scene = data.scene_of(i)
        turns = talks.asked(scene, np.random.default_rng(i))
        assert len({turn.question for turn in turns}) == len(turns) == talks.TURNS
        color_of = {thing.shape: thing.color for thing in scene.things}
        for question, answer in turns:
            *asked, last = question.rstrip("?").split()
            match asked:
                case ["what", "color", "is", "the"]:
                    assert answer == f"the {last} is {color_of[last]}"
                case ["is", "there", "a"]:
                    assert answer.startswith("yes" if last in color_of else "no")
            kinds.add(asked[0])
    assert kinds == {"what", "is"}


def test_trained_as_it_will_be_used(named):
    """What the training computes of pictures and texts is what the model's own forward computes."""
    name, built = named
    how, examples = TRAININGS[name], [data.example(f"pretrain-{i:05d}-exists") for i in range(3)]
    images = np.stack([np.asarray(example.image()) for example in examples])
    text = Chats(built).batch([talks.single_turn(example) for example in examples])
    seen = pretrain_hosts.process(built, images)
    inputs = {"input_ids": text.ids, "attention_mask": text.mask}
    inputs |= {"pixel_values": seen[:, None]} if name == "idefics" else dict(seen)
    if name == "mllama":
        inputs["cross_attention_mask"] = torch.ones(*text.ids.shape, 1, hosts.MAX_TILES, dtype=torch.long)
    if name == "qwen2_vl":
        inputs["mm_token_type_ids"] = (text.ids == text.image_token_id).int()
    if name == "idefics":
        inputs["image_attention_mask"] = ((text.ids == text.image_token_id).cumsum(1) > 0).long()[..., None]
    with torch.no_grad():
        expected = built.model.eval()(**inputs).logits
        found = how.speak(built.model, text, how.project(built.model, how.look(built.model, seen).states))
    torch.testing.assert_close(found[text.mask.bool()], expected[text.mask.bool()], atol=1e-4, rtol=1e-4)


def test_a_training_goes_on_where_it_was(tmp_path, monkeypatch):
    """Stopped in the tower and again in the whole, it gives the same weights as one that was not."""
    images = np.stack([np.asarray(data.example(f"pretrain-{i:05d}-caption").image()) for i in range(4)])
    monkeypatch.setattr(pretrain_hosts, "corpus", lambda: CORPUS)
    monkeypatch.setitem(
        TRAININGS, "qwen2_vl", TRAININGS["qwen2_vl"]._replace(pictures=2, tower_steps=3, whole_steps=(2, 1))
    )
    monkeypatch.setattr(pretrain_hosts, "right_answers", lambda *_: 0.0)
    monkeypatch.setattr(fitting, "SAVE_EVERY", 1)
    process, left = pretrain_hosts.process, [10**6]

    def interrupted(*args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return process(*args)

    monkeypatch.setattr(pretrain_hosts, "process", interrupted)
    weights = []
    # One picture is looked at before the first step of each start.
    for folder, starts in (("unbroken", [10**6]), ("broken", [4, 4, 10**6])):
        out = tmp_path / folder
        out.mkdir()
        for left[0] in starts:
            with pytest.raises(KeyboardInterrupt) if left[0] < 10 else nullcontext():
                pretrain_hosts.train("qwen2_vl", images, out)
        weights.append((out / "qwen2_vl" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


# ------------------------------------------------------------------------------------------------- the shipped hosts

IMAGE_TOKENS = {"mllama": "<|image|>", "qwen2_vl": "<|image_pad|>", "idefics3": "<image>", "idefics": "<image>"}
SHIPPED = sorted(folder.name for folder in models.SHIPPED.iterdir() if folder.name != "sd")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_host_loads_by_the_librarys_own_call_and_knows_colours(name):
    """At least nine of ten before any tuning: in a world in which nothing can be learnt nothing can be shown."""
    folder = models.SHIPPED / name
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    built = hosts.finish(model, processors.load(str(folder)), IMAGE_TOKENS[name])
    assert model.config.model_type == name
    assert pretrain_hosts.right_answers(name, built, "color", 96) >= 0.9


def test_all_shipped_models_are_small():
    assert "mllama" in SHIPPED
    sizes = {file: file.stat().st_size for file in models.SHIPPED.rglob("*") if file.is_file()}
    assert sum(sizes.values()) < 25e6
    assert all(file.suffix in (".safetensors", ".json", ".jinja", ".txt") for file in sizes)
