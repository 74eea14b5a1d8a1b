"""A hook for outside suites: the tasks of lm-evaluation-harness on the models of a comparison, put beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AnatomyError


def run_suites(
    models: Mapping[str, str | Path],
    tasks: Sequence[str],
    *,
    out: Path | None = None,
    **settings: Any,
) -> dict[str, dict[str, dict[str, float]]]:
    """Run tasks of lm-evaluation-harness (`pip install lm-eval`) on each model, such as before and after training.

    Args:
        models: name -> folder or hub name, such as {"before": M, "dpo": "out"}.
        tasks: names that lm-evaluation-harness knows, such as "gsm8k" or "ifeval".
        out: folder for `suites.json`, such as that of `compare`.
        settings: further arguments of `lm_eval.simple_evaluate`, such as `limit`, `batch_size`, `apply_chat_template`.

    Returns:
        task -> metric (with its filter and `_stderr`, as lm-evaluation-harness names them) -> model -> value.

    Raises:
        AnatomyError: lm-evaluation-harness is not installed; no model or no task.
    """
    if not models or not tasks:
        raise AnatomyError(f"run_suites: {len(models)} models and {len(tasks)} tasks given, needed: one of each.")
    try:
        import lm_eval
    except ImportError as error:
        raise AnatomyError("run_suites needs lm-evaluation-harness: pip install lm-eval.") from error

    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, model in models.items():
        loaded = {"pretrained": str(model), "trust_remote_code": False}
        told = lm_eval.simple_evaluate(model="hf", model_args=loaded, tasks=list(tasks), **settings)
        for task, metrics in told["results"].items():
            for metric, value in metrics.items():
                # Beside figures a result holds the task's alias, and "N/A" where there is no standard error
                if isinstance(value, int | float) and not isinstance(value, bool):
                    found.setdefault(task, {}).setdefault(metric, {})[name] = float(value)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / "suites.json.tmp"
        temporary.write_text(json.dumps({"models": {k: str(v) for k, v in models.items()}, "tasks": found}, indent=2))
        os.replace(temporary, out / "suites.json")
    return found
