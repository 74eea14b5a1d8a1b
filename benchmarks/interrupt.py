"""Kill audits, scoring, trainings and pages at random moments, start them again, and compare what they leave.

    python benchmarks/interrupt.py --kills 50

Each piece of work (`tests/interrupting.py`) is done once undisturbed. Then SIGKILL ends it: half of the times at a
moment drawn evenly over what the undisturbed work takes, the others as soon as a file or a checkpoint is seen half
written. It is started again in the same folder until it finishes, and every file that it leaves is compared with the
undisturbed ones by hash. Records kills, where they fell, finishes, and differences.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import conftest
import torch
from interrupting import interrupt, works
from transformers import LlamaConfig, LlamaForCausalLM

RESULT = Path(__file__).parent / "results" / "interrupt.json"


def start_model(folder: Path) -> Path:
    """A random two-layer Llama of width 16 and its tokenizer."""
    tokenizer = conftest.build_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "bos_token_id": None}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each piece of work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="pieces of work; the others stay as they were recorded")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        every = works(start_model(root / "model-to-train"))
        for name in args.only or every:
            if name == "audit at s3" and find_spec("s3fs") is None:
                print(f"{name}: left out, the extra 'storage' is not installed")
                continue
            (root / name).mkdir()
            start, before = time.monotonic(), cpu_seconds()
            record = interrupt(every[name](root / name), root / name, args.kills, args.seed, name)
            spent = {"seconds": round(time.monotonic() - start), "cpu_seconds": round(cpu_seconds() - before)}
            found = {**vars(record), **spent, "date": datetime.date.today().isoformat(), "seed": args.seed}
            print(name, json.dumps(found), flush=True)
            shutil.rmtree(root / name)
            recorded = json.loads(RESULT.read_text())["work"] | {name: found}
            write({name: recorded[name] for name in every if name in recorded})


def write(found: dict[str, Any]) -> None:
    packages = ("torch", "trl", "transformers", "datasets")
    made = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "work": found,
    }
    RESULT.write_text(json.dumps(made, indent=1) + "\n")


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
