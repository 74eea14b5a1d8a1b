"""The processing class of a model, loaded as TRL's trainers load it: what makes tokens of the rows that are trained on.

`DPOTrainer` takes the processor where a repository has one, whose template may be another than its tokenizer's.
`RewardTrainer` takes the tokenizer, and puts the template of ``chat_template_path`` into it.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import AnatomyError
from .remote_code import why_not_loaded

_TEMPLATE_FILES = (".jinja", ".j2")


def load_processing_class(
    name: str,
    *,
    reward: bool = False,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
) -> Any:
    """Load the processor or tokenizer that a trainer of TRL would load for a model.

    Args:
        name: folder or hub name of the model.
        reward: as the reward trainer, which takes a tokenizer also where there is a processor.
        revision: of the model on the hub.
        trust_remote_code: run code of the repository, as the config of a trainer says; None, where no setting can allow
            it, is no.

    Raises:
        AnatomyError: it cannot be loaded, or is a processor without a tokenizer.
    """
    from transformers import AutoProcessor, AutoTokenizer

    def load(auto: Any) -> Any:
        return auto.from_pretrained(name, revision=revision, trust_remote_code=bool(trust_remote_code))

    try:
        loaded = load(AutoTokenizer if reward else AutoProcessor)
    except Exception as error:  # of the hub, of a broken file, of a tokenizer's own backend: what they raise is theirs
        # A processor passes over what its tokenizer says.
        why = error if reward else _raised(lambda: load(AutoTokenizer)) or error
        reason = why_not_loaded(why, settable=trust_remote_code is not None)
        raise AnatomyError(f"model {name}: its tokenizer cannot be loaded ({reason}).") from error
    if not hasattr(text_tokenizer(loaded), "eos_token_id"):
        raise AnatomyError(
            f"model {name}: its processor is a {type(loaded).__name__} without a tokenizer; save the tokenizer "
            "beside the model."
        )
    return loaded


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer of a processor; a tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def prompt_ids(processing_class: Any, prompt: str | list[dict[str, Any]], **kwargs: Any) -> list[int]:
    """Tokens of a prompt as TRL makes them: text as it stands, a conversation by the template, up to the answer.

    Args:
        kwargs: for the template: tools, and what a row's ``chat_template_kwargs`` hold.
    """
    from trl.data_utils import _tokenize

    if not isinstance(prompt, str):
        kwargs = {"add_generation_prompt": True, **kwargs}
    return list(_tokenize(processing_class, prompt, **kwargs)["input_ids"])


def is_template_file(path: str | None) -> bool:
    """Whether `chat_template_path` names a template itself, and no tokenizer that has one."""
    return path is not None and path.endswith(_TEMPLATE_FILES)


def set_chat_template(processing_class: Any, path: str) -> None:
    """Put the template at `path` into a processing class as ``chat_template_path`` does.

    A file (.jinja, .j2) is the template. A folder or hub name is a tokenizer, which gives its template, its added
    tokens and its EOS too (`trl.clone_chat_template`).

    Raises:
        AnatomyError: nothing there that can be read as one.
    """
    if is_template_file(path):
        try:
            with open(path, encoding="utf-8") as file:
                processing_class.chat_template = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise AnatomyError(f"chat_template_path {path}: cannot be read ({why_not_loaded(error)}).") from error
        return
    from transformers import AutoTokenizer
    from trl import clone_chat_template

    tokenizer = text_tokenizer(processing_class)
    try:
        # TRL's function does not say whether remote code may run: here it may not, before it could be asked for.
        AutoTokenizer.from_pretrained(path, trust_remote_code=False).get_chat_template()
        clone_chat_template(_Unweighted(), tokenizer, path)
    except Exception as error:
        raise AnatomyError(
            f"chat_template_path {path}: no template can be loaded from there ({why_not_loaded(error)}); give a .jinja "
            "file, or the folder or hub name of a tokenizer that has one."
        ) from error
    processing_class.chat_template = tokenizer.chat_template


class _Unweighted:
    """Stands in for the model whose embeddings TRL's function makes as long as the vocabulary, in whole multiples."""

    def __init__(self) -> None:
        text_config = SimpleNamespace(eos_token_id=None)
        self.config = SimpleNamespace(get_text_config=lambda: text_config)
        self.vocab_size = 0

    def can_generate(self) -> bool:
        return False

    def resize_token_embeddings(self, new_num_tokens: int, pad_to_multiple_of: int | None) -> None:
        whole = pad_to_multiple_of or 1
        self.vocab_size = -(-new_num_tokens // whole) * whole


def lengthen_embeddings(model: nn.Module, processing_class: Any) -> None:
    """Give the tokens that `set_chat_template` added their rows in a model's embeddings: the mean of all others.

    TRL draws such rows around that mean, with a 30,000th of the spread of the others: what is read of the start model
    is what training starts from, but for that.
    """
    lm: Any = model
    before, wanted = lm.get_input_embeddings().num_embeddings, len(text_tokenizer(processing_class))
    if wanted <= before:
        return
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        lm.resize_token_embeddings(wanted, mean_resizing=False)
    with torch.no_grad():
        for rows in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            if rows is not None:
                rows.weight[before:] = rows.weight[:before].float().mean(dim=0).to(rows.weight.dtype)


def _raised(do: Callable[[], Any]) -> Exception | None:
    try:
        do()
    except Exception as error:
        return error
    return None
