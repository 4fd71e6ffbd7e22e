"""Importing, listing and querying stay light, whatever is installed."""

import pytest

HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes", "peft", "numpy", "huggingface_hub", "safetensors")


@pytest.mark.parametrize(
    "code",
    [
        "import polyquant; polyquant.backends()",
        "import polyquant; polyquant.backends(bits=4, device='cpu', on_the_fly=True)",
        "import polyquant; [polyquant.backend(info.name).config({}) for info in polyquant.backends()]",
        "import sys; sys.argv = ['polyquant', 'backends', '--json']\ntry:\n    import polyquant.__main__\nexcept SystemExit: pass",
        "import sys; sys.argv = ['polyquant', 'run', '--backend', 'bitsandbytes', '--help']\ntry:\n    import polyquant.__main__\nexcept SystemExit: pass",
    ],
    ids=["list", "query", "configure", "command line", "help"],
)
def test_nothing_heavy_is_imported(run_python, code):
    result = run_python(
        code=f"{code}\nimport sys; print('heavy:', [name for name in {HEAVY} if name in sys.modules])", fresh=True
    )
    assert result.stdout.rstrip().endswith("heavy: []"), result.stdout[-300:] + result.stderr
