"""Test settings that must stand before torch, triton or transformers are imported, and the small models tests share."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent

# Every annotated signature of the package is checked while the tests run. Left out are the kernels, which Triton reads as text,
# and the Trainer's flags, to some of which transformers itself gives values that their types exclude.
UNCHECKED = ("kernels", "tuning.arguments")
MODULES = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "lavender_min").rglob("*.py")]
NAMES = [".".join(module.parts) for module in MODULES if module.name != "__init__"]
install_import_hook([name for name in NAMES if not name.partition(".")[2].startswith(UNCHECKED)], "typecheck.check")


def run_script(*args, **env) -> subprocess.CompletedProcess:
    """A script of the repository root as a user runs it."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory):
    """A small Mllama with random weights whose gates are open, and its processor."""
    from lavender_min.data import CAPTION_PROMPT
    from lavender_min.toy import data, hosts

    torch.manual_seed(0)
    lines = [f"{e.question} {e.answer}" for e in data.load("tune", 100)] + [f"{CAPTION_PROMPT} user assistant"]
    model, processor, *_ = hosts.mllama(lines * 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
            elif parameter.ndim > 1:
                parameter.mul_(4)  # so that attention is far from uniform
    folder = tmp_path_factory.mktemp("vlm")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    from tiny_sd import build_tiny_sd

    from lavender_min.teachers import stable_diffusion

    return stable_diffusion.load(str(build_tiny_sd(tmp_path_factory.mktemp("sd"))))


@pytest.fixture
def pixels():
    """Three pictures for it."""
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory):
    """Maps of 8 scenes' tuning examples: each word's exact mask, or a random map where it has none."""
    from lavender_min.geometry import MAP_SIDE
    from lavender_min.maps import MapWriter
    from lavender_min.toy import data
    from lavender_min.words import find_words

    folder = tmp_path_factory.mktemp("maps")
    with MapWriter(folder, {"frame": "whole"}) as writer:
        for example in data.load("tune", 8):
            masks = {region[:3]: torch.from_numpy(region.mask) for region in example.regions(MAP_SIDE)}
            words = find_words(example.fields)
            made = [
                masks[word[1:]].float()
                if word[1:] in masks
                else torch.rand(MAP_SIDE, MAP_SIDE, generator=torch.Generator().manual_seed(i))
                for i, word in enumerate(words)
            ]
            writer.add(example.id, example.question, example.answer, words, torch.stack(made), 0.9)
    return str(folder)
