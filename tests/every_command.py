"""Every command once, as a program that sees what reaches for another machine, the imports included.

    python every_command.py        in a folder with what `audit_files.write_inputs` makes; `--demo`: the demo too

The last line is JSON: of each command whether it ended well, and what was tried to be reached from where.
"""

import json
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

tried: list[list[str]] = []
now = ["imports"]


def close(name: str) -> None:
    real = getattr(socket.socket, name, None)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if name == "connect" and args[0].family == socket.AF_UNIX:
            return real(*args)
        frames = [f"{Path(frame.filename).name}:{frame.name}" for frame in traceback.extract_stack()]
        place = args[0] if name == "getaddrinfo" else args[-1]
        tried.append([now[0], f"{name} {place} from {' > '.join(frames)}"])
        raise OSError("the network is closed")

    setattr(socket if name == "getaddrinfo" else socket.socket, name, refuse)


if __name__ == "__main__":  # before anything else is imported; pytest, which looks for examples here, keeps its network
    for call in ("connect", "connect_ex", "sendto", "sendmsg", "getaddrinfo"):
        close(call)

POLICY = """\
concepts:
  habit: {scorer: features, audit: audit, cluster: T1}
rules:
  - {explain_away: habit, with: VERB}
"""
AUDIT = "audit --model model --dataset pairs.jsonl.gz --sae sae --out audit --shard_pairs 48 --bootstrap 100"
TRAIN = (
    "--model_name_or_path model --dataset_name pairs --max_steps 1 --bf16 false --use_cpu --report_to none "
    "--save_strategy no --dtype float32"
)
COMMANDS = {
    "check": f"{AUDIT} --dry_run",
    "audit": AUDIT,
    "plan": "plan --audit audit --policy shape.yaml --json",
    "report": "report --audit audit",
    "fit": "fit --model model --dataset pairs.jsonl.gz --scorer probe --layers 1 --out concept",
    "compare": "compare --audit audit --before model --after again --n_prompts 12 --n_per_prompt 4 --max_new_tokens 6",
    "dpo": f"dpo {TRAIN} --output_dir dpo --audit audit --concept_policy shape.yaml",
    "predict": f"predict {TRAIN} --output_dir foretold --audit audit --concept_policy shape.yaml --n_pairs 40 --json",
    "reward": f"reward {TRAIN} --output_dir reward --concept_policy weigh.yaml",
}


def demo() -> int:
    from trl_anatomy.testbed.demo import run_demo
    from trl_anatomy.testbed.world import Size

    run_demo(Path("demo"), size=Size(160, 2, 32, 64, 4, 50, 4_000, 48, 8, 1), say=lambda text: None)
    return 0


if __name__ == "__main__":
    from trl_anatomy.cli import main

    Path("shape.yaml").write_text(POLICY.replace("VERB", "shape_reward"))
    Path("weigh.yaml").write_text(POLICY.replace("VERB", "reweight_pairs"))
    ended = {}
    for now[0], words in COMMANDS.items():
        ended[now[0]] = main(words.split())
    if "--demo" in sys.argv:
        now[0] = "demo"
        ended["demo"] = demo()
    print("\n" + json.dumps({"ended": ended, "tried": tried}))
