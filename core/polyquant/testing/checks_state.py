"""Check of global state: a load leaves the process as it was."""

from __future__ import annotations

import json

from polyquant.testing.check import check, expect
from polyquant.testing.processes import run_python
from polyquant.testing.subject import Subject

LOADS = """
import json, sys
import accelerate, torch, transformers
import polyquant
from polyquant.testing.state import differences, snapshot
backend, device, dense, loads = json.loads(sys.argv[1])
transformers.AutoModelForCausalLM.from_pretrained(dense, trust_remote_code=False)
found = {}
for name, source, options in loads:
    before = snapshot()
    polyquant.load(source, backend, device=device, **options)
    found[name] = differences(before, snapshot())
print(json.dumps(found))
"""


@check(per="backend")
def load_leaves_global_state_alone(subject: Subject) -> None:
    """In a fresh process no load changes a default, a random state, the environment, a flag or a filter."""
    loads = [(preset, *subject.source(preset, "llama")) for preset in subject.info.presets]
    found = run_python(
        LOADS, json.dumps([subject.backend, subject.runs_on, subject.dense("llama"), loads]), imported=True
    )
    for preset, changed in found.items():
        expect(not changed, f"loading {preset} changes " + "; ".join(changed[:5]))
