"""The page in headless Chromium: words are pointed at by mouse, finger and keyboard, and the maps change."""

import re
import shutil

import pytest
import torch
from PIL import Image

from lavender_min import page
from lavender_min.words import find_words

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# It looks for no updates, and needs no graphics card. As root it has no sandbox.
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
)
NAMES = ["Stable Diffusion", "untuned", "plain tuning", "Lavender"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium, and pip install playwright"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Two pictures, one of them wide, with two texts each; the words of one have layers and heads."""
    draw = torch.Generator().manual_seed(0)
    pictures = []
    for name, size in (("tall", (80, 120)), ("wide", (200, 100))):
        texts = []
        for question, answer in (("", "a red cat"), ("what is it?", "it is a \U0001f600 dog")):
            words = []
            for i, word in enumerate(find_words({"answer": answer})):
                mask = torch.zeros(32, 32, dtype=torch.bool)
                mask[4 + i : 20, 6:22] = True
                maps, numbers = torch.rand(4, 32, 32, generator=draw), [{"entropy": f"{i}.{k}"} for k in range(4)]
                words.append(page.WordMaps(word, maps, numbers, mask, torch.rand(3, 5, 32, 32, generator=draw)))
            texts.append(page.Text(question, answer, words))
        pictures.append(page.Picture(name, Image.effect_noise(size, 60).convert("RGB"), texts))
    path = tmp_path_factory.mktemp("page") / "page.html"
    page.write(path, page.Page("Where they look", "What one sees.", NAMES, pictures, [2, 5, 9]))
    return path


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield launched
        launched.close()


@pytest.fixture
def opened(browser, file):
    """Opens the page; nothing may go wrong in its script, and nothing outside it may be asked for."""
    said, asked, contexts = [], [], []

    def open_(width=1400, height=900, **how):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **how))
        shown = contexts[-1].new_page()
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda request: asked.append(request.url[:5]))
        shown.goto(file.as_uri())
        until(shown, "a")
        return shown

    yield open_
    for context in contexts:
        context.close()
    assert said == [] and set(asked) <= {"file:", "data:"}


def until(shown, word, number=0):
    """Waits until picture `number` shows the maps of a word."""
    shown.wait_for_function(
        "([n, w]) => document.querySelectorAll('.picture')[n].dataset.shown === w", arg=[number, word]
    )


def overlays(shown, number=0):
    """What the canvases over picture `number` hold, the numbers below them, and the outline."""
    return shown.evaluate(
        """(n) => {
            const section = document.querySelectorAll(".picture")[n];
            const all = (what, of) => [...section.querySelectorAll(what)].map(of);
            return [all("canvas", (c) => c.toDataURL()), all("dd", (d) => d.textContent), all(".line", (l) => l.getAttribute("d"))];
        }""",
        number,
    )


def test_the_maps_follow_the_mouse(opened):
    shown = opened()
    canvases, numbers, outlines = overlays(shown)
    other = overlays(shown, 1)
    assert len(set(canvases)) == len(NAMES) + 1 and numbers == ["0.0", "0.1", "0.2", "0.3"]
    shown.locator(".picture").first.get_by_role("button", name="cat").hover()
    until(shown, "cat")
    changed = overlays(shown)
    assert all(a != b for a, b in zip(canvases, changed[0], strict=True))
    assert changed[1] == ["2.0", "2.1", "2.2", "2.3"] and changed[2][0] != outlines[0] != ""
    # The other picture stays as it was; so do the maps when the pointer leaves.
    shown.mouse.move(1, 1)
    assert overlays(shown, 1) == other and overlays(shown) == changed


def test_the_maps_follow_the_keyboard(opened):
    shown = opened()
    before = overlays(shown)
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.textContent") == "a"
    for key, word in (
        ("ArrowRight", "red"),
        ("ArrowLeft", "a"),
        ("ArrowDown", "it"),
        ("ArrowUp", "a"),
        ("End", "dog"),
        ("ArrowRight", "dog"),
        ("Home", "a"),
        ("ArrowRight", "red"),
    ):
        shown.keyboard.press(key)
        until(shown, word)
        assert shown.evaluate("document.activeElement.textContent") == word, key
    after = overlays(shown)
    assert all(a != b for a, b in zip(before[0], after[0], strict=True)) and after[1] == ["1.0", "1.1", "1.2", "1.3"]
    assert "“red”. Stable Diffusion: entropy 1.0" in shown.locator(".said").first.text_content()
    assert [c.get_attribute("aria-label") for c in shown.locator("canvas").all()[:4]] == [
        f"{n}: map of “red”" for n in NAMES
    ]
    # One word of a picture is a stop of the tab key, then layer and head, then the next picture's word.
    stops = []
    for _ in range(3):
        shown.keyboard.press("Tab")
        stops.append(shown.evaluate("document.activeElement.type"))
    assert stops == ["range", "range", "button"]


def test_layers_and_heads_are_leafed_through(opened):
    shown = opened()
    section = shown.locator(".picture").first
    layer, head = section.get_by_role("slider").all()
    seen = [overlays(shown)[0][-1]]
    for slider, label in (
        (layer, "map of “a”, layer 2, head mean"),
        (head, "map of “a”, layer 2, head 0"),
        (head, "map of “a”, layer 2, head 1"),
        (layer, "map of “a”, layer 5, head 1"),
    ):
        slider.press("ArrowRight")
        section.get_by_label(label, exact=True).wait_for()
        seen.append(overlays(shown)[0][-1])
    # Layer and head stay when the word changes.
    section.get_by_role("button", name="cat").hover()
    section.get_by_label("map of “cat”, layer 5, head 1", exact=True).wait_for()
    seen.append(overlays(shown)[0][-1])
    assert len(set(seen)) == len(seen) == 6
    assert (layer.get_attribute("max"), head.get_attribute("max")) == ("3", "5")


def test_a_tap_does_the_same(opened):
    shown = opened(400, 800, has_touch=True, is_mobile=True)
    before = overlays(shown)
    shown.get_by_role("button", name="dog").first.tap()
    until(shown, "dog")
    assert all(a != b for a, b in zip(before[0], overlays(shown)[0], strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_overlaps_and_text_can_be_read(opened, width, scheme):
    shown = opened(width, 800, color_scheme=scheme)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    boxes = shown.evaluate(
        """() => [...document.querySelectorAll("h1, header p, h2, .text, .panel")].map((e) => {
            const r = e.getBoundingClientRect();
            return [e.className || e.tagName, r.left, r.top, r.right, r.bottom];
        })"""
    )
    assert len(boxes) == 3 + 2 * (1 + 2 + 6)
    for i, (name, left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= width and top < bottom, name
        for other in boxes[i + 1 :]:
            apart = (
                right <= other[1] + 0.5 or other[3] <= left + 0.5 or bottom <= other[2] + 0.5 or other[4] <= top + 0.5
            )
            assert apart, (name, other)
    pairs = shown.evaluate(
        """() => ["h1", ".about", "h2", ".question", ".answer", "dt", "dd", ".word", ".word[aria-current]"].map((what) => {
            let element = document.querySelector(what);
            const color = getComputedStyle(element).color;
            while (getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
            return [what, color, getComputedStyle(element).backgroundColor];
        })"""
    )
    for what, text, ground in pairs:
        lights = sorted(luminance(color) for color in (text, ground))
        # WCAG 2, AA.
        assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, (what, text, ground)


def luminance(color):
    """Relative luminance of "rgb(r, g, b)", as WCAG defines it."""
    shares = [int(number) / 255 for number in re.findall(r"\d+", color)[:3]]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
