"""Models whose files bring code of their own: it is not run, unless the config of a trainer says so."""

import json
from pathlib import Path
from typing import Any

from ..errors import AnatomyError


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool | None = None) -> Any:
    """Load the transformers configuration of a model; of an adapter that of its base model.

    Args:
        name: folder or hub name.
        revision: of the model on the hub.
        trust_remote_code: as the config of a trainer says; None, where no setting can allow it, is no.

    Raises:
        AnatomyError: it cannot be loaded.
    """
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    try:
        adapter = find_adapter_config_file(name, revision=revision)
        if adapter is not None:
            base = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
            return AutoConfig.from_pretrained(base, trust_remote_code=bool(trust_remote_code))
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=bool(trust_remote_code))
    except Exception as error:  # of the hub, of a broken file: what they raise is theirs
        reason = why_not_loaded(error, settable=trust_remote_code is not None)
        raise AnatomyError(f"model {name}: cannot be loaded ({reason}).") from error


def why_not_loaded(error: Exception, *, settable: bool = False) -> str:
    """Why transformers did not load a model or its tokenizer, as part of a sentence.

    Args:
        error: what it raised.
        settable: there is a setting that lets such code run.

    >>> why_not_loaded(ValueError("Wrong.\\nMore."))
    'Wrong.'
    """
    if not needs_remote_code(error):
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    remedy = "set trust_remote_code if you trust it, or " if settable else ""
    return f"its files bring code of their own, which is not run here: {remedy}use a model that transformers knows"


def needs_remote_code(error: Exception) -> bool:
    """Whether transformers refused to load something because code beside it would have to run."""
    return "trust_remote_code" in str(error)
