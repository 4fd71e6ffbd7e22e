"""The six steps on a real model: select, configure, load, verify, run, fine-tune. Then seven candidates compared."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import polyquant
from polyquant.cli.progress import showing_rows
from polyquant.cli.reporting import show_comparison
from polyquant.cli.show import console
from polyquant.cli.terminal import styled
from polyquant.loading.records import Verification
from polyquant.support.sizes import size
from rich import box
from rich.table import Table

MODEL = "builtin:smollm2"
PROMPT = "The three primary colours are"
TOKENS = 32
STEPS = 12
BARS = "▁▂▃▄▅▆▇█"
CANDIDATES = (
    "dense:float32", "bitsandbytes:nf4", "bitsandbytes:int8", "torchao:int8", "quanto:int4", "gguf:Q8_0",
    "llama-cpp:Q4_0,requantize=true",
)  # fmt: skip
DATA = Path(__file__).parent / "captain.jsonl"  # 48 questions, answered the way a sailor would
CONFIGURATIONS = {
    "NF4": {"bits": 4, "quant_type": "nf4"},
    "NF4 double": {"bits": 4, "quant_type": "nf4", "double_quant": True},
    "FP4": {"bits": 4, "quant_type": "fp4"},
    "LLM.int8": {"bits": 8},
}


def main() -> None:
    console.rule("1. Select: what can quantize to 4 bit while loading, here?")
    selection = polyquant.backends(bits=4, on_the_fly=True, device="cpu")
    console.print(f"polyquant.backends(bits=4, on_the_fly=True, device='cpu') -> {selection!r}")
    backend = polyquant.backend("bitsandbytes")
    problems = backend.problems("cpu")
    console.print(f"polyquant.doctor('bitsandbytes') -> {problems or 'runs'}")
    console.print(f"model: {MODEL} (SmolLM2-135M-Instruct, from a 4-bit GGUF: its quality was quantized once already)")
    console.print("a dense float32 checkpoint is made of it first; once, under a minute")

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", *CONFIGURATIONS):
        table.add_column(heading, no_wrap=not heading, justify="right" if heading else "left")
    columns = []
    for name, options in CONFIGURATIONS.items():
        console.rule(f"2. Configure, 3. load, 4. verify, 5. run: {name}")
        console.print(f"polyquant.load({MODEL!r}, backend='bitsandbytes', {shown(options)})")
        loaded = polyquant.load(MODEL, backend="bitsandbytes", **options)
        report = polyquant.verify(loaded)
        console.print(f"verified: {report.passed}, {len(report.checks)} checks")
        for check in report.failures:
            console.print(f"  {check}")
        started = time.perf_counter()
        text = loaded.generate(PROMPT, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        rate = TOKENS / (time.perf_counter() - started)
        console.print(styled("{}[bold]{}[/]", PROMPT, text))
        columns.append((report, rate, text))

    console.rule("What it takes")
    for label, cells in rows(columns):
        table.add_row(label, *cells)
    console.print(table)
    console.print(
        "planned: predicted from shapes; stored: every storage counted once; reported: transformers' own count, which "
        "misses scales that libraries keep beside parameters. Embeddings stay dense, so the whole model shrinks less "
        "than its layers."
    )
    folder = Path(tempfile.mkdtemp(prefix="polyquant-demo-"))
    tuned = fine_tune(folder)
    if not tuned or not compare(folder / "comparison") or not all(report.passed for report, _, _ in columns):
        sys.exit(1)


def fine_tune(folder: Path) -> bool:
    """A short QLoRA run on the NF4 base; whether the loss fell."""
    console.rule("6. Fine-tune: LoRA on the frozen NF4 base")
    options = {**CONFIGURATIONS["NF4"], "steps": STEPS, "learning_rate": 2e-3, "warmup": 0.1}
    console.print(
        f"polyquant.finetune({MODEL!r}, 'captain.jsonl', 'adapter', backend='bitsandbytes', {shown(options)})"
    )
    loaded = polyquant.load(MODEL, backend="bitsandbytes", **CONFIGURATIONS["NF4"])
    question = [{"role": "user", "content": "What is the capital of Spain?"}]  # not in the data
    before = loaded.generate(question, max_new_tokens=TOKENS, do_sample=False)
    training = {name: options[name] for name in ("steps", "learning_rate", "warmup")}
    steps: list[float] = []
    progress = SimpleNamespace(step=lambda step: steps.append(step.loss))
    tuned = polyquant.finetune(loaded, DATA, folder / "adapter", progress=progress, **training)
    after = loaded.generate(question, max_new_tokens=TOKENS, do_sample=False)
    highest = max(steps)
    bars = "".join(BARS[round(loss / highest * (len(BARS) - 1))] for loss in steps)
    console.print(
        f"loss {steps[0]:.2f} {bars} {steps[-1]:.2f} in {tuned.seconds:.0f} s; adapter {size(tuned.adapter_bytes)}"
    )
    console.print(styled("before: {}\nafter:  [bold]{}[/]", before, after))
    console.print(f"curve: {folder / 'adapter' / 'loss.svg'}", soft_wrap=True)
    return steps[-1] < steps[0]


def compare(folder: Path) -> bool:
    """Seven candidates side by side; whether all of them were measured."""
    console.rule("Compare: quality, speed and memory, each in a process of its own")
    options = {"device": "cpu", "windows": 2, "speed_limit_seconds": 4.0}
    console.print(f"polyquant.compare({MODEL!r}, {list(CANDIDATES)}, {shown(options)})")
    with showing_rows(live=sys.stderr.isatty()) as progress:
        comparison = polyquant.compare(MODEL, CANDIDATES, out=folder, progress=progress, **options)
    show_comparison(comparison, comparison.report(folder / "report.html"))
    return len(comparison.done) == len(comparison.rows)


def rows(columns: list[tuple[Verification, float, str]]) -> list[tuple[str, list[str]]]:
    """The table's rows: a label and one cell for each configuration."""
    memories = [report.memory for report, _, _ in columns]
    return [
        ("quantized layers", [""] * len(columns)),
        ("  planned", [size(memory.quantized_planned_bytes) for memory in memories]),
        ("  stored", [size(memory.quantized_bytes) for memory in memories]),
        ("  reported", [size(memory.quantized_reported_bytes) for memory in memories]),
        ("  bits a weight", [f"{memory.quantized_bits_per_weight:.2f}" for memory in memories]),
        ("  to bfloat16", [f"{memory.quantized_ratio_to_bfloat16:.2f}x" for memory in memories]),
        ("whole model", [""] * len(columns)),
        ("  planned", [size(memory.weights_planned_bytes) for memory in memories]),
        ("  stored", [size(memory.weights_stored_bytes) for memory in memories]),
        ("  reported", [size(memory.weights_reported_bytes) for memory in memories]),
        ("  to bfloat16", [f"{memory.ratio_to_bfloat16:.2f}x" for memory in memories]),
        ("  to the float32 file", [f"{memory.ratio_to_checkpoint:.2f}x" for memory in memories]),
        ("load seconds", [f"{report.load_seconds:.1f}" for report, _, _ in columns]),
        ("generated tokens/s", [f"{rate:.1f}" for _, rate, _ in columns]),
        ("first words", [" ".join(text.split()[:6]) for _, _, text in columns]),
    ]


def shown(options: dict[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


if __name__ == "__main__":
    main()
