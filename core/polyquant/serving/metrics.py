"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from polyquant.serving.line import Line

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one server."""

    def __init__(self, line: Line) -> None:
        self._registry = CollectorRegistry()
        shared: dict[str, Any] = {"registry": self._registry, "namespace": "polyquant"}
        self.requests = Counter("requests", "Requests by path and status.", ("path", "status"), **shared)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **shared)
        self.generated_tokens = Counter("generated_tokens", "Tokens of answers.", **shared)
        self.abandoned = Counter("abandoned_requests", "Requests whose client went away before the end.", **shared)
        self.first_token = Histogram(
            "first_token_seconds", "From the request to the first token, waiting included.", buckets=SECONDS, **shared
        )
        self.whole = Histogram("answer_seconds", "From the request to the last token.", buckets=SECONDS, **shared)
        Gauge("waiting_requests", "Requests that wait.", **shared).set_function(lambda: line.waiting)
        Gauge("running_requests", "Requests that are answered.", **shared).set_function(lambda: line.running)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return bytes(generate_latest(self._registry))
