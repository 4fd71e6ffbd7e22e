"""Large tensors between two processes: through a pipe that lends pages, into memory that is used again."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from polyquant.isolated import pipes, protocol
from polyquant.isolated.memory import KEPT, MOST_BYTES, Blocks

LARGE = (3, 2**20 + 5)  # 12 MiB of float32, no whole number of pages


@pytest.fixture
def pipe():
    """The two ends, wide: a reader, and a descriptor to write to."""
    reading, writing = os.pipe()
    pipes.widen(writing)
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb") as writer:
        yield reader, writer.fileno()


def sent(writing, tensor):
    """Send from another thread, and overwrite the tensor the moment that is done."""

    def work():
        protocol.send(writing, {"result": None}, tensor)
        tensor.fill_(-1)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("lends", [True, False], ids=["lent", "copied"])
@pytest.mark.parametrize("shape", [LARGE, (2, 3), (1, 2**17), (0, 5)], ids=str)
def test_what_is_sent_arrives_though_it_changes_at_once(pipe, monkeypatch, shape, lends):
    if not lends:
        monkeypatch.setattr(pipes, "_lend", lambda pipe, content: 0)
    reader, writing = pipe
    for seed in range(3):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        expected = tensor.clone()
        thread = sent(writing, tensor)
        message, read = protocol.receive(reader)
        thread.join(10)
        assert message == {"result": None}
        assert torch.equal(read, expected)


@pytest.mark.skipif(not hasattr(os, "splice"), reason="pages are lent on Linux")
def test_pages_are_lent(pipe):
    reader, writing = pipe
    content = memoryview(bytearray(b"a" * 100_000))
    assert pipes._lend(writing, content) == len(content)
    content[:] = b"b" * len(content)
    assert reader.read(10) == b"b" * 10, "they are no copy"


def test_a_reader_that_goes_away_is_an_error(pipe):
    reader, writing = pipe
    tensor = torch.zeros(LARGE)
    failures = []

    def work():
        try:
            protocol.send(writing, {"result": None}, tensor)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    reader.read(1000)
    reader.close()
    thread.join(10)
    assert isinstance(failures[0], BrokenPipeError)


def test_a_block_is_used_again_only_when_nobody_has_it():
    blocks, nbytes = Blocks(), 2**21
    first = blocks.take(nbytes)
    place = first.data_ptr()
    kept = first.view(torch.float32).reshape(2, -1)[1].fill_(7)
    del first
    second = blocks.take(nbytes)
    second.fill_(0)
    assert second.data_ptr() != place
    assert (kept == 7).all(), "a view of a view still has it"
    del kept
    assert blocks.take(nbytes - 4096).data_ptr() == place
    third, fourth = blocks.take(nbytes), blocks.take(nbytes)
    assert len({second.data_ptr(), third.data_ptr(), fourth.data_ptr()}) == 3
    assert len(blocks._blocks) == KEPT


@pytest.mark.parametrize("nbytes", [0, 100, MOST_BYTES + 1])
def test_small_and_huge_tensors_are_kept_by_nobody(nbytes):
    blocks = Blocks()
    assert blocks.take(nbytes).nbytes == nbytes
    assert not blocks._blocks


def test_numpy_has_what_the_tensor_had():
    """An array made of a tensor outlives it, and so does its memory."""
    blocks = Blocks()
    array = blocks.take(2**21).fill_(9).numpy()
    blocks.take(2**21).fill_(0)
    assert (array == 9).all()
