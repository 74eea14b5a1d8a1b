"""compare on a real small audit: several runs into one folder, names of models, and what its JSON holds."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit_files import config_for, write_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_anatomy.audit.folder import Audit
from trl_anatomy.audit.run import run_audit
from trl_anatomy.checking import compare as comparing
from trl_anatomy.checking.compare import compare, comparison_report, names_of
from trl_anatomy.checking.report import render_comparison
from trl_anatomy.checking.responses import sampled_responses
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.sae import load_sae

PROMPTS = [f"tell me about the {word} " for word in ("sea", "soup", "tide", "bad")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `write_inputs` makes, and two trained models of one name in folders `one` and `two`."""
    root = tmp_path_factory.mktemp("compared")
    write_inputs(root)
    for seed, name in enumerate(("one", "two")):
        model = AutoModelForCausalLM.from_pretrained(root / "model")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(root / name / "out")
    return root


@pytest.fixture(scope="module")
def audit(root: Path) -> Audit:
    return run_audit(config_for(root, "."), progress=False)


def compared(audit: Audit, root: Path, out: Path, prompts: list[str] = PROMPTS, **changes: Any) -> dict[str, Any]:
    given = {"before": str(root / "model"), "after": {"out": str(root / "one" / "out")}} | changes
    before, after = given.pop("before"), given.pop("after")
    return compare(audit, before, after, prompts, out=out, max_new_tokens=5, progress=False, **given)


def test_a_later_run_takes_the_place_of_an_earlier_one(root: Path, audit: Audit, tmp_path: Path) -> None:
    """More prompts, or the model trained again, in the same folder: the same as in a folder of its own."""
    compared(audit, root, tmp_path / "here", PROMPTS[:2])
    again = compared(audit, root, tmp_path / "here")
    alone = compared(audit, root, tmp_path / "alone")
    assert again == alone
    first, second = (list((tmp_path / name / "harvest-out").iterdir()) for name in ("here", "alone"))
    assert sorted(file.name for file in first) == sorted(file.name for file in second)


def test_models_of_one_name_are_told_apart(root: Path, audit: Audit, tmp_path: Path) -> None:
    paths = [str(root / name / "out") for name in ("one", "two")]
    assert list(names_of(paths)) == ["one/out", "two/out"]
    found = compared(audit, root, tmp_path, after=names_of(paths))
    assert list(found["after"].values()) == paths
    assert found["concepts"][0]["observed"].keys() == {"one/out", "two/out"}
    assert (tmp_path / "one_out.json").read_bytes() != (tmp_path / "two_out.json").read_bytes()


def test_names_of_trained_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "before").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    assert names_of(["org/model", "checkpoint-10/"]) == {"model": "org/model", "checkpoint-10": "checkpoint-10/"}
    assert names_of(["before", "."]) == {"run/before": "before", f"{tmp_path.name}/run": "."}
    with pytest.raises(AnatomyError, match=r"names the same model twice: before and \./before"):
        names_of(["before", "./before"])


@pytest.mark.parametrize("names", [("before",), ("compare",), ("a b", "a_b"), ("",)])
def test_a_name_that_would_write_over_something_else(
    root: Path, audit: Audit, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """Responses of a model called "before" would be read as those of the start model: no shift at all, in silence."""
    with pytest.raises(AnatomyError, match="call it by another name"):
        compared(audit, root, tmp_path, after=dict.fromkeys(names, str(root / "one" / "out")))
    assert not list(tmp_path.iterdir())


def test_kept_responses_are_those_of_these_tokens(root: Path, audit: Audit, tmp_path: Path) -> None:
    """A chat template that changed since makes other prompts of the same messages, and so other responses."""
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    prompts: list[Any] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    sampling, found = {"max_new_tokens": 5, "batch_size": 4, "seed": 0}, []
    for n, template in enumerate(("{{ messages[0].content }}", "say {{ messages[0].content }} nice")):
        tokenizer.chat_template = template
        found.append(comparing.sampled(model, tokenizer, prompts, tmp_path / "kept.json", sampling))
        assert found[n] == comparing.sampled(model, tokenizer, prompts, tmp_path / f"{n}.json", sampling)
    assert found[0] != found[1]


def test_one_prompt_leaves_json_that_every_reader_takes(root: Path, audit: Audit, tmp_path: Path, capsys: Any) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPTS[0]}))
    words = ["--before", str(root / "model"), "--after", str(root / "one" / "out"), "--max_new_tokens", "5", "--json"]
    files = ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["compare", "--audit", str(audit.path), *words, *files]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert printed == json.loads((tmp_path / "out" / "compare.json").read_text(), parse_constant=refuse)
    assert printed["words"]["out"][1:] == [None, None]
    assert "Words per response: before" in comparison_report(printed)
    assert "nan" not in comparison_report(printed).lower()
    assert "n/a" in render_comparison(printed)


def test_several_responses_to_a_prompt_are_not_as_many_prompts(root: Path, audit: Audit, tmp_path: Path) -> None:
    """The same responses four times over tell nothing more: intervals must not narrow."""
    once = compared(audit, root, tmp_path / "once")
    # With their tokens, which is what compare reads of them: text alone would be rendered anew.
    sampled = {name: sampled_responses(tmp_path / "once", name) * 4 for name in ("before", "out")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "sampled", lambda model, tokenizer, prompts, file, sampling: sampled[file.stem])
        repeated = compared(audit, root, tmp_path / "repeated", PROMPTS * 4)
    for one, four in zip(once["concepts"], repeated["concepts"], strict=True):
        np.testing.assert_allclose(four["observed"]["out"], one["observed"]["out"], atol=1e-12)
    assert any(row["observed"]["out"][0] != 0 for row in once["concepts"])
    np.testing.assert_allclose(repeated["words"]["out"], once["words"]["out"])
    for told, n in ((once, 4), (repeated, 16)):
        assert (told["sampling"]["n_prompts"], told["sampling"]["n_responses"]) == (4, n)
        figures = told["agreement"]["out"]
        left_out = sum(figures["left_out"].values()) * 4 // n  # prompts to which a response is empty
        assert (figures["n_prompts"], figures["n_responses"]) == (4 - left_out, n - left_out * n // 4)
    assert [row["verdict"] for row in once["concepts"]] == audit.concepts["verdict"].to_pylist()


def test_an_audit_that_was_moved_without_what_it_was_made_of_says_what_is_missing(
    root: Path, tmp_path: Path, audit: Audit, capsys: Any
) -> None:
    """On another machine: which file of which audit, not only that some file is not there."""
    shutil.copytree(audit.path, tmp_path / "audit")
    info = json.loads((tmp_path / "audit" / "audit.json").read_text())
    info["settings"]["dataset"] = str(tmp_path / "gone.jsonl")
    info["sae"]["source"] = {"path": str(tmp_path / "no-sae")}
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(info))
    assert main(["report", "--audit", str(tmp_path / "audit")]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'audit'}: the dataset of the audit is needed again" in told
    assert "gone.jsonl: no such file. Put it back there" in told
    words = ["--before", str(root / "model"), "--after", str(root / "one" / "out")]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPTS[0]}))
    moved = ["compare", "--audit", str(tmp_path / "audit"), "--prompts", str(tmp_path / "prompts.jsonl")]
    assert main([*moved, *words]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'audit'}: the SAE of the audit is needed again" in told
    assert "no-sae" in told


def test_an_sae_that_has_changed_is_refused_before_anything_is_sampled(
    root: Path, audit: Audit, tmp_path: Path
) -> None:
    shutil.copytree(root / "sae", tmp_path / "kept")
    assert load_sae(tmp_path / "kept").fingerprint == audit.info["sae"]["fingerprint"]
    info = {**audit.info, "sae": {**audit.info["sae"], "fingerprint": "another"}}
    changed = Audit(audit.path, info, audit.hypotheses, audit.concepts, audit.pairs)
    with pytest.raises(AnatomyError, match=r"the SAE at .* has changed since the audit"):
        compared(changed, root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
