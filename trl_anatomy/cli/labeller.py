"""The chat model that names concepts and contexts, for the commands that write a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..audit.config import AuditConfig
from ..errors import AnatomyError

if TYPE_CHECKING:
    from ..audit.folder import Audit


def check_labeller(flags: Any) -> None:
    """Refuse what can not work before long work."""
    from ..audit.run import empty_model, load_tokenizer
    from ..reading.chat import ChatEndpoint, LocalChat
    from ..reading.processing import text_tokenizer

    if flags.label_url is not None and flags.label_model is None:
        raise AnatomyError("--label_url needs --label_model, the name of the model there.")
    if flags.label_key_variable is not None and flags.label_url is None:
        raise AnatomyError("--label_key_variable goes with --label_url.")
    if flags.label_url is not None:
        ChatEndpoint(flags.label_url, flags.label_model, flags.label_key_variable).check()
    elif flags.label_model is not None:
        empty_model(flags.label_model)
        LocalChat.check(text_tokenizer(load_tokenizer(flags.label_model)), flags.label_model)


def name_concepts(audit: Audit, flags: Any) -> None:
    """Have concepts and contexts named, and write the page again."""
    from ..audit.labelling import label_audit, read_firings
    from ..audit.reopen import reopen
    from ..audit.report import write_report
    from ..audit.run import load_model, load_tokenizer
    from ..reading.chat import ChatEndpoint, LocalChat
    from ..reading.processing import text_tokenizer

    source = reopen(audit)
    pairs = source.pairs
    chat: ChatEndpoint | LocalChat
    if flags.label_url is not None:
        chat = ChatEndpoint(flags.label_url, flags.label_model, flags.label_key_variable)
    else:
        name = flags.label_model
        chat = LocalChat(load_model(AuditConfig(model=name)), text_tokenizer(load_tokenizer(name)), Path(name).name)
    label_audit(audit, pairs.texts, chat, firings=read_firings(source))
    write_report(audit, pairs)
