"""Sampling puts the model where training put it, and what it wrote is read token by token."""

import json
import pickle
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_world import TOOLS, chat_audit, chat_rows, said, trl_template, write_world
from datasets import Dataset
from reading_world import build_tokenizer, tiny_model
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from trl import DPOConfig, DPOTrainer
from vision_world import VISION, vision_model

from trl_anatomy.audit.reopen import reopen
from trl_anatomy.audit.run import run_audit
from trl_anatomy.checking import persona, vllm_rollouts
from trl_anatomy.checking import responses as checking
from trl_anatomy.checking.compare import compare
from trl_anatomy.checking.dose import dose_response, perplexity
from trl_anatomy.checking.persona import persona_rows
from trl_anatomy.checking.responses import (
    as_pairs,
    audited_tokenizer,
    prompts_for,
    sampled,
    sampled_responses,
    written_texts,
)
from trl_anatomy.checking.rollouts import Response, encode_prompt, rollouts
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.fit import read_examples
from trl_anatomy.reading.prompts import ChatPrompt, TextPrompt, prompt_key, prompt_of
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import SAMPLED, read_pairs

TEMPLATES = ("qwen3", "qwen2_5", "llama3_2", "gptoss", "gemma3", "deepseek_r1_distill", "phi3", "glm4moe")
# R1's template writes a thought into the prompt that it deletes before a response; Qwen3's answers open with one.
ASKED: dict[str, dict[str, Any]] = {
    "one turn": {"prompt": [said("user", "Why?")]},
    "system": {"prompt": [said("system", "Be brief."), said("user", "Why?")]},
    "turns": {"prompt": [said("user", "Why?"), said("assistant", "Because."), said("user", "Why so?")]},
    "begun answer": {"prompt": [said("user", "Why?"), said("assistant", "Because")]},
    "tools as text": {"prompt": [said("user", "Rain?")], "tools": json.dumps(TOOLS)},
    "tools as a list": {"prompt": [said("user", "Rain?")], "tools": TOOLS},
    "kwargs": {"prompt": [said("user", "Why?")], "chat_template_kwargs": {"enable_thinking": False}},
}
ENDS = {"chosen": [said("assistant", "It is **air**.")], "rejected": [said("assistant", "No.")]}


def tokenizer_of(template: str | None) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_has_the_tokens_that_trl_trains_on(template: str, kind: str) -> None:
    """Rendered anew, without its pair at hand: as DPOTrainer's preparation puts it."""
    tokenizer, rows = tokenizer_of(trl_template(template)), Dataset.from_list([ASKED[kind] | ENDS])
    if (template, kind) == ("gemma3", "begun answer"):  # two answers in a row: neither trained on nor sampled on
        for refused in (lambda: read_pairs(rows, tokenizer), lambda: encode_prompt(tokenizer, prompt_of(rows[0]))):
            with pytest.raises(AnatomyError, match=r"cannot be tokenised .*must alternate"):
                refused()
        return
    pairs = read_pairs(rows, tokenizer, max_length=None)
    assert encode_prompt(tokenizer, prompt_of(rows[0])) == pairs.ids(0, "prompt").tolist()


def replaced(prompt: Any) -> ChatPrompt:
    """A prompt without the tokens that it brings."""
    return ChatPrompt(prompt, tools=prompt.tools, template_kwargs=prompt.template_kwargs)


@pytest.mark.parametrize("kind", VISION)
def test_a_processor_puts_prompts_as_trl_puts_them(kind: str, tmp_path: Path) -> None:
    processor = vision_model(kind, tmp_path)
    rows = Dataset.from_list([ASKED["one turn"] | ENDS, ASKED["turns"] | ENDS])
    pairs = read_pairs(rows, processor)
    prompts = [prompt_of(row) for row in rows]
    trained = [pairs.ids(i, "prompt").tolist() for i in range(2)]
    assert [encode_prompt(processor, prompt) for prompt in prompts] == trained
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    found = [group[0] for group in rollouts(model, processor, prompts, max_new_tokens=3)]
    assert [list(response.prompt_ids) for response in found] == trained
    read = read_pairs(as_pairs(prompts, found, found), processor)
    assert [read.ids(i, "chosen").tolist() for i in range(len(read))] == [list(found[r].ids) for r in read.rows]


@pytest.mark.parametrize(
    ("template", "kind"),
    [("qwen3", "turns after"), ("qwen3", "implicit"), ("llama3_2", "turns after"), ("gptoss", "turns after")],
)
def test_prompts_of_an_audit_bring_the_tokens_of_their_pairs(template: str, kind: str, tmp_path: Path) -> None:
    """Also of responses of several turns, which change how a template writes the prompt, and without `prompt`."""
    rows = chat_rows(12)
    for i, row in enumerate(rows):
        row |= {"tools": json.dumps(TOOLS if i % 2 else TOOLS[:0]), "chat_template_kwargs": {"enable_thinking": False}}
        if kind == "implicit":
            prompt = row.pop("prompt")
            row |= {side: prompt + row[side] for side in ("chosen", "rejected")}
        elif i % 3:
            row["prompt"] = [said("user", f"Why {i}?"), said("assistant", "Well."), said("user", "Say.")]
            more = [said("user", "And?"), said("assistant", "That is all.")]
            row |= {side: row[side] + more for side in ("chosen", "rejected")}
    audit = chat_audit(tmp_path, trl_template(template), rows)
    source, prompts = reopen(audit), prompts_for(audit, None, 100, 0)
    assert len(prompts) == len(rows)
    trained = [source.pairs.ids(i, "prompt").tolist() for i in range(len(rows))]
    assert [encode_prompt(source.tokenizer, prompt) for prompt in prompts] == trained
    if template == "qwen3" and kind == "turns after":  # where rendering the prompt anew puts the model elsewhere
        assert [encode_prompt(source.tokenizer, replaced(prompt)) for prompt in prompts] != trained
    if kind != "implicit":
        assert prompts == [source.pairs.raw[i]["prompt"] for i in range(len(rows))]


TEXTS = ("Why?\n", "Why? ", "It is", "Tell me a story about 12", "")


@pytest.mark.parametrize("end", [False, True], ids=["plain", "a tokenizer that ends every text"])
def test_a_text_prompt_ends_where_training_ends_it(end: bool) -> None:
    """No end token before the response, and no blank that training gives to it."""
    tokenizer = tokenizer_of(None)
    if end:
        from tokenizers import processors

        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    for text in TEXTS:
        pairs = read_pairs(Dataset.from_list([{"prompt": text, "chosen": "0x", "rejected": "Zx"}]), tokenizer)
        assert encode_prompt(tokenizer, text) == pairs.ids(0, "prompt").tolist()
        assert encode_prompt(tokenizer, TextPrompt(text)) == pairs.ids(0, "prompt").tolist()
        assert tokenizer.eos_token_id not in encode_prompt(tokenizer, text)


def test_prompts_that_are_asked_otherwise_differ(tmp_path: Path) -> None:
    messages = [said("user", "Rain?")]
    asked = [
        ChatPrompt(messages),
        ChatPrompt(messages, tools=TOOLS),
        ChatPrompt(messages, tools=[{**TOOLS[0], "type": "other"}]),
        ChatPrompt(messages, template_kwargs={"enable_thinking": False}),
    ]
    assert all(prompt == messages for prompt in asked)
    assert all((a == b) == (a is b) for a in asked for b in asked)
    assert len(set(map(prompt_key, asked))) == len(asked)
    assert prompt_key(messages) == prompt_key(asked[0])
    rows = [
        {"prompt": messages, "tools": None if prompt.tools is None else json.dumps(prompt.tools)}
        for prompt in asked[:3]
    ]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    audit = chat_audit(tmp_path, trl_template("qwen3"), chat_rows())
    found = prompts_for(audit, str(file), 10, 0)
    assert found == asked[:3]
    assert len({tuple(encode_prompt(reopen(audit).tokenizer, prompt)) for prompt in found}) == 3
    for prompt in (*asked, TextPrompt("Why?", [1, 2])):
        again = pickle.loads(pickle.dumps(prompt))
        assert again == prompt
        assert again.ids == prompt.ids


def test_prompts_that_training_cuts_are_left_out_with_their_number(tmp_path: Path) -> None:
    """keep_end cuts the beginning of a prompt; keep_start never trains on a prompt that fills max_length."""
    rows = chat_rows()
    for row in rows[:3]:
        row["prompt"] = [said("user", "Why? " * 60)]
    rows[3]["prompt"] = [said("user", "Who? " * 60)]
    for truncation, n_cut in (("keep_end", 2), ("keep_start", 0)):
        root = tmp_path / truncation
        root.mkdir()
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
        audit = chat_audit(root, template, rows, max_length=60, truncation=truncation)
        if n_cut:
            with pytest.warns(UserWarning, match="2 prompts of .* are left out: training cuts off their beginning"):
                prompts = prompts_for(audit, None, 100, 0)
        else:
            prompts = prompts_for(audit, None, 100, 0)
        assert prompts == [row["prompt"] for row in rows[4:]]


def test_where_training_cuts_every_prompt_the_error_says_so(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    audit = chat_audit(tmp_path, template, chat_rows(), max_length=6, truncation="keep_end")
    with pytest.raises(AnatomyError, match=r"training cuts off the beginning of all \(max_length 6\); give prompts"):
        prompts_for(audit, None, 100, 0)
    own = tmp_path / "own.json"
    own.write_text(json.dumps([{"prompt": [said("user", "Why?")]}]))
    assert prompts_for(audit, str(own), 100, 0) == [[said("user", "Why?")]]


def endless(model: Any, tokenizer: Any, end: float) -> Any:
    """A model that writes letters, and ends by chance, the likelier the larger `end`."""
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefgh"]
    with torch.no_grad():
        weight = torch.full_like(model.lm_head.weight, 0.0)
        weight[letters] = 0.01 * torch.randn(len(letters), weight.shape[1], generator=torch.Generator().manual_seed(0))
        model.lm_head.weight.copy_(weight)
    bias = torch.full((weight.shape[0],), -50.0)
    bias[letters] = 0.0
    bias[tokenizer.eos_token_id] = end
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


@pytest.mark.parametrize("kind", ["chat", "tools", "text"])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_sampled_tokens_are_read_as_they_were_sampled(kind: str, batch_size: int) -> None:
    """Prompt tokens and sampled tokens; an end only where the model wrote one, none after a cut."""
    tokenizer = tokenizer_of(trl_template("qwen3"))
    model = endless(tiny_model(layers=2), tokenizer, end=0.5)
    prompts: list[Any] = [ChatPrompt([said("user", f"Why {'so ' * i}?")], tools=TOOLS) for i in range(6)]
    if kind != "tools":
        prompts = [list(prompt) for prompt in prompts]
    if kind == "text":
        prompts = [prompt[0]["content"] for prompt in prompts]
    settings = {"max_new_tokens": 8, "batch_size": batch_size, "n_per_prompt": 4}
    found = rollouts(model, tokenizer, prompts, **settings)
    flat = [response for group in found for response in group]
    assert {response.finished for response in flat} == {True, False}
    for prompt, group in zip(prompts, found, strict=True):
        for response in group:
            assert list(response.prompt_ids) == encode_prompt(tokenizer, prompt)
            assert (response.ids[-1] == tokenizer.eos_token_id) == response.finished
            assert tokenizer.eos_token_id not in response.ids[:-1]
            assert tokenizer.pad_token_id not in response.ids
            assert len(response.ids) == 8 or response.finished
            assert tokenizer.decode(response.ids, skip_special_tokens=True) == response
            assert {response: 1}[str(response)] == 1
    one, two = [group[0] for group in found], [group[1] for group in found]
    pairs = read_pairs(as_pairs(prompts, one, two), tokenizer)
    for i, row in enumerate(pairs.rows):
        expected = (one[row].prompt_ids, one[row].ids, two[row].ids)
        assert tuple(tuple(pairs.ids(i, span).tolist()) for span in ("prompt", "chosen", "rejected")) == expected
    assert len(pairs) + sum(pairs.left_out.values()) == len(prompts)


def test_several_end_tokens_end_a_response() -> None:
    """Chat models stop on more than the tokenizer's own end: nothing after the first is a response's."""
    tokenizer = tokenizer_of(None)
    model = endless(tiny_model(layers=2), tokenizer, end=-50.0)
    other = tokenizer.convert_tokens_to_ids("h")
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, other])
    found = [group[0] for group in rollouts(model, tokenizer, ["Why?"] * 8, max_new_tokens=12)]
    assert any(response.finished for response in found)
    for response in found:
        assert (response.ids[-1] == other) == response.finished
        assert other not in response.ids[:-1]


def test_text_without_tokens_is_rendered_with_the_tools_of_its_prompt() -> None:
    tokenizer = tokenizer_of(trl_template("qwen3"))
    prompts = [ChatPrompt([said("user", "Rain?")], tools=TOOLS, template_kwargs={"enable_thinking": False})] * 2
    made = as_pairs(prompts, ["yes", "so"], ["no", "it"])
    assert not set(SAMPLED) & set(made.column_names)
    pairs = read_pairs(made, tokenizer)
    assert pairs.ids(0, "prompt").tolist() == encode_prompt(tokenizer, prompts[0])
    assert tokenizer.decode(pairs.ids(0, "chosen")) == "yes<|im_end|>\n"
    sampled_one = Response("yes", [7], [5, 6])
    with pytest.raises(AnatomyError, match="give all of them as one"):
        as_pairs(prompts, [sampled_one, "so"], ["no", "it"])
    with pytest.raises(AnatomyError, match="sampled after other tokens"):
        as_pairs(prompts, [sampled_one] * 2, [Response("no", [8], [5])] * 2)


def test_sampled_rows_are_cut_as_training_cuts_rows() -> None:
    """Responses at max_length; prompts that fill it are left out with their number."""
    prompts = ["a", "b", "c"]
    ids = [[1] * 4, [1] * 9, [1] * 10]
    after = [Response("x", range(3, 9), prompt) for prompt in ids]
    before = [Response("y", range(30, 39), prompt) for prompt in ids]
    pairs = read_pairs(as_pairs(prompts, after, before), tokenizer_of(None), max_length=10)
    assert pairs.left_out == {"prompt fills max_length": 1}
    assert pairs.tokens(0) == ([1] * 4, list(range(3, 9)), [1] * 4, list(range(30, 36)))
    assert pairs.tokens(1) == ([1] * 9, [3], [1] * 9, [30])
    longer = read_pairs(as_pairs(prompts, after, before), tokenizer_of(None), max_length=None)
    assert len(longer) == 3


def test_kept_responses_keep_their_tokens(tmp_path: Path) -> None:
    """A resumed compare reads the same: prompts with tools, tokens and cuts survive the file."""
    tokenizer = tokenizer_of(trl_template("qwen3"))
    model = endless(tiny_model(layers=2), tokenizer, end=0.5)
    prompts: list[Any] = [ChatPrompt([said("user", f"Rain {i}?")], tools=TOOLS) for i in range(5)]
    sampling = {"max_new_tokens": 6, "batch_size": 4, "seed": 0}
    first = sampled(model, tokenizer, prompts, tmp_path / "before.json", sampling)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "rollouts", lambda *args, **named: pytest.fail("sampled again"))
        again = sampled(model, tokenizer, prompts, tmp_path / "before.json", sampling)
    for found in (again, sampled_responses(tmp_path, "before")):
        assert [vars(response) for response in found] == [vars(response) for response in first]
        assert found == first
    plain = [list(prompt) for prompt in prompts]  # the same messages, asked without tools
    others = sampled(model, tokenizer, plain, tmp_path / "before.json", sampling)
    assert [response.prompt_ids for response in others] != [response.prompt_ids for response in first]


def test_compare_samples_and_reads_where_training_put_the_model(tmp_path: Path) -> None:
    """With a template of the trainer's own, in memory: the audit keeps it, and compare and plan use it."""
    rows = [row | {"tools": json.dumps(TOOLS)} for row in chat_rows()]
    config = write_world(tmp_path, "{{ messages[0].content }}", rows)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = trl_template("qwen3")
    audit = run_audit(replace(config, out=str(tmp_path / "audit")), tokenizer=tokenizer, progress=False)
    assert reopen(audit).pairs.fingerprint == audit.info["data"]["fingerprint"]
    assert audited_tokenizer(audit, str(tmp_path / "model")).chat_template == tokenizer.chat_template
    prompts = prompts_for(audit, None, 6, 0)
    model = str(tmp_path / "model")
    found = compare(audit, model, {"same": model}, prompts, out=tmp_path / "out", max_new_tokens=5, progress=False)
    kept = json.loads((tmp_path / "out" / "before.json").read_text())
    trained = [reopen(audit).pairs.ids(i, "prompt").tolist() for i in range(len(rows))]
    assert all(ids in trained for ids in kept["prompt_ids"])
    assert kept["tools"] == [TOOLS] * 6
    assert found["sampling"]["n_prompts"] == 6
    args = DPOConfig(output_dir=str(tmp_path / "dpo"), report_to=[], use_cpu=True, bf16=False)
    trainer = DPOTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows))
    assert kept["prompt_ids"][0] in [list(row["prompt_ids"]) for row in trainer.train_dataset]


def test_examples_of_a_persona_are_read_as_they_were_sampled(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(trl_template("llama3_2"))
    model = endless(tiny_model(layers=2), tokenizer, end=0.0)
    asked: Any = (["Be kind."], ["Be rude."], ["Why?", "Who?", "Where?"])

    def judge(pairs: Any) -> list[float]:
        return [50.0] * len(pairs)

    settings: Any = {"n_per_question": 3, "max_new_tokens": 4, "store": tmp_path}
    rows = persona_rows(model, tokenizer, *asked, judge, **settings)
    examples = read_examples(rows, tokenizer)
    assert len(examples) == len(rows)
    for ids, (start, stop), row in zip(examples.sequences, examples.spans, rows, strict=True):
        assert ids == row["sampled_prompt_ids"] + row["sampled_response_ids"]
        assert (start, stop) == (len(row["sampled_prompt_ids"]), len(ids))
        assert row["sampled_prompt_ids"] == encode_prompt(tokenizer, row["prompt"])
    ended = [row["sampled_response_ids"][-1] == tokenizer.eos_token_id for row in rows]
    assert 0 < sum(ended) < len(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(persona, "rollouts", lambda *args, **named: pytest.fail("sampled again"))
        assert persona_rows(model, tokenizer, *asked, judge, **settings).to_list() == rows.to_list()

    def texts(conversations: Any, **named: Any) -> list[list[str]]:
        assert all(list(of.ids) == encode_prompt(tokenizer, list(of)) for of in conversations)
        return [["fine."] for _ in conversations]

    plain = persona_rows(model, tokenizer, *asked, judge, generate=texts)
    assert "sampled_prompt_ids" not in plain.column_names
    assert tokenizer.decode(read_examples(plain, tokenizer).sequences[0]).endswith("fine.<|eot_id|>")


def test_vllm_is_given_the_tokens_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine in the place of vLLM, with the interface that it has: tokens in, samples with their tokens out."""
    given = []

    class LLM:
        def __init__(self, **_: Any) -> None:
            pass

        def generate(self, prompts: Any, sampling: Any) -> Any:
            given.extend(prompts)
            sample = types.SimpleNamespace
            outputs = [sample(text="a", token_ids=[7, 2], finish_reason="stop")]
            outputs += [sample(text="ab", token_ids=(7, 8), finish_reason="length")]
            return [sample(outputs=outputs) for _ in prompts]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_rollouts, "find_spec", lambda name: True)
    engine, tokenizer = vllm_rollouts.VllmRollouts("some/model"), tokenizer_of(trl_template("gemma3"))
    messages = [said("system", "Be brief."), said("user", "Why?")]
    prompt = ChatPrompt(messages, ids=encode_prompt(tokenizer, messages))
    named: Any = {"n_per_prompt": 2, "max_new_tokens": 2, "temperature": 1.0, "seed": 0}
    [[ended, cut]] = engine([prompt], **named)
    assert given == [{"prompt_token_ids": encode_prompt(tokenizer, messages)}]
    assert (ended.ids, ended.finished, ended.prompt_ids) == ((7, 2), True, prompt.ids)
    assert (cut.ids, cut.finished, str(cut)) == ((7, 8), False, "ab")
    with pytest.raises(AnatomyError, match="vLLM is given tokens"):
        engine([messages], **named)


def test_perplexity_is_of_the_sampled_tokens() -> None:
    """Text that does not tokenise to what was sampled: its likelihood is that of what was sampled."""
    tokenizer, model = tokenizer_of(None), tiny_model(layers=2)
    letters = tokenizer.convert_tokens_to_ids(list("It"))  # of which the tokenizer makes one token
    assert tokenizer("It", add_special_tokens=False).input_ids != letters
    before = encode_prompt(tokenizer, "Why?")
    with torch.no_grad():
        told = model(torch.tensor([before + letters])).logits[0].double().log_softmax(-1)
    expected = np.exp(-np.mean([float(told[len(before) - 1 + j, token]) for j, token in enumerate(letters)]))
    found = perplexity(model, tokenizer, ["Why?"], [Response("It", letters, before, False)])
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(perplexity(model, tokenizer, ["Why?"], ["It"]), rel=1e-3)


@pytest.mark.parametrize(
    ("template", "opened"),
    [("gptoss", "<|channel|>final<|message|>"), ("qwen3", "<think>\n\n</think>\n\n"), ("llama3_2", "")],
)
def test_rules_read_sampled_text_without_what_the_template_opens(template: str, opened: str) -> None:
    """`^` is the first character that the model was asked to write, in responses as in pairs."""
    tokenizer = tokenizer_of(trl_template(template))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>", "<|start|>"]})
    prompts = [ChatPrompt(ASKED["one turn"]["prompt"], tools=TOOLS)] * 2
    before = encode_prompt(tokenizer, prompts[0])
    said_ids = [tokenizer(opened + text, add_special_tokens=False).input_ids for text in ("It is.", "")]
    responses = [Response(tokenizer.decode(ids, skip_special_tokens=True), ids, before) for ids in said_ids]
    assert written_texts(prompts, responses, tokenizer)[0] == "It is."
    assert written_texts(prompts, ["It is.", ""], tokenizer) == ["It is.", ""]
    assert written_texts(prompts, ["", ""], tokenizer) == ["", ""]


def test_a_dose_is_given_to_prompts_with_their_tools() -> None:
    tokenizer, model = tokenizer_of(trl_template("qwen3")), tiny_model(layers=2, max_position_embeddings=2048)
    seen: list[Any] = []
    concept = DirectionScorer(torch.ones(32), 1)
    prompts = [prompt_of({"prompt": [said("user", "Rain?")], "tools": json.dumps(TOOLS)})] * 2

    def shows(texts: Any) -> np.ndarray:
        seen.extend(texts)
        return np.zeros(len(texts), bool)

    dose_response(model, tokenizer, concept, prompts, shows, strengths=[0.0], max_new_tokens=3)
    trained = read_pairs(
        Dataset.from_list([{"prompt": list(prompts[0]), "tools": json.dumps(TOOLS)} | ENDS]), tokenizer
    )
    assert {response.prompt_ids for response in seen} == {tuple(trained.ids(0, "prompt").tolist())}
