"""What errors advise, in a shell's words."""

import os
import re

import pytest
from polyquant.cli.words import in_shell, option_names

pytestmark = pytest.mark.usefixtures("bitsandbytes")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("name the backend (backend=...); installed: hqq", "name the backend (--backend ...); installed: hqq"),
        ("or accept it with force=True (--force)", "or accept it with --force"),
        ("begin anew with restart=True (--restart)", "begin anew with --restart"),
        ("use optimizer='adamw_torch' (--optimizer adamw_torch)", "use --optimizer adamw_torch"),
        (
            "accept float32 there with fp32_offload=True, or keep it",
            "accept float32 there with --fp32-offload, or keep it",
        ),
        ("use skip=('q_proj',)", "use --skip q_proj"),
        ("use skip=('q_proj', 'lm_head') or group_size=64", "use --skip q_proj,lm_head or group_size=64"),
        ("leave it out (kv_cache='keep')", "leave it out (--kv-cache keep)"),
        ("leave it out (double_quant=False)", "leave it out (--no-double-quant)"),
        ("allow it with trust_remote_code=True (--trust-remote-code)", "allow it with --trust-remote-code"),
        ("give device_map={'': 'cpu'}", "give device_map={'': 'cpu'}"),
        ("gptq:skip=layers.0,bits=4 is no candidate", "gptq:skip=layers.0,bits=4 is no candidate"),
        ("polyquant.load(model, bits=4, skip=('a',))", "polyquant.load(model, bits=4, skip=('a',))"),
    ],
)
def test_options_become_flags(said, shown):
    assert in_shell(said, "bitsandbytes:nf4") == shown


def test_options_of_a_backend_are_known_where_it_is_named():
    assert "double_quant" in option_names("bitsandbytes")
    assert "double_quant" not in option_names(None)
    assert "double_quant" not in option_names("bitsandbites")


def test_a_shell_is_told_in_its_words(tmp_path, run_python):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoConfig": "a.B"}}')
    (tmp_path / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    result = run_python("verify", "builtin:smollm2")
    assert result.returncode == 2
    assert re.search(
        r"builtin:smollm2 is dense: name the backend to quantize it with \(--backend \.\.\.\)", result.stderr
    )


def test_a_backend_that_is_broken_is_told_once(make_plugin, tmp_path, run_python):
    make_plugin("import a_library_that_is_missing")
    site = str(tmp_path / "site" / "polyquant-acme")
    result = run_python("run", "m", "-b", "acme", "hello", env={**os.environ, "PYTHONPATH": site})
    assert result.returncode == 1
    assert result.stderr.count("polyquant-acme 1.0: import failed") == 1
    assert "Traceback" not in result.stderr
    assert option_names("acme") == option_names(None)
