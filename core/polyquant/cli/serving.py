"""`polyquant serve`."""

from __future__ import annotations

from typing import Any

from polyquant.cli import choosing
from polyquant.cli.arguments import Loading, Model
from polyquant.cli.loading import load_model
from polyquant.cli.output import say


def serve(model: Model, loading: Loading, options: dict[str, Any]) -> None:
    """Serve a model behind OpenAI's HTTP interface, to this machine alone unless told otherwise. Ctrl-C ends it.

    Without a backend, a dense model is quantized as `polyquant recommend MODEL --needs on_the_fly` puts first.

    Example: polyquant serve builtin:smollm2 -b bitsandbytes:nf4 --port 8000
    """
    from polyquant.serving.options import ServeOptions
    from polyquant.serving.server import Server, listening, require_libraries

    asked = ServeOptions(**options)
    require_libraries()
    with listening(asked) as taken:
        loaded = load_model(model, choosing.with_backend(model, loading))
        server = Server(loaded, asked, taken)
        limit = f"{server.served.limit} tokens a text" if server.served.limit else "texts of any length"
        key = "with a key" if asked.api_key else "without a key"
        say(f"serving {server.served.name} at {server.url}/v1, {key}, {limit}; Ctrl-C ends it", error=True)
        server.run()
    say("ended", error=True)
