"""Asks the page of `delta-llava app` through the Gradio client. Prints one JSON object.

    python page_client.py URL DOWNLOADS [--together] < REQUESTS.json

REQUESTS.json is a list of lists, the arguments of /ask: image (a file or null), question, visual tokens. Without `--together` one is sent after the other.
"""

import json
import sys

from gradio_client import Client, handle_file


def submit(client: Client, request: list):
    """A request under way."""
    image, *rest = request
    return client.submit(image and handle_file(image), *rest, api_name="/ask")


def collect(job) -> dict:
    """All that a request yields: the text at each step, and what came last; or its error."""
    try:
        steps = list(job)
        job.result()  # raises what ended the iteration
    except Exception as error:
        return {"error": str(error)}
    text, costs = steps[-1]
    return {"steps": [step[0] for step in steps], "text": text, "costs": costs}


def main() -> None:
    """Send the requests and print what came back."""
    url, downloads, *flags = sys.argv[1:]
    requests = json.load(sys.stdin)
    client = Client(url, download_files=downloads, verbose=False)
    if flags:
        answers = [collect(job) for job in [submit(client, request) for request in requests]]
    else:
        answers = [collect(submit(client, request)) for request in requests]
    print(json.dumps({"answers": answers}))


if __name__ == "__main__":
    main()
