"""Visits the page of `delta-llava app` in Chromium, with all ways out of this machine closed. Prints one JSON object.

    python page_visitor.py CHROMIUM URL IMAGE NO_IMAGE QUESTION SCREENSHOT

Asks without an image, then with NO_IMAGE (a file that only has an image's name), then about IMAGE, then again with the slider
two steps further left, and at its right end; the screenshot is of what stands there last.
"""

import json
import sys
from urllib.parse import urlparse

from playwright.sync_api import Page, Route, sync_playwright


FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--no-first-run", "--disable-component-update"]
# Notes what stands in the answer's box, every time that it is something else.
WATCH = """() => {
    window.seen = [];
    setInterval(() => {
        const text = document.querySelector('#answer textarea').value;
        if (text !== window.seen.at(-1)) window.seen.push(text);
    }, 2);
}"""
DONE = """([tokens, map]) => {
    const drawn = document.querySelector('#map img');
    const costs = document.querySelector('#costs').innerText;
    return costs.startsWith(tokens + ' visual token') && / in \\d/.test(costs) && drawn && drawn.src !== map && drawn.naturalWidth;
}"""


def error_shown(page: Page) -> str:
    """What the page complains about, once it is asked; the note is closed after."""
    page.click("#ask")
    toast = page.get_by_test_id("toast-body").first
    toast.wait_for()
    text = toast.inner_text()
    page.get_by_test_id("toast-close").first.click()
    toast.wait_for(state="detached")
    return " ".join(text.split())


def upload(page: Page, image: str) -> None:
    """Give the page an image, and wait until it shows it."""
    page.set_input_files("#image input[type=file]", image)
    page.locator("#image img").wait_for(state="attached")


def move_slider(page: Page, *keys: str) -> None:
    """Press keys on the slider, and wait after each until the number of tokens is another."""
    for key in keys:
        before = page.input_value("#tokens input")
        page.press("#budget input[type=range]", key)
        page.wait_for_function("before => document.querySelector('#tokens input').value !== before", arg=before)


def answer(page: Page, last_map: str | None) -> dict:
    """Ask, and wait for answer and saliency map."""
    page.evaluate("window.seen = []")
    tokens = page.input_value("#tokens input")
    page.click("#ask")
    page.wait_for_function(DONE, arg=[tokens, last_map])
    return {
        "tokens": int(tokens),
        "text": page.input_value("#answer textarea"),
        "seen": page.evaluate("window.seen"),
        "costs": page.inner_text("#costs").strip(),
        "map": page.get_attribute("#map img", "src"),
        "caption": page.inner_text("#caption").strip(),
    }


def visit(page: Page, image: str, no_image: str, question: str, screenshot: str) -> dict:
    """The whole visit, with what was seen."""
    page.wait_for_selector("#ask")
    page.evaluate(WATCH)
    page.fill("#question textarea", question)
    found: dict = {"title": page.title(), "errors_shown": [error_shown(page)]}
    upload(page, no_image)
    found["errors_shown"].append(error_shown(page))
    page.get_by_label("Clear").first.click()
    upload(page, image)
    page.fill("#question textarea", " ")
    found["errors_shown"].append(error_shown(page))
    page.fill("#question textarea", question)
    first = answer(page, None)
    move_slider(page, "ArrowLeft", "ArrowLeft")
    second = answer(page, first["map"])
    move_slider(page, "End")
    third = answer(page, second["map"])
    page.screenshot(path=screenshot, full_page=True)
    return {**found, "answers": [first, second, third]}


def main() -> None:
    """Visit, and print what was seen and which hosts the page wanted beside its own."""
    chromium, url, *rest = sys.argv[1:]
    elsewhere: list[str] = []

    def stay_here(route: Route) -> None:
        if urlparse(route.request.url).hostname in (None, "127.0.0.1"):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1180, "height": 760})
        page.route("**/*", stay_here)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        found = visit(page, *rest)
        browser.close()
    print(json.dumps({**found, "elsewhere": elsewhere, "errors": errors}))


if __name__ == "__main__":
    main()
