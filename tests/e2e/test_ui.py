"""A second run, which is cached; a real browser on its Prefect UI: the pipeline's form, a run started from it, its artifacts."""

import shutil
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser import SLOW_MS, browser_page
from tests.e2e.volume import CACHED, Volume
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow(reason="a real browser on a real server"),
    pytest.mark.timeout(1800),
]

RUN_NAME = "from the form"
"""Until the run starts and gets its own."""


@pytest.fixture
def page() -> Iterator[Page]:
    with browser_page() as page:
        yield page


def test_a_run_is_started_from_its_form_and_completes_with_its_artifacts(volume: Volume, page: Page, tmp_path: Path) -> None:
    again = volume.run("--keep-server")
    assert (again.status, again.states) == (0, CACHED), "a second run of a finished pipeline"
    address = again.ui
    curves = volume.step("train", "curves")
    shutil.rmtree(curves)  # so that the run has something to do, and to show

    page.goto(f"{address}/open#{volume.password}")
    expect(page.get_by_role("link", name="Deployments")).to_be_visible(timeout=SLOW_MS)  # the UI has read the password
    page.goto(f"{address}/deployments")
    page.get_by_placeholder("Search deployments").fill("pipeline")
    expect(page.get_by_text("1 Deployment", exact=True)).to_be_visible(timeout=SLOW_MS)
    page.screenshot(path=tmp_path / "1-deployments.png")
    page.get_by_role("link", name=volume.config.name, exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()

    # a typed form: names, descriptions, values, and what is allowed
    expect(page.get_by_text("The profile's name; appears in the names of runs.")).to_be_visible(timeout=SLOW_MS)
    for label in ("Precompute", "Ablations", "Stage2", "Micro Batch", "volume"):
        assert page.get_by_text(label).count(), label
    page.get_by_text("Run Name", exact=True).locator("xpath=following::input[1]").fill(RUN_NAME)
    page.screenshot(path=tmp_path / "2-form.png", full_page=True)
    run = submit(page)
    assert run["name"] == RUN_NAME

    page.goto("about:blank")  # a page that shows a run as it goes takes a third of a core
    with volume.client() as client:
        wait_until(lambda: client.read_flow_run(run["id"]).state_name == "Completed", "the run", poll_s=0.5)
    page.goto(f"{address}/runs/flow-run/{run['id']}")
    header = page.locator("header.page-heading-flow-run")
    expect(header.get_by_text("Completed")).to_be_visible(timeout=SLOW_MS)
    page.screenshot(path=tmp_path / "3-run.png")
    page.get_by_role("tab", name="Artifacts").or_(page.get_by_text("Artifacts", exact=True)).last.click()
    expect(page.get_by_text("pipeline-table")).to_be_visible(timeout=SLOW_MS)
    page.screenshot(path=tmp_path / "4-artifacts-of-the-run.png")

    page.goto(f"{address}/artifacts/key/train-summary")
    expect(page.get_by_text(f"What train did with profile {volume.config.name}").first).to_be_visible(timeout=SLOW_MS)
    page.goto(f"{address}/artifacts/key/train-curves")
    page.locator("a[href*='/artifacts/artifact/']").first.click()
    picture = page.locator("img[src^='data:image/png']").first
    expect(picture).to_be_visible(timeout=SLOW_MS)
    assert picture.evaluate("image => image.naturalWidth") > 0
    page.screenshot(path=tmp_path / "5-picture.png")
    assert curves.is_dir()


def submit(page: Page, tries: int = 5) -> dict[str, Any]:
    """Press the button; once more where the server says that SQLite was busy."""
    for _ in range(tries):
        with page.expect_response(lambda response: response.url.endswith("/create_flow_run")) as answer:
            page.get_by_role("button", name="Submit").click()
        if answer.value.status != HTTPStatus.SERVICE_UNAVAILABLE:
            break
    assert answer.value.ok, answer.value.text()
    return answer.value.json()
