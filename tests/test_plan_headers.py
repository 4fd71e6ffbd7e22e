"""Headers of safetensors files and of hub repositories: what they say, and what is not believed."""

import json
import os
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import polyquant
import pytest
from polyquant.errors import ModelError
from polyquant.models.headers import checked, read_safetensors
from polyquant.testing.models import tiny_model

NAME = "someone/tiny"


def written(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_true_header_is_read(tmp_path):
    path = written(tmp_path / "m.safetensors", {"__metadata__": {"format": "pt"}, "a": entry()}, bytes(24))
    assert read_safetensors(path) == {"a": ("float32", (2, 3), 24)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(offsets=(0, 20))}, "a F32 \\(2, 3\\) takes 24 bytes, and its offsets are 0 to 20"),
        ({"a": entry(offsets=(8, 32))}, "a ends at byte 32, and 24 bytes follow the header"),
        ({"a": entry(shape=(2,), offsets=(0, 8)), "b": entry(shape=(2,), offsets=(4, 12))}, "a and b overlap"),
        ({"a": entry(shape=(2**40, 2**40), offsets=(0, 2**82))}, "not readable JSON|has the shape"),
        ({"a": entry(shape=(2**31, 2**33), offsets=(0, 24))}, "has the shape"),
        ({"a": entry(shape=(-2, -3))}, "has the shape"),
        ({"a": entry(dtype="F7")}, "a has the dtype 'F7'; known are"),
        ({"a": {"dtype": "F32"}}, "not readable JSON"),
        (b"{}x", "not readable JSON"),
    ],
    ids=["short", "out of range", "overlap", "overflow", "absurd", "negative", "dtype", "fields", "no JSON"],
)
def test_headers_that_lie(tmp_path, header, message):
    with pytest.raises(ModelError, match=message):
        read_safetensors(written(tmp_path / "m.safetensors", header, bytes(24)))


def test_a_header_longer_than_its_file(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ModelError, match="its header claims 1152921504606846976 bytes, and the file has 10"):
        read_safetensors(path)


def test_a_file_whose_size_is_not_known_is_held_against_itself():
    rows = {"a": ("F32", (2,), (0, 8)), "b": ("F32", (2,), (4, 12))}
    with pytest.raises(ModelError, match="overlap"):
        checked("f", rows, None)


def test_a_folder_with_a_lying_header_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    written(tmp_path / "model.safetensors", {"a": entry(offsets=(0, 99))}, bytes(24))
    with pytest.raises(ModelError, match="truncated or damaged"):
        polyquant.plan(tmp_path, "bitsandbytes")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a plan asks for: a repository's files, with ranges, and their sizes."""

    folder = None
    fetched: list[tuple[str, str, int]] = []  # (file, range, bytes sent)

    def log_message(self, *arguments):
        pass

    def _file(self):
        path = self.path.partition("?")[0]
        prefix = f"/{NAME}/resolve/"
        found = self.folder / path.removeprefix(prefix).partition("/")[2]
        return found if path.startswith(prefix) and found.is_file() else None

    def _send(self, content, status=200, head=False, **headers):
        self.send_response(status)
        etag = f'"{zlib.crc32(self.path.encode()):08x}"'  # the hub's cache keeps a file under it
        for name, value in {"X-Repo-Commit": "0" * 40, "ETag": etag, "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not head:
            self.wfile.write(content)

    def do_HEAD(self):
        file = self._file()
        if file is None:
            return self._send(b"", 404, head=True, X_Error_Code="EntryNotFound")
        self._send(file.read_bytes(), head=True)

    def do_GET(self):
        if self.path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": path.name, "size": path.stat().st_size} for path in sorted(self.folder.iterdir())]
            body = {"id": NAME, "modelId": NAME, "sha": "0" * 40, "private": False, "siblings": siblings, "tags": []}
            return self._send(json.dumps(body).encode(), Content_Type="application/json")
        file = self._file()
        if file is None:
            code = "EntryNotFound" if f"/{NAME}/" in self.path else "RepoNotFound"
            return self._send(b"{}", 404, X_Error_Code=code)
        content, asked = file.read_bytes(), self.headers.get("Range", "")
        if asked:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            part = content[int(begin) : int(end) + 1]
            Hub.fetched.append((file.name, asked, len(part)))
            return self._send(part, 206, Content_Range=f"bytes {begin}-{int(begin) + len(part) - 1}/{len(content)}")
        Hub.fetched.append((file.name, "", len(content)))
        self._send(content)


@pytest.fixture
def hub(tmp_path):
    """A hub on this machine; `folder` is its one repository."""
    Hub.folder, Hub.fetched = tmp_path / "repository", []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(hub, tmp_path, run_python):
    env = {
        **os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*",
    }  # fmt: skip
    return lambda *arguments, **more: run_python("plan", *arguments, env={**env, **more})


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_hub_repository_is_planned_without_its_weights(ask, tmp_path, sharded):
    from transformers import AutoModelForCausalLM

    local = tiny_model("llama", tmp_path)
    if sharded:
        AutoModelForCausalLM.from_pretrained(local).save_pretrained(Hub.folder, max_shard_size="2MB")
        assert len(list(Hub.folder.glob("*.safetensors"))) > 1
    else:
        local.rename(Hub.folder)
    result = ask(NAME, "-b", "bitsandbytes", "--bits", "4", "--memory", "4GiB", "--json")
    assert result.returncode == 0, result.stderr
    remote = json.loads(result.stdout)
    weights = sum(path.stat().st_size for path in Hub.folder.glob("*.safetensors"))
    assert 0.98 * weights < remote["checkpoint_bytes"] <= weights
    here = polyquant.plan(Hub.folder, "bitsandbytes", bits=4)
    assert remote["weights_planned_bytes"] == here.weights_planned_bytes
    assert [row["dtype"] for row in remote["tensors"]] == [row.dtype for row in here.tensors]
    of_weights = [(name, asked, sent) for name, asked, sent in Hub.fetched if name.endswith(".safetensors")]
    assert of_weights
    assert all(asked for _, asked, _ in of_weights), "weights are asked for by ranges only"
    assert all(sent <= 100_001 for _, _, sent in of_weights), "and no more than their heads"


def test_a_repository_without_safetensors(ask, tmp_path):
    tiny_model("llama", tmp_path).rename(Hub.folder)
    (Hub.folder / "model.safetensors").rename(Hub.folder / "pytorch_model.bin")
    result = ask(NAME, "-b", "bitsandbytes")
    assert result.returncode == 2
    assert "has no model.safetensors; its weight files are pytorch_model.bin" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_repository_whose_header_lies(ask, tmp_path):
    tiny_model("llama", tmp_path).rename(Hub.folder)
    written(Hub.folder / "model.safetensors", {"a": entry(offsets=(0, 20))}, bytes(24))
    result = ask(NAME, "-b", "bitsandbytes")
    assert result.returncode == 2
    assert "model.safetensors: its header cannot be true: a F32 (2, 3) takes 24 bytes" in result.stderr


def test_a_repository_that_is_not_there(ask, tmp_path):
    Hub.folder.mkdir()
    result = ask("someone/else", "-b", "bitsandbytes")
    assert result.returncode == 2
    assert "no such folder here and no such repository on the hub" in result.stderr


@pytest.mark.parametrize(
    "more", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "refused"]
)
def test_no_network(ask, more):
    result = ask(NAME, "-b", "bitsandbytes", **more)
    assert result.returncode == 2
    assert "not in the hub's cache, and the hub cannot be reached" in result.stderr
    assert "give a local folder, a .gguf file or a config.json" in result.stderr
