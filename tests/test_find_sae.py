"""`--sae auto`: which published SAE stands for a model, and where its base model is looked for."""

import json

import pytest
from test_audit_folder import word_pairs, write_start_model

from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.find_sae import model_names
from trl_anatomy.audit.folder import load_audit
from trl_anatomy.audit.run import dry_run, run_audit
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.sae_check import CONTINUE, FITS
from trl_anatomy.reading.sae_list import published_sae


@pytest.mark.parametrize(
    ("name", "n_layers", "layer", "begins"),
    [
        ("google/gemma-2-2b", 26, 16, "gemma-scope-2b-pt-res-canonical:"),
        ("openai-community/gpt2", 12, 7, "gpt2-small-res"),
        ("meta-llama/Llama-3.1-8B", 32, 20, "llama_scope_lxr_"),
        ("google/gemma-3-4b-it", 34, 22, "gemma-scope-2-4b-it-res"),
        ("Qwen/Qwen3-8B-Base", 36, 23, "qwen-scope-3-8b-base"),
        ("meta-llama/Llama-3.1-8B-Instruct", 32, 19, "llama-3.1-8b-instruct-andyrdt:"),
    ],
)
def test_the_layer_nearest_two_thirds_of_the_depth(name, n_layers, layer, begins):
    found = published_sae([name], n_layers)
    assert found is not None
    assert abs(found.layer - layer) <= 1, found
    assert found.source.startswith(begins), found


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM3-3B", "allenai/OLMo-3-7B-Instruct", "runs/sft"])
def test_models_without_one(name):
    assert published_sae([name], 32) is None


def test_transcoders_and_attention_are_no_saes_of_the_residual_stream():
    assert published_sae(["Qwen/Qwen3-4B"], 36) is None


def test_the_base_model_is_found_in_the_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "google/gemma-2-2b"}))
    assert model_names(str(tmp_path)) == [str(tmp_path), "google/gemma-2-2b"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "openai-community/gpt2"}))
    (tmp_path / "README.md").write_text("---\nbase_model: meta-llama/Llama-3.1-8B\n---\n# A model\n")
    names = model_names(str(tmp_path))
    assert names[1:] == ["openai-community/gpt2", "google/gemma-2-2b", "meta-llama/Llama-3.1-8B"]
    assert published_sae(names, 12).of == "gpt2-small"
    (tmp_path / "config.json").write_text("{broken")
    (tmp_path / "README.md").write_text("no card")
    assert model_names(str(tmp_path))[1:] == ["openai-community/gpt2"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("auto")
    write_start_model(root / "model")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in word_pairs(700)))
    return root


def config(root, **changes) -> AuditConfig:
    given = {"model": str(root / "model"), "dataset": str(root / "pairs.jsonl"), "sae": "auto", "device": "cpu"}
    return AuditConfig(**{**given, "out": str(root / "audit"), "bootstrap": 100, **changes})


def test_an_audit_without_an_sae_trains_one_once_and_judges_it(inputs):
    audit = run_audit(config(inputs), progress=False)
    sae = audit.info["sae"]
    assert sae["source"] == {"path": str(inputs / "audit" / "sae")}
    assert sae["fit"]["verdict"] in (FITS, CONTINUE)
    assert any(note.startswith("The SAE was trained on these pairs; its verdict is") for note in audit.info["notes"])
    made = (inputs / "audit" / "sae" / "sae_weights.safetensors").stat().st_mtime_ns
    again = run_audit(config(inputs), progress=False)
    assert (inputs / "audit" / "sae" / "sae_weights.safetensors").stat().st_mtime_ns == made
    assert again.info["sae"] == sae
    assert load_audit(inputs / "audit").load_sae().fingerprint == sae["fingerprint"]


def test_a_training_that_would_take_too_long_is_not_begun(inputs):
    said = r"more than sae_minutes \(0\).* `trl-anatomy sae --model .* --out saes/run1 --max_length 64 --device cpu`"
    with pytest.raises(AnatomyError, match=said):
        run_audit(config(inputs, sae_minutes=0.0, max_length=64, out=str(inputs / "other")), progress=False)
    assert not (inputs / "other" / "sae").exists()


def test_none_names_the_audit_that_needs_none(inputs):
    with pytest.raises(AnatomyError, match="call run_text_audit"):
        run_audit(config(inputs, sae="none"), progress=False)


def test_a_dry_run_says_which_sae_would_be_used(inputs):
    shown = dry_run(config(inputs))
    assert (shown["sae"], shown["d_sae"]) == ("one trained on these pairs", None)


def test_a_model_without_an_sae_on_the_command_line_gets_one(inputs, capsys):
    words = ["audit", "--model", str(inputs / "model"), "--dataset", str(inputs / "pairs.jsonl"), "--device", "cpu"]
    assert main([*words, "--dry_run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sae"] == "one trained on these pairs"
    assert main([*words, "--sae_minutes", "0", "--out", str(inputs / "third")]) == 2
    assert "With --sae none habits alone are counted." in capsys.readouterr().err
