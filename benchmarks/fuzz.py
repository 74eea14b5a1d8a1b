"""Coverage-guided fuzzing of what reads other people's files: policies, datasets, audit folders.

    python benchmarks/fuzz.py --minutes 60 --target policy dataset folder

Atheris (libFuzzer for Python, `pip install -e .[fuzz]`) mutates inputs and keeps those that reach new code of this
package or of PyYAML. The targets are those of `tests/fuzz_targets.py`: whatever comes out of a reader that is not
AnatomyError is a finding, and so is an input that takes more than 30 seconds or 4 GB. Findings are saved beside the
results (`--findings`) and do not end the run. Of the inputs that reached something new, up to 150 are
kept in `tests/fuzz_corpus/TARGET`, which the tests replay.
"""

import argparse
import datetime
import json
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"
TARGETS = ("policy", "dataset", "folder")
LARGEST = {"policy": 4096, "dataset": 512, "folder": 256}  # bytes of an input
KEPT = 150  # inputs of each target's corpus

# What libFuzzer puts into policies; single characters it finds by itself.
WORDS = (
    "version: concepts: rules: scorer: text pattern: features [1,2] direction probe attention_probe path: "
    "layer: reduce: max mean sae: release: id: audit: cluster: T1 R1 given: [a] explain_away: amplify: with: "
    "filter_pairs reweight_pairs shape_reward residualize inoculate steer ablate_features project_out "
    "mask_tokens where: column: equals: in: data: B1 prompts: prompt: strength: fraction: threshold: hold: "
    "above: instruction: &a *a <<: !!int !!python/object !!binary .nan .inf null true 1e400 0x1F 1_000 "
    "2001-01-01 {} [] %YAML --- ..."
)


def seeds(target: str) -> list[bytes]:
    """Where a corpus begins: the policies of the documentation, and a few plain bytes."""
    if target != "policy":
        return [bytes([0]), bytes(range(64)), bytes(range(255, 155, -1))]
    text = (ROOT / "docs" / "reference" / "policy.md").read_text(encoding="utf-8")
    return [found.encode() for found in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


def fuzz(target: str, seconds: int, corpus: Path, findings: Path) -> None:
    """One fuzzer, in this process, which libFuzzer ends."""
    import atheris

    sys.path[:0] = [str(ROOT), str(TESTS)]
    with atheris.instrument_imports(include=["trl_anatomy", "yaml"], enable_loader_override=False):
        import fuzz_targets
    read, seen = fuzz_targets.TARGETS[target], set()
    fuzz_targets.whole_folder()

    def one(data: bytes) -> None:
        try:
            read(data)
        except Exception as error:
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "trl_anatomy/" in f.filename]
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "fuzz_targets"
            if (type(error).__name__, place) not in seen:
                seen.add((type(error).__name__, place))
                name = f"{target}-{type(error).__name__}-{place.replace(':', '-')}"
                (findings / name).write_bytes(data)
                print(f"\nFINDING {type(error).__name__} at {place}", flush=True)
                traceback.print_exc()

    words = findings / f"{target}.dict"
    words.write_text("".join(f'"{word}"\n' for word in WORDS.split()))
    options = [f"-dict={words}"] if target == "policy" else []
    options += [
        f"-max_total_time={seconds}",
        f"-max_len={LARGEST[target]}",
        f"-artifact_prefix={findings}/{target}-",
        "-timeout=30",
        "-rss_limit_mb=4096",
        "-print_final_stats=1",
        "-verbosity=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def keep(target: str, corpus: Path) -> None:
    """Copy some of the new inputs, short ones and long ones, into the tests' corpus."""
    home = TESTS / "fuzz_corpus" / target
    home.mkdir(parents=True, exist_ok=True)
    there = {file.read_bytes() for file in home.iterdir()}
    found = sorted(
        (file for file in corpus.iterdir() if file.read_bytes() not in there), key=lambda f: f.stat().st_size
    )
    room = max(0, KEPT - len(there))
    for file in found[:: max(1, -(-len(found) // room))] if room else []:
        (home / file.name[:16]).write_bytes(file.read_bytes())  # libFuzzer names an input by its hash


def measure(target: str, minutes: float, findings: Path) -> dict[str, Any]:
    """Run one fuzzer in a process of its own, and read what libFuzzer says of it."""
    home = TESTS / "fuzz_corpus" / target
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        starts = [*seeds(target), *(file.read_bytes() for file in home.glob("*"))]
        for number, data in enumerate(starts):
            (corpus / f"seed-{number:04d}").write_bytes(data)
        command = [sys.executable, __file__, "--one", target, "--minutes", str(minutes)]
        command += ["--corpus", folder, "--findings", str(findings)]
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        text = done.stdout + done.stderr
        (findings / f"{target}.log").write_text(text)
        stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", text))
        for file in corpus.glob("seed-*"):
            file.unlink()
        coverage = re.findall(r"cov: (\d+) ft: (\d+)", text)
        keep(target, corpus)
        return {
            "executions": int(stats.get("number_of_executed_units", 0)),
            "seconds": round(seconds),
            "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
            "edges": int(coverage[-1][0]) if coverage else 0,
            "findings": sorted(set(re.findall(r"FINDING (.*)", text))),
            "exit": done.returncode,  # not 0 where an input took too long, too much, or the process
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="of each target")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-findings")
    parser.add_argument("--one", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.findings.mkdir(parents=True, exist_ok=True)
    if args.one:
        fuzz(args.one, round(60 * args.minutes), args.corpus, args.findings)
        return
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {"runs": []}
    for target in args.target:
        found = {
            "target": target,
            "date": datetime.date.today().isoformat(),
            **measure(target, args.minutes, args.findings),
        }
        found["versions"] = {"python": platform.python_version(), "atheris": version("atheris")}
        results["runs"].append(found)
        print(json.dumps(found, indent=1), flush=True)
        RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
