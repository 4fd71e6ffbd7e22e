"""What a client is told in place of an answer, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from polyquant.errors import ConfigError, PolyquantError


class Refused(Exception):
    """A request that gets no answer."""

    def __init__(self, status: int, message: str, *, code: str = "", parameter: str = "") -> None:
        """status: of HTTP. parameter: the field of the request that is at fault."""
        super().__init__(message)
        self.status, self.code, self.parameter = status, code, parameter

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, and how to say who one is."""
        return {429: {"Retry-After": "5"}, 503: {"Retry-After": "5"}, 401: {"WWW-Authenticate": "Bearer"}}.get(
            self.status, {}
        )

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        return {
            "error": {
                "message": str(self), "type": kinds.get(self.status, "invalid_request_error"),
                "param": self.parameter or None, "code": self.code or None,
            }
        }  # fmt: skip


def refused(error: BaseException) -> Refused:
    """Any error, as a client is told of it: what is wrong with the request, or that the work failed here."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, ConfigError):
        return Refused(400, str(error))
    said = str(error) if isinstance(error, PolyquantError) else f"{type(error).__name__}: {error}"
    return Refused(500, f"the request failed: {said}")
