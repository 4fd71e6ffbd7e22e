"""Puts a load on a server of `polyquant serve` and says what came of it, and what memory the server took:
`python serve_load.py http://127.0.0.1:8000 --pid PID --seconds 120`.

A third of the requests stream, a third are answered whole, and of the rest some are left in the middle, too large,
malformed, or for another model. An error is an answer that is none of those that the request may get.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import threading
import time
from collections import Counter

import psutil

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=20)
    how = parser.parse_args()
    address = how.url.removeprefix("http://").rstrip("/")
    model = json.loads(ask(address, "GET", "/v1/models")[1])["data"][0]["id"]
    server, counts, lock = psutil.Process(how.pid), Counter[str](), threading.Lock()
    for _ in range(3):  # what is made once is made now
        ask(address, "POST", "/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 8})
    before, end, began = seen(server), time.monotonic() + how.seconds, time.monotonic()

    def work(number: int) -> None:
        draw = random.Random(number)  # noqa: S311  no secret
        while time.monotonic() < end:
            kind = draw.choice(("stream", "stream", "whole", "whole", "left", "wrong"))
            try:
                status = one(kind, address, model, draw)
            except (OSError, http.client.HTTPException) as error:
                status = f"failed: {type(error).__name__}"
            with lock:
                counts[f"{kind} {status}"] += 1
            if status == "429":
                time.sleep(0.2)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(how.clients)]
    for thread in threads:
        thread.start()
    middle = None
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        if middle is None and time.monotonic() > began + how.seconds / 2:
            middle = seen(server)
    after = seen(server)
    for name, count in sorted(counts.items()):
        print(f"{name:24} {count:6}")
    wrong = sum(count for name, count in counts.items() if "failed" in name or name.split()[1].startswith("5"))
    print(
        f"{sum(counts.values())} requests in {time.monotonic() - began:.0f} s by {how.clients} clients, {wrong} errors"
    )
    for name, (memory, threads_, files) in {"before": before, "middle": middle or after, "after": after}.items():
        print(f"{name:8} {memory / MIB:7.1f} MiB, {threads_} threads, {files} files and connections")


def seen(server: psutil.Process) -> tuple[int, int, int]:
    """Memory of its own (bytes), threads, open files."""
    return server.memory_full_info().uss, server.num_threads(), server.num_fds()


def one(kind: str, address: str, model: str, draw: random.Random) -> str:
    body = {"model": model, "prompt": "The captain " * draw.randint(1, 20), "max_tokens": draw.randint(1, 24)}
    if kind == "whole":
        return str(ask(address, "POST", "/v1/completions", body)[0])
    if kind == "wrong":
        wrong = draw.choice(({"model": "another"}, {"prompt": "x" * 2**21}, {"max_tokens": -1}, {"colour": 1}))
        status = ask(address, "POST", "/v1/completions", body | wrong)[0]
        return str(status) if status in (400, 404, 413) else f"failed: {status}"
    connection = http.client.HTTPConnection(address, timeout=300)
    try:
        content = json.dumps(body | {"stream": True})
        connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if kind == "left":
            answer.read(10)
            return str(answer.status)
        text = answer.read()
        whole = answer.status != 200 or text.endswith(b"[DONE]\n\n")
        return str(answer.status) if whole else "failed: cut short"
    finally:
        connection.close()


def ask(address: str, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=300)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except BrokenPipeError:  # a body that is too large is refused before it is read
        return 413, b""
    finally:
        connection.close()


if __name__ == "__main__":
    main()
