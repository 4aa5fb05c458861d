"""Writes docs/images/serve.png: the server's page, as Chromium shows it for an attempt of the bundled corpus.

PYTHONPATH=tests:tests/scoring/server .venv/bin/python tests/benchmarks/picture_of_page.py
"""

import tempfile
from io import BytesIO
from pathlib import Path

from browsing import Page, browsing
from PIL import Image
from running import serving

from rbm.assets import bundled_corpus
from rbm.corpus import Corpus
from rbm.trajectory import Quality
from rbm.video import encode_video

TASK = "open the faucet"
TARGET = Path(__file__).parents[2] / "docs" / "images" / "serve.png"


def main() -> None:
    corpus = Corpus.open(bundled_corpus())
    row = next(i for i in range(len(corpus)) if (corpus[i].task, corpus[i].quality) == (TASK, Quality.SUCCESSFUL))
    with tempfile.TemporaryDirectory() as folder, browsing() as driver:
        video = Path(folder, "attempt.mp4")
        encode_video(video, corpus[row].frames(), fps=12)
        with serving(Path(folder, "log")) as server:
            page = Page(driver, server.url, width=1180)
            page.ask(TASK, a=video)
            page.until(lambda: page.moment > 0, "the video")
            if page[".play"].text == "Pause":
                page[".play"].click()
            page.run("state.view.player.seek(4.0)")
            page.until(lambda: abs(page.moment - 4.0) < 0.1, "a moment in the middle")
            height = page.run("return document.documentElement.scrollHeight")
            size = {"width": 1180, "height": height, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            picture = Image.open(BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    picture.quantize(256).save(TARGET, optimize=True)
    print(TARGET)


if __name__ == "__main__":
    main()
