"""What `trl-anatomy demo --real` costs, stage by stage, and what it shows.

Each stage runs in a process of its own, so that its peak of memory is its own too. The folder can be gone on with: a
stage that was measured is not run again. CPU seconds count all threads; of wall time they say what the machine's other
work leaves out.

    python benchmarks/demo_real.py --out anatomy-demo-real
"""

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "demo_real.json"
PACKAGES = ("torch", "trl", "transformers", "peft", "sae-lens", "datasets")


def measure(out: Path, number: int) -> None:
    """Run stage `number` of the demo in `out`, and keep what it took."""
    import torch

    from trl_anatomy.testbed.demo import quiet
    from trl_anatomy.testbed.real_demo import RealDemo, large_blocks_apart

    large_blocks_apart()
    demo = RealDemo(out)
    stage = demo.stages()[number]
    cpu, wall = time.process_time(), time.perf_counter()
    with quiet():
        demo.do(stage)
    taken = {
        "stage": stage.name,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - wall, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "threads": torch.get_num_threads(),
    }
    folder = out.with_name(f"{out.name}.measured")
    folder.mkdir(exist_ok=True)
    (folder / f"{number}.json").write_text(json.dumps(taken))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the demo")
    parser.add_argument("--stage", type=int, help="run this stage alone, counted from 0")
    args = parser.parse_args()
    if args.stage is not None:
        measure(args.out, args.stage)
        return

    from trl_anatomy.testbed.demo import quiet
    from trl_anatomy.testbed.real_demo import LORA, PREFERENCE, REAL, RECIPE, RealDemo

    taken: list[dict[str, Any]] = []
    for number in range(len(RealDemo(args.out).stages())):
        file = args.out.with_name(f"{args.out.name}.measured") / f"{number}.json"
        if not file.is_file():
            words = ["--out", str(args.out), "--stage", str(number)]
            subprocess.run([sys.executable, __file__, *words], check=True)
        taken.append(json.loads(file.read_text()))
    with quiet():
        told = RealDemo(args.out).run()
    comparison = json.loads((args.out / "compare" / "compare.json").read_text())
    result = {
        "command": f"python benchmarks/demo_real.py --out {args.out.name}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU only",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "seed": 0,
        "size": REAL.__dict__,
        "recipe": {**RECIPE, "lora": dict(LORA)},
        "preference": dict(PREFERENCE),
        "stages": taken,
        "cpu_seconds": round(sum(stage["cpu_seconds"] for stage in taken), 1),
        "peak_gb": max(stage["peak_gb"] for stage in taken),
        "habits": told["habits"],
        "agreement": {
            name: comparison["agreement"]["dpo"][name] for name in ("n", "r2", "r2_low", "r2_high", "spearman")
        },
        "rates": comparison["rates"],
        "words": comparison["words"],
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['cpu_seconds'] / 60:.0f} CPU minutes, at most {result['peak_gb']} GB")


if __name__ == "__main__":
    main()
