"""Reports an audit, and what a policy touches, to whatever `report_to` names. It changes nothing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..reading.storage import fetch, listed
from .card import (
    OBSERVED,
    Cells,
    by_prompt_cells,
    concept_cells,
    fence,
    finding_cells,
    hypothesis_cells,
    observed,
    observed_cells,
)

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..shaping.plan import PolicyPlan

MAX_ROWS = 10_000  # what W&B shows of a table
_ROWS = ("untouched", "blank")  # counts of a plan that are logged: rows that rules miss or that have nothing to read


class AuditCallback(TrainerCallback):
    """Logs an audit and a plan when training begins, and what was observed when it ends.

    The trainers of this package add it by themselves. To every tracker: the numbers of `audit.json` counts as `audit/*`
    and what each rule touches as `policy/*`, through `trainer.log`; in `log_history` they stand after the training's
    first entry. Beyond numbers, where `report_to` names them:

    - W&B, where a run exists: the tables `audit/findings/step_N`, as the page tells them, `audit/by_prompt/step_N`,
      `audit/hypotheses/step_N`, `audit/concepts/step_N`, `policy/rules/step_N`, `observed/concepts/step_N` and
      `observed/rewards/step_N` (N = the global step, so that no later table, say of a resumed run, hides an earlier
      one), the page as `audit/report/step_N`, the policy in the run's configuration as `concept_policy`, and the audit
      folder as an artifact of type "audit", without `harvest/`, which can be tens of gigabytes.
    - TensorBoard (through the writer of the trainer's own callback) and trackio: the first rows of the same tables,
      `audit/findings`, `audit/by_prompt`, `audit/hypotheses`, `audit/concepts`, `observed/concepts`,
      `observed/rewards`, and `policy/yaml`, `policy/plan`. Text of the data stands in code spans and fences there,
      since both read Markdown.

    Args:
        audit: an Audit, the path of an audit folder, or None to report the plan only.
        plan: the PolicyPlan that acts, or None.
        trainer: where scalars are logged, and whose TensorBoard writer is used; None logs neither.
        policy_text: the policy as YAML.
    """

    def __init__(
        self,
        audit: "Audit | str | Path | None",
        plan: "PolicyPlan | None" = None,
        trainer: Any = None,
        *,
        policy_text: str = "",
    ) -> None:
        if isinstance(audit, str | Path):
            from ..audit.folder import load_audit

            audit = load_audit(audit)
        if audit is not None and not audit.has_concepts:
            audit.check_kind("log")
        self.audit: Audit | None = audit
        self._record: dict[str, float] | None = None
        self.plan, self.trainer, self.policy_text = plan, trainer, policy_text

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scalars = self.scalars()
        if self.trainer is not None and scalars:
            self.trainer.log(scalars)
            if len(state.log_history) == 1:  # the first entry of a history is the training's own
                self._record = state.log_history.pop()
        if not state.is_world_process_zero:
            return
        if "wandb" in args.report_to:
            self._begin_in_wandb(state.global_step)
        tables: dict[str, Cells] = {}
        texts: dict[str, str] = {}
        if self.audit is not None:
            concepts = concept_cells(self.audit.labelled(self.audit.concepts).to_pylist(), self.plan)
            findings = finding_cells(self.audit)
            tables = {"audit/findings": findings} if findings.rows else {}
            by_prompt = by_prompt_cells(self.audit)
            tables |= {"audit/by_prompt": by_prompt} if by_prompt.rows else {}
            tables |= {"audit/hypotheses": hypothesis_cells(self.audit), "audit/concepts": concepts}
        if self.plan is not None:
            from ..shaping.plan import plan_report

            texts = {"policy/yaml": fence(self.policy_text, "yaml"), "policy/plan": fence(plan_report(self.plan))}
        self._log_markdown(args, tables, texts, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        ends = "train_runtime" in (logs or {})
        if self._record is not None and len(state.log_history) > ends:
            state.log_history.insert(1, self._record)
            self._record = None
        # The summary that ends a training: in on_train_end the trackers' own callbacks, which come first, have closed.
        if not ends or not state.is_world_process_zero:
            return
        seen = observed(state.log_history)
        if "wandb" in args.report_to:
            import wandb

            if wandb.run is not None:
                step = state.global_step
                tables = {f"observed/{key}/step_{step}": _table(OBSERVED[key], rows) for key, rows in seen.items()}
                wandb.run.log({**tables, "train/global_step": step})
        cells = {f"observed/{key}": observed_cells(key, rows) for key, rows in seen.items()}
        self._log_markdown(args, cells, {}, state.global_step)

    def scalars(self) -> dict[str, float]:
        """`audit/<count>`, `policy/rows_<count>` and `policy/<n>_<verb>_<concept>/<number>`, n from 1."""
        found: dict[str, float] = {}
        if self.audit is not None:
            found |= {f"audit/{key}": value for key, value in _numbers(self.audit.info.get("counts", {})).items()}
        if self.plan is not None:
            found |= {f"policy/rows_{key}": self.plan.counts[key] for key in _ROWS if key in self.plan.counts}
        for n, rule in enumerate(self.plan.rules if self.plan is not None else [], start=1):
            place = "_".join([str(n), *(str(rule[key]) for key in ("verb", "concept") if rule.get(key) is not None)])
            found |= {f"policy/{place}/{key}": value for key, value in _numbers(rule).items()}
        return found

    def _begin_in_wandb(self, step: int) -> None:
        import wandb

        run, audit = wandb.run, self.audit
        if run is None:
            return
        payload: dict[str, Any] = {"train/global_step": step}
        if self.plan is not None:
            run.config.update({"concept_policy": self.policy_text}, allow_val_change=True)
            rules = [{"rule": n, **rule} for n, rule in enumerate(self.plan.rules, start=1)]
            if rules:
                payload[f"policy/rules/step_{step}"] = _table(list(rules[0]), [list(rule.values()) for rule in rules])
        if audit is not None:
            if audit.findings is not None and audit.findings.num_rows:
                payload[f"audit/findings/step_{step}"] = _finding_table(audit.findings, audit.habits)
            if audit.habit_hypotheses is not None and audit.habit_hypotheses.num_rows:
                payload[f"audit/by_prompt/step_{step}"] = _arrow_table(audit.habit_hypotheses, first="rank")
            payload[f"audit/hypotheses/step_{step}"] = _arrow_table(audit.hypotheses, first="rank")
            payload[f"audit/concepts/step_{step}"] = _arrow_table(audit.labelled(audit.concepts))
            page = Path(audit.path) / "report.html"
            if fetch(page):
                payload[f"audit/report/step_{step}"] = wandb.Html(str(page), inject=False)
        run.log(payload)
        if audit is not None:
            artifact = wandb.Artifact(f"audit-{run.id}", type="audit", metadata=audit.info)
            for name in listed(Path(audit.path)):
                if fetch(file := Path(audit.path) / name):
                    artifact.add_file(str(file))
            run.log_artifact(artifact)

    def _log_markdown(
        self, args: TrainingArguments, tables: Mapping[str, Cells], texts: Mapping[str, str], step: int
    ) -> None:
        """Tables and texts to the trackers that read Markdown, where they run."""
        if "tensorboard" in args.report_to and self.trainer is not None:
            for writer in (getattr(c, "tb_writer", None) for c in self.trainer.callback_handler.callbacks):
                if writer is not None:
                    for key, text in {**{key: table.markdown() for key, table in tables.items()}, **texts}.items():
                        writer.add_text(key, text, step)
                    writer.flush()
        if "trackio" in args.report_to:
            import trackio

            if trackio.context_vars.current_run.get() is not None:
                shown: dict[str, Any] = {
                    key: trackio.Table(columns=list(table.columns), data=table.rows) for key, table in tables.items()
                }
                trackio.log(shown | {key: trackio.Markdown(text) for key, text in texts.items()})


def _numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a nested dict under slash-joined keys."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found


def _finding_table(findings: Any, habits: Any) -> Any:
    """The findings as a W&B table, in the words and numbers of the page."""
    from ..audit.finding_text import finding_texts

    columns = ("rank", "finding", "name", "chosen", "rejected", "difference", "95 % interval", "adds", "with it", "q")
    texts = finding_texts(findings, habits)
    rows = [
        [rank, t.title, t.name, t.chosen, t.rejected, t.difference, t.interval, t.adds, t.with_it, q]
        for rank, (t, q) in enumerate(zip(texts, findings["q"].to_pylist(), strict=True), start=1)
    ]
    return _table(columns, rows)


def _arrow_table(table: Any, first: str | None = None) -> Any:
    """A pyarrow table as a W&B table of at most MAX_ROWS rows, sorted by the column `first` where there is one.

    What a W&B table has no type for, such as the evidence of a label, stands as JSON.
    """
    if first in table.column_names:
        table = table.sort_by(first)
    rows = table.slice(0, MAX_ROWS).to_pylist()
    return _table(table.column_names, [[_cell(value) for value in row.values()] for row in rows])


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])
