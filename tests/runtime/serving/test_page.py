"""The page at /, in headless Chromium: a question, its rounds and stages, and its answer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from recmas import SEQUENTIAL
from tests.runtime.scheduling.rows import tiny_system
from tests.runtime.serving.served import served

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture
def browser() -> Iterator[object]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with api.sync_playwright() as playwright:
        path = found or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium is installed")
        sandboxed = os.geteuid() != 0
        opened = playwright.chromium.launch(executable_path=path, chromium_sandbox=sandboxed)
        yield opened
        opened.close()


def test_the_page_shows_rounds_stages_and_latents(browser: api.Browser, tmp_path: Path) -> None:
    system = tiny_system(SEQUENTIAL)
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text("a-key-of-some-length\n")
    with served(system, keys=keys) as server:
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(server.at) or problems.append(request.url))
        page.goto(server.at)
        page.fill("#question", "the lazy dog")
        page.click("#ask")
        api.expect(page.locator("#error")).to_contain_text("no API key")
        page.fill("#key", "a-key-of-some-length")
        page.click("#ask")
        api.expect(page.locator("#usage")).to_contain_text("latent steps", timeout=30_000)
        assert page.text_content("#answer") == system.answer(["the lazy dog"])[0].text
        assert page.locator(".visit.done").count() == 6
        assert page.locator(".visit.done details").count() == 5  # all but the first agent read latents
        assert page.locator("#visit-1-critic details li").count() == 3
        assert "3 latent steps" in (page.text_content("#visit-1-planner .took") or "")
        assert problems == []
