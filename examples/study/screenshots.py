"""Pictures of TensorBoard's page and of a study's report.

    python examples/study/screenshots.py LOGDIR REPORT.html OUTPUT

Starts TensorBoard on a free port of this machine, opens its tabs and the report in a headless Chromium, and writes
small PNGs into the folder OUTPUT: images, custom-scalars, time-series and report. Nothing is asked of a network.
"""

import argparse
import base64
import fcntl
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

from tqdm import tqdm

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SHOWN = "^(lm loss|vwn/(routing|depth_receptive_field|(independent_segments|depth_window|dynamic_share)/mean))$"
# name -> part of TensorBoard's address, width and height in pixels.
TABS = {
    "images": ("#images", 1500, 1100),
    "custom-scalars": ("#custom_scalars", 1500, 1100),
    "time-series": (f"?tagFilter={quote(_SHOWN)}#timeseries", 1500, 1300),
}
_REPORT_SIZE = 1200, 1500
_SECONDS_TO_START = _SECONDS_TO_ANSWER = 180
_SECONDS_STILL = 2
# Most of TensorBoard's elements are in shadow trees, which document.querySelectorAll does not enter.
_EVERYTHING = """
    function everything(root = document) {
        return [...root.querySelectorAll("*")].flatMap(e => [e, ...(e.shadowRoot ? everything(e.shadowRoot) : [])]);
    }
"""
# How much is on the page, and whether all of its pictures are.
_STATE = """(all => [all.map(e => e.tagName + (e.getAttribute("d") || "").length).join().length,
    all.filter(e => e.tagName == "IMG").every(e => e.complete)])(everything())"""
# Chromium's own conversations with its maker, and what is of no use without a screen.
_QUIET = """
    --headless=new --no-sandbox --disable-gpu --hide-scrollbars --disable-background-networking
    --disable-component-update --disable-sync --no-first-run --disable-default-apps --disable-extensions
"""


class CannotShow(Exception):
    """One sentence: what is missing and what to do."""


def find_browser() -> str:
    """The path of a Chromium.

    Raises:
        CannotShow: there is none.
    """
    for name in BROWSERS:
        if (path := shutil.which(name)) is not None:
            return path
    raise CannotShow(f"no browser was found among {', '.join(BROWSERS)}: install Chromium.")


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """TensorBoard of a folder while the context lasts, with all its data read; gives its address.

    Raises:
        CannotShow: no event files, or TensorBoard does not start.
    """
    if not any(logdir.rglob("*tfevents*")):
        raise CannotShow(f"{logdir} holds no event files: give the --tensorboard-dir of a run, or a folder of some.")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--host", "127.0.0.1", "--port", "0"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([*command, "--load_fast=false"], stdout=said, stderr=subprocess.STDOUT)
        try:
            yield _when_it_answers(process, said)
        finally:
            process.terminate()
            process.wait()


def _when_it_answers(process: subprocess.Popen, said) -> str:
    open_url = build_opener(ProxyHandler({})).open  # not through a proxy that the environment names
    end = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.2)
        said.seek(0)
        if (found := re.search(r"http://\S+:\d+/", said.read())) is None:
            continue
        # Runs appear when they have been read.
        with open_url(f"{found[0]}data/runs") as answer:
            if json.load(answer):
                return found[0]
    said.seek(0)
    raise CannotShow(f"TensorBoard did not start: {' '.join(said.read().split())[-300:] or 'it said nothing'}.")


class Page:
    """One page of a headless Chromium, driven through its debugging pipe while the context lasts.

    Args:
        browser: path of the browser.
        url: what to open.
        width: of the page in pixels.
        height: of the page.

    Raises:
        CannotShow: the browser does not answer.
    """

    def __init__(self, browser: str, url: str, width: int, height: int):
        self._arguments = [browser, *_QUIET.split()]
        self._size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._url, self._number, self._received = url, 0, b""

    def __enter__(self) -> "Page":
        # The browser's last processes may still write while it is removed.
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        # The browser expects them as 3 and 4, which may be taken by one another here.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        self._process = subprocess.Popen(
            [*self._arguments, f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=lambda: [os.dup2(end, number) for number, end in enumerate(theirs, 3)],
        )
        for end in (theirs_in, theirs_out, *theirs):
            os.close(end)
        try:
            (target,) = (t for t in self._ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
            attach = {"targetId": target["targetId"], "flatten": True}
            self._session = self._ask("Target.attachToTarget", **attach)["sessionId"]
            # A window has a frame, whatever its size is said to be.
            self._ask("Emulation.setDeviceMetricsOverride", **self._size)
            self._ask("Page.navigate", url=self._url)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def evaluate(self, expression: str) -> object:
        """The value of a JavaScript expression, in which ``everything()`` gives all elements, of shadow trees too."""
        found = self._ask("Runtime.evaluate", expression=_EVERYTHING + expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise CannotShow(f"{self._url} fails: {found['exceptionDetails']['text']}.")
        return found["result"].get("value")

    def settle(self) -> None:
        """Wait until the page has changed no more for some seconds, and all its pictures are there."""
        end, before, still = time.monotonic() + _SECONDS_TO_ANSWER, None, 0
        while time.monotonic() < end and still < _SECONDS_STILL:
            time.sleep(1)
            now = self.evaluate(_STATE)
            still = still + 1 if now == before and now[1] else 0
            before = now

    def photograph(self) -> bytes:
        """The window as a PNG."""
        return base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"])

    def _ask(self, method: str, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if not method.startswith("Target."):
            message["sessionId"] = self._session
        end = time.monotonic() + _SECONDS_TO_ANSWER
        try:
            os.write(self._to, json.dumps(message).encode() + b"\0")
            while time.monotonic() < end:
                while b"\0" in self._received:
                    text, _, self._received = self._received.partition(b"\0")
                    answer = json.loads(text)
                    if answer.get("id") == self._number and "result" in answer:
                        return answer["result"]
                if select.select([self._from], [], [], 1)[0] and not self._read():
                    break
        except OSError:
            pass
        raise CannotShow(f"{self._arguments[0]} does not answer {method} of {self._url}: try another Chromium.")

    def _read(self) -> bool:
        part = os.read(self._from, 1 << 20)
        self._received += part
        return bool(part)


def photograph(browser: str, url: str, path: Path, width: int, height: int) -> None:
    """Write a picture of a page once it has settled, a whole one or none.

    Raises:
        CannotShow: the browser does not answer.
    """
    with Page(browser, url, width, height) as page:
        page.settle()
        picture = page.photograph()
    partial = path.with_suffix(".part")
    partial.write_bytes(_shrunk(picture))
    partial.replace(path)


def _shrunk(picture: bytes) -> bytes:
    """With fewer colours, where Pillow is there to choose them."""
    if find_spec("PIL") is None:
        return picture
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image, io.BytesIO() as smaller:
        few = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(smaller, "PNG", optimize=True)
        return smaller.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Take the pictures; 0, or 2 where one sentence says why not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("logdir", type=Path, help="event files of one run, or of several in folders")
    parser.add_argument("report", type=Path, help="report.html of vwn-study")
    parser.add_argument("output", type=Path, help="folder of the PNGs, made if need be; files of these names go")
    options = parser.parse_args(argv)
    try:
        browser = find_browser()
        if not options.report.is_file():
            raise CannotShow(f"there is no {options.report}: vwn-study report writes one.")
        options.output.mkdir(parents=True, exist_ok=True)
        with tensorboard(options.logdir) as address:
            for name, (tab, *size) in tqdm(TABS.items(), disable=None):
                photograph(browser, address + tab, options.output / f"{name}.png", *size)
        photograph(browser, options.report.resolve().as_uri(), options.output / "report.png", *_REPORT_SIZE)
    except CannotShow as reason:
        print(f"screenshots: {reason}", file=sys.stderr)
        return 2
    print(f"{', '.join([*TABS, 'report'])}: in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
