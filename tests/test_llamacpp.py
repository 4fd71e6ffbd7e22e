"""Our metrics against llama.cpp's own logits, taken from llama-cpp-python without polyquant."""

import numpy as np
import polyquant
import pytest
import torch
from polyquant.comparison.cell.quality import measure_quality
from polyquant.comparison.cell.reference import dense_reference
from polyquant.models.resolve import resolve_dense
from polyquant.measure.quality import stored
from polyquant.measure.quality.index import stored_in
from polyquant.support.texts import evaluation_text

llama_cpp = pytest.importorskip("llama_cpp")
MODEL, WINDOWS = "builtin:smollm2", 2


@pytest.fixture
def plain_kernels(monkeypatch):
    """llama.cpp's AMX kernels end the process (its issue 20824); the class that is used here has no switch for them."""
    defaults = llama_cpp.llama_model_default_params

    def without_repacking():
        params = defaults()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr("llama_cpp.llama_cpp.llama_model_default_params", without_repacking)


def raw_logits(path, tokens):
    """(positions, vocabulary), float64, as llama.cpp gives them."""
    model = llama_cpp.Llama(str(path), n_ctx=len(tokens), n_batch=len(tokens), logits_all=True, verbose=False)
    model.eval(list(tokens))
    return np.array(model.scores[: len(tokens)], dtype=np.float64)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.real
def test_perplexity_and_kl_agree_with_llama_cpp(tmp_path, plain_kernels):
    """Of the packaged model quantized to Q4_0 by llama.cpp: through `gguf` in PyTorch, and by hand from raw logits."""
    folder, key = dense_reference(resolve_dense(MODEL), evaluation_text(), limit=WINDOWS)
    made = polyquant.quantize(MODEL, "llama-cpp", tmp_path / "made", type="Q4_0", requantize=True, device="cpu")
    (path,) = made.glob("*.gguf")
    ours = measure_quality(polyquant.load(path, "gguf", device="cpu"), folder, key)
    kl, likelihoods = [], []
    for window, dense in stored.read(folder, stored_in(folder, key)):
        rows = log_softmax(raw_logits(path, window.tokens))[window.first_scored - 1 : len(window.tokens) - 1]
        exact = torch.exp(dense).double().numpy()
        kl.append((exact * (dense.double().numpy() - rows)).sum(axis=-1))
        likelihoods.append(rows[np.arange(len(rows)), list(window.tokens[window.first_scored :])])
    assert ours.kl_mean == pytest.approx(np.concatenate(kl).mean(), rel=0.02)
    assert ours.perplexity == pytest.approx(np.exp(-np.concatenate(likelihoods).mean()), rel=0.02)
    assert ours.kl_mean > 0.1, "four bits change something"
