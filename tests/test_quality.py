"""Quality: closed forms for every figure, windows as the conventions say, and a reference that survives its storage."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from polyquant.plugin.calibration import LEAST_TOKENS, token_windows
from polyquant.errors import ConfigError, ModelError
from polyquant.measure.quality import stored
from polyquant.measure.quality.index import INDEX, stored_in
from polyquant.measure.quality.metrics import Tally
from polyquant.measure.quality.windows import PRESETS, cut, preset_named
from polyquant.measure.speed import measure_speed
from polyquant.support.texts import calibration_text, evaluation_text


def log_probabilities(*rows):
    return torch.tensor(rows, dtype=torch.float32).log()


def test_figures_of_two_known_distributions():
    reference = log_probabilities([0.5, 0.25, 0.25], [0.2, 0.7, 0.1])
    candidate = log_probabilities([0.25, 0.5, 0.25], [0.2, 0.7, 0.1])
    tally = Tally()
    tally.add(reference, candidate + 3.0, torch.tensor([0, 2]))  # logits: any constant may be added
    quality = tally.result("test", storage_error=0.0)
    kl = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert quality.kl_mean == pytest.approx(kl / 2, abs=1e-6)
    assert quality.kl_max == pytest.approx(kl, abs=1e-6)
    assert quality.kl_median == pytest.approx(kl / 2, abs=1e-6)
    assert quality.kl_standard_error == pytest.approx(kl / 2, abs=1e-6)  # of two values: half their distance
    assert (quality.top1, quality.tokens_scored, quality.windows) == (0.5, 2, 1)
    assert quality.top1_standard_error == pytest.approx(math.sqrt(0.25 / 2))
    assert quality.rms_probability_change == pytest.approx(math.sqrt(0.25**2 / 2), abs=1e-6)
    assert quality.perplexity == pytest.approx(math.exp(-(math.log(0.25) + math.log(0.1)) / 2), rel=1e-5)
    assert quality.reference_perplexity == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.1)) / 2), rel=1e-5)
    assert quality.perplexity_ratio == pytest.approx(math.sqrt(2), rel=1e-5)
    assert quality.perplexity_ratio_standard_error == pytest.approx(math.sqrt(2) * math.log(2) / 2, rel=1e-5)


def test_quantiles_over_many_positions():
    tally, reference = Tally(), log_probabilities([0.5, 0.5]).repeat(1000, 1)
    shift = torch.linspace(0, 1, 1000)
    candidate = torch.stack([shift, torch.zeros(1000)], dim=1)
    tally.add(reference, candidate, torch.zeros(1000, dtype=torch.long))
    kl = -math.log(2) + torch.log(1 + shift.exp()) - shift / 2
    quality = tally.result("test", storage_error=0.0)
    for name, share in (("median", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("p99_9", 0.999)):
        assert getattr(quality, f"kl_{name}") == pytest.approx(float(torch.quantile(kl, share)), abs=1e-5), name


def test_other_shapes_and_nan_are_refused():
    with pytest.raises(ValueError, match="not the same model or tokenizer"):
        Tally().add(torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="NaN"):
        Tally().add(torch.zeros(1, 5), torch.full((1, 5), math.nan), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="nothing was compared"):
        Tally().result("test", storage_error=0.0)


def test_windows_score_what_the_conventions_say():
    tokens = list(range(10, 5010))
    plain = cut(tokens, PRESETS["llamacpp-512"], bos=1)
    assert len(plain) == 5000 // 512
    assert plain[0].tokens[:2] == (1, 11)
    assert plain[1].tokens[:2] == (1, 10 + 513)
    assert {window.scored for window in plain} == {255}
    assert cut(tokens, PRESETS["llamacpp-512"], bos=None)[0].tokens[0] == 10
    whole = cut(tokens, PRESETS["gptq-2048"], bos=1)
    assert [(len(window.tokens), window.scored) for window in whole] == [(2048, 2047)] * 2
    assert whole[0].tokens[0] == 10
    strided = cut(tokens, PRESETS["hf-stride-512"], bos=1)
    assert [window.scored for window in strided] == [1023] + [512] * (len(strided) - 1)
    scored = [token for window in strided for token in window.tokens[window.first_scored :]]
    assert scored == list(range(11, 11 + len(scored)))  # every token once
    assert len(cut(tokens, PRESETS["llamacpp-512"], bos=1, limit=3)) == 3


def test_a_text_shorter_than_a_window_is_refused_with_both_lengths():
    with pytest.raises(ConfigError, match=r"100 tokens.*takes 512"):
        cut(range(100), PRESETS["llamacpp-512"], bos=None)
    with pytest.raises(ConfigError, match="Did you mean 'gptq-2048'"):
        preset_named("gptq-2024")


@pytest.fixture
def reference(tmp_path):
    torch.manual_seed(0)
    windows = cut([token % 1000 for token in range(100, 100 + 3 * 512)], PRESETS["llamacpp-512"], bos=None)
    logits = {window.tokens: 4 * torch.randn(512, 1000) for window in windows}
    folder, done = tmp_path / "reference", []
    progress = SimpleNamespace(step=lambda step: done.append((step.done, step.of)))
    index = stored.store(folder, "key", "llamacpp-512", windows, logits.__getitem__, progress)
    assert done == [(1, 3), (2, 3), (3, 3)]
    return folder, index, logits


def test_the_reference_against_itself_is_zero(reference):
    folder, index, logits = reference
    tally = Tally()
    for window, kept in stored.read(folder, index):
        exact = stored.scored(logits[window.tokens], window)
        tally.add(kept, exact, torch.tensor(window.tokens[window.first_scored :]))
    quality = tally.result(index.preset, storage_error=index.storage_error)
    assert abs(quality.kl_mean) <= 1e-6
    assert quality.kl_mean == pytest.approx(index.storage_error, abs=1e-7)
    assert quality.top1 == 1.0
    assert quality.perplexity_ratio == pytest.approx(1.0, abs=1e-4)


def test_a_stored_reference_is_found_by_its_key_and_damage_is_said(reference):
    folder, index, _ = reference
    assert stored_in(folder, "key") == index
    assert stored_in(folder, "another") is None
    assert stored_in(folder / "nowhere", "key") is None
    victim = folder / "window-00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:1000])
    with pytest.raises(ModelError, match="window-00001.safetensors is damaged"):
        list(stored.read(folder, index))


@pytest.fixture
def timed(monkeypatch):
    """Feeds that take 10 ms a token on a clock of their own, and the number of tokens of every call."""
    clock, fed = [0.0], []
    monkeypatch.setattr("polyquant.measure.speed.perf_counter", lambda: clock[0])

    def session():
        fed.append([])

        def feed(tokens):
            fed[-1].append(len(tokens))
            warming_up = fed in ([[8]], [[8]] * 4 + [[1]], [[8]] * 4 + [[1, 1]])
            clock[0] += 100.0 if warming_up else len(tokens) * 0.01

        return feed

    return session, fed


def test_speed_counts_tokens_and_leaves_the_warm_up_out(timed):
    session, fed = timed
    speed = measure_speed(session, 50, prompt_tokens=8, generated_tokens=4, repetitions=3)
    assert fed == [[8]] * 4 + [[1, 1]] + [[1, 1, 1, 1]] * 3
    assert speed.prompt_tokens_per_second.mean == pytest.approx(100)
    assert speed.generated_tokens_per_second.repetitions == pytest.approx((100, 100, 100))
    assert speed.first_token_seconds == pytest.approx(0.08)


def test_a_slow_model_is_repeated_less_often(timed):
    speed = measure_speed(timed[0], 50, prompt_tokens=8, generated_tokens=4, limit_seconds=0.1)
    assert len(speed.prompt_tokens_per_second.repetitions) == 2
    assert len(speed.generated_tokens_per_second.repetitions) == 3
    assert speed.generated_tokens == 4
    slower = measure_speed(timed[0], 50, prompt_tokens=8, generated_tokens=128, limit_seconds=0.3)
    assert slower.generated_tokens in (29, 30)


def test_texts_are_there_and_calibration_is_cut_from_its_own():
    assert len(evaluation_text().encode()) >= 200_000
    assert calibration_text()[:1000] not in evaluation_text()

    class Words:
        def __call__(self, text, add_special_tokens=True):
            return type("Encoding", (), {"input_ids": [len(word) for word in text.split()]})

    default = token_windows(Words(), (), length=64, count=10)
    assert [len(window) for window in default] == [64] * 10
    own = token_windows(Words(), ["five words are in here "] * 60, length=256, count=10)
    assert [len(window) for window in own] == [256, 44]
    with pytest.raises(ConfigError, match=rf"3 tokens, at least {LEAST_TOKENS}.*--calibration"):
        token_windows(Words(), ["only three words"], length=64, count=10)


def test_records_are_read_back_as_they_were_written(reference):
    assert json.loads((reference[0] / INDEX).read_text())["storage_error"] < 1e-6
