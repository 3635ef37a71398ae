"""Visits the page of `delta-llava app` in Chromium, with all ways out of this machine closed. Prints one JSON object.

    python page_visitor.py CHROMIUM URL PICTURE NO_PICTURE QUESTION SCREENSHOT

Asks without a picture, then with NO_PICTURE (a file that only has a picture's name), then about PICTURE, then again with the slider
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
    const spent = document.querySelector('#spent').innerText;
    return spent.startsWith(tokens + ' visual token') && / in \\d/.test(spent) && drawn && drawn.src !== map && drawn.naturalWidth;
}"""


def complaint(page: Page) -> str:
    """What the page complains about, once it is asked; the note is closed after."""
    page.click("#ask")
    toast = page.get_by_test_id("toast-body").first
    toast.wait_for()
    text = toast.inner_text()
    page.get_by_test_id("toast-close").first.click()
    toast.wait_for(state="detached")
    return " ".join(text.split())


def upload(page: Page, picture: str) -> None:
    """Give the page a picture, and wait until it shows it."""
    page.set_input_files("#picture input[type=file]", picture)
    page.locator("#picture img").wait_for(state="attached")


def move_slider(page: Page, *keys: str) -> None:
    """Press keys on the slider, and wait after each until the number of tokens is another."""
    for key in keys:
        before = page.input_value("#tokens input")
        page.press("#budget input[type=range]", key)
        page.wait_for_function("before => document.querySelector('#tokens input').value !== before", arg=before)


def answer(page: Page, last_map: str | None) -> dict:
    """Ask, and wait for answer and heat map."""
    page.evaluate("window.seen = []")
    tokens = page.input_value("#tokens input")
    page.click("#ask")
    page.wait_for_function(DONE, arg=[tokens, last_map])
    return {
        "tokens": int(tokens),
        "text": page.input_value("#answer textarea"),
        "seen": page.evaluate("window.seen"),
        "spent": page.inner_text("#spent").strip(),
        "map": page.get_attribute("#map img", "src"),
        "source": page.inner_text("#source").strip(),
    }


def visit(page: Page, picture: str, no_picture: str, question: str, screenshot: str) -> dict:
    """The whole visit, with what was seen."""
    page.wait_for_selector("#ask")
    page.evaluate(WATCH)
    page.fill("#question textarea", question)
    found: dict = {"title": page.title(), "complaints": [complaint(page)]}
    upload(page, no_picture)
    found["complaints"].append(complaint(page))
    page.get_by_label("Clear").first.click()
    upload(page, picture)
    page.fill("#question textarea", " ")
    found["complaints"].append(complaint(page))
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
