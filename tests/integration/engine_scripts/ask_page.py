"""Asks the page of `examples/browser` in Chromium, with and without a network. Prints one JSON object.

    python ask_page.py CHROMIUM URL SCREENSHOT SCRATCH FOLDER < questions.json

questions.json is a list of {image, question, num_visual_tokens}, all of them asked in one visit, and its last ones again after
the network is gone and the page loaded anew. FOLDER is what the server serves. The hosts that the page wanted to reach are read from Chromium's own log.
"""

import json
import sys
from pathlib import Path
from urllib.parse import urlparse

from playwright.sync_api import Page, sync_playwright


FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--no-first-run", "--disable-component-update", "--disable-default-apps", "--disable-domain-reliability"]
PHONE = {"width": 390, "height": 844}
ENDED = "() => document.querySelector('#ask').disabled === false"
# Notes every text that stands in the answer's place.
WATCH = """() => {
    window.seen = [];
    const answer = document.querySelector('#answer');
    new MutationObserver(() => window.seen.push(answer.textContent)).observe(answer, {childList: true});
}"""


def load(page: Page, action) -> str:
    """Wait until the model is ready; what the page says then."""
    action()
    page.wait_for_function("() => /^Ready/.test(document.querySelector('#status').textContent)")
    page.evaluate(WATCH)
    return page.inner_text("#status")


def ask(page: Page, image: str, question: str, num_visual_tokens: int) -> dict:
    """Ask as a visitor with a keyboard does."""
    page.set_input_files("#file", image)
    page.fill("#question", question)
    page.focus("#tokens")
    page.keyboard.press("Home")
    while int(page.inner_text("#number")) < num_visual_tokens:
        page.keyboard.press("ArrowRight")
    page.evaluate("window.seen = []")
    page.press("#question", "Enter")
    page.wait_for_function(ENDED)
    return {
        "num_visual_tokens": int(page.inner_text("#number")),
        "spoken": page.get_attribute("#tokens", "aria-valuetext"),
        "text": page.inner_text("#answer"),
        "row": page.inner_text("#rows tr:first-child").split("\t"),
        "seen": page.evaluate("window.seen"),
    }


def error(page: Page, action) -> str:
    """What the page says about something that does not work."""
    action()
    page.wait_for_selector("#answer.error")
    return page.inner_text("#answer")


def swap_image(page: Page, questions: list[dict]) -> str:
    """What stands there after another image was chosen while the model answered about the first."""
    page.set_input_files("#file", questions[0]["image"])
    page.wait_for_function(ENDED)
    page.press("#question", "Enter")
    page.set_input_files("#file", questions[1]["image"])
    page.wait_for_function(ENDED)
    page.wait_for_timeout(2000)
    return page.inner_text("#answer")


def half_update(page: Page, url: str, model: Path, question: dict) -> dict:
    """The answer after a new version was put in place of which a file is missing."""
    manifest = model / "manifest.json"
    before = manifest.read_text()
    new = json.loads(before)
    for file in new["files"]:
        if file["path"].startswith("onnx/decoder"):
            file["sha256"] = "0" * 64
    manifest.write_text(json.dumps(new))
    try:
        load(page, lambda: page.goto(url))
        return ask(page, **question)
    finally:
        manifest.write_text(before)


def hosts(log: Path) -> list[str]:
    """The hosts that pages and workers wanted to reach, as Chromium's log of its network has them.

    A request of the browser itself, which looks for updates of its own, has no origin as its initiator.
    """
    requests = (event.get("params", {}) for event in json.loads(log.read_text())["events"])
    urls = [request["url"] for request in requests if request.get("initiator", "").startswith("http")]
    return sorted({urlparse(url).hostname or url for url in urls})


def main() -> None:
    """Visit, and print what was seen."""
    chromium, url, screenshot, scratch, folder = sys.argv[1:]
    questions = json.load(sys.stdin)
    log = Path(scratch) / "network.json"
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*FLAGS, f"--log-net-log={log}"])
        context = browser.new_context(viewport=PHONE, device_scale_factor=1)
        page = context.new_page()
        page.on("pageerror", lambda exception: errors.append(str(exception)))
        found: dict = {"online": load(page, lambda: page.goto(url)), "isolated": page.evaluate("crossOriginIsolated")}
        found["answers"] = [ask(page, **question) for question in questions]
        found["fits"] = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.set_viewport_size({**PHONE, "height": 1180})
        page.screenshot(path=screenshot)
        found["bad_image"] = error(page, lambda: page.set_input_files("#file", __file__))
        found["bad_image_shown"] = page.is_visible("#preview") or page.is_enabled("#ask")
        found["swapped"] = swap_image(page, questions)
        found["half_updated"] = half_update(page, url, Path(folder) / "model", questions[-1])
        page.goto(url, wait_until="commit")
        page.set_input_files("#file", questions[0]["image"])  # before the model is ready
        load(page, lambda: None)
        found["loading"] = page.inner_text("#answer")
        found["no_export"] = error(page, lambda: page.goto(f"{url}/?model=nothing"))
        context.set_offline(True)
        found["offline"] = load(page, lambda: page.goto(url))
        found["offline_answers"] = [ask(page, **question) for question in questions[-4:]]
        browser.close()
    print(json.dumps({**found, "hosts": hosts(log), "errors": errors}))


if __name__ == "__main__":
    main()
