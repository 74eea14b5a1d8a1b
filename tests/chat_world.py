"""Audits of conversations under any chat template: a tiny model, SAE and file of pairs, all random."""

import json
from pathlib import Path
from typing import Any

import trl
from reading_world import build_tokenizer, tiny_model, tiny_sae

from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import Audit
from trl_anatomy.audit.run import run_audit

_SHIPPED = Path(trl.__file__).parent / "chat_templates"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "rain",
            "description": "Rain of a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "Its name."}}},
        },
    }
]


def trl_template(name: str) -> str:
    """A chat template that TRL ships."""
    return (_SHIPPED / f"{name}.jinja").read_text()


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat_rows(n: int = 24) -> list[dict[str, Any]]:
    """Pairs with a prompt of their own each."""
    return [
        {
            "prompt": [said("user", f"Why {i}?")],
            "chosen": [said("assistant", f"Because {'of **air** ' * (i % 3)}it is.")],
            "rejected": [said("assistant", f"No{'.' * (1 + i % 4)}")],
        }
        for i in range(n)
    ]


def write_world(root: Path, template: str | None, rows: list[dict[str, Any]]) -> AuditConfig:
    """`root`/model with a tokenizer of `template`, `root`/sae and `root`/pairs.jsonl; the settings of their audit."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    tiny_model(layers=2, max_position_embeddings=2048).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    tiny_sae(hook="blocks.1.hook_resid_post").save_model(str(root / "sae"))
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return AuditConfig(
        model=str(root / "model"),
        dataset=str(root / "pairs.jsonl"),
        sae=str(root / "sae"),
        out=str(root / "audit"),
        bootstrap=100,
        device="cpu",
    )


def chat_audit(root: Path, template: str | None, rows: list[dict[str, Any]], **settings: Any) -> Audit:
    """The audit of `write_world`, run now."""
    from dataclasses import replace

    return run_audit(replace(write_world(root, template, rows), **settings), progress=False)
