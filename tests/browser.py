"""A page of a real browser: Debian's chromium."""

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"
SLOW_MS = 120_000
"""Of a page on a busy machine; a second on an idle one."""


@contextmanager
def browser_page() -> Iterator[Page]:
    """An empty page."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1400, "height": 1100}, reduced_motion="reduce")  # drawn without a GPU: costly
        page.set_default_timeout(SLOW_MS)
        yield page
        browser.close()
