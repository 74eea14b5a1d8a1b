"""Which checkpoints of a training are whole: a kill inside a save leaves the one with the highest number cut short.

The Trainer writes a checkpoint in place, in this order: weights, optimizer, scheduler, states of the random generators,
`trainer_state.json`. `get_last_checkpoint` of transformers takes the highest number, whatever is in it.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import AnatomyError

# What the Trainer reads when it goes on. torch's files are zip archives, whose table of contents stands at the end.
_JSON = (TRAINER_STATE_NAME, "config.json", "adapter_config.json", "*.index.json")
_TORCH = ("*.pt", "*.pth", "pytorch_model*.bin", "adapter_model*.bin", "optimizer*.bin")
_WEIGHTS = re.compile(
    r"(pytorch_model|model|(.+/)?adapter_model)\.(safetensors|bin)(\.index\.json)?"
    r"|pytorch_model_fsdp(\.bin|_\d+/\.metadata)|global_step\d+/.*_states\.pt"
)
_OPTIMIZER = re.compile(r"optimizer\.(pt|bin)|optimizer_\d+/\.metadata")


def flaw(checkpoint: Path) -> str | None:
    """What makes a checkpoint unfit to go on from; None where it is whole.

    Headers and tables of contents are read, neither tensors nor pickles. Files that the Trainer does not read when it
    goes on (the tokenizer, the model card, `training_args.bin`) are not looked at.

    Args:
        checkpoint: folder as the Trainer writes it: full, sharded, PEFT, FSDP or DeepSpeed.

    Returns:
        The flaw, such as "optimizer.pt is cut short", or None.
    """
    if not (checkpoint / TRAINER_STATE_NAME).is_file():  # written last
        return f"{TRAINER_STATE_NAME} is missing"
    files = {file.relative_to(checkpoint).as_posix(): file for file in checkpoint.rglob("*") if file.is_file()}
    for name, file in files.items():
        if not _readable(file):
            return f"{name} is cut short"
    return next((f"{missing} is missing" for missing in _missing(files)), None)


def _readable(file: Path) -> bool:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):  # refuses a header that does not agree with the file's size
                pass
        elif any(file.match(pattern) for pattern in _JSON):
            return isinstance(json.loads(file.read_bytes()), dict)
        elif any(file.match(pattern) for pattern in _TORCH):
            zipfile.ZipFile(file).close()
        elif file.suffix == ".distcp":
            return file.stat().st_size > 0
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False
    return True


def _missing(files: dict[str, Path]) -> Iterator[str]:
    """What must be there beside what is there."""
    if not any(_WEIGHTS.fullmatch(name) for name in files):
        yield "the file of weights"
    for name, file in files.items():
        folder = name.rpartition("/")[0]
        beside = f"{folder}/" if folder else ""
        if name.endswith(".index.json"):
            shards = json.loads(file.read_bytes()).get("weight_map", {})
            yield from (beside + shard for shard in sorted(set(shards.values())) if beside + shard not in files)
        if file.match("adapter_model.*") and f"{beside}adapter_config.json" not in files:
            yield f"{beside}adapter_config.json"
        if file.suffix == ".distcp" and f"{beside}.metadata" not in files:
            yield f"{beside}.metadata"
    if "latest" in files:  # DeepSpeed, which keeps optimizer and scheduler in the folder named here
        folder = files["latest"].read_text().strip()
        if not folder or not any(name.startswith(f"{folder}/") for name in files):
            yield f"the folder that latest names ('{folder}')"
        return
    parts = {
        "the optimizer's state": any(_OPTIMIZER.fullmatch(name) for name in files),
        "scheduler.pt": "scheduler.pt" in files,
        "the state of the random generators": any(re.fullmatch(r"rng_state(_\d+)?\.pth", name) for name in files),
    }
    if any(parts.values()):  # none of them with save_only_model
        yield from (part for part, there in parts.items() if not there)


def last_whole(output_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The whole checkpoint with the highest number, and those above it, each with its flaw."""
    numbers = {
        path: int(path.name.split("-")[1])
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if path.is_dir() and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)
    }
    skipped: list[tuple[Path, str]] = []
    for path in sorted(numbers, key=lambda path: -numbers[path]):
        found = flaw(path)
        if found is None:
            return path, skipped
        skipped.append((path, found))
    return None, skipped


def checkpoint_to_resume(wanted: str | bool | None, output_dir: Path) -> tuple[str | bool | None, str]:
    """What to hand to the Trainer for the `resume_from_checkpoint` that was asked for.

    Args:
        wanted: as `Trainer.train` takes it; "True" of a command line means True, unless there is such a folder.
        output_dir: of the training.

    Returns:
        `wanted` itself where the Trainer's own choice is whole, else the last whole checkpoint, with a warning.

    Raises:
        AnatomyError: a path that is cut short, or True where there are checkpoints and none is whole.
    """
    if isinstance(wanted, str) and wanted.lower() == "true" and not Path(wanted).exists():
        wanted = True
    if not wanted:
        return wanted, ""
    if isinstance(wanted, bool):
        whole, skipped = last_whole(output_dir)
        if not skipped:
            return wanted, ""
        told = ", ".join(f"{path.name} ({found})" for path, found in skipped)
        if whole is None:
            raise AnatomyError(f"{output_dir}: no checkpoint is whole: {told}; start without resume_from_checkpoint.")
        return str(whole), f"{output_dir}: {told} is not whole: training goes on from {whole.name}."
    path = Path(wanted)
    if not path.is_dir() or (found := flaw(path)) is None:
        return wanted, ""
    whole = last_whole(path.parent)[0]
    remedy = "start without resume_from_checkpoint" if whole is None else f"the last whole one there is {whole.name}"
    raise AnatomyError(f"resume_from_checkpoint: {path} is not whole ({found}); {remedy}.")


class WholeCheckpoints:
    """Mixin in front of a Trainer: goes on from whole checkpoints, and writes ones that differ from half ones."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; with True it goes on from the last checkpoint that is whole.

        Raises:
            AnatomyError: a path to a checkpoint that is cut short, or True where no checkpoint is whole.
        """
        trainer: Any = self
        found, warning = checkpoint_to_resume(resume_from_checkpoint, Path(trainer.args.output_dir))
        if warning and trainer.is_world_process_zero():
            warnings.warn(warning, stacklevel=2)
        return super().train(found, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer: Any = self
        if trainer.args.should_save:  # else one that is written over would look whole, half old and half new
            folder = Path(trainer._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        # The main process writes `trainer_state.json` next, which is to mean that the files of all ranks are there.
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]
