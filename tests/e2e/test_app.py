"""`python -m stages.app` in a real browser, over a tiny run: chromium of this system, driven by playwright."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from stages.sample import main

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest.importorskip("gradio", minversion="6")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"),
]
REPO = Path(__file__).resolve().parents[2]
PATIENCE = 300_000  # ms: machines that test are busy
WRONG: list[str] = []  # what pages asked of other places, and their errors


@dataclass(frozen=True)
class App:
    address: str
    folder: Path

    def results(self) -> list[Path]:
        return sorted(self.folder.glob("results/*/*/page.json"))


@pytest.fixture(scope="module")
def app(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("page") / "app"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "stages.app", str(home / "flow"), str(home / "iddpm"), "--out", str(folder)]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu"], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith(f"http://127.0.0.1:{port}/ shows flow, iddpm; results are in {folder}")
        yield App(line.split()[0], folder)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser: Browser, app: App) -> Page:
    """One browser's page, which the tests go on with: to load it takes longer than what they do."""
    return opened(browser.new_context(), app)


def opened(context: Any, app: App) -> Page:
    """The page, once it answers; what it asks of other places, or complains of, is noted."""
    own = (app.address, "data:", "blob:")
    page: Page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("request", lambda request: None if request.url.startswith(own) else WRONG.append(request.url))
    page.on("pageerror", lambda error: WRONG.append(str(error)))
    page.on("console", lambda line: WRONG.append(line.text) if line.type == "error" else None)
    page.goto(app.address)
    page.wait_for_selector("#prompt textarea")
    page.wait_for_function("localStorage.getItem('opensora-repro')")  # the page knows this browser
    return page


@pytest.fixture(autouse=True)
def nothing_wrong() -> Iterator[None]:
    yield
    assert not WRONG


def ask(page: Page, prompt: str, *, steps: int = 3) -> None:
    page.fill("#prompt textarea", prompt)
    if not page.is_visible("#steps input"):
        page.click("#more button")
    page.fill("#steps input", str(steps))
    page.fill("#seed textarea, #seed input", "7")
    page.evaluate("window.before = document.querySelector('#result figure')?.dataset.result")
    page.click("#generate")


def finished(page: Page, count: int = 1) -> list[str]:
    """Ids of the results that are shown, once they are others and Generate is there again."""
    page.wait_for_function(
        """count => {
            const shown = document.querySelectorAll('#result figure')
            return shown.length == count && shown[0].dataset.result != window.before
        }""",
        arg=count,
    )
    page.wait_for_selector("#generate")
    return [str(figure.get_attribute("data-result")) for figure in page.query_selector_all("#result figure")]


def test_a_prompt_becomes_a_video_that_plays(page: Page, home: Path, tmp_path: Path) -> None:
    prompt = "a red circle ${1+1} {{value}} <b>moving</b> left"
    ask(page, prompt)
    [name] = finished(page)
    page.wait_for_function("document.querySelector('#result video').currentTime > 0.1")  # it plays
    assert page.evaluate("document.querySelector('#result video').duration") == pytest.approx(0.75)
    assert page.inner_text("#result figcaption") == prompt
    shown = page.request.get(page.evaluate("document.querySelector('#result video').src")).body()
    words = ["--prompt", prompt, "--seed=7", "--steps=3", "--device=cpu", "--out", str(tmp_path / "out")]
    assert main([str(home / "flow"), *words]) == 0
    assert shown == (tmp_path / "out" / "0000.mp4").read_bytes()
    page.reload()
    page.click("#gallery button:has(img)")  # it is on the disk, with all settings
    page.wait_for_selector(f"#result figure[data-result='{name}']")
    page.click("#again")
    page.wait_for_function("text => document.querySelector('#prompt textarea').value == text", arg=prompt)


@pytest.mark.exhaustive
def test_a_first_frame_is_uploaded_and_its_video_extended(page: Page, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("#EXTM3U\nfile:///etc/passwd")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "first.png")
    page.click("#given button")
    page.set_input_files("#given input[type=file]", tmp_path / "bad.png")
    page.wait_for_selector("#given .problem")
    assert page.inner_text("#given .problem").startswith("bad.png: this is a playlist")
    page.set_input_files("#given input[type=file]", tmp_path / "first.png")
    page.wait_for_selector("#given .timeline .given[title='first.png: frames 0 to 0']")
    ask(page, "a blue square moving up")
    finished(page)
    assert "frames 0 to 0 from" in str(page.text_content("#result li"))
    page.click("#extend")
    page.wait_for_selector("#given .timeline .given[title='an earlier result: frames 0 to 0']")
    ask(page, "a blue square moving down")
    finished(page)
    assert "frames 0 to 0 from 0000.mp4" in str(page.text_content("#result li"))
    page.click("#given button:text('Remove')")
    page.wait_for_selector("#given .timeline", state="detached")


@pytest.mark.exhaustive
def test_stop_ends_the_sampler(page: Page, app: App) -> None:
    before = app.results()
    ask(page, "a green triangle", steps=1000)
    page.wait_for_selector("#status img.estimate")  # what is foreseen
    page.click("#stop")
    page.wait_for_selector("#status :text('Stopped')")
    assert app.results() == before
    page.wait_for_selector("#generate")
    ask(page, " ")
    page.wait_for_selector("#status .problem:text('prompt: prompt 1 is empty')")


@pytest.mark.exhaustive
def test_two_settings_stand_side_by_side_and_two_browsers_do_not_mix(browser: Browser, page: Page, app: App) -> None:
    other, before = opened(browser.new_context(), app), page.locator("#gallery button:has(img)").count()
    page.click("#compare button")
    page.check("#compare input[type=checkbox]")
    page.fill("#compare textarea >> nth=0", "a blue square moving up")
    ask(page, "a red circle moving left")
    ask(other, "a green triangle moving down")
    mine, theirs = finished(page, 2), finished(other)
    texts = [figure.inner_text() for figure in page.query_selector_all("#result figcaption")]
    assert texts == ["a red circle moving left", "a blue square moving up"]
    assert other.inner_text("#result figcaption") == "a green triangle moving down"
    assert not set(mine) & set(theirs)
    other.wait_for_selector("#gallery button:has(img)")
    assert len(other.query_selector_all("#gallery button:has(img)")) == 1
    page.wait_for_function(f"document.querySelectorAll('#gallery button:has(img)').length == {before + 2}")


def test_nothing_outside_of_its_folder_is_given_out(app: App, home: Path) -> None:
    def status(path: str, **headers: str) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(app.address + path, headers=headers)) as answer:
                assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert status("") == 200
    assert status("", Host="somewhere.example") == 400
    for path in ("/etc/passwd", str(home / "flow" / "config.toml"), f"{app.folder}/results/../../../passwd"):
        assert status(f"gradio_api/file={path}") == 403
    assert status("gradio_api/file=http://127.0.0.1/") == status("gradio_api/proxy=http://127.0.0.1/") == 404
