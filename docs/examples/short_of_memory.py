"""A model whose dense weights take more memory than there may be: made on disk, quantized and run under a limit.

python docs/examples/short_of_memory.py [--layers 28] [--limit 3GB] [--candidate bitsandbytes:nf4] [--folder DIR]

A random Llama of Llama-3.2-3B's sizes with a vocabulary of 32,000 words, 6 GB in float16, in a temporary folder
(TMPDIR) that is deleted, or in DIR, where it stays. A process that may have so much memory quantizes it and generates
some tokens. The limit is that of a control group, which counts all that is resident, pages of files too, where one can
be made (Linux, version 1, as root); else RLIMIT_DATA, which counts what is no file's, touched or not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from polyquant.support.sizes import parse_size

SIZES = {
    "vocab_size": 32000, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
TOKENS = 8
GROUPS = Path("/sys/fs/cgroup/memory")  # of the memory controller, version 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--limit", default="3GB", help="memory that the loading process may have")
    parser.add_argument("--candidate", default="bitsandbytes:nf4")
    parser.add_argument("--folder", type=Path, help="where the model is written, and stays")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(loaded(arguments.load, arguments.candidate), indent=1), flush=True)
        return
    with TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        command = [sys.executable, __file__, "--load", str(folder / "model")]
        if not (folder / "model").exists():
            write(folder / "model", arguments.layers)
        nbytes = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        print(f"{nbytes / 1e9:.2f} GB on disk in float16", flush=True)
        run_limited([*command, "--candidate", arguments.candidate], parse_size(arguments.limit))


def run_limited(command: list[str], limit: int) -> None:
    """Run a process that may have so many bytes of memory."""
    group = GROUPS / f"short-of-memory-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        print(f"RLIMIT_DATA: {limit / 1e9:.2f} GB", flush=True)
        subprocess.run(command, check=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
        return
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        enter = f"echo $$ > {group}/cgroup.procs && exec {shlex.join(command)}"
        subprocess.run(["sh", "-c", enter], check=True)
        most, failed = (int((group / f"memory.{name}").read_text()) for name in ("max_usage_in_bytes", "failcnt"))
        print(f"control group of {limit / 1e9:.2f} GB: {most / 1e9:.2f} GB at most, pages of the model's files among "
              f"them; {failed} times some of these were given up", flush=True)  # fmt: skip
    finally:
        group.rmdir()


def write(out: Path, layers: int) -> None:
    """Write a random model, a file for each layer, so that no more than one is in memory."""
    import torch
    import transformers
    from polyquant.testing.models import tiny_model
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        **SIZES, num_hidden_layers=layers, dtype="float16", architectures=["LlamaForCausalLM"]
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    out.mkdir(parents=True)
    config.save_pretrained(out)
    for file in tiny_model("llama", out.parent).glob("tokenizer*"):
        shutil.copy(file, out)
    files: dict[str, dict[str, Any]] = {}
    for name, tensor in model.named_parameters():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = tensor.shape
    for file, shapes in files.items():
        tensors = {name: (torch.randn(shape) / shape[-1] ** 0.5).half() for name, shape in shapes.items()}
        save_file(tensors, out / file, metadata={"format": "pt"})
    where = {name: file for file, shapes in files.items() for name in shapes}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def loaded(model: Path, candidate: str) -> dict[str, object]:
    """What loading and running the model takes, in this process."""
    import polyquant
    from polyquant.comparison.candidates import parse
    from polyquant.memory.peak import measure_peak
    from polyquant.memory.storage import stored_bytes

    chosen = parse(candidate, lambda backend: polyquant.backend(backend).info)
    start = time.perf_counter()
    with measure_peak() as peak:
        ready = polyquant.load(model, chosen.backend, device="cpu", cache=False, **chosen.options)
        seconds = time.perf_counter() - start
        tokens = ready.model.generate(
            **ready.tokenizer("The water", return_tensors="pt"), max_new_tokens=TOKENS, do_sample=False
        )
    return {
        "candidate": candidate,
        "kernel": ready.kernel,
        "kept_mb": round(stored_bytes(ready.model) / 1e6),
        "held_before_mb": round((peak.held_bytes or 0) / 1e6),
        "peak_resident_mb": round((peak.peak_bytes or 0) / 1e6),
        "load_seconds": round(seconds, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "generated": tokens[0, -TOKENS:].tolist(),
    }


if __name__ == "__main__":
    main()
