"""A server from the port that it takes to its end."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from polyquant.errors import ConfigError, EnvironmentProblem
from polyquant.serving.options import ServeOptions

if TYPE_CHECKING:
    from polyquant.loaded import LoadedModel

LIBRARIES = ("prometheus_client", "starlette", "uvicorn")
END_SECONDS = 5  # in which answers that are being written are told of the end, and connections are closed


def require_libraries() -> None:
    """Raises EnvironmentProblem where the extra `serve` is not installed."""
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise EnvironmentProblem(
            f"serving needs {', '.join(missing)}, which is not installed: pip install 'polyquant[serve]'"
        )


@contextmanager
def listening(options: ServeOptions) -> Iterator[socket.socket]:
    """A socket that has the port, until the block ends. Raises ConfigError where another has it."""
    try:
        address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigError(f"host {options.host!r} is no address of this machine: {error}") from error
    with socket.socket(address[0], address[1]) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(address[4])
            taken.listen(socket.SOMAXCONN)  # bound sockets of two processes may share a port until one listens
        except OSError as error:
            raise ConfigError(
                f"port {options.port} of {options.host} cannot be had: {error.strerror}; choose another with port "
                "(--port), or 0 for a free one"
            ) from error
        yield taken


class Server:
    """Serves a model until it is stopped, or the process gets SIGINT or SIGTERM."""

    def __init__(self, loaded: LoadedModel, options: ServeOptions, taken: socket.socket) -> None:
        """taken: as `listening` gives it."""
        import uvicorn

        from polyquant.serving.endpoints import application
        from polyquant.serving.generating import Served

        host, port = taken.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        name = options.name or (loaded.request.source.name if loaded.request is not None else "model")
        self.served = served = Served(loaded, name, options.max_tokens, options.waiting)
        self._socket = taken

        class Ending(uvicorn.Server):
            """Ends what is being generated before it waits for the connections, and raises no signal again."""

            async def shutdown(self, sockets: Any = None) -> None:
                served.line.close()
                await super().shutdown(sockets)

            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                with _handled(self.handle_exit):
                    yield

        config = uvicorn.Config(
            application(served, options), log_config=None, access_log=False, lifespan="off", server_header=False,
            timeout_graceful_shutdown=END_SECONDS,
        )  # fmt: skip
        self._server = Ending(config)

    def run(self) -> None:
        """Until the end."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.served.line.close()
            self.served.line.join(END_SECONDS)

    def stop(self) -> None:
        """End it, from another thread."""
        self._server.should_exit = True


@contextmanager
def _handled(handle: Any) -> Iterator[None]:
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
