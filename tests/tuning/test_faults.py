"""What users' pictures, flags, folders and machines do to train.py: the right thing, or one line."""

import shutil

import pytest
import torch
from fitting import make, words_of
from PIL import Image
from safetensors.torch import load_file, save_file
from starting import digests, flags_of, start, steps, weights

from lavender_min import data
from lavender_min.data import Example
from lavender_min.maps import MapStore, MapWriter
from lavender_min.toy import data as toy
from lavender_min.tuning import arguments, export, runs, tune
from lavender_min.tuning.collator import Collator, MappedExamples, chat
from lavender_min.tuning.flags import Flags, ModelFlags


@pytest.fixture(scope="module")
def command(vlm_folder, store_folder):
    return lambda out, *more: flags_of(vlm_folder, store_folder, out, *more)


@pytest.fixture
def said(capfd):
    """The last line on stderr; there is no traceback before it."""

    def last():
        err = capfd.readouterr().err
        assert "Traceback" not in err
        return err.strip().rsplit("\n", 1)[-1].rsplit("\r", 1)[-1].split("it/s]")[-1]

    return last


def broken():
    raise OSError("image file is truncated")


# ------------------------------------------------------------------------------------------------------------ pictures


def test_plain_tuning_takes_the_examples_of_the_store(store_folder, capsys):
    examples = toy.load("tune", 12)
    [toys] = Flags(maps=[store_folder], data=["toy"]).sets
    aligned = tune.chosen(toys, False, examples, "examples")
    plain = tune.chosen(toys, True, examples, "examples")
    assert [e.id for e in plain.examples] == [e.id for e in aligned.examples] and plain.missing == aligned.missing > 0
    assert plain[0][1] is None and aligned[0][1] is not None
    capsys.readouterr()
    assert not tune.chosen(toys._replace(maps="nowhere"), True, examples, "examples").missing
    assert "no maps in nowhere: --plain takes all" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("plain", [False, True])
def test_a_picture_gone_bad_is_named_once_and_the_next_stands_in(command, tmp_path, capfd, monkeypatch, plain, workers):
    """In a run as if the next example stood in its place."""
    examples = toy.load("tune", 8)
    more = ["--num_train_epochs", "2", "--max_steps", "-1", "--dataloader_num_workers", workers, "--lora_dropout", "0"]
    more += ["--plain"] if plain else []
    bad = [e._replace(image=broken) if i in (2, 3) else e for i, e in enumerate(examples)]
    monkeypatch.setattr(data, "load", lambda *_: bad)
    assert start(command(tmp_path / "one", *more)) == 0
    out, err = capfd.readouterr()
    for i in (2, 3):
        assert (
            err.count(f"broken picture, the next example stands in for it: {examples[i].id}: image file is trunc") == 1
        )
    assert "2 of 16 pictures could not be read" in out and len(steps(tmp_path / "one")) == 8
    monkeypatch.setattr(data, "load", lambda *_: [examples[4] if i in (2, 3) else e for i, e in enumerate(examples)])
    assert start(command(tmp_path / "two", *more)) == 0
    assert (tmp_path / "one" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "two" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file", "pictures/{id}"),
        Image.DecompressionBombError("too large to be meant"),
        RuntimeError("Failed to decode frame"),
        StopIteration(),
    ],
)
def test_whatever_opening_a_picture_raises_it_is_a_broken_picture(capsys, error):
    examples = toy.load("tune", 2)

    def raises():
        error.filename = str(error.filename).format(id=examples[0].id) if hasattr(error, "filename") else None
        raise error

    rows = MappedExamples([examples[0]._replace(image=raises), *examples[1:]], None)
    assert rows[0][0].id == rows[0][0].id == examples[1].id
    err = capsys.readouterr().err
    assert examples[0].id in err and err.count("\n") == 1
    # These say nothing about the picture.
    for other in (MemoryError, KeyboardInterrupt):

        def full(other=other):
            raise other

        with pytest.raises(other):
            MappedExamples([examples[0]._replace(image=full)], None)[0]


def test_no_picture_that_can_be_read_is_one_line(command, tmp_path, said, monkeypatch):
    examples = [example._replace(image=broken) for example in toy.load("tune", 2)]
    monkeypatch.setattr(data, "load", lambda *_: examples)
    assert start(command(tmp_path, "--dataloader_num_workers", "1")) == 2
    assert said() == f"train.py: none of the {len(examples)} pictures can be read"


def test_what_a_worker_raises_is_one_line(command, tmp_path, said, monkeypatch):
    examples = toy.load("tune", 8)
    # Beyond what is tried before the first step.
    monkeypatch.setattr(data, "load", lambda *_: [*examples[:15], examples[15]._replace(answer="other")])
    # As if the text had changed after the start.
    monkeypatch.setattr(tune, "find_stale", lambda *_: {})
    assert start(command(tmp_path, "--dataloader_num_workers", "1", "--limit", "16")) == 2
    assert said().startswith(f"train.py: the maps of {examples[15].id} were made for")


# --------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("question", ["is", "an", "id", "assistant", "user", "header", " is ", "begin_of_text"])
def test_a_question_is_not_taken_for_the_templates_own_words(vlm_folder, question):
    _, processor = make(vlm_folder, plain=True)
    said = chat(processor, Example("one", lambda: Image.new("RGB", (8, 8)), question, "an id is user"))
    at = said.starts["question"]
    word = question.strip()
    start = at + len(question) - len(question.lstrip())
    header = said.text.index("<|start_header_id|>user<|end_header_id|>") + len(
        "<|start_header_id|>user<|end_header_id|>"
    )
    assert said.text[start : start + len(word)] == word and header <= start < said.answer_start
    assert said.text[said.starts["answer"] :].startswith("an id is user")


def test_a_text_that_a_processor_refuses_is_named(vlm_folder):
    model, processor = make(vlm_folder)
    asked = [f"what is {shown}?" for shown in ("this", "<|image|>")]
    examples = [Example(f"row-{i}", lambda: Image.new("RGB", (32, 32)), text, "red") for i, text in enumerate(asked)]
    with pytest.raises(ValueError, match="^the host's processor: .*image.*; it was given row-0, row-1$"):
        Collator(processor, model.family, model.base.config)([(example, None) for example in examples])


def test_words_of_a_short_question_stand_after_the_header(vlm_folder, store_folder):
    model, processor = make(vlm_folder, plain=True)
    example, stored = MappedExamples(toy.load("tune", 1), MapStore(store_folder))[0]
    word = stored.words[0]._replace(text="assistant", field="question", start=0, end=9)
    stored = stored._replace(words=[word], maps=stored.maps[:1])
    batch = Collator(processor, model.family, model.base.config, words="all")(
        [(example._replace(question="assistant"), stored)]
    )
    [(_, tokens, _)] = words_of(batch)
    ids = batch["input_ids"][0].tolist()
    assert processor.tokenizer.decode([ids[t] for t in tokens]).strip() == "assistant"
    ends = [t for t, i in enumerate(ids) if i == processor.tokenizer.convert_tokens_to_ids("<|end_header_id|>")]
    assert ends[0] < tokens[0] < ends[1] - 2


# ------------------------------------------------------------------------------------------------------------ machines


def test_one_process_drives_one_of_several_gpus(command, tmp_path, capsys, monkeypatch):
    usual = arguments.parse

    def two_gpus(argv, flags):
        args = usual(argv, flags)
        # What the Trainer's flags hold where torch.cuda.device_count() is 2.
        args._n_gpu = 2
        return args

    monkeypatch.setattr(arguments, "parse", two_gpus)
    monkeypatch.setattr(torch.nn.DataParallel, "__init__", None)
    assert start(command(tmp_path)) == 0
    assert "2 GPUs are here and this process uses one" in (out := capsys.readouterr().out)
    assert "accelerate launch --num_processes 2" in out and steps(tmp_path) == [1, 2, 3, 4]


def test_a_full_gpu_is_no_bug_of_ours(command, tmp_path, said, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(tune.LavenderTrainer, "train", full)
    assert start(command(tmp_path)) == 2 and "--plan says where it goes" in said()


@pytest.mark.parametrize("where", ["lavender_min.tuning.tune.LavenderTrainer.train", "lavender_min.tuning.runs.load"])
def test_ctrl_c_is_130_and_one_line(command, tmp_path, said, monkeypatch, where):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, pressed)
    assert start(command(tmp_path)) == 130 and said() == "train.py: stopped; the same command goes on"


@pytest.mark.parametrize("name", ["torch.save", "lavender_min.tuning.trainer.save_file"])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_taken(command, tmp_path, said, monkeypatch, name):
    whole = tmp_path / "whole"
    assert start(command(whole, "--save_steps", "2")) == 0
    import lavender_min.tuning.trainer as trainer

    module, function = (torch, "save") if name == "torch.save" else (trainer, "save_file")
    usual = getattr(module, function)

    def full(what, file, *more, **options):
        if "checkpoint-4" in str(file):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        return usual(what, file, *more, **options)

    monkeypatch.setattr(module, function, full)
    assert start(command(tmp_path / "run", "--save_steps", "2")) == 2
    assert f"{tmp_path}/run/checkpoint-4: RuntimeError: " in (line := said()) and "is there room on the disk?" in line
    monkeypatch.undo()
    assert start(command(tmp_path / "run", "--save_steps", "2")) == 0
    assert weights(tmp_path / "run") == weights(whole)


# ------------------------------------------------------------------------------------------------------------- numbers


def test_maps_that_are_no_numbers_are_refused_with_their_example(command, store_folder, tmp_path, said):
    good, bad = MapStore(store_folder), tmp_path / "bad"
    with MapWriter(bad, good.recipe) as writer:
        for i, id in enumerate(good.ids):
            row = good[id]
            maps = row.maps * float("nan") if i == 3 else row.maps
            writer.add(id, row.question, row.answer, row.words, maps, row.sos)
    argv = command(tmp_path / "out")
    argv[argv.index(store_folder)] = str(bad)
    assert start(argv) == 2 and good.ids[3] in said()


@pytest.mark.parametrize("plain", [False, True])
def test_training_stops_at_the_step_whose_numbers_are_none(command, tmp_path, said, monkeypatch, plain):
    usual = tune.LavenderTrainer.training_step

    def poisoned(self, model, *more):
        if self.state.global_step == 2:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
        return usual(self, model, *more)

    monkeypatch.setattr(tune.LavenderTrainer, "training_step", poisoned)
    more = ["--plain"] if plain else []
    assert start(command(tmp_path / "a", *more)) == 2
    assert "stopped at step 3: loss_vlm is nan" in said()
    # Where nothing is logged before the save, the weights tell.
    assert start(command(tmp_path / "b", "--logging_steps", "50", *more)) == 2
    assert "stopped at step 4: host." in (line := said()) and "holds no numbers any more" in line
    for run in "ab":
        assert not list((tmp_path / run).rglob("*.safetensors"))


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model.safetensors", lambda text: text[:-500]),
        ("model.safetensors", lambda text: b""),
        ("config.json", lambda text: b"null"),
        ("config.json", lambda text: text.replace(b'"hidden_size": ', b'"hidden_size": "x", "old": ', 1)),
        ("tokenizer.json", lambda text: b"{}"),
        ("tokenizer.json", lambda text: text[: len(text) // 2]),
    ],
)
def test_a_host_folder_that_cannot_be_read_is_named(vlm_folder, store_folder, tmp_path, said, file, change):
    host = shutil.copytree(vlm_folder, tmp_path / "host")
    (host / file).write_bytes(change((host / file).read_bytes()))
    assert start(flags_of(str(host), store_folder, tmp_path / "out")) == 2
    line = said()
    assert line.startswith("train.py: ") and f"--vlm {host}" in line and len(line) < 800


def test_a_host_that_lacks_weights_is_not_filled_up_at_random(vlm_folder, store_folder, tmp_path, said):
    host = shutil.copytree(vlm_folder, tmp_path / "host")
    weights = load_file(host / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.2.mlp.up_proj.weight"))
    del weights[name]
    save_file(weights, host / "model.safetensors", {"format": "pt"})
    assert start(flags_of(str(host), store_folder, tmp_path / "out")) == 2
    line = said()
    assert line.startswith(f"train.py: --vlm {host}: its files lack 1 of its weights, the first ") and "up_proj" in line


def test_no_code_of_a_models_folder_runs(vlm_folder, store_folder, tmp_path, said):
    host = shutil.copytree(vlm_folder, tmp_path / "host")
    (host / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    config = (host / "config.json").read_text().replace('"model_type": "mllama",', '"model_type": "strange",', 1)
    (host / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoConfig": "own.Config"},', 1))
    assert start(flags_of(str(host), store_folder, tmp_path / "out")) == 2
    assert f"--vlm {host}" in said() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("held", ["null", "{}", '{"base_model_name_or_path": 5}', "[", "[1]"])
def test_an_adapters_config_that_is_none_is_named(tmp_path, held):
    (tmp_path / "adapter_config.json").write_text(held)
    with pytest.raises(ValueError, match="adapter_config.json"):
        export.base_of(tmp_path)


def test_an_aligner_of_nans_is_named(tmp_path, vlm_folder):
    flags = ModelFlags(vlm_folder)
    model, _ = runs.build(flags)
    model.host.save_pretrained(tmp_path)
    held = dict(model.align.state_dict())
    name = next(name for name, tensor in held.items() if tensor.is_floating_point())
    save_file(held | {name: held[name] * float("nan")}, tmp_path / "lavender.safetensors")
    with pytest.raises(ValueError, match=f"lavender.safetensors: {name} holds what is no finite number"):
        runs.build(flags, trained=tmp_path)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "lavender.safetensors"])
def test_a_cut_file_of_a_finished_run_is_named(command, tmp_path, file, vlm_folder):
    from safetensors.torch import save_file

    flags = ModelFlags(vlm_folder)
    model, _ = runs.build(flags)
    model.host.save_pretrained(tmp_path)
    save_file(model.align.state_dict(), tmp_path / "lavender.safetensors")
    runs.build(flags, trained=tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-40])
    with pytest.raises(ValueError, match=str(tmp_path)):
        runs.build(flags, trained=tmp_path)


def test_an_export_killed_midway_is_in_nobodys_way(vlm_folder, tmp_path, monkeypatch):
    flags = ModelFlags(vlm_folder, plain=True)
    model, processor = runs.build(flags)
    model.host.save_pretrained(tmp_path / "run")
    runs.remember(flags, tmp_path / "run")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(processor), "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        export.export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    export.export(tmp_path / "run", tmp_path / "out")
    assert "config.json" in digests(tmp_path / "out") and not list(tmp_path.glob(".tmp*"))
