"""What a checkpoint is: by a file beside its config, an object in it, its tensors; and who reads what nobody here does."""

import json
from importlib import metadata

import polyquant
import pytest
import torch
from packaging.requirements import Requirement
from polyquant.errors import ModelError, UnknownBackend
from polyquant.loading.stored import method_of, reader_of
from polyquant.models import marks
from polyquant.models.outline import outline
from polyquant.models.resolve import resolve
from polyquant.registry.catalogue import catalogue
from polyquant.support.libraries import LOOK_ALIKES, install_command, library_problems, look_alike
from polyquant.types import Library
from safetensors.torch import save_file

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8}  # fmt: skip
KINDS = [(method, mark) for method, kind in marks.FOREIGN.items() for mark in kind.marks]


def write(folder, config, tensors, metadata=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    save_file(tensors, folder / "model.safetensors", metadata or {"format": "pt"})
    return folder


def layer(words, module="model.layers.0.self_attn.q_proj"):
    """Tensors of a layer with these last words; a word may have a dtype behind it."""
    return {
        f"{module}.{word}": torch.zeros(8, 8, dtype=getattr(torch, dtype or "int16"))
        for word, _, dtype in (word.partition(":") for word in words)
    }


@pytest.mark.parametrize(("method", "mark"), KINDS, ids=[f"{name}-{mark.tensors[-1]}" for name, mark in KINDS])
def test_a_kind_that_nobody_here_reads_is_known_by_its_tensors(tmp_path, method, mark):
    source = resolve(write(tmp_path / "model", {}, layer(mark.tensors)))
    assert method_of(source) == method
    assert outline(source.path).source.stored_quantization == {"quant_method": method}
    kind = marks.FOREIGN[method]
    with pytest.raises(UnknownBackend) as refused:
        polyquant.load(source.path)
    assert kind.title in str(refused.value)
    assert kind.read_by in str(refused.value)


@pytest.mark.parametrize("written", ["exl2", "EXL2", "quip_sharp", "svdquant", "onebit"])
def test_and_by_the_name_that_its_config_has(tmp_path, written):
    source = resolve(write(tmp_path / "model", {"quantization_config": {"quant_method": written}}, layer(["weight"])))
    with pytest.raises(UnknownBackend, match="which no polyquant backend reads; what reads it: "):
        reader_of(method_of(source), polyquant.backends())


def test_a_part_of_the_tensors_is_no_mark(tmp_path):
    tensors = layer(["q_weight", "q_scale"]) | layer(["q_groups"], "model.layers.1.mlp.up_proj")
    assert method_of(resolve(write(tmp_path / "model", {}, tensors))) == ""


def test_nobody_is_said_to_read_alone_what_a_backend_reads():
    """A kind goes out of FOREIGN when a backend reads it."""
    ours = {method for known in catalogue().values() for method in known.reads}
    assert not ours & {*marks.FOREIGN, *marks.ALIASES}
    assert set(marks.ALIASES.values()) <= set(marks.FOREIGN)


def test_every_mark_is_of_a_method_that_somebody_reads():
    assert {mark.method for mark in marks.known_marks()} <= {m for known in catalogue().values() for m in known.reads}
    cards = [mark for info in polyquant.backends() if info.name in catalogue() for mark in info.marks]
    assert set(map(repr, cards)) <= set(map(repr, marks.known_marks())), "run: python docs/generate.py"


def test_no_advice_names_a_look_alike():
    """Neither a library of a card, nor a requirement of a package or of an environment, nor who reads a kind."""
    cards = [info for info in polyquant.backends() if info.name in catalogue()]
    named = {library.requirement for info in cards for library in info.libraries}
    named |= {requirement for info in cards if info.isolated for requirement in info.isolated.requirements}
    for known in catalogue().values():
        named |= {known.package, *known.libraries}
    named |= {text for package in {known.package for known in catalogue().values()} for text in _requires(package)}
    named |= {kind.read_by.partition("pip install ")[2].rstrip(")") for kind in marks.FOREIGN.values()} - {""}
    assert len(named) > 20
    assert not [requirement for requirement in named if look_alike(requirement)]


def _requires(package):
    try:
        return [str(Requirement(text)) for text in metadata.requires(package) or ()]
    except metadata.PackageNotFoundError:
        return []


@pytest.mark.parametrize(
    "name", ["triton_kernels", "triton-kernels>=1", "Triton.Kernels", "qutlass", "qutlass[all]>=0.2"]
)
def test_a_look_alike_is_not_advised(name):
    command = install_command(name)
    assert "git+https://github.com/" in command
    assert f"'{name}'" not in command
    (problem,) = library_problems((Library(distribution=Requirement(name).name),))
    assert problem.what.endswith("is not installed")
    assert "git+https://" in problem.fix
    assert "of the index" in problem.fix


def test_an_installed_look_alike_is_a_problem(tmp_path, monkeypatch):
    info = tmp_path / "qutlass-0.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qutlass\nVersion: 0.0.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (problem,) = library_problems((Library(distribution="qutlass"),))
    assert problem.what == "qutlass 0.0.0 is installed, and is a placeholder without kernels"
    assert problem.fix.startswith(LOOK_ALIKES["qutlass"].instead)


def test_what_is_no_look_alike_is_advised_as_it_is():
    assert install_command("triton>=3") == "pip install 'triton>=3'"


def test_metadata_that_is_no_text_is_refused(tmp_path):
    folder = write(tmp_path / "model", {}, layer(["weight"]))
    content = b'{"__metadata__":{"format":1},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + b"\0")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        resolve(folder)
