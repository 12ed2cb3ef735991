"""Ask a running server about its model and an image, with Python's own HTTP client.

repmlp-serve artifacts/digits
python examples/service_client.py http://127.0.0.1:8000 repmlp-digits models/samples/digits/7-0081.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen


def ask(url: str, body: bytes | None = None, **headers: str) -> Any:
    """Return the JSON that the server answers with; an error is its one line."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urlopen(Request(url, data=body, headers=given), timeout=30) as answer:  # noqa: S310 - the user's own server
            return json.load(answer)
    except HTTPError as error:
        raise SystemExit(f"{error.code}: {json.load(error)['error']}") from None


def main(server: str, model: str, image: str) -> None:
    """Print the model's inputs, and what it says of the image."""
    about = ask(f"{server}/v2/models/{model}-image")
    print(f"{about['name']} takes {', '.join(one['name'] for one in about['inputs'])}")
    # a header of 0 bytes says that the body is nothing but the image
    url = f"{server}/v2/models/{model}-image/infer"
    answer = ask(url, Path(image).read_bytes(), Inference_Header_Content_Length="0")
    found = {one["name"]: one["data"] for one in answer["outputs"]}
    name = found["label"][0] or found["index"][0]  # a bundle without class names has numbers alone
    print(f"class {name}, score {found['score'][0]:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
