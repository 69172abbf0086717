"""Every kind of decoder goes through everything: read, aligned, trained in 4 bits, cached, its words found.

The hosts are tiny and random, their processors and chat templates those of the kind (`zoo`).
"""

import re

import pytest
import torch
import zoo
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from lavender_min.hosts.decoder import KINDS
from lavender_min.hosts.load import Host, family_of
from lavender_min.hosts.reading import Sink, hook
from lavender_min.maps import MapStore
from lavender_min.toy import data
from lavender_min.tuning import runs
from lavender_min.tuning.collator import Collator, MappedExamples, chat
from lavender_min.tuning.flags import ModelFlags
from lavender_min.tuning.model import word_rows
from lavender_min.tuning.sanity import one_beginning


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return zoo.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def name(folder):
    return family_name(folder)


def family_name(folder):
    return next(kind for kind in sorted(KINDS, key=len, reverse=True) if f"/{kind}" in folder)


def host_of(folder, attention="sdpa", **options):
    """As `load.load` makes it, but for processors that do not load without torchvision."""
    name = family_name(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return Host(model.eval(), zoo.built(name)[1], family_of(name, name))


@pytest.fixture(scope="module")
def plain(folder):
    return host_of(folder)


@pytest.fixture(scope="module")
def hooked(folder):
    host = host_of(folder)
    hook(host.model, host.family)
    return host


@pytest.fixture
def examples(store_folder):
    """Pictures of two shapes, neither square; a caption and a question about each."""
    mapped = MappedExamples(data.load("tune", 2), MapStore(store_folder))
    shapes = [(150, 90), (150, 90), (60, 100), (60, 100)]
    return [
        (e._replace(image=lambda e=e, shape=shape: e.image().resize(shape)), stored)
        for (e, stored), shape in zip(map(mapped.__getitem__, range(4)), shapes, strict=True)
    ]


def batch_of(host, examples, **options):
    return Collator(host.processor, host.family, host.model.config, **options)(examples)


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name not in ("labels", "words")}


def read(host, batch):
    sink = Sink(host.family, word_rows(batch["words"]), host.family.layers(host.model), None, lambda maps: maps)
    with torch.no_grad():
        return sink, host.family.hidden_states(host.model, inputs_of(batch), sink)


# --------------------------------------------------------------------------------------------------------------- reading


def test_hidden_states_are_bit_equal_with_hooks_and_a_sink(plain, hooked, examples):
    batch = batch_of(hooked, examples)
    sink, hidden = read(hooked, batch)
    assert len(sink.own_maps) == len(hooked.family.layers(hooked.model)) > 0
    with torch.no_grad():
        whole = plain.model(**inputs_of(batch), use_cache=False, output_hidden_states=True)
        assert torch.equal(hidden, plain.family.hidden_states(plain.model, inputs_of(batch)))
        assert torch.equal(hooked.family.logits(hooked.model, hidden), whole.logits)


@pytest.mark.parametrize("together", [True, False])
def test_maps_equal_those_of_eager_attention(folder, hooked, examples, together):
    """A padded batch comes with a mask, one text alone mostly with none, which means causal.

    Eager attention as a whole, the tokens of every view picked one by one, resampled by F.interpolate.
    """
    eager = host_of(folder, "eager")
    layers = list(eager.family.layers(eager.model))
    for some in [examples] if together else [examples[:1], examples[3:]]:
        batch = batch_of(hooked, some)
        words = word_rows(batch["words"])
        sink, _ = read(hooked, batch)
        with torch.no_grad():
            attentions = eager.model.model(**inputs_of(batch), use_cache=False, output_attentions=True).attentions
        # Linear layers have none.
        attentions = dict(
            zip(layers, attentions, strict=True) if len(attentions) == len(layers) else enumerate(attentions)
        )
        assert list(sink.own_maps) == layers
        for layer in layers:
            for found, text, row in zip(sink.own_maps[layer], words.texts, words.rows, strict=True):
                expected, views = 0, [view for view in words.views if (view.index[text] >= 0).any()]
                for view in views:
                    seen = attentions[layer][text][:, row]
                    expected = expected + resampled(seen, view, text) * (view.index[text] >= 0).sum()
                patches = sum(int((view.index[text] >= 0).sum()) for view in views)
                torch.testing.assert_close(found / patches, expected / patches, atol=1e-6, rtol=1e-4)


def resampled(seen, view, text):
    """[h, keys] ─► [h, g, g], one patch after another."""
    h, (hc, wc) = len(seen), view.index[text].shape
    map = torch.zeros(h, view.resize_y.shape[1], view.resize_x.shape[1])
    for y in range(hc):
        for x in range(wc):
            if (key := int(view.index[text, y, x])) >= 0:
                map += seen[:, key, None, None] * view.resize_y[text, :, y, None] * view.resize_x[text, :, x]
    return map


def test_padded_and_unpadded_texts_are_read_alike(hooked, examples):
    together, start = read(hooked, batch_of(hooked, examples))[0], 0
    for example in examples:
        alone = read(hooked, batch_of(hooked, [example]))[0]
        for layer, maps in alone.own_maps.items():
            torch.testing.assert_close(together.own_maps[layer][start : start + len(maps)], maps, atol=2e-5, rtol=1e-3)
        start += len(maps)
    assert start == len(together.words.rows)


@pytest.mark.parametrize(("rank", "together"), [(0, True), (8, False)])
def test_parallel_attention_starts_as_the_hosts_own(folder, examples, rank, together):
    """Norms, rotation and mask included: the maps of the parallel projections are the host's own at the start."""
    host = host_of(folder)
    hook(host.model, host.family)
    model, _ = runs.build(ModelFlags("", align_layers="all", parallel_rank=rank), loaded=host)
    batch = batch_of(host, examples if together else examples[1:2])
    sink = model.sink(word_rows(batch["words"]), model.layers)
    with torch.no_grad():
        host.family.hidden_states(model.eval().base, inputs_of(batch), sink)
    assert sink.parallel_maps
    for layer, own in sink.own_maps.items():
        torch.testing.assert_close(sink.parallel_maps[layer], own, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("aggregate", ["learn", "layer-mean"])
def test_both_losses_in_4_bits_with_adapters_and_checkpointing(folder, examples, aggregate):
    """Every trainable part is reached, by the alignment loss alone too, and checkpointing changes no gradient."""
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head"]
    )
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        host = host_of(folder, quantization_config=quantized, dtype=torch.float32)
        hook(host.model, host.family)
        options = {"aggregate": aggregate, "match": "all", "align_layers": "all"}
        flags = ModelFlags(folder, mode="qlora", lora_dropout=0.0, **options)
        model, _ = runs.build(flags, loaded=host)
        assert sum(type(module).__name__ == "Linear4bit" for module in model.modules()) > 3 * 7
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
        made = batch_of(host, examples[1:3])
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        out = model(**made)
        assert out["loss_vlm"] > 0 and out["loss_att"] > 0 and out["words"] == len(made["words"]["lengths"])
        out["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all(), name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    reached = [name for name, gradient in gradients[0].items() if gradient.abs().sum() > 0]
    # Of a low-rank correction the first factor waits for the second, which starts at 0. The bias shifts a map that is normalised.
    waiting = [name for name in gradients[0] if name not in reached and name != "align.aligner.bias"]
    assert all(".parallel." in name and name.endswith("0.weight") for name in waiting), waiting
    # Adapters of the text model's attention, four of each layer that has it.
    texts = [name for name in gradients[0] if "lora_A" in name]
    assert texts and all("language_model" in name or "text_model" in name for name in texts)
    model.zero_grad()
    made["labels"].fill_(-100)
    model(**made)["loss"].backward()
    if aggregate == "layer-mean":
        for layer in host.family.layers(host.model):
            [query] = [p for n, p in model.named_parameters() if f"layers.{layer}.self_attn.q_proj.lora_A" in n]
            assert query.grad.abs().sum() > 0


def test_every_weight_of_a_checkpoint_is_read_back(folder, tmp_path):
    host = host_of(folder).model
    host.save_pretrained(tmp_path)
    kept = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    for parameter in host.parameters():
        parameter.data.add_(1)
    runs.load_whole(host, tmp_path)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in host.state_dict().items())


def test_targets_name_the_text_model_only(plain):
    for target, ends in (("cross", "qkvo"), ("released", "qv")):
        named = [n for n, _ in plain.model.named_modules() if re.fullmatch(plain.family.lora_targets[target], n)]
        assert {n.split(".")[-1] for n in named} == {f"{end}_proj" for end in ends}
        assert not any("vision" in n or "visual" in n for n in named)
    language = [n for n, _ in plain.model.named_modules() if re.fullmatch(plain.family.lora_targets["language"], n)]
    assert {"gate_proj", "up_proj", "down_proj"} < {n.split(".")[-1] for n in language}


def test_cached_picture_states_give_the_same_hidden_states(plain, examples):
    """Each picture's states are made alone, as they are kept."""
    batch = batch_of(plain, examples[1:3])
    states = []
    with torch.no_grad():
        expected = plain.family.hidden_states(plain.model, inputs_of(batch))
        for example in examples[1:3]:
            states += plain.family.picture_states(plain.model, batch_of(plain, [example]))
        together = plain.family.picture_states(plain.model, batch)
        rest = {k: v for k, v in inputs_of(batch).items() if k not in plain.family.picture_inputs}
        assert "pixel_values" not in rest
        found = plain.family.hidden_states(plain.model, rest | plain.family.cached_inputs(together))
        apart = plain.family.hidden_states(plain.model, rest | plain.family.cached_inputs(states))
    assert torch.equal(found, expected)
    torch.testing.assert_close(apart, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- words


def test_words_are_found_in_a_text_that_grew(plain, examples):
    batch, start = batch_of(plain, examples, words="all"), 0
    tokenizer, words = plain.processor.tokenizer, batch["words"]
    assert batch["attention_mask"].sum(1).unique().numel() > 1
    spoken = [word for _, stored in examples for word in stored.words]
    for word, length in zip(spoken, words["lengths"].tolist(), strict=True):
        tokens, text = words["tokens"][start : start + length], words["texts"][start]
        assert tokenizer.decode(batch["input_ids"][text, tokens.long()]).strip(" ,.?\n") == word.text
        start += length
    one_beginning(batch["input_ids"], tokenizer.bos_token_id)


def test_labels_are_the_answer_and_the_end_of_its_turn(plain, examples):
    batch = batch_of(plain, examples)
    for ids, labels, (example, _) in zip(batch["input_ids"], batch["labels"], examples, strict=True):
        said = plain.processor.tokenizer.decode(ids[labels != -100])
        assert said.split(example.answer)[0].strip() == ""
        after = said.split(example.answer)[1].strip()
        # LLaVA 1.5's template does not end an answer.
        assert after == ("" if plain.family.name == "llava" else plain.processor.tokenizer.eos_token)
        assert (labels[labels != -100] == ids[labels != -100]).all()


def test_a_prompt_is_the_beginning_of_the_text_it_is_trained_with(plain, examples):
    """A generation is asked with the tokens that stood before the answer, from the left if padded so."""
    [(example, _)] = examples[1:2]
    said = chat(plain.processor, example)
    prompt, picture = said.text[: said.answer_start], [example.image()]
    asked = plain.family.encode(plain.processor, [prompt], picture).inputs["input_ids"][0]
    batch = batch_of(plain, examples[1:2])
    first = int((batch["labels"][0] != -100).nonzero()[0])
    trained = batch["input_ids"][0][:first]
    # White space between question and answer may be cut otherwise.
    common = min(len(asked), len(trained)) - 2
    assert common > 20 and asked[:common].tolist() == trained[:common].tolist()
    decoded = [plain.processor.tokenizer.decode(ids).rstrip() for ids in (asked, trained)]
    assert decoded[0] == decoded[1]


def test_an_answer_is_not_read_before_it_is_said(plain, examples):
    """The last word of an answer changes no hidden state before it."""
    [(example, stored)] = examples[:1]
    begun, _, last = example.answer.rstrip(". ").rpartition(" ")
    hidden = []
    for answer in (example.answer, example.answer.replace(f"{begun} {last}", f"{begun} zzz")):
        batch = Collator(plain.processor, plain.family, plain.model.config)([(example._replace(answer=answer), None)])
        with torch.no_grad():
            hidden.append(plain.family.hidden_states(plain.model, inputs_of(batch))[0])
        ids = batch["input_ids"][0]
    answered = int((batch["labels"][0] != -100).nonzero()[0])
    same = answered + len(plain.processor.tokenizer(begun, add_special_tokens=False)["input_ids"]) - 1
    assert same > answered + 2 and len(ids) > same
    torch.testing.assert_close(hidden[0][:same], hidden[1][:same], atol=1e-5, rtol=1e-4)
    assert (hidden[0][same + 2] - hidden[1][same + 2]).abs().max() > 1e-2
