"""`--sae auto`: which published SAE stands for a model, and where its base model is looked for."""

import json

import pytest

from trl_anatomy.audit.find_sae import model_names, published_sae


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
