"""Reports an audit, and what a policy touches, to whatever `report_to` names. It changes nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..shaping.plan import PolicyPlan

MAX_ROWS = 10_000  # what W&B shows of a table


class AuditCallback(TrainerCallback):
    """Logs an audit when training begins; the trainers of this package add it by themselves.

    To every tracker: the numbers of `audit.json` counts as `audit/*` and what each rule touches as `policy/*`, through
    `trainer.log`. To W&B, where `report_to` names it and a run exists: `audit/hypotheses/step_N` and
    `audit/concepts/step_N` tables (N = the global step, so that a resumed run does not hide the first tables), the page
    as `audit/report/step_N`, and the folder as an artifact of type "audit", without `harvest/`, which can be tens of
    gigabytes.

    Args:
        audit: an Audit, the path of an audit folder, or None to report the plan only.
        plan: the PolicyPlan that acts, or None.
        trainer: where scalars are logged; None logs none.
    """

    def __init__(
        self, audit: "Audit | str | Path | None", plan: "PolicyPlan | None" = None, trainer: Any = None
    ) -> None:
        if isinstance(audit, str | Path):
            from ..audit.folder import load_audit

            audit = load_audit(audit)
        self.audit: Audit | None = audit
        self.plan, self.trainer = plan, trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scalars = self.scalars()
        if self.trainer is not None and scalars:
            self.trainer.log(scalars)
        if self.audit is not None and state.is_world_process_zero and "wandb" in args.report_to:
            self._log_to_wandb(state.global_step)

    def scalars(self) -> dict[str, float]:
        """`audit/<count>` and `policy/<n>_<verb>_<concept>/<number>`, n counting rules from 1."""
        found: dict[str, float] = {}
        if self.audit is not None:
            found |= {f"audit/{key}": value for key, value in _numbers(self.audit.info.get("counts", {})).items()}
        for n, rule in enumerate(self.plan.rules if self.plan is not None else [], start=1):
            place = "_".join([str(n), *(str(rule[key]) for key in ("verb", "concept") if rule.get(key) is not None)])
            found |= {f"policy/{place}/{key}": value for key, value in _numbers(rule).items()}
        return found

    def _log_to_wandb(self, step: int) -> None:
        import wandb

        run, audit = wandb.run, self.audit
        if run is None or audit is None:
            return
        payload: dict[str, Any] = {
            f"audit/hypotheses/step_{step}": _table(audit.hypotheses, first="rank"),
            f"audit/concepts/step_{step}": _table(audit.labelled(audit.concepts)),
            "train/global_step": step,
        }
        page = Path(audit.path) / "report.html"
        if page.is_file():
            payload[f"audit/report/step_{step}"] = wandb.Html(str(page), inject=False)
        run.log(payload)
        artifact = wandb.Artifact(f"audit-{run.id}", type="audit", metadata=audit.info)
        for file in sorted(Path(audit.path).iterdir()):
            if file.is_file():
                artifact.add_file(str(file))
        run.log_artifact(artifact)


def _numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a nested dict under slash-joined keys."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found


def _table(table: Any, first: str | None = None) -> Any:
    """A pyarrow table as a W&B table of at most MAX_ROWS rows, sorted by the column `first` where there is one."""
    import wandb

    if first in table.column_names:
        table = table.sort_by(first)
    rows = table.slice(0, MAX_ROWS).to_pylist()
    return wandb.Table(columns=list(table.column_names), data=[list(row.values()) for row in rows])
