"""Peak memory of every command, and how much of it each further pair takes.

    python benchmarks/memory.py

Every command runs in a process of its own on generated pairs of several sizes, with a small random model and SAE that
are the same for all sizes. The smallest size is what the others are set against: it imports, loads and computes the
same, so that what lies above it is what more pairs take. Two peaks are told: resident (files mapped into memory, which
the system takes back when it wants the room, included) and anonymous (what it can not take back).
"""

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "memory.json"
SIZES = (2048, 8192)
PROMPT, RESPONSE = (8, 24), (20, 60)  # words, which are tokens of this model
SHARD = 512
TRAIN = "--max_steps 1 --per_device_train_batch_size 2 --bf16 false --use_cpu --report_to none --save_strategy no"
# What is measured: the pairs grow; of what ends in "--n_prompts" the prompts, an eighth as many, on one audit.
COMMANDS = (
    "audit",
    "plan",
    "report",
    "fit",
    "compare",
    "compare --n_prompts",
    "predict",
    "predict --n_prompts",
    "dpo",
    "dpo of TRL",
    "reward",
)
MASK = """concepts:
  bold: {scorer: text, pattern: bold}
  habit: {scorer: features, audit: AUDIT, cluster: T1}
rules:
  - {explain_away: bold, with: shape_reward}
"""
TOKENS = "  - {explain_away: habit, with: mask_tokens, threshold: 0.5}\n"
SCORED = "  - {explain_away: habit, with: reweight_pairs}\n"


def write_data(root: Path, n: int) -> None:
    """`root`/pairs-`n`.jsonl, and `root`/model and `root`/sae if they are missing."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_audit_folder import WORDS, write_sae, write_start_model

    if not (root / "model").exists():
        write_start_model(root / "model")
        write_sae(root / "sae")
    rng = random.Random(0)
    plain = [word for word in WORDS if word != "**bold**"]

    def text(least: int, most: int, *more: str) -> str:
        return " ".join([*rng.choices(plain, k=rng.randint(least, most)), *more])

    with open(root / f"pairs-{n}.jsonl", "w") as file:
        for _ in range(n):
            row = {"prompt": text(*PROMPT) + " "}
            for side, rate in (("chosen", 0.8), ("rejected", 0.2)):
                row[side] = text(*RESPONSE, *(["**bold**"] * 2 if rng.random() < rate else []))
            file.write(json.dumps(row) + "\n")


def words_of(command: str, root: Path, n: int, largest: int) -> list[str]:
    """The command line, as `trl-anatomy` takes it."""
    model, pairs = str(root / "model"), str(root / f"pairs-{n}.jsonl")
    audit = root / f"audit-{n}"
    if command == "audit":
        words = ["audit", "--model", model, "--dataset", pairs, "--sae", str(root / "sae"), "--out", str(audit)]
        return [*words, f"--shard_pairs={SHARD}", "--bootstrap=100"]
    if command == "report":
        return ["report", "--audit", str(audit)]
    if command == "fit":
        return ["fit", "--model", model, "--dataset", pairs, "--scorer", "probe", "--out", str(root / "concept")]
    shown, prompts = (largest, n // 8) if command.endswith("--n_prompts") else (n, 128)
    if command.startswith("compare"):
        words = ["compare", "--audit", str(root / f"audit-{shown}"), "--before", model, "--after", model]
        return [*words, f"--n_prompts={prompts}", "--max_new_tokens=40", "--out", str(root / f"compare-{command}-{n}")]
    policy = root / f"{command}-{n}.yaml"
    policy.write_text(MASK.replace("AUDIT", str(audit)) + (SCORED if command == "reward" else TOKENS))
    if command == "plan":
        return ["plan", "--audit", str(audit), "--policy", str(policy)]
    data = root / f"data-{shown}"
    data.mkdir(exist_ok=True)
    if not (data / "train.jsonl").exists():
        (data / "train.jsonl").write_bytes((root / f"pairs-{shown}.jsonl").read_bytes())
    words = ["--model_name_or_path", model, "--dataset_name", str(data), "--output_dir", str(root / f"out-{command}")]
    words = [command.split()[0], *words, *TRAIN.split(), "--dtype=float32", "--max_length=1024"]
    if words[0] == "predict":
        words += ["--audit", str(root / f"audit-{shown}"), "--prediction", str(root / f"foretold-{command}-{n}")]
        return [*words, f"--n_prompts={prompts}", "--n_per_prompt=2", "--max_new_tokens=40", "--n_pairs=64"]
    ours = {"dpo": ["--audit", str(audit)], "reward": []}  # the audit's truncation is not that of reward training
    if command in ours:
        words += [*ours[command], "--concept_policy", str(policy)]
    return words


class Peak:
    """Peak of the memory of this process that the system could not take back (anonymous pages), in bytes."""

    def __init__(self) -> None:
        self.anonymous = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, of_status("RssAnon"))
            time.sleep(0.005)


def of_status(name: str) -> int:
    """A figure of /proc/self/status in bytes; VmHWM, unlike ru_maxrss, knows nothing of what started the process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this benchmark needs Linux")


def part(command: str, root: Path, n: int, largest: int) -> dict[str, Any]:
    """Run one command in this process; its peaks in bytes and its processor time."""
    from trl_anatomy.cli import main

    words = words_of(command, root, n, largest)
    peak = Peak()
    if main(words) != 0:
        raise SystemExit(f"{' '.join(words)} failed")
    return {"resident": of_status("VmHWM"), "anonymous": peak.anonymous, "cpu_seconds": round(time.process_time(), 1)}


def slope(sizes: list[int], peaks: list[int]) -> float:
    """Bytes that a further pair takes: between the two largest sizes, where what is allocated once is behind."""
    return round((peaks[-1] - peaks[-2]) / (sizes[-1] - sizes[-2]), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=SIZES)
    parser.add_argument("--only", nargs="+", default=COMMANDS, choices=COMMANDS, help="what is measured anew")
    parser.add_argument("--folder", help="where data and audits are kept; default: a folder that is removed")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = sorted(args.pairs)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.folder or temporary)
        if args.part == "data":
            return write_data(root, args.size)
        if args.part is not None:
            print(json.dumps(part(args.part, root, args.size, sizes[-1])))
            return None
        root.mkdir(exist_ok=True)

        def run(name: str, size: int) -> dict[str, Any]:
            command = [sys.executable, __file__, "--part", name, "--size", str(size), "--folder", str(root), "--pairs"]
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            with tempfile.TemporaryDirectory(dir=root) as cache:  # each command tokenises for itself
                environment = {**os.environ, "PYTHONPATH": path, "HF_DATASETS_CACHE": cache, "OMP_NUM_THREADS": "1"}
                command += map(str, sizes)
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{name}, {size} pairs: {done.stderr[-2000:]}")
            return json.loads(done.stdout.splitlines()[-1]) if name != "data" else {}

        before = json.loads(RESULT.read_text())["commands"] if RESULT.exists() else {}
        measured: dict[str, Any] = {}
        for size in sizes:
            if not (root / f"pairs-{size}.jsonl").exists():
                run("data", size)
            if "audit" not in args.only and not (root / f"audit-{size}").exists():
                run("audit", size)
        for name in args.only:
            found = [run(name, size) for size in sizes]
            pairs = [size // 8 for size in sizes] if "n_prompts" in name else sizes
            measured[name] = {
                "date": datetime.date.today().isoformat(),
                "pairs": pairs,
                **{key: [figures[key] for figures in found] for key in found[0]},
                "resident_bytes_per_pair": slope(pairs, [figures["resident"] for figures in found]),
                "anonymous_bytes_per_pair": slope(pairs, [figures["anonymous"] for figures in found]),
            }
            print(name, json.dumps(measured[name]), flush=True)
            write_results({**before, **measured})
    return None


def write_results(commands: dict[str, Any]) -> None:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "transformers", "trl", "datasets", "pyarrow", "numpy")
    result = {
        "command": "python benchmarks/memory.py",
        "device": {"cpu": cpu[0].split(":")[1].strip() if cpu else "unknown", "threads": 1},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "data": {
            "prompt_tokens": PROMPT,
            "response_tokens": RESPONSE,
            "latents": 96,
            "live_latents_per_token": 6,
            "shard_pairs": SHARD,
        },
        "commands": {name: commands[name] for name in COMMANDS if name in commands},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
