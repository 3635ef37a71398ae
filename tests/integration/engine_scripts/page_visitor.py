"""Visits the page of `delta-llava app` in Chromium, with all ways out of this machine closed. Prints one JSON object.

    python page_visitor.py CHROMIUM URL IMAGE NO_IMAGE QUESTION

Looks whether it can ask without an image, with NO_IMAGE (a file that only has an image's name) and with IMAGE; asks about that, then
again with the slider two steps further left, and at its right end.
"""

import json
import sys
from urllib.parse import urlparse

from playwright.sync_api import Page, Route, sync_playwright


FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--no-first-run", "--disable-component-update"]
DONE = """([tokens, before]) => {
    const costs = document.querySelector('#costs').innerText;
    return costs !== before && costs.startsWith(tokens + ' visual token') && / in all/.test(costs);
}"""


def can_ask(page: Page) -> bool:
    """Whether the button works, once the page is at rest."""
    page.wait_for_timeout(1000)
    return page.locator("#ask").is_enabled()


def move_slider(page: Page, *keys: str) -> None:
    """Press keys on the slider, and wait after each until the number of tokens is another."""
    for key in keys:
        before = page.input_value("#tokens input")
        page.press("#budget input[type=range]", key)
        page.wait_for_function("before => document.querySelector('#tokens input').value !== before", arg=before)


def answer(page: Page) -> dict:
    """Ask, and wait for the answer."""
    tokens, before = page.input_value("#tokens input"), page.inner_text("#costs")
    page.click("#ask")
    page.wait_for_function(DONE, arg=[tokens, before])
    text, costs = page.input_value("#answer textarea"), page.inner_text("#costs").strip()
    return {"tokens": int(tokens), "text": text, "costs": costs}


def visit(page: Page, image: str, no_image: str, question: str) -> dict:
    """The whole visit, with what was seen."""
    page.wait_for_selector("#ask")
    page.fill("#question textarea", question)
    found = {"without image": can_ask(page)}
    page.set_input_files("#image input[type=file]", no_image)
    found["no image"] = can_ask(page)
    page.set_input_files("#image input[type=file]", image)
    page.locator("#image img").wait_for(state="attached")
    found["image"] = can_ask(page)
    answers = [answer(page)]
    for keys in (("ArrowLeft", "ArrowLeft"), ("End",)):
        move_slider(page, *keys)
        answers.append(answer(page))
    return {"can_ask": found, "answers": answers}


def main() -> None:
    """Visit, and print what was seen and which hosts the page wanted in addition to its own."""
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
