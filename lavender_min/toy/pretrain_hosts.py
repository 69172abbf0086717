"""How the toy hosts are trained: the vision tower alone, on what each patch shows, then everything, on answers.

A published host came with a tower that had seen many pictures with texts. A tower that starts from nothing, inside the whole,
spends most steps on finding out that pictures hold things at all. So it is trained first, through three heads that are thrown
away: for every patch they tell shape, colour and size, or background.

Then the whole host is trained on two conversations about each picture. One lists what is there; of all texts it says most
about which colour goes with which shape. The other asks "what color is the star?" and "is there a star?". Relations, places and
numbers are left for tuning to teach.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from lavender_min.data import CAPTION_PROMPT
from lavender_min.toy import data, hosts, world
from lavender_min.toy.fitting import DEVICE, corpus, fit
from lavender_min.toy.talks import NO_LABEL, QUESTIONS, Chats, Text, asked, listed, single_turn

# What a patch may show, in the order of a Thing's fields.
KINDS_OF_PATCH = (world.SHAPES, tuple(world.COLORS), tuple(world.SIZES))
# Patches along the side of a picture, and of a tile.
CELLS, TILE_CELLS = hosts.SIDE // hosts.PATCH, hosts.TILE // hosts.PATCH


class Sight(NamedTuple):
    """What a tower makes of b pictures."""

    states: Tensor  # as the host's projector takes them
    patches: Tensor  # [b, k, c], the states of patches alone


class Training(NamedTuple):
    """What differs between hosts."""

    tower: Callable[[Any], nn.Module]
    # (model, what the image processor makes of b pictures) ─► Sight
    look: Callable[[Any, Any], Sight]
    # A scene ─► [3, k], what each of those k patches shows.
    shown: Callable[[world.Scene], np.ndarray]
    # (model, states) ─► what the text model gets, [b, p, c].
    project: Callable[[Any, Tensor], Tensor]
    # (model, text, what it gets for each of its lines) ─► logits [b, t, vocabulary].
    speak: Callable[[Any, "Text", Tensor], Tensor]
    # Of a step; steps of the tower; steps of the whole, in phases of which each has its own warm-up and cosine.
    pictures: int = 16
    tower_steps: int = 2600
    whole_steps: tuple[int, ...] = (2400,)


def patch_kinds(scene: world.Scene, side: int) -> np.ndarray:
    """int64 [shape | colour | size, side, side]: which one the centre of each cell shows, 0 for the background."""
    masks = world.visible_masks(scene, side)
    return np.stack(
        [
            sum(mask * (1 + kinds.index(thing[k])) for mask, thing in zip(masks, scene.things, strict=True))
            for k, kinds in enumerate(KINDS_OF_PATCH)
        ]
    )


# ----------------------------------------------------------------------------------- Llama 3.2 Vision: tiles


def mllama_look(model: Any, seen: Any) -> Sight:
    """States are [b, tiles, class token + patches + padding, c]."""
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    states = model.model.vision_model(**{name: seen[name] for name in names}).last_hidden_state[:, 0]
    return Sight(states, states[:, :, 1 : 1 + TILE_CELLS**2].flatten(1, 2))


def tiles_shown(scene: world.Scene) -> np.ndarray:
    kinds = patch_kinds(scene, CELLS)
    return rearrange(kinds, "k (r y) (c x) -> k (r c y x)", y=TILE_CELLS, x=TILE_CELLS)


def mllama_project(model: Any, states: Tensor) -> Tensor:
    return model.model.multi_modal_projector(states).flatten(1, 2)


def mllama_speak(model: Any, text: Text, states: Tensor) -> Tensor:
    tiles = torch.ones(*text.ids.shape, 1, hosts.MAX_TILES, dtype=torch.long, device=DEVICE)
    return model(
        input_ids=text.ids, attention_mask=text.mask, cross_attention_states=states, cross_attention_mask=tiles
    ).logits


def open_gates(model: Any) -> None:
    """Mllama's gates start at tanh(0) = 0, and then no gradient reaches what comes from the picture."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cross_attn_attn_gate" in name or "cross_attn_mlp_gate" in name:
                parameter.fill_(0.5)


# ------------------------------------------------------------------------------- SmolVLM's kind: tiles and thumbnail


def idefics3_look(model: Any, seen: Any) -> Sight:
    """The thumbnail comes last."""
    pixels, b = seen["pixel_values"].flatten(0, 1), len(seen["pixel_values"])
    every = torch.ones(len(pixels), TILE_CELLS, TILE_CELLS, dtype=torch.bool, device=DEVICE)
    states = model.model.vision_model(pixel_values=pixels, patch_attention_mask=every).last_hidden_state
    return Sight(states, rearrange(states, "(b n) p c -> b (n p) c", b=b))


def tiles_and_thumbnail_shown(scene: world.Scene) -> np.ndarray:
    return np.concatenate([tiles_shown(scene), patch_kinds(scene, TILE_CELLS).reshape(3, -1)], 1)


def idefics3_project(model: Any, states: Tensor) -> Tensor:
    return rearrange(model.model.connector(states), "(b n) p c -> b (n p) c", n=hosts.MAX_TILES + 1)


def among_the_text(model: Any, text: Text, states: Tensor) -> Tensor:
    """The text's embeddings, those of image tokens replaced by what the picture gives."""
    embeddings = model.get_input_embeddings()(text.ids)
    place = (text.ids == text.image_token_id)[..., None].expand_as(embeddings)
    return embeddings.masked_scatter(place, states)


def idefics3_speak(model: Any, text: Text, states: Tensor) -> Tensor:
    return model(inputs_embeds=among_the_text(model, text, states), attention_mask=text.mask).logits


# ----------------------------------------------------------------------------- Qwen-VL's kind: patches in blocks of 2 × 2

BLOCK = 2
GRID = (1, CELLS, CELLS)


def qwen2_vl_look(model: Any, seen: Any) -> Sight:
    states = model.model.visual(seen["pixel_values"], seen["image_grid_thw"]).last_hidden_state
    return Sight(states, rearrange(states, "(b k) c -> b k c", k=CELLS**2))


def blocks_shown(scene: world.Scene) -> np.ndarray:
    return rearrange(patch_kinds(scene, CELLS), "k (y i) (x j) -> k (y x i j)", i=BLOCK, j=BLOCK)


def qwen2_vl_project(model: Any, states: Tensor) -> Tensor:
    return rearrange(model.model.visual.merger(states), "(b p) c -> b p c", p=(CELLS // BLOCK) ** 2)


def qwen2_vl_speak(model: Any, text: Text, states: Tensor) -> Tensor:
    """Positions have three axes: time, row and column of a picture's token."""
    is_image = (text.ids == text.image_token_id).int()
    grid = torch.tensor(GRID, device=DEVICE).expand(len(text.ids), -1)
    places, _ = model.model.get_rope_index(text.ids, is_image, image_grid_thw=grid, attention_mask=text.mask)
    embeddings = among_the_text(model, text, states)
    return model(inputs_embeds=embeddings, attention_mask=text.mask, position_ids=places).logits


# -------------------------------------------------------------------------------------------- Flamingo: latents


def idefics_look(model: Any, seen: Any) -> Sight:
    """States are [b, class token + patches, c]. The image processor gives the pixels alone, not by name."""
    states = model.model.vision_model(pixel_values=seen).last_hidden_state
    return Sight(states, states[:, 1:])


def patches_shown(scene: world.Scene) -> np.ndarray:
    return patch_kinds(scene, CELLS).reshape(3, -1)


def idefics_project(model: Any, states: Tensor) -> Tensor:
    return model.model.perceiver_resampler(states)


def idefics_speak(model: Any, text: Text, states: Tensor) -> Tensor:
    """A text row sees the picture once its image token has been read."""
    after = ((text.ids == text.image_token_id).cumsum(1) > 0).long()[..., None]
    return model(
        input_ids=text.ids, attention_mask=text.mask, perceiver_embeddings=states[:, None], image_attention_mask=after
    ).logits


TRAININGS = {
    "mllama": Training(
        lambda m: m.model.vision_model, mllama_look, tiles_shown, mllama_project, mllama_speak, 32, 2600, (1200,)
    ),
    "idefics3": Training(
        # A thing is often cut in two by the tiles, and the thumbnail shows it small: its shape takes longer to learn.
        lambda m: m.model.vision_model,
        idefics3_look,
        tiles_and_thumbnail_shown,
        idefics3_project,
        idefics3_speak,
        tower_steps=6600,
        whole_steps=(2400, 1800, 1800, 3000),
    ),
    "qwen2_vl": Training(
        lambda m: m.model.visual,
        qwen2_vl_look,
        blocks_shown,
        qwen2_vl_project,
        qwen2_vl_speak,
        whole_steps=(2400, 1800),
    ),
    "idefics": Training(
        # Its resampler too must learn what to read, from answers alone.
        lambda m: m.model.vision_model,
        idefics_look,
        patches_shown,
        idefics_project,
        idefics_speak,
        whole_steps=(2400, 3000),
    ),
}


# ------------------------------------------------------------------------------------------------------ the trainings


def process(built: hosts.Built, images: np.ndarray) -> Any:
    """What the image processor makes of pictures, uint8 [b, y, x, 3]."""
    pictures = [Image.fromarray(image) for image in images]
    # IdeficsImageProcessor takes a flat list only.
    nested = pictures if built.model.config.model_type == "idefics" else [[picture] for picture in pictures]
    return built.processor.image_processor(images=nested, return_tensors="pt").to(DEVICE)


def train_tower(name: str, built: hosts.Built, images: np.ndarray, out: Path) -> None:
    how, heads = TRAININGS[name], nn.ModuleList()
    tower = how.tower(built.model)
    with torch.no_grad():
        width = how.look(built.model.to(DEVICE), process(built, images[:1])).patches.shape[-1]
    heads.extend(nn.Linear(width, 1 + len(kinds)) for kinds in KINDS_OF_PATCH)

    def loss_of(rng: np.random.Generator) -> Tensor:
        picked = np.sort(rng.choice(len(images), how.pictures, replace=False))
        patches = how.look(built.model, process(built, images[picked])).patches
        shown = torch.from_numpy(np.stack([how.shown(data.scene_of(int(i))) for i in picked])).to(DEVICE)
        losses = [
            nn.functional.cross_entropy(head(patches).flatten(0, 1).float(), shown[:, k].flatten())
            for k, head in enumerate(heads)
        ]
        return torch.stack(losses).sum()

    fit(f"{name}_tower", nn.ModuleList([tower, heads]), loss_of, how.tower_steps, 2e-3, out)


def train_whole(name: str, built: hosts.Built, images: np.ndarray, out: Path) -> None:
    how = TRAININGS[name]
    chats = Chats(built)

    def loss_of(rng: np.random.Generator) -> Tensor:
        picked = np.sort(rng.choice(len(images), how.pictures, replace=False))
        states = how.project(built.model, how.look(built.model, process(built, images[picked])).states)
        scenes = [data.scene_of(int(i)) for i in picked]
        losses = []
        for talks in ([listed(scene) for scene in scenes], [asked(scene, rng) for scene in scenes]):
            text = chats.batch(talks)
            logits = how.speak(built.model, text, states)
            losses.append(
                nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), text.labels[:, 1:].flatten())
            )
        return torch.stack(losses).mean()

    for phase, steps in enumerate(how.whole_steps, 1):
        fit(name if phase == 1 else f"{name}_{phase}", built.model, loss_of, steps, 1.5e-3, out)


@torch.no_grad()
def right_answers(name: str, built: hosts.Built, kind: str, scenes: int = 200) -> float:
    """The share of answers that come out right, token for token, as greedy decoding would give them; on the tuning split."""
    how, right = TRAININGS[name], []
    chats = Chats(built)
    for first in range(0, scenes, how.pictures):
        examples = [data.example(f"tune-{i:05d}-{kind}") for i in range(first, min(first + how.pictures, scenes))]
        images = np.stack([np.asarray(example.image()) for example in examples])
        text = chats.batch([single_turn(example) for example in examples])
        states = how.project(built.model, how.look(built.model, process(built, images)).states)
        guess = how.speak(built.model, text, states)[:, :-1].argmax(-1)
        wrong = (guess != text.labels[:, 1:]) & (text.labels[:, 1:] != NO_LABEL)
        right += (~wrong.any(1)).tolist()
    return float(np.mean(right))


def train(name: str, images: np.ndarray, out: Path) -> None:
    """Leaves the trained host in `out/name`, in half precision, with its processor."""
    torch.manual_seed(0)
    built = hosts.HOSTS[name](corpus() + [CAPTION_PROMPT, "user", "assistant", "User:", "Assistant:"] * 1000)
    built.model.to(DEVICE)
    train_tower(name, built, images, out)
    if name == "mllama":
        open_gates(built.model)
    train_whole(name, built, images, out)
    for kind in QUESTIONS:
        print(f"{name}: {kind} right {right_answers(name, built, kind):.1%} of the time")
    built.model.to(torch.float16).save_pretrained(out / name)
    built.processor.save_pretrained(out / name)
