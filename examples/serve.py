"""Serve a compiled model over HTTP with the server of transformers, which speaks the protocol of OpenAI's.

python examples/serve.py OUT --port 8000

Options are those of `transformers serve`; `pip install 'qpc[serve]'` brings what it needs.
"""

import sys

from transformers.cli.transformers import app

import qpc  # noqa: F401 - lets transformers read compiled models

if __name__ == "__main__":
    app(["serve", *sys.argv[1:]], prog_name="transformers")
