"""The page of a server in a real browser, as a person uses it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

SECONDS = 20.0
"""For what must happen at some time."""


@contextmanager
def browsing() -> Iterator[webdriver.Chrome]:
    """Chromium without a window; Debian has it in the packages chromium and chromium-driver."""
    places = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    assert all(places.values()), f"apt-get install chromium chromium-driver: {places}"
    options = webdriver.ChromeOptions()
    options.binary_location = str(places["chromium"])
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(places["chromedriver"]))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page, just opened, in a window of this width."""

    def __init__(self, driver: webdriver.Chrome, url: str, width: int = 1400) -> None:
        self.driver = driver
        self.resize(width)
        driver.get(url)
        driver.get_log("browser")  # of pages before

    def resize(self, width: int, dark: bool = False, still: bool = False) -> None:
        """Another width (pixels); `dark` and `still` (no animation) as the person wants it everywhere."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        wishes = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        media = [{"name": name, "value": value} for name, value in wishes.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})

    def __getitem__(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def shown(self, css: str) -> bool:
        return any(element.is_displayed() for element in self.all(css))

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def until(self, true: Callable[[], Any], what: str) -> None:
        """Fails where it does not become true in time."""
        end = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < end, f"{what} did not happen; the page says {self['main'].text!r}"
            time.sleep(0.03)

    def choose(self, task: str | None = None, **files: Path) -> None:
        """Picks files for `a` and `b`, and types the task."""
        for slot, path in files.items():
            self[f"#file-{slot}"].send_keys(str(path))
        if task is not None:
            self["#task"].clear()
            self["#task"].send_keys(task)

    def press(self) -> None:
        self["#go"].click()

    def ask(self, task: str, **files: Path) -> None:
        """Picks, types, presses, and waits for the curve."""
        before = self.run("return state.recent.length")
        self.choose(task, **files)
        self.press()
        self.until(lambda: self.run("return state.recent.length") > before, "an answer")
        self.until(lambda: self.all(".chart .ahead polyline"), "a curve")

    def problem(self) -> str:
        """The sentence of an error, when there is one."""
        self.until(lambda: self["#problem"].text, "an error")
        return self["#problem"].text

    @property
    def moment(self) -> float:
        """Where the playhead stands, in seconds."""
        return float(self[".chart"].get_attribute("aria-valuenow") or "nan")

    def video_times(self) -> list[float]:
        return list(
            self.run("return [...document.querySelectorAll('#result video')].map((video) => video.currentTime)")
        )

    def point(self, part: float) -> ActionChains:
        """The mouse, moved to this part of the chart's time."""
        chart = self[".chart"]
        left, right = self.run("return [state.view.chart.left, state.view.chart.right]")
        x = left + part * (right - left) - chart.size["width"] / 2
        return ActionChains(self.driver, duration=20).move_to_element_with_offset(chart, round(x), 0)

    def complaints(self) -> list[str]:
        """What the browser holds against the page."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
