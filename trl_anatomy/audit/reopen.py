"""What an audit was made from, loaded again as its settings say: for plan, report and compare."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import AnatomyError
from ..reading.clock import dated
from ..reading.processing import is_template_file
from .config import AuditConfig, recorded
from .run import load_dataset, load_model, load_tokenizer, shape_of

if TYPE_CHECKING:
    from ..reading.spans import Pairs
    from .folder import Audit


@dataclass(frozen=True)
class Source:
    """The audited pairs, with the tokenizer and the model that read them; each is loaded when first asked for."""

    audit: Audit
    config: AuditConfig

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer or processor that made the audited tokens."""
        return self.as_audited(load_tokenizer(self._named("model"), self.config))

    def as_audited(self, processing_class: Any) -> Any:
        """A tokenizer or processor with the chat template of the audit, whose clock shows the audit's date."""
        template = self.audit.info["data"].get("chat_template")
        if template is not None and template != processing_class.chat_template:
            processing_class.chat_template = template
        return dated(processing_class, self.audit.date)

    @cached_property
    def model_config(self) -> Any:
        """The start model's transformers config, without its weights."""
        try:
            self._named("model")
            return shape_of(self.config)
        except AnatomyError as error:
            raise AnatomyError(f"{self.audit.name}: the model of the audit is needed again. {error}") from error

    @cached_property
    def model(self) -> Any:
        """The start model, checked against the audit's fingerprint."""
        from ..reading.fingerprint import model_fingerprint

        self._named("model")
        model = load_model(self.config)
        said = self.audit.info["model"].get("fingerprint")  # an audit of habits alone read no weights
        if said is not None and model_fingerprint(model) != said:
            raise AnatomyError(
                f"{self.audit.name}: the model at {self.config.model} has changed since the audit; audit again."
            )
        return model

    @cached_property
    def pairs(self) -> Pairs:
        """The pairs, checked against the audit's fingerprint."""
        from ..reading.sft import read_rows

        self._named("dataset")
        try:
            raw = load_dataset(self.config)
        except AnatomyError as error:
            raise AnatomyError(
                f"{self.audit.name}: the dataset of the audit is needed again, and cannot be read. {error} Put it "
                "back there, or audit it where it is now."
            ) from error
        pairs = read_rows(
            raw,
            self.tokenizer,
            data_kind=self.config.data_kind,
            max_length=self.config.max_length,
            truncation=self.config.truncation,
            pool_special_tokens=self.config.pool_special_tokens,
        )
        self.audit.check_pairs(pairs)
        return pairs

    @cached_property
    def trained(self) -> Pairs:
        """The pairs that are trained on: those with a blank response too, which the audit leaves out."""
        from ..reading.spans import EMPTY, read_pairs

        pairs = self.pairs
        if EMPTY not in pairs.left_out or pairs.one_sided:  # rules leave such rows of SFT data as they are
            return pairs
        return read_pairs(
            pairs.raw,
            self.tokenizer,
            max_length=pairs.max_length,
            truncation=pairs.truncation,
            pool_special_tokens=pairs.pool_special_tokens,
            keep_blank=True,
        )

    def _named(self, what: str) -> str:
        name: str = self.config.data_name if what == "dataset" else getattr(self.config, what)
        if not name:
            raise AnatomyError(
                f"{self.audit.name}: the audit was made with a {what} in memory, which cannot be loaded again; save "
                f"the {what}, and audit it from there."
            )
        return name


def reopen(audit: Audit, *, trust_remote_code: bool | None = None) -> Source:
    """What `audit` was made from.

    Args:
        audit: the audit; its folder is no reason to trust the code of the model that it names.
        trust_remote_code: as the user's own recipe says; None, where none can say it, is no.

    Raises:
        AnatomyError: when something asked for is not there any more, or has changed since the audit.
    """
    config = replace(recorded(audit.info["settings"]), trust_remote_code=trust_remote_code)
    if is_template_file(config.chat_template_path) and audit.info["data"].get("chat_template") is not None:
        config = replace(config, chat_template_path=None)  # the audit has its text, whatever became of the file
    return Source(audit, config)
