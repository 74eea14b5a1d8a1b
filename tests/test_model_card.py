"""The section of the model card: what it says, what it leaves as it was, and that no text becomes markup."""

import copy
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from audit_world import make_audit, make_world, of_first_rows
from conftest import preference_rows
from explicit_dpo import dpo, reward
from huggingface_hub import ModelCard
from parity import EXACT, fresh
from test_compare import comparison
from trl import DPOConfig, DPOTrainer, RewardTrainer

from trl_anatomy import AnatomyDPOTrainer
from trl_anatomy.audit.folder import Audit
from trl_anatomy.audit.habits_by_prompt import HABIT_HYPOTHESES
from trl_anatomy.trainers.card import COMPARED, COMPARED_END, HEADING, card_section, code, fence, put_comparison

HOSTILE = [
    "`",
    "``` \n# heading",
    "a | b || c",
    "back\\| slash \\` tick",
    "<img src=x onerror=alert(1)>",
    "</code></td></table><script>alert(1)</script>",
    "[link](javascript:alert(1)) ![image](https://evil.example/x.png)",
    "https://evil.example www.evil.example someone@evil.example",
    f"{COMPARED_END}\n{COMPARED}",
    "&lt;b&gt; &#96; **bold** ~~gone~~ $x$",
    "right to left \u202e and \u2028 lines \r\n\t\x00 and \ud800",
    "{{ jinja }} {% raw %}",
    "---\nlicense: evil\n---",
    "x" * 1000,
    "   ",
    "",
]
SAFE = {*("h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre")}


class Page(HTMLParser):
    """Tags and attributes of a page, and the number of cells of each row."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.rows: list[int] = []
        parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
        self.feed(parser.render(markdown))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += 1


@pytest.mark.parametrize("text", HOSTILE)
def test_code_spans_and_fences_hold_any_text(text: str) -> None:
    page = Page(f"| a | b |\n| --- | --- |\n| {code(text)} | {code(text)} |\n| 1 | 2 |\n")
    assert page.tags <= SAFE
    assert page.rows == [2, 2, 2]
    assert page.tags >= {"code"} or not text.strip()
    block = Page(f"before\n\n{fence(text)}\n\nafter")
    assert block.tags == {"p", "pre", "code"}
    assert block.attributes <= {"class"}
    assert len(code(text)) <= 82


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    return of_first_rows(make_audit(tmp_path_factory.mktemp("audit"), make_world(600)), 12)


def test_without_audit_and_policy_the_card_is_the_one_of_trl(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = dpo(tiny_model_dir, tmp_path, preference_rows(12), policy=None)
    trainer.create_model_card(model_name="m")
    ours = (tmp_path / "README.md").read_bytes()
    DPOTrainer.create_model_card(trainer, model_name="m")
    assert (tmp_path / "README.md").read_bytes() == ours
    assert HEADING.encode() not in ours


@pytest.mark.parametrize(("make", "stock"), [(dpo, DPOTrainer), (reward, RewardTrainer)])
def test_section_follows_the_card_of_trl(make: Any, stock: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Twice, as two checkpoints do: the second card has one section, with what was logged by then."""
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 6, "learning_rate": 1e-3}
    trainer = make(tiny_model_dir, tmp_path, preference_rows(12), **options)
    trainer.train()
    ours = (tmp_path / "README.md").read_text()
    stock.create_model_card(trainer, model_name=tmp_path.name)
    theirs = (tmp_path / "README.md").read_text()
    assert ours.startswith(theirs.rstrip() + f"\n\n{HEADING}\n")
    assert ours.count(HEADING) == 1
    assert "trl_anatomy" in ModelCard(ours).data.tags
    assert "### What was audited" not in ours
    assert "```yaml\nversion: 1\n" in ours
    assert "explain away  bold" in ours  # the row of the plan
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    (row,) = (line for line in ours.splitlines() if line.startswith("| `bold` |"))
    assert f"→ {last['concepts/bold/gap']:.4g} |" in row
    assert f"→ {last['concepts/bold/reward_correlation']:.4g} |" in row
    assert f"→ {last['loss']:.4g} |" in ours
    assert Page(ours[ours.index(HEADING) :]).tags <= SAFE


def test_section_tells_of_the_audit_and_holds_no_markup(audit: Audit, tiny_model_dir: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        f"# ``` <script>alert(1)</script>\n# ````\n# {COMPARED}\n"
        + json.dumps(
            {
                "concepts": {"bold": {"scorer": "text", "pattern": r"\*\*bold\*\*"}},
                "rules": [
                    {
                        "explain_away": "bold",
                        "with": "shape_reward",
                        "strength": 1.5,
                        "where": {"prompt": "w3|`<img src=x>|\\[a\\]\\(javascript:b\\)|."},
                    }
                ],
            }
        )
    )
    trainer = dpo(tiny_model_dir, tmp_path / "out", preference_rows(12), policy=policy)
    trainer.train()
    shown = copy.copy(audit)
    labels = [HOSTILE[i % len(HOSTILE)] for i in range(audit.concepts.num_rows)]
    labels = [label.replace("\ud800", "") for label in labels]  # which no parquet file holds
    shown.concepts = audit.concepts.set_column(audit.concepts.column_names.index("label"), "label", pa.array(labels))
    shown.info = {**audit.info, "data": {**audit.info["data"], "name": str(tmp_path), "left_out": {"`|<b>": 3}}}
    row = {
        "kept": True,
        "differs": True,
        "context": "list",
        "habit": "bold",
        "unit": "share",
        "mean_in": 0.5,
        "q": 0.01,
    }
    row |= {"mean_in": 0.5, "mean_out": 0.1, "n_in": 30}
    row |= {"chosen_in": 0.7, "rejected_in": 0.2, "chosen_out": 0.3, "rejected_out": 0.2}
    rows = [row | {"when": hostile.replace("\ud800", "")} for hostile in ("asks for a list", *HOSTILE)]
    shown.habit_hypotheses = pa.Table.from_pylist(rows[:9], schema=HABIT_HYPOTHESES)
    section = card_section(shown, trainer.plan, trainer.policy_text, trainer.state.log_history)
    told = "more in chosen, hardly so elsewhere | `70 % / 20 %` | `30 % / 20 %` |"
    assert f"| `asks for a list` | `bold` | {told}" in section
    page = Page(section)
    assert page.tags <= SAFE
    assert page.attributes <= {"class"}
    assert str(tmp_path) not in section  # a card may be published
    largest = max(audit.concepts.to_pylist(), key=lambda row: abs(row["predicted"]))
    (line,) = (line for line in section.splitlines() if line.startswith(f"| {largest['concept']} |"))
    assert f"| {largest['predicted']:+.3f} | {largest['ci_low']:+.3f} to {largest['ci_high']:+.3f} |" in line
    assert f"`{audit.info['data']['fingerprint']}`" in section
    assert f"layer {audit.info['sae']['layer']}" in section
    alpha = audit.info["settings"]["alpha"]
    standing = [row for row in audit.hypotheses.to_pylist() if row["kept"] and row["q"] <= alpha]
    first = min(standing, key=lambda row: row["rank"])
    assert f"| {first['context']} | {first['concept']} |" in section
    assert policy.read_text().rstrip() in section


def card(folder: Path, policy_text: str, plan: Any) -> Path:
    readme = folder / "README.md"
    text = "stock\n\n" + card_section(None, plan, policy_text, [{"loss": 1.0}]) + "\nadded by hand: "
    readme.write_bytes(text.encode() + b"\xff\r\n")  # not UTF-8
    return readme


def test_comparison_takes_the_place_of_an_earlier_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    plan = dpo(tiny_model_dir, tmp_path / "out", preference_rows(12)).plan
    readme = card(tmp_path, f"# x\n{COMPARED}\n{COMPARED_END}\nversion: 1", plan)

    def read() -> str:
        return readme.read_bytes().decode("latin-1")

    empty, result = read(), comparison()
    assert put_comparison(readme, result, "policy")
    once = read()
    assert put_comparison(readme, result, "policy")
    assert read() == once
    assert "| T1 | `bold` | +0.250 | +0.200 to +0.300 | +0.100 | +0.000 to +0.200 |" in once
    assert "| `bold` | 30.0% | 35.0% |" in once
    assert "emoji" not in once
    start, end = empty.rindex(COMPARED), empty.rindex(COMPARED_END)
    assert once.startswith(empty[: start + len(COMPARED)])
    assert once.endswith(empty[end:])
    result["concepts"][0]["label"] = f"\n{COMPARED_END}\n<b>"
    result["agreement"]["policy"] |= {"r2": 0.5, "r2_low": 0.25, "r2_high": 0.75}
    assert put_comparison(readme, result, "policy")
    assert put_comparison(readme, comparison(), "policy")
    assert read() == once


def test_comparison_leaves_other_cards_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    assert not put_comparison(readme, comparison(), "dpo")
    assert not readme.exists()
    for text in ("stock card\n", f"{COMPARED_END}\n\n{COMPARED}\n"):
        readme.write_text(text)
        assert not put_comparison(readme, comparison(), "dpo")
        assert readme.read_text() == text


TWO_RANKS = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from conftest import preference_rows
from parity import EXACT, fresh
from trl import DPOConfig
from trl_anatomy import AnatomyDPOTrainer
from trl_anatomy.trainers import card, seams
out = Path(sys.argv[3])
args = DPOConfig(
    output_dir=str(out),
    **{**EXACT, "report_to": sys.argv[5].split(), "save_strategy": "steps", "max_steps": 1, "save_steps": 1},
)
trainer = AnatomyDPOTrainer(
    model=sys.argv[2], args=args, train_dataset=fresh(preference_rows(12)), audit=sys.argv[4], callbacks=[]
)
assert trainer.accelerator.num_processes == 2
append = seams.append_section
def counted(*arguments):
    (out / f"wrote-{trainer.accelerator.process_index}").write_text("")
    append(*arguments)
seams.append_section = counted
trainer.train()
"""


def test_one_of_two_ranks_writes(audit: Audit, tiny_model_dir: Path, tmp_path: Path) -> None:
    try:
        import tensorboard  # noqa: F401

        tracker = "tensorboard"
    except ImportError:
        tracker = "none"
    script, out = tmp_path / "train.py", tmp_path / "out"
    script.write_text(TWO_RANKS)
    arguments = [str(script), str(Path(__file__).parent), str(tiny_model_dir), str(out), str(audit.path), tracker]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr[-3000:]
    assert [path.name for path in out.glob("wrote-*")] == ["wrote-0"]
    assert (out / "README.md").read_text().count("### What was audited") == 1
    if tracker == "tensorboard":
        assert len(list(out.glob("runs/*/events*"))) == 1


def test_an_audit_alone_is_told(audit: Audit, tiny_model_dir: Path, tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path), **EXACT)
    trainer = AnatomyDPOTrainer(
        model=str(tiny_model_dir), args=args, train_dataset=fresh(preference_rows(12)), audit=audit
    )
    trainer.create_model_card(model_name="m")
    text = (tmp_path / "README.md").read_text()
    assert "### What was audited" in text
    assert "### What the policy did" not in text
    assert "No training step was logged." in text
