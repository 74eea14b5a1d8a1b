"""How long a page takes to open in Chromium, and how long its table of pairs takes the first time.

    python benchmarks/page.py --pairs 10000 50000 --rounds 3

Builds audits of generated pairs (the tests' world with other words added to every response, every step but the pass
through a model), writes their pages, and opens each in a fresh headless Chromium with an empty cache. Wall time counts
from the start of navigation and depends on what else the machine does; processor time, of all the browser's processes,
hardly does, and is what the page would take at most on two idle cores. Needs playwright and a Chromium, as the browser
tests do.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from audit_world import make_audit, make_world, raw_dataset
from browser import chromium

from trl_anatomy.audit.report import write_report

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as", "they", "there")


def write_page(n_pairs: int, words: int, out: Path) -> tuple[Path, float]:
    """The page of an audit of `n_pairs` generated pairs, and the seconds it took to write."""
    world, rng = make_world(n=n_pairs), random.Random(0)
    for texts in world.texts:
        for side in ("chosen", "rejected"):
            texts[side] += " " + " ".join(rng.choices(WORDS, k=words))
    audit = make_audit(out, world, samples=True)
    start = time.perf_counter()
    return write_report(audit, raw_dataset(world)), round(time.perf_counter() - start, 1)


def measure(page: Path) -> dict[str, float]:
    """Milliseconds of one opening: first paint, all scripts done, the table of pairs; processor time of all of it."""
    with chromium() as browser:
        system = browser.new_browser_cdp_session()

        def spent() -> float:
            return 1000 * sum(p["cpuTime"] for p in system.send("SystemInfo.getProcessInfo")["processInfo"])

        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(180_000)
        tab.goto("about:blank")
        before = spent()
        tab.goto(page.as_uri())
        tab.wait_for_function("() => performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
        opened = spent() - before
        found = tab.evaluate(
            "() => ({paint: performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0,"
            " load: performance.getEntriesByType('navigation')[0].loadEventEnd})"
        )
        pairs = tab.evaluate(
            "() => { const start = performance.now(); document.getElementById('tab-pairs').click();"
            " document.body.offsetHeight; return performance.now() - start; }"
        )
        return {"first_paint_ms": found["paint"], "loaded_ms": found["load"], "cpu_ms": opened, "pairs_table_ms": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000])
    parser.add_argument("--words", type=int, default=200, help="words added to each response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pages", type=Path, nargs="*", default=[], help="measure these pages as well")
    parser.add_argument("--out", type=Path, help="folder for the audits; default a temporary one")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "page.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        made = [(n, *write_page(n, args.words, out / str(n))) for n in args.pairs]
        for n, page, seconds in [*made, *((None, page, None) for page in args.pages)]:
            rounds = [measure(page) for _ in range(args.rounds)]
            row = {
                "pairs": n,
                "megabytes": round(page.stat().st_size / 1e6, 1),
                "write_s": seconds and round(seconds, 1),
            }
            row |= {key: round(statistics.median(r[key] for r in rounds)) for key in rounds[0]}
            print(json.dumps(row))
            rows.append(row)
    with chromium() as browser:
        versions = {"chromium": browser.version, "plotly": version("plotly"), "python": platform.python_version()}
    machine = {"date": datetime.date.today().isoformat(), "processor": platform.machine(), "cores": os.cpu_count()}
    machine |= {"load": os.getloadavg()[0], "rounds": args.rounds, "words": args.words, "versions": versions}
    args.results.parent.mkdir(exist_ok=True)
    args.results.write_text(json.dumps({"machine": machine, "pages": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
