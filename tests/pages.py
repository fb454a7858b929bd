"""Open every page of the built book in headless Chromium and look for faults.

    python tests/pages.py [--screenshots DIR] [--axe axe.min.js] [PAGE ...]

A script, not a test that pytest collects: it needs Chromium, chromedriver and a built book.
A page fails on a request to another origin, a message of error on the console, a script exception,
a page wider than a screen of 360 px, an image without alternative text, a button that is pressed
and loses the focus, or, where a copy of
axe-core is named, a violation that axe finds in the light or the dark theme.
"""

import argparse
import functools
import http.server
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HTML = Path(__file__).resolve().parent.parent / "book" / "_build" / "html"
WIDE, NARROW = (1400, 1000), (360, 740)
THEMES = ("light", "dark")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
FLAGS += ["--disable-background-networking", "--no-first-run", "--hide-scrollbars"]

# End what moves, and wait until MathJax, where the page has it, has set the formulas.
SETTLED = """
const done = arguments[0];
const still = document.createElement("style");
still.textContent =
  "*, ::before, ::after { transition: none !important; animation: none !important; }";
document.head.append(still);
const math = window.MathJax && window.MathJax.startup && window.MathJax.startup.promise;
Promise.resolve(math).then(() => document.fonts.ready).then(() => setTimeout(
  () => requestAnimationFrame(() => requestAnimationFrame(done)), 100));
"""
WIDEST = """
const limit = window.innerWidth;
if (document.documentElement.scrollWidth <= limit) return null;
const scrolls = node => node && node !== document.body &&
  (getComputedStyle(node).overflowX !== "visible" || scrolls(node.parentElement));
const wide = [...document.querySelectorAll("body *")].filter(
  node => node.getBoundingClientRect().right > limit + 1 && !scrolls(node.parentElement));
const name = node => node.tagName.toLowerCase() + "." + [...node.classList].join(".");
return document.documentElement.scrollWidth + " px: " + wide.slice(0, 3).map(name).join(", ");
"""
NO_ALT = """
return [...document.querySelectorAll("img:not([alt])")].map(node => node.getAttribute("src"));
"""
# The buttons that are pressed, one of each kind, and do not have the focus afterwards.
LOST = """
const done = arguments[0];
const kinds = ["button.copybtn", "button.theme-switch-button"];
const buttons = kinds.map(kind => document.querySelector(kind)).filter(Boolean);
(async () => {
  const lost = [];
  for (const button of buttons) {
    button.focus();
    if (document.activeElement !== button) continue;  // hidden here
    button.click();
    await new Promise(next => setTimeout(next, 500));
    if (document.activeElement !== button) lost.push(button.classList[0]);
  }
  localStorage.clear();  // the theme that was chosen
  done(lost);
})();
"""
AXE = """
const done = arguments[0];
axe.run(document, {resultTypes: ["violations"]}).then(result => done(result.violations.map(
  one => one.id + " (" + one.nodes.length + "): " + one.nodes[0].target.join(" "))));
"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve files without a line on standard error for each."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on the loopback interface; yield its origin."""
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium with an empty profile; yield its driver."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(path for name in BROWSERS if (path := shutil.which(name)))
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield driver
        finally:
            driver.quit()


def show(driver: Any, size: tuple[int, int], theme: str) -> None:
    """Set the size of the screen and the theme that the system prefers."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wanted = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wanted.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def foreign_requests(driver: Any, origin: str) -> list[str]:
    """List the requests since the last call that went to another origin."""
    own = (origin, "data:", "blob:", "about:", "chrome:", "chrome-extension:", "devtools:")
    found = []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
            parameters = message["params"]
            url = parameters["request"]["url"] if "request" in parameters else parameters["url"]
            if not url.startswith(own):
                found.append(f"requests {url}")
    return found


def inspect(driver: Any, origin: str, page: str, axe: str, pictures: Path | None) -> list[str]:
    """Load one page in each size and theme; return its faults."""
    faults = []
    for theme in THEMES:
        for size in (WIDE, NARROW):
            show(driver, size, theme)
            driver.get(f"{origin}/{page}")
            driver.execute_async_script(SETTLED)
            where = f"{size[0]} px, {theme}"
            faults += foreign_requests(driver, origin)
            for entry in driver.get_log("browser"):
                if entry["level"] == "SEVERE":
                    faults.append(f"console: {entry['message']}")
            if size is NARROW and (widest := driver.execute_script(WIDEST)):
                faults.append(f"{where}: wider than the screen, {widest}")
            faults += [f"no alternative text: {src}" for src in driver.execute_script(NO_ALT)]
            if axe:
                driver.execute_script(axe)
                faults += [f"axe, {where}: {one}" for one in driver.execute_async_script(AXE)]
            if pictures:
                name = page.removesuffix(".html").replace("/", "-")
                save_picture(driver, pictures / f"{name}-{size[0]}-{theme}.png")
            if (theme, size) == (THEMES[-1], WIDE):  # last: it changes the theme
                lost = driver.execute_async_script(LOST)
                faults += [f"{where}: loses the focus, {one}" for one in lost]
    return list(dict.fromkeys(faults))


def save_picture(driver: Any, path: Path) -> None:
    """Save the whole page, not only the part on the screen."""
    import base64

    driver.execute_script("window.scrollTo(0, 0)")
    options = {"captureBeyondViewport": True}
    height = driver.execute_script("return document.documentElement.scrollHeight")
    width = driver.execute_script("return window.innerWidth")
    options["clip"] = {"x": 0, "y": 0, "width": width, "height": min(height, 16000), "scale": 1}
    picture = driver.execute_cdp_cmd("Page.captureScreenshot", options)
    path.write_bytes(base64.b64decode(picture["data"]))


def main() -> int:
    """Inspect the pages named, or all of them; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--html", type=Path, default=HTML, help="folder of the built pages")
    parser.add_argument("--screenshots", type=Path, help="folder to write pictures to")
    parser.add_argument("--axe", type=Path, help="a copy of axe.min.js, from the package axe-core")
    parser.add_argument("pages", nargs="*", help="such as chapters/roofline.html")
    arguments = parser.parse_args()
    if not any(map(shutil.which, BROWSERS)) or not shutil.which("chromedriver"):
        print("pages: there is no Chromium with chromedriver here; nothing was looked at")
        return 2
    found = sorted(arguments.html.rglob("*.html"))
    names = [path.relative_to(arguments.html).as_posix() for path in found]
    pages = arguments.pages or [name for name in names if not name.startswith("_static/")]
    if not pages:
        print(f"pages: {arguments.html} holds no pages; make book builds them")
        return 2
    if arguments.screenshots:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)
    axe = arguments.axe.read_text(encoding="utf-8") if arguments.axe else ""

    begin = time.monotonic()
    failed = 0
    with served(arguments.html) as origin, browser() as driver:
        driver.set_script_timeout(60)
        for page in pages:
            faults = inspect(driver, origin, page, axe, arguments.screenshots)
            failed += bool(faults)
            print(f"  {page}: {f'{len(faults)} faults' if faults else 'ok'}", flush=True)
            for fault in faults:
                print(f"      {fault}")
    outcome = f"FAILED in {failed} of {len(pages)}" if failed else f"all {len(pages)} passed"
    print(f"pages: {outcome} ({time.monotonic() - begin:.0f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
