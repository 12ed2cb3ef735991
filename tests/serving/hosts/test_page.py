"""The page for people: what it says, and how it looks and works in a real browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.serving.models import Models
from support.serving import Server

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def test_the_page_tells_the_state_of_every_model(client: TestClient, models: Models) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "The server is <span" in page.text
    assert ">ready</span>" in page.text
    assert "self-check</dt><dd>passed" in page.text
    models.find("digits")[0].unload("<script>alert(1)</script>\x1b[31m")
    text = client.get("/").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u001b[31m" in text
    assert "<script>alert" not in text
    assert ">not ready</span>" in text


def test_its_parts_are_served(client: TestClient) -> None:
    assert client.get("/page.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/page.css").headers["content-type"].startswith("text/css")
    assert client.get("/page.html").status_code == 404


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; CI installs one")
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 800)])
def test_a_person_tries_an_image_in_a_browser(
    server: Server, predictor: Predictor, digit_files: list[Path], width: int, height: int
) -> None:
    from playwright.sync_api import sync_playwright

    expected = predictor(digit_files[7])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(server.http)
        assert page.locator("h2").first.inner_text() == "digits ready"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.set_input_files("#file", digit_files[7])
        page.click("button")
        page.wait_for_selector("#result p:has-text('score')")
        said = page.locator("#result").inner_text()
        assert f"{expected.pred_class}, score {expected.pred_score:.4f}" in said
        assert page.locator("#result img").evaluate("image => image.naturalWidth") > 0
        page.set_input_files("#file", {"name": "no.png", "mimeType": "image/png", "buffer": b"no image"})
        page.click("button")
        page.wait_for_selector("#result p:has-text('not a readable image')")
        browser.close()
    assert [error for error in errors if "400" not in error] == []
