"""Large tensors between two processes."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from polyquant.isolated import protocol

LARGE = (3, 2**20 + 5)  # 12 MiB of float32, no whole number of pages


@pytest.fixture
def pipe():
    """The two ends: a reader, and a descriptor to write to."""
    reading, writing = os.pipe()
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


@pytest.mark.parametrize("shape", [LARGE, (2, 3), (1, 2**17), (0, 5)], ids=str)
def test_what_is_sent_arrives_though_it_changes_at_once(pipe, shape):
    reader, writing = pipe
    for seed in range(3):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        expected = tensor.clone()
        thread = sent(writing, tensor)
        message, read = protocol.receive(reader)
        thread.join(10)
        assert message == {"result": None}
        assert torch.equal(read, expected)


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
