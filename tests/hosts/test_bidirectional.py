"""A LLaVA whose picture is seen both ways, assembled from a tiny SigLIP and a tiny Qwen2: its mask, its cache, its folder."""

import pytest
import tiny_parts
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from transformers.models.llava.processing_llava import LlavaProcessor

from lavender_min.data import Example
from lavender_min.hosts import assemble
from lavender_min.hosts.architectures import (
    BidirectionalLlavaConfig,
    BidirectionalLlavaForConditionalGeneration,
    picture_blocks,
)
from lavender_min.hosts.load import load
from lavender_min.tuning.collator import Collator, chat

# Patches of the picture's square.
PATCHES = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same parts under both masks."""
    where = tmp_path_factory.mktemp("hosts")
    torch.manual_seed(0)
    vision, llm = tiny_parts.siglip(where / "siglip"), tiny_parts.qwen2(where / "qwen2")
    for mask in assemble.MASKS:
        words = ["--vision", str(vision), "--llm", str(llm), "--mask", mask, str(where / mask)]
        assert assemble.main(words) == 0
    return where


@pytest.fixture(scope="module")
def model(folders):
    return AutoModelForImageTextToText.from_pretrained(folders / "bidirectional").eval()


@pytest.fixture(scope="module")
def processor(folders):
    return AutoProcessor.from_pretrained(folders / "bidirectional")


def inputs_of(processor, side="right", texts=("ab <image> what is it?", "<image> a red circle, and a star")):
    """Two texts of different lengths, pictures at different places, each with text behind it."""
    pictures = [[Image.new("RGB", (90, 60), color)] for color in ("red", "blue")][: len(texts)]
    return dict(processor(text=list(texts), images=pictures, padding=True, padding_side=side, return_tensors="pt"))


def by_hand(inputs, image_token):
    """[b, 1, t, t]: a token attends to itself, to real tokens before it, and, if both are the picture's, to those behind it."""
    b, t = inputs["input_ids"].shape
    mask = torch.zeros(b, 1, t, t, dtype=torch.bool)
    for text in range(b):
        for i in range(t):
            for j in range(t):
                both = all(inputs["input_ids"][text, at] == image_token for at in (i, j))
                mask[text, 0, i, j] = bool(inputs["attention_mask"][text, j]) and (j <= i or both)
    return mask


def seen(model, inputs):
    """The mask that reaches the first layer, and the last hidden states."""
    found = []
    hook = model.model.language_model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
    hook.remove()
    return found[0], hidden


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_mask_is_the_one_made_by_hand(folders, model, processor, side):
    """And an ordinary LLaVA that is handed it has the same hidden states, bit for bit; with its own mask it has others."""
    inputs = inputs_of(processor, side)
    real = inputs["attention_mask"].bool()
    expected = by_hand(inputs, model.config.image_token_id)
    mask, hidden = seen(model, inputs)
    assert not real.all() and (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [PATCHES] * 2
    for text, rows in enumerate(real):
        assert torch.equal(mask[text, 0, rows], expected[text, 0, rows])
    causal = AutoModelForImageTextToText.from_pretrained(folders / "causal").eval()
    assert type(causal) is LlavaForConditionalGeneration
    assert torch.equal(seen(causal, {**inputs, "attention_mask": mask})[1], hidden)
    assert (seen(causal, inputs)[1] - hidden)[real].abs().max() > 0.01


def test_every_picture_is_a_block_of_its_own():
    ids = torch.tensor([[9, 9, 1, 9, 9, 9], [1, 2, 9, 3, 4, 9]])
    assert picture_blocks(ids, 9).tolist() == [[0, 0, -1, 1, 1, 1], [-1, -1, 0, -1, -1, 1]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_with_a_cache_is_that_without(folders, processor, attention):
    """Also with a cache of fixed size, for which `generate` would make causal masks; and padded on the left or alone."""
    model = AutoModelForImageTextToText.from_pretrained(folders / "bidirectional", attn_implementation=attention).eval()
    inputs = inputs_of(processor, "left")
    # Random weights may say the image token.
    how = {
        "max_new_tokens": 6,
        "do_sample": False,
        "suppress_tokens": [model.config.image_token_id],
        "eos_token_id": -1,
    }
    without = model.generate(**inputs, **how, use_cache=False)[:, -6:]
    assert len(set(without.flatten().tolist())) > 2
    assert torch.equal(model.generate(**inputs, **how)[:, -6:], without)
    fixed = model.generate(**inputs, **how, cache_implementation="static", disable_compile=True)
    assert torch.equal(fixed[:, -6:], without)
    alone = inputs_of(processor, texts=("ab <image> what is it?",))
    assert torch.equal(model.generate(**alone, **how)[:, -6:], without[:1])


def test_a_picture_behind_a_cached_text_is_seen_both_ways(model, processor):
    inputs = inputs_of(processor, texts=("ab <image> what is it?",))
    begin = inputs["input_ids"][0].tolist().index(model.config.image_token_id)
    with torch.no_grad():
        whole = model.model(**inputs, use_cache=False).last_hidden_state
        first = model.model(input_ids=inputs["input_ids"][:, :begin], use_cache=True)
        rest = model.model(
            input_ids=inputs["input_ids"][:, begin:],
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"],
            past_key_values=first.past_key_values,
        ).last_hidden_state
    assert begin > 0
    torch.testing.assert_close(rest, whole[:, begin:], atol=1e-5, rtol=1e-4)


def test_checkpointing_changes_no_gradient(model, processor):
    inputs = inputs_of(processor)
    found = []
    for checkpointed in (False, True):
        model.zero_grad()
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        # LLaVA takes the last layer's output before SigLIP's closing norm.
        used = {name: p for name, p in model.named_parameters() if "vision_tower.post_layernorm" not in name}
        found.append({name: p.grad.clone() for name, p in used.items()})
    model.gradient_checkpointing_disable()
    model.eval()
    for name, gradient in found[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_a_folder_loads_as_what_it_is(folders, model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is BidirectionalLlavaForConditionalGeneration and type(processor) is LlavaProcessor
    assert AutoConfig.from_pretrained(tmp_path).model_type == "bidirectional_llava"
    inputs = inputs_of(processor)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_parts_that_are_not_named_are_the_papers():
    config = BidirectionalLlavaConfig()
    assert config.vision_config.model_type == "siglip_vision_model" and config.text_config.model_type == "qwen2"


def test_what_it_cannot_mask_is_refused(model, processor):
    inputs = inputs_of(processor)
    with pytest.raises(ValueError, match="made from input_ids, which were not given"):
        model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        model.set_attn_implementation("flash_attention_2")
    windows = {"use_sliding_window": True, "max_window_layers": 0, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="must be of full attention; it has sliding_attention"):
        BidirectionalLlavaForConditionalGeneration(BidirectionalLlavaConfig(text_config=windows))


def test_the_language_models_own_template_takes_pictures(folders, processor):
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template([asked], add_generation_prompt=True) == expected
    # Plain texts stay as they were.
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    language = AutoProcessor.from_pretrained(folders / "qwen2")
    assert processor.apply_chat_template(said) == language.apply_chat_template(said, tokenize=False)


@pytest.mark.parametrize("prompt_ends", ["ASSISTANT:", "ASSISTANT: "])
def test_an_answer_of_one_word_is_learnt_without_a_template_of_the_language_models_own(folders, tmp_path, prompt_ends):
    """Also where a generation prompt ends with a space: in the text that space is a part of the answer's first token."""
    llm = tiny_parts.qwen2(tmp_path / "llm", chat_template=None)
    assert assemble.main(["--vision", str(folders / "siglip"), "--llm", str(llm), str(tmp_path / "host")]) == 0
    host = load(str(tmp_path / "host"))
    host.processor.chat_template = host.processor.chat_template.replace(
        "{{ 'ASSISTANT:' }}", f"{{{{ '{prompt_ends}' }}}}"
    )
    example = Example("a", lambda: Image.new("RGB", (90, 60)), "what color is it?", "red")
    assert chat(host.processor, example).text.endswith(" color is it? ASSISTANT: red<|im_end|>")
    batch = Collator(host.processor, host.family, host.model.config)([(example, None)])
    assert host.processor.tokenizer.decode(batch["labels"][batch["labels"] != -100]) == " red<|im_end|>"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("vision", "--vision {}: expected a SigLIP, found a qwen2"),
        ("llm", "--llm {}: Unrecognized configuration class"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(folders, tmp_path, capsys, part, message):
    wrong = {"vision": folders / "qwen2", "llm": folders / "siglip"}[part]
    parts = {"vision": folders / "siglip", "llm": folders / "qwen2", part: wrong}
    words = [word for name, path in parts.items() for word in (f"--{name}", str(path))]
    assert assemble.main([*words, str(tmp_path / "out")]) == 2
    assert message.format(wrong) in capsys.readouterr().err and not (tmp_path / "out").exists()
