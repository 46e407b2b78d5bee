"""The page of `vdit serve` in a real browser: Debian's chromium, without a window."""

import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
if not BROWSER or not DRIVER:
    pytest.skip("chromium and chromium-driver are not installed", allow_module_level=True)

import uvicorn  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402
from test_serve import queue, studio, workdir  # noqa: E402, F401

from vdit.serve import guard, requests  # noqa: E402
from vdit.serve.http import application  # noqa: E402
from vdit.serve.queue import Queue  # noqa: E402
from vdit.serve.work import Studio  # noqa: E402

PATIENCE = 600  # seconds: nothing here is about time


@contextlib.contextmanager
def served(studio: Studio, queue: Queue) -> Iterator[str]:  # noqa: F811
    """The address of a server in a thread."""
    app = application(studio, queue, guard.LOCAL)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(studio: Studio, queue: Queue) -> Iterator[str]:  # noqa: F811
    with served(studio, queue) as address:
        yield address


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options: Any = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.binary_location = BROWSER
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    """The page, and what a person does there."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        driver.get(address)
        driver.execute_script("sessionStorage.clear()")
        self.wait("body[data-ready]")  # the wall is there

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, selector: str, count: int = 1) -> list[Any]:
        """Until there are so many."""
        WebDriverWait(self.driver, PATIENCE).until(lambda _: len(self.all(selector)) == count)
        return self.all(selector)

    def write(self, name: str, text: str) -> None:
        (field,) = self.all(f"#{name}")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text or Keys.DELETE)

    def click(self, selector: str) -> None:
        self.all(selector)[0].click()

    def complaints(self) -> list[str]:
        """What the browser says is wrong, but for requests that were refused."""
        said = [line["message"] for line in self.driver.get_log("browser")]
        return [line for line in said if "422" not in line]


def test_a_video_its_extension_and_a_reload(driver: Any, address: str) -> None:
    page = Page(driver, address)
    before = len(page.all(".result"))
    page.write("prompt", "a blue box rests")
    page.write("steps", "2")
    page.write("num", "2")
    page.click("#go")
    page.wait(".result", before + 2)
    page.wait(".job", 0)
    first = page.all(".result")[0]
    assert first.find_element(By.TAG_NAME, "h2").text == "a blue box rests"
    assert "seed 1" in first.text and "The oracle reads" in first.text
    links = [link.text for link in first.find_elements(By.TAG_NAME, "a")]
    assert links == ["MP4", "GIF", "Settings"]
    width = "return arguments[0].videoWidth"
    video = first.find_element(By.TAG_NAME, "video")
    WebDriverWait(driver, PATIENCE).until(lambda _: driver.execute_script(width, video) > 0)
    first.find_elements(By.TAG_NAME, "button")[0].click()  # go on from the last frames
    assert "the last 5 frames" in page.wait("#rows .name")[0].text
    assert page.all("#seed")[0].get_attribute("value") == "1"
    driver.switch_to.active_element.send_keys("a blue box rolls to the left")  # it is the prompt
    driver.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait(".result", before + 3)
    driver.refresh()
    page.wait("body[data-ready]")
    assert "rolls to the left" in page.wait(".result", before + 3)[0].text
    assert not page.complaints()


def test_frames_on_the_timeline_and_errors_beside_their_fields(
    driver: Any, address: str, tmp_path: Path
) -> None:
    page = Page(driver, address)
    Image.new("RGB", (24, 16), (20, 120, 60)).save(tmp_path / "green.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (file,) = page.all("#file")
    file.send_keys(f"{tmp_path / 'notes.txt'}\n{tmp_path / 'green.png'}")
    page.wait(".mark")
    assert "notes.txt" in page.all("#error-given")[0].text
    for _ in range(3):
        page.all(".mark")[0].send_keys(Keys.ARROW_RIGHT)
    assert page.all("#rows .at input")[0].get_attribute("value") == "0.3"
    page.write("size", "16")
    page.write("steps", "0")
    page.write("prompt", "")
    page.click("#go")
    page.wait("[aria-invalid]", 3)
    shown = {error.get_attribute("id"): error.text for error in page.all(".error") if error.text}
    assert shown.keys() == {"error-size", "error-steps", "error-prompt"}
    assert "1 to 10000 is allowed" in shown["error-steps"]
    page.click("#rows button")
    page.wait(".mark", 0)
    assert not page.complaints()


def test_a_request_is_cancelled(driver: Any, address: str) -> None:
    page = Page(driver, address)
    before = len(page.all(".result"))
    page.write("prompt", "a red ball falls")
    page.write("steps", "9000")
    page.click("#go")
    page.wait(".job img")  # a preview of x0
    assert "of 9000" in page.all(".job .said")[0].text
    page.write("steps", "2")
    page.click("#go")
    assert "1 request before this one" in page.wait(".job", 2)[1].text
    page.click(".job button")
    page.wait(".job", 0)
    page.wait(".result", before + 1)
    assert not page.complaints()


def test_shots_of_a_model_that_takes_them(
    driver: Any,
    studio: Studio,  # noqa: F811
    queue: Queue,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requests, "most_shots", lambda config: 2)
    with served(studio, queue) as address:
        page = Page(driver, address)
        for caption in ("a red ball falls", "a red ball rests"):
            page.click("#shot")
            driver.switch_to.active_element.send_keys(caption)
        times = [field.get_attribute("value") for field in page.all("#rows .at input")]
        assert times == ["0", "0.5"]  # where the first one had its middle, on a frame
        bands = [band.text for band in page.wait("#bands div", 2)]
        assert bands == ["1 a red ball falls", "2 a red ball rests"]
        page.write("prompt", "two shots")
        page.write("steps", "2")
        before = len(page.all(".result"))
        page.click("#go")
        first = page.wait(".result", before + 1)[0]
        first.find_elements(By.TAG_NAME, "button")[-1].click()  # same seed, other words
        assert len(page.wait("#bands div", 2)) == 2
        page.click("#rows button")  # the second one does not start at 0
        page.click("#go")
        page.wait("#error-shots:not([hidden])")
        assert "must start at 0" in page.all("#error-shots")[0].text
        assert not page.complaints()


@pytest.mark.parametrize("width", [400, 900, 1500])
def test_it_fits_every_width(driver: Any, address: str, width: int) -> None:
    page = Page(driver, address)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.wait("#go")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
