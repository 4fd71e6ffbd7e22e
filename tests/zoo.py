"""Small models of all causal architectures that transformers builds here, each through every on-the-fly backend.

`python -m nox -s zoo` runs the whole matrix and writes its table; tests/test_zoo.py runs a part of it.
A cell plans, loads, verifies, writes four tokens, saves, loads, saves and loads again: it passes, or it is refused with
polyquant's own words before the model is loaded. Anything else is a fault.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polyquant
from polyquant.errors import BackendFailed, PolyquantError, SaveError
from polyquant.testing.models import _tokenizer

SIZES: dict[str, Any] = {  # of whatever of these a config has
    "vocab_size": 384, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "lru_width"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"), 256),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 512),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "kv_lora_rank", "q_lora_rank"), 64),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state"), 16), **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    "n_groups": 1, "time_step_rank": 8, "sliding_window": 64,
}  # fmt: skip
OTHERWISE: dict[str, dict[str, Any]] = {  # where those contradict each other
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 32, "n_groups": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_ssm": 256},
    "reformer": {"is_decoder": True},
    **dict.fromkeys(("gptj", "codegen"), {"rotary_dim": 16}),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},  # transformers generates with no hybrid
    "bamba": {"attn_layer_indices": [1]},  # of which no layer is attention
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    **dict.fromkeys(
        ("granitemoehybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear",
         "bailing_hybrid"),
        {"layer_types": ["linear_attention", "full_attention"]},
    ),
}  # fmt: skip
HEAD = """# Architectures

Small models with random weights of {models} causal architectures of transformers {version}, each through the {backends}
backends that quantize as they load: planned, loaded, verified, run, saved, loaded, saved and loaded again, on a CPU.
`python -m nox -s zoo` writes this page.

- passes: everything, and the logits are the same after each loading.
- partly: the same, and less than 95 % of the weights in its blocks are quantized; what stays dense is named below.
- unsaved: it loads and runs, and the format has no place for it in a file.
- refused: before work, with what to do.
- not run: transformers' own dense model does not run with these sizes."""
LARGEST = 12_000_000  # weights: what cannot be made smaller is left out
PARTLY = {"sample", "coverage"}
"""Checks that random weights, or experts that stay dense, may fail."""


def configs(kinds: Collection[str] = ()) -> Iterator[tuple[str, Any, type]]:
    """(model type, small config, class) of each causal architecture that builds, by name; of those in `kinds` alone."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for kind, names in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        if kinds and kind not in kinds:
            continue
        try:
            default = CONFIG_MAPPING[kind]()
            known = {*default.to_dict(), *default.attribute_map}
            sizes = {name: value for name, value in SIZES.items() if name in known} | OTHERWISE.get(kind, {})
            if "kv_lora_rank" in known:  # each head has its own keys, made of one compressed state
                sizes["num_key_value_heads"] = sizes["num_attention_heads"]
            config = CONFIG_MAPPING[kind](**sizes)
            model_class = getattr(transformers, names if isinstance(names, str) else names[0])
            with torch.device("meta"):
                weights = sum(parameter.numel() for parameter in model_class(config).parameters())
        except Exception:  # sizes that this architecture does not take
            continue
        if weights < LARGEST and not config.is_encoder_decoder:
            yield kind, config, model_class


def build(config: Any, model_class: Any, folder: Path) -> Path:
    """A checkpoint with random weights of the spread that trained ones have. Raises what its dense model raises."""
    import torch

    torch.manual_seed(0)
    model = model_class(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.eval()(input_ids=torch.arange(20, 36)[None])
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def on_the_fly() -> list[str]:
    """The backends that quantize a dense model as it loads, and run here."""
    return [name for name in polyquant.backends(on_the_fly=True).names if not polyquant.backend(name).problems("cpu")]


def cell(folder: Path, backend: str) -> tuple[str, str]:
    """(passes, partly, unsaved, refused or FAULT; what was said) of one model with one backend.

    partly: less than 95 % of the weights in its blocks are quantized. unsaved: it runs, and its format cannot hold it.
    """
    stage = "plan"
    try:
        plan = polyquant.plan(folder, backend, device="cpu")
        stage = "load"
        loaded = polyquant.load(folder, backend, device="cpu")
    except BackendFailed as error:
        return "FAULT", f"{stage}: {error}"
    except PolyquantError as error:
        return "refused", f"{stage}: {error}"
    except Exception as error:
        return "FAULT", f"{stage}: {type(error).__name__}: {error}"
    try:
        stage = "verify"
        failed = {check.name: check.found for check in polyquant.verify(loaded, max_new_tokens=4).failures}
        if failed.keys() - PARTLY:
            return "FAULT", f"verify: {failed}"
        stored = sum(layer.stored_bytes for layer in loaded.initial_layers)
        if plan.weights_planned_bytes != stored:
            return "FAULT", f"planned {plan.weights_planned_bytes} bytes, stored {stored}"
        stage = "run"
        tokens = list(range(20, 36))
        before, again = loaded.logits(tokens), loaded
        for number in range(2 if polyquant.backend(backend).can("save") else 0):
            stage = f"save {number}"
            saved = again.save(folder.parent / f"{backend}-{number}")
            stage = f"load {number}"
            again = polyquant.load(saved, backend, device="cpu")
            if not bool((again.logits(tokens) == before).all()):
                return "FAULT", f"load {number}: other logits than before saving"
    except SaveError as error:  # in the backend's own words: a format that has no place for this model
        foreign = error.__cause__ is not None and not isinstance(error.__cause__, PolyquantError)
        return "FAULT" if foreign else "unsaved", f"{stage}: {error}"
    except Exception as error:
        return "FAULT", f"{stage}: {type(error).__name__}: {error}"
    return ("partly", failed["coverage"]) if "coverage" in failed else ("passes", "")


def run_one(kind: str) -> None:
    """Print a JSON line for each backend with the architecture `kind`, in this process."""
    (_, config, model_class), *_ = configs([kind])
    with TemporaryDirectory() as folder:
        unrun = ""
        try:
            build(config, model_class, Path(folder) / "model")
        except Exception as error:
            unrun = f"its dense model: {type(error).__name__}: {str(error).splitlines()[0]}"
        for backend in on_the_fly():
            start = time.perf_counter()
            outcome, said = ("not run", unrun) if unrun else cell(Path(folder) / "model", backend)
            said = re.sub(r"\S*/(\.[\w-]+\.partial-\w+/)?", "", said.replace(folder, ""))  # paths that differ each time
            row = {"model": kind, "backend": backend, "outcome": outcome, "said": said}
            print(json.dumps({**row, "seconds": round(time.perf_counter() - start, 1)}), flush=True)


def run_all(kinds: list[str], limit: float) -> Iterator[dict[str, Any]]:
    """The rows of each architecture, run in a process of its own: one that crashes or hangs takes no other along."""
    backends = on_the_fly()
    for kind in kinds:
        command = [sys.executable, "-m", "tests.zoo", "--one", kind]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            out, code = done.stdout, done.returncode
            ended = f"exit code {code}: {done.stderr[-300:]}" if code else ""
        except subprocess.TimeoutExpired as error:
            out, ended = (error.stdout or b"").decode(), f"not done after {limit:.0f} s"
        rows = [json.loads(line) for line in out.splitlines() if line.startswith('{"model"')]
        yield from rows
        for backend in backends[len(rows) :]:
            yield {"model": kind, "backend": backend, "outcome": "FAULT", "said": ended, "seconds": 0.0}


def page(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each architecture, a column for each backend, and what each refusal says, once."""
    from transformers import __version__

    backends = sorted({row["backend"] for row in rows})
    cells = {(row["model"], row["backend"]): row["outcome"] for row in rows}
    lines = [HEAD.format(version=__version__, models=len({row["model"] for row in rows}), backends=len(backends)), ""]
    lines += [f"| model | {' | '.join(backends)} |", "|---" * (len(backends) + 1) + "|"]
    for model in sorted({row["model"] for row in rows}):
        lines.append(f"| {model} | {' | '.join(cells.get((model, backend), '') for backend in backends)} |")
    said: dict[str, list[str]] = {}
    for row in rows:
        if row["said"]:
            said.setdefault(row["said"], []).append(f"{row['model']} with {row['backend']}")
    lines += ["", "## What is said", "", *(f"- {', '.join(where)}: {_escaped(words)}" for words, where in said.items())]
    return "\n".join(lines).rstrip() + "\n"


def _escaped(words: str) -> str:
    """As Markdown shows them: names with * and < as they are."""
    return "".join(f"\\{letter}" if letter in "*<>_|`" else letter for letter in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="model types; all that build, where none is named")
    parser.add_argument("--one", help="run one architecture in this process")
    parser.add_argument("--limit", type=float, default=300, help="seconds for an architecture")
    parser.add_argument("--out", type=Path, help="a file for the table, as Markdown")
    given = parser.parse_args()
    if given.one:
        run_one(given.one)
        return
    rows = []
    for row in run_all(given.models or [kind for kind, _, _ in configs()], given.limit):
        rows.append(row)
        print(f"{row['model']:24} {row['backend']:16} {row['outcome']:8} {row['said'][:160]}", flush=True)
        if given.out:
            given.out.write_text(page(rows))
    sys.exit(any(row["outcome"] == "FAULT" for row in rows))


if __name__ == "__main__":
    main()
