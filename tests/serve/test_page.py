"""The web page in a real browser: a video is dropped, asked about before and after, in every mode; the answer streams, the gaze moves."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from benchmarks.chat_server import running
from fvlm_core.serve.app import create_app
from fvlm_core.serve.batched_decoding import Sampling
from fvlm_core.serve.session import Session, open_media

pytestmark = [pytest.mark.slow(reason="a real browser"), pytest.mark.timeout(300)]

CHROMIUM = "/usr/bin/chromium"
SLOW_MS = 60_000
DROP = """([content, name]) => {
    const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([bytes], name, { type: "video/mp4" }));
    document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: files, cancelable: true, bubbles: true }));
}"""
"""What a browser does when a file is dropped."""
SHOWN = """() => [document.getElementById("caption").textContent, document.getElementById("look").toDataURL()]"""
"""Caption and picture of the same frame: read one after the other, a new frame could come in between."""
BLANK = """() => ["look", "entropy"].every((id) => {
    const canvas = document.getElementById(id);
    return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.every((value) => value === 0);
})"""


@pytest.fixture(scope="module")
def address(answerer) -> Iterator[str]:
    with running(create_app(answerer, api_key="secret")) as url:
        yield url


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme="light")
        page.set_default_timeout(SLOW_MS)
        yield page
        browser.close()


def drop(page: Page, path: Path) -> None:
    page.evaluate(DROP, [base64.b64encode(path.read_bytes()).decode(), path.name])
    expect(page.locator("#dropped")).to_have_text(path.name)


def test_a_dropped_video_is_asked_about_and_the_gaze_moves(page: Page, address: str, answerer, root: Path, tmp_path: Path) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if "Content Security Policy" in message.text else None)
    page.goto(address)
    expect(page.locator("#about")).to_have_text("the API key is missing or wrong")
    page.get_by_text("API key", exact=True).click()
    page.locator("#key").fill("secret")
    page.locator("#key").blur()
    expect(page.locator("#about")).to_contain_text(answerer.name)
    assert page.locator("#mode option").evaluate_all("all => all.map(one => one.value)") == list(answerer.subject.model.modes)
    expect(page.locator("#ask")).to_be_disabled()
    drop(page, root / "clip.mp4")

    session = Session(answerer, open_media(root / "clip.mp4", answerer))
    for first, mode in ((True, "coarse_fine"), (False, "autoregressive")):
        page.get_by_label("before the video" if first else "after the video").check()
        page.locator("#mode").select_option(mode)
        page.locator("#question").fill("Which digits?")
        page.locator("#ask").click()
        answer = page.locator("#talk .answer").last
        expect(answer).to_have_class("answer")
        said = "".join(session.ask("Which digits?", mode=mode, question_first=first, sampling=Sampling()))
        assert answer.text_content() == said
        expect(page.locator("#caption")).to_contain_text("of 5, entropy of the gaze")
        caption, picture = page.evaluate(SHOWN)
        expect(page.locator("#caption")).not_to_have_text(caption)  # it moves by itself
        assert page.evaluate(SHOWN)[1] != picture
        page.screenshot(path=tmp_path / f"{mode}.png", full_page=True)
    page.locator("#where").fill("3")
    expect(page.locator("#caption")).to_contain_text("frame 4 of 5")

    page.locator("#file").set_input_files({"name": "broken.mp4", "mimeType": "video/mp4", "buffer": b"no video"})
    expect(page.locator("#caption")).to_contain_text("Here the frames appear")
    assert page.evaluate(BLANK)
    expect(page.locator("#where")).to_be_disabled()
    expect(page.locator("#where")).to_have_value("0")
    page.locator("#ask").click()
    expect(page.locator("#talk .failed")).to_contain_text("not a video of a known format")
    assert not errors
    page.set_viewport_size({"width": 390, "height": 800})
    page.emulate_media(color_scheme="dark")
    drop(page, root / "clip.mp4")
    page.locator("#ask").click()
    expect(page.locator("#caption")).to_contain_text("frame 2 of 5")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    assert not page.evaluate(BLANK)
    page.locator("#file").set_input_files({"name": "other.mp4", "mimeType": "video/mp4", "buffer": (root / "clip.mp4").read_bytes()})
    page.wait_for_timeout(1500)  # two frames of the previous clip would be drawn
    assert page.evaluate(BLANK)
    expect(page.locator("#talk p")).to_have_count(0)
