"""The page at /: driven in Chromium against a real server, with real videos."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from browsing import Page, browsing
from running import Running, serving
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from rbm.scoring import Scorer, Scores
from rbm.video import encode_video

TASK = "open the drawer"
TOKEN = "a-token"


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    with browsing() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def guarded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that wants a token and takes one request at a time."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    with serving(log, "limits.queue=1", "limits.body_bytes=3000000", checkpoint=tiny, token=TOKEN) as running:
        yield running


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, clip_of: Callable[..., np.ndarray]) -> Path:
    """A video of 40 frames, 2.67 s."""
    path = tmp_path_factory.mktemp("videos") / "short.mp4"
    encode_video(path, clip_of(2, 40), fps=15)
    return path


@pytest.fixture
def page(driver: webdriver.Chrome, server: Running) -> Iterator[Page]:
    page = Page(driver, server.url)
    yield page
    assert page.complaints() == []


def drawn(page: Page) -> list[np.ndarray]:
    """The curves of the chart as numbers, 0 to 1, one for each frame; first panel only."""
    points = page.run("return [...document.querySelectorAll('.ahead polyline')].map((p) => p.getAttribute('points'))")
    zero = page.run("return Number(document.querySelector('.chart line.axis').getAttribute('y1'))")
    one = page.run(
        "return Math.min(...[...document.querySelectorAll('.chart line.grid')].map((l) => l.getAttribute('y1')))"
    )
    curves = [np.array([pair.split(",") for pair in line.split()], float) for line in points]
    assert all((np.diff(curve[:, 0]) > 0).all() for curve in curves)
    return [(zero - curve[:, 1]) / (zero - one) for curve in curves]


def said(scores: Scores, i: int) -> str:
    numbers = [round(float(x[i]) * 100) for x in (scores.progress, scores.progress_std, scores.success)]
    return "progress {} ± {} %, success {} %".format(*numbers)


def test_a_video_is_scored_and_its_curve_runs_along_with_it(page: Page, own: Scorer, video_path: Path) -> None:
    page.until(lambda: page["#model"].text == "nano · looks at 6 frames · cpu", "the model's name")
    page.ask(TASK, a=video_path)
    looked_at = own.score(video_path, TASK)
    scores = looked_at.dense()
    progress, success = drawn(page)
    np.testing.assert_allclose(progress, scores.progress, atol=0.01)
    np.testing.assert_allclose(success, scores.success, atol=0.01)
    assert len(page.all(".chart polygon.band")) == 1
    assert f"{scores.progress[-1] * 100:.0f} %" in page[".facts"].text
    assert f"{scores.success[-1] * 100:.0f} %" in page[".facts"].text
    assert {f"progress {scores.progress[-1] * 100:.0f} %", "0 s", "5 s", "100 %"} <= {
        x.text for x in page.all(".chart text")
    }
    done, ends_well = looked_at.done_at(), scores.success[-1] >= 0.5
    if done is None:
        assert page["#verdict"].text == ("Done at the very end" if ends_well else "Not done")
    else:
        when = f"{looked_at.timestamp[done]:.2f} s"
        assert page["#verdict"].text == (f"Done at {when}" if ends_well else "Done, then undone")
        assert f"done {when}" in {x.text for x in page.all(".chart text")}
        assert f"at frame {looked_at.frame_index[done]}, 3 of 5 frames looked at" in page[".why p"].text
    assert TASK in page[".why p"].text
    assert page["#verdict"].text in page["#status"].get_attribute("textContent")  # heard as well as seen

    page.until(lambda: page.moment > 0.5, "playing")
    times = page.run("return [state.view.player.t, document.querySelector('#result video').currentTime]")
    assert abs(times[0] - times[1]) < 0.2
    page[".play"].click()
    page.until(lambda: page[".play"].text == "Play", "a pause")
    assert abs(page.moment - page.video_times()[0]) < 0.2
    assert abs(float(page[".readout b"].text.removesuffix(" s")) - page.moment) < 0.006


def test_the_chart_moves_the_video(page: Page, own: Scorer, video_path: Path) -> None:
    page.resize(1400, still=True)  # does not begin to play by itself
    page.ask(TASK, a=video_path)
    scores = own.score(video_path, TASK).dense()
    last = float(scores.timestamp[-1])

    def stands_at(moment: float) -> None:
        page.until(lambda: abs(page.moment - moment) < 0.03 and abs(page.video_times()[0] - moment) < 0.03, f"{moment}")

    page.point(0.25).click().perform()
    stands_at(0.25 * last)
    page.point(0.5).click_and_hold().perform()
    page.point(0.75).perform()
    stands_at(0.75 * last)
    page.point(0.6).release().perform()
    stands_at(0.6 * last)
    page.point(0.1).perform()  # only hovers
    i = int(np.searchsorted(scores.timestamp, 0.1 * last, "right")) - 1
    assert page[".tip"].text.replace("\n", ", ").endswith(f"frame {i}, {said(scores, i)}")
    stands_at(0.6 * last)

    chart = page[".chart"]
    assert (chart.aria_role, chart.accessible_name) == ("slider", "Moment of the video")
    chart.send_keys(Keys.HOME)
    assert chart.get_attribute("aria-valuetext") == f"0.00 s: {said(scores, 0)}"
    chart.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    stands_at(float(scores.timestamp[2]))
    assert (chart.get_attribute("aria-valuetext") or "").endswith(said(scores, 2))
    chart.send_keys(Keys.END)
    stands_at(last)
    chart.send_keys(Keys.SPACE)  # from its start again
    page.until(lambda: 0 < page.moment < last / 2, "playing")


def test_two_attempts_on_one_time_axis(page: Page, own: Scorer, video_path: Path, short: Path) -> None:
    page["#tab-score"].send_keys(Keys.ARROW_RIGHT)
    page.ask(TASK, a=video_path, b=short)
    p = own.compare(video_path, short, TASK)
    a, b = (own.score(path, TASK).dense() for path in (video_path, short))
    for curve, scores in zip(drawn(page), (a, b), strict=False):
        np.testing.assert_allclose(curve, scores.progress, atol=0.015)
    assert len(page.all(".ahead polyline")) == 4  # two of progress, two of success
    assert page[".split"].text.split("\n") == [f"A {p * 100:.0f} %", f"B {100 - round(p * 100)} %"]
    winner = "About equally good" if abs(p - 0.5) < 0.05 else f"{'A' if p > 0.5 else 'B'} is "
    assert page["#verdict"].text.startswith(winner)
    rows = [row.text for row in page.all("tbody tr")]
    assert [
        f"{x.progress[-1] * 100:.0f} % ± {x.progress_std[-1] * 100:.0f}" in row
        for x, row in zip((a, b), rows, strict=True)
    ]
    page[".play"].click()
    page.point(0.2).click().perform()
    moment = 0.2 * float(a.timestamp[-1])
    page.until(lambda: np.abs(np.array(page.video_times()) - moment).max() < 0.6, "both videos there")
    page.point(0.9).click().perform()  # the shorter one stays at its end
    page.until(lambda: page.video_times()[0] > 5 and 2.4 < page.video_times()[1] < 2.7, "both videos there")


def test_recent_results_come_back(page: Page, video_path: Path, short: Path, tmp_path: Path) -> None:
    page.ask("close the drawer", a=short)
    assert not page.shown("#recent")
    page.ask(TASK, a=video_path)
    assert [video_path.name in text.text for text in page.all("#recent li")] == [True, False]
    page.all("#recent button")[1].click()
    assert page["#result figcaption"].text == short.name
    assert page["#task"].get_attribute("value") == "close the drawer"
    assert [button.get_attribute("aria-current") for button in page.all("#recent button")] == ["false", "true"]
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page[".below button"].click()
    saved = tmp_path / "short.scores.json"
    page.until(saved.exists, "a download")
    assert len(json.loads(saved.read_text())["scores"][0]["progress"]) == 6


def test_files_may_be_dropped_anywhere(page: Page, video_path: Path, short: Path) -> None:
    page["#tab-compare"].click()
    files = [str(video_path), str(short)]
    for kind in ("dragEnter", "dragOver", "drop"):
        data = {"items": [], "files": files, "dragOperationsMask": 1}
        page.driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "x": 700, "y": 700, "data": data})
    page.until(lambda: page["#drop-a .file"].text == video_path.name, "the first file")
    assert page["#drop-b .file"].text == short.name
    page.ask(TASK)


def test_what_is_missing_is_said_before_anything_is_sent(page: Page, short: Path) -> None:
    page.press()
    assert "drop a video" in page.problem()
    assert page.driver.switch_to.active_element == page["#file-a"]
    page.choose("  ", a=short)
    page.press()
    page.until(lambda: page.driver.switch_to.active_element == page["#task"], "the focus")
    assert "what the robot should do" in page.problem()


def test_a_broken_file_is_a_sentence(driver: webdriver.Chrome, server: Running, short: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(short.read_bytes()[:2000])
    page = Page(driver, server.url)
    page.choose(TASK, a=broken)
    page.press()
    assert re.fullmatch(r"No frame of the upload can be decoded.*[.?]", page.problem())
    assert page["#problem"].aria_role == "alert"
    assert page["#go"].is_enabled()
    page.ask(TASK, a=short)
    assert not page.shown("#problem")


def test_what_the_browser_cannot_play_has_its_curve(
    page: Page, own: Scorer, clip_of: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    frames = clip_of(3, 30, 48, 64)
    np.save(tmp_path / "frames.npy", frames)
    with av.open(str(tmp_path / "old.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    for name, sentence in (("old.mp4", "This browser cannot play the file"), ("frames.npy", "no player here")):
        page.ask(TASK, a=tmp_path / name)
        page.until(lambda sentence=sentence: sentence in page[".screen"].text, "a sentence")
        np.testing.assert_allclose(
            drawn(page)[0],
            own.score(str(tmp_path / name) if "mp4" in name else frames, TASK).dense().progress,
            atol=0.01,
        )
        page.until(lambda: page.moment > 0.3, "the playhead, by itself")


def test_the_token_is_asked_for_and_kept(driver: webdriver.Chrome, guarded: Running, short: Path) -> None:
    page = Page(driver, guarded.url)
    page.until(lambda: page.shown("#token-form"), "the question for the token")
    assert page["#token"].accessible_name == "Token"
    page.choose(TASK, a=short)
    page.press()
    page.until(lambda: page.driver.switch_to.active_element == page["#token"], "the focus")
    page["#token"].send_keys("wrong", Keys.ENTER)
    page.until(lambda: "did not take this token" in page["#token-why"].text, "a refusal")
    page["#token"].send_keys(TOKEN, Keys.ENTER)
    page.until(lambda: page.all(".ahead polyline"), "the answer to what was asked before")
    assert not page.shown("#token-form")
    assert TOKEN not in page.run(
        "return document.documentElement.outerHTML + JSON.stringify([localStorage, document.cookie])"
    )


def test_a_busy_server_is_asked_again_and_patience_may_end(
    driver: webdriver.Chrome, guarded: Running, short: Path, clip_of: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    page = Page(driver, guarded.url)
    page.until(lambda: page.shown("#token-form"), "the question for the token")
    page["#token"].send_keys(TOKEN, Keys.ENTER)
    page.until(lambda: not page.shown("#token-form"), "entrance")
    np.save(tmp_path / "large.npy", np.zeros((40, 300, 300, 3), np.uint8))
    page.choose(TASK, a=tmp_path / "large.npy")
    page.press()
    assert "11 MB, the server takes 3.0 MB" in page.problem()

    worker = guarded.child("worker")
    os.kill(worker, signal.SIGSTOP)
    try:
        page.choose(a=short)
        page.press()
        page.until(lambda: page["#phase"].text == "The model is looking", "waiting")
        assert not page["#go"].is_enabled()
        page["#cancel"].click()
        page.until(lambda: page["#go"].is_enabled() and not page.shown("#busy"), "an end")
        assert page["#status"].get_attribute("textContent") == "Cancelled."
        assert not page.shown("#problem")
        assert not page.shown("#result")

        headers = {"authorization": f"Bearer {TOKEN}"}
        files = {"video": ("short.mp4", short.read_bytes())}
        other = threading.Thread(
            target=httpx.post,
            args=(guarded.url + "/v1/score",),
            kwargs={"headers": headers, "files": files, "data": {"task": TASK}, "timeout": 60},
        )
        other.start()
        page.until(lambda: "waiting" in httpx.get(guarded.url + "/metrics", headers=headers).text, "metrics")
        page.press()
        page.until(lambda: re.search(r"Trying again \(\d of \d\)", page["#phase"].text), "a note")
        assert re.fullmatch(r"in \d+ s", page["#amount"].text)
    finally:
        os.kill(worker, signal.SIGCONT)
    page.until(lambda: page.all(".ahead polyline"), "an answer in the end")
    other.join(30)
    assert not other.is_alive()


def test_an_upload_shows_how_far_it_is(page: Page, clip_of: Callable[..., np.ndarray], tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", clip_of(4, 40, 96, 96))
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 800_000}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    try:
        page.choose(TASK, a=tmp_path / "frames.npy")
        page.press()
        page.until(lambda: page.run("return document.getElementById('bar').position") > 0.2, "a part of the upload")
        assert page["#phase"].text == "Sending frames.npy"
        assert re.fullmatch(r"\d+ %", page["#amount"].text)
        page["#cancel"].click()
        page.until(lambda: not page.shown("#busy"), "an end")
    finally:
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**slow, "uploadThroughput": -1})
        page.driver.execute_cdp_cmd("Network.disable", {})


def test_a_server_that_is_gone_is_said(driver: webdriver.Chrome, tiny: Path, short: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", checkpoint=tiny) as running:
        page = Page(driver, running.url)
        page.until(lambda: "nano" in page["#model"].text, "the model's name")
    page.choose(TASK, a=short)
    page.press()
    assert "Is the server running" in page.problem()


@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits_the_window(page: Page, width: int, short: Path, video_path: Path) -> None:
    page.resize(width)
    for tab, files in (("score", {"a": short}), ("compare", {"a": short, "b": video_path})):
        page[f"#tab-{tab}"].click()
        page.ask(TASK, **files)
        outside = page.run(
            "return [...document.querySelectorAll('body *')].filter((e) => !e.closest('.unseen, .tip') && "
            "e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 200))"
        )
        assert outside == []
        assert page.run("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("dark", [False, True])
def test_colours_have_contrast(page: Page, dark: bool) -> None:
    page.resize(1400, dark=dark)
    names = [
        "--paper",
        "--card",
        "--raised",
        "--wash",
        "--ink",
        "--soft",
        "--blue",
        "--green",
        "--orange",
        "--bad",
        "--bad-wash",
        "--on-blue",
        "--edge",
    ]
    found = page.run(
        "const style = getComputedStyle(document.documentElement);"
        "return arguments[0].map((name) => style.getPropertyValue(name).trim())",
        names,
    )
    light = {name: luminance(value) for name, value in zip(names, found, strict=True)}
    assert (light["--paper"] < 0.1) == dark
    texts = [(text, ground) for text in ("--ink", "--soft") for ground in ("--paper", "--card", "--raised", "--wash")]
    texts += [(curve, "--card") for curve in ("--blue", "--green", "--orange")]
    texts += [("--bad", "--bad-wash"), ("--on-blue", "--blue")]
    for over, ground, least in [(*pair, 4.5) for pair in texts] + [("--edge", "--card", 3.0)]:
        high, low = sorted((light[over], light[ground]), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= least, (over, ground)


def luminance(colour: str) -> float:
    """Of #rgb or #rrggbb, as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_everything_has_a_name(page: Page, short: Path) -> None:
    page.ask(TASK, a=short)
    for control in page.all("button, input, select, [role=slider], #result video"):
        if page.run("return arguments[0].checkVisibility()", control):
            assert control.accessible_name, control.get_attribute("outerHTML")
    names = [page[css].accessible_name for css in ("#task", "#go", ".play", "#tab-compare", "#form", "#result")]
    assert names[:5] == ["Task, as the robot was told", "Score", page[".play"].text, "Compare two", "Score one"]
    assert names[5] == page["#verdict"].text


def test_the_policy_allows_the_page_alone(page: Page, server: Running) -> None:
    answer = server.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in policy
    assert not re.search(r"unsafe|\*", policy)
    assert set(re.findall(r"https?://[^'\" )]+", answer.text)) == {"http://www.w3.org/2000/svg"}
    page.run("setTimeout(() => { try { eval('1'); window.said = 'ran' } catch (error) { window.said = error.name } })")
    page.until(lambda: page.run("return window.said"), "eval")
    assert page.run("return window.said") == "EvalError"
    inline = "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
    page.run(f"try {{ {inline} }} catch {{}}")
    assert page.run("return window.ran === undefined")
    page.run("return fetch('http://localhost:9/').catch(() => 0)")
    assert len([text for text in page.complaints() if "Content Security Policy" in text]) >= 2
