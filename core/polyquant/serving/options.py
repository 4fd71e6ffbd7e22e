"""How to serve."""

from __future__ import annotations

import os
from ipaddress import ip_address
from typing import Annotated

import msgspec
from msgspec import Meta

KEY_VARIABLE = "POLYQUANT_API_KEY"


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where to listen, for whom, and how much is taken at once."""

    host: Annotated[str, Meta(description="address to listen at; other machines reach none of 127.*")] = "127.0.0.1"
    port: Annotated[int, Meta(description="port to listen at; 0: a free one", ge=0, le=65535)] = 8000
    api_key: Annotated[
        str, Meta(description="key that clients have to send; better in the variable POLYQUANT_API_KEY")
    ] = ""
    name: Annotated[str, Meta(description="what clients call the model; empty: as it is called here")] = ""
    max_tokens: Annotated[
        int, Meta(description="tokens of prompt and answer together; 0: as many as the model can", ge=0)
    ] = 0
    max_request_bytes: Annotated[int, Meta(description="bytes of a request", ge=1024)] = 2**20
    waiting: Annotated[int, Meta(description="requests that wait; one more is told to come again", ge=0)] = 32

    def __post_init__(self) -> None:
        if not self.api_key:
            msgspec.structs.force_setattr(self, "api_key", os.environ.get(KEY_VARIABLE, ""))
        if not self.is_loopback and not self.api_key:
            raise ValueError(
                f"whoever reaches this machine could use the model at {self.host}: give api_key (--api-key, or the "
                "variable POLYQUANT_API_KEY), or leave the host at 127.0.0.1"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether this machine alone reaches it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
