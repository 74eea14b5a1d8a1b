"""The statistics of an audit at full size: 260,000 pairs, 65,536 latents, 814 communities, 512 contexts.

Makes a harvest with known communities, contexts and effects on disk, shard by shard through the project's own writer,
and runs the analysis of `run_audit` on it in a fresh process, with made numbers of habits and the list of findings:
CPU seconds of each step, peak memory, and how much of what was planted it found. What is read in text has a benchmark
of its own (`scale_text.py`); labels of concepts look at 20,000 pairs at most, and need a model. Beside it, on a smaller
harvest, a straightforward version with dense arrays, scipy and scikit-learn, in a process of its own; both must agree
before anything is written.

    python benchmarks/scale.py
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from scipy import sparse

SPANS = ("prompt", "chosen", "rejected")
SEED = 0
SHARD = 2048


class Plan:
    """What is planted. Everything follows from the sizes and `SEED`; shards are drawn one by one.

    Latents fire in communities, which are on or off in a response; in addition each response lights latents drawn from
    a power law over all of them, most on one to three tokens only. A topic turns a community of its own on in both
    responses, on many tokens, and lights latents of its own in the prompt.
    """

    def __init__(self, pairs: int, latents: int, communities: int, topics: int, live: int) -> None:
        self.pairs, self.latents, self.n_topics, self.live = pairs, latents, topics, live
        rng = np.random.default_rng(SEED)
        order = rng.permutation(latents)
        mean = latents // (2 * communities)
        size = rng.integers(max(10, mean // 2), mean + mean // 2 + 1, communities)
        self.start = np.r_[0, np.cumsum(size)]
        self.members = order[: self.start[-1]]
        others = order[self.start[-1] :]
        self.background = rng.permutation(latents)
        rate = rng.permutation(np.arange(1, communities + 1) ** -0.6)
        self.rate = np.minimum(0.25, rate * 10 / rate.sum())  # about ten communities are on in a response
        weight = rng.uniform(0.5, 1.5, topics)
        self.topic_weight = weight / weight.sum()
        kinds = rng.permutation(communities)
        n_global, n_local = communities // 12, min(topics, communities // 12)
        self.gap = np.zeros(communities)  # on more often in chosen (+) or in rejected (-), everywhere
        sign = np.where(np.arange(n_global) % 2 == 0, 1.0, -1.0)
        self.gap[kinds[:n_global]] = sign * np.minimum(0.5 * self.rate[kinds[:n_global]], 0.02)
        self.local = np.stack([rng.choice(topics, n_local, replace=False), kinds[n_global : n_global + n_local]])
        neutral = kinds[n_global + n_local :]
        self.of_topic = neutral[:topics]
        per_topic = max(8, min(24, len(others) // topics))
        self.of_prompt = np.stack([rng.choice(others, per_topic, replace=False) for _ in range(topics)])

    @property
    def communities(self) -> list[np.ndarray]:
        return [np.sort(self.members[a:b]) for a, b in zip(self.start[:-1], self.start[1:], strict=True)]

    def topics(self, shard: int) -> np.ndarray:
        n = min(SHARD, self.pairs - shard * SHARD)
        return np.random.default_rng([SEED, 1, shard]).choice(self.n_topics, n, p=self.topic_weight)

    def shard(self, shard: int) -> tuple[dict[str, tuple[sparse.csr_array, sparse.csr_array, np.ndarray]], np.ndarray]:
        rng, topic = np.random.default_rng([SEED, 2, shard]), self.topics(shard)
        n = len(topic)
        spans = {}
        row = np.repeat(np.arange(n), self.of_prompt.shape[1])
        strong = (row, self.of_prompt[topic].ravel(), np.zeros(len(row), dtype=np.int64))
        spans["prompt"] = self._span(rng, n, strong, self.live // 4, rng.integers(20, 120, n))
        for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
            on = rng.random((n, len(self.rate)), dtype=np.float32) < self.rate + sign * self.gap
            on[np.arange(n), self.of_topic[topic]] |= rng.random(n) < 0.95
            for t, community in self.local.T:
                here = np.flatnonzero(topic == t)
                on[here, community] = rng.random(len(here)) < 0.4 + 0.2 * sign
            row, which = np.nonzero(on)
            size = np.diff(self.start)[which]
            first = np.cumsum(size) - size
            latent = self.members[np.repeat(self.start[which] - first, size) + np.arange(size.sum())]
            length, often = rng.integers(100, 500, n), np.repeat(which == self.of_topic[topic[row]], size)
            strong = (np.repeat(row, size), latent, np.where(often, length[np.repeat(row, size)] // 5, 0))
            spans[side] = self._span(rng, n, strong, self.live, length)
        return spans, shard * SHARD + np.arange(n)

    def _span(
        self,
        rng: np.random.Generator,
        n: int,
        strong: tuple[np.ndarray, np.ndarray, np.ndarray],
        live: int,
        length: np.ndarray,
    ) -> tuple[sparse.csr_array, sparse.csr_array, np.ndarray]:
        """Strong latents (row, latent, tokens more) fire with probability 0.85, on 2 % of the tokens or more; others
        fill up to about `live`."""
        kept = rng.random(len(strong[0]), dtype=np.float32) < 0.85
        row, latent, extra = (part[kept] for part in strong)
        count = np.minimum(length[row] // 50 + 1 + extra + rng.geometric(0.15, len(row)), 200)
        fill = np.maximum(0, live - np.bincount(row, minlength=n))
        more = np.repeat(np.arange(n), fill)
        # Rank r is drawn with a density falling as r^-0.5.
        drawn = self.background[np.int64(self.latents * np.square(rng.random(len(more), dtype=np.float32)))]
        few = rng.integers(1, 4, len(more))
        few[rng.random(len(more), dtype=np.float32) < 0.1] = 12
        # One sort by (row, latent, count); of a latent that was drawn twice the larger count stays.
        packed = np.concatenate(
            [(row * self.latents + latent) * 256 + count, (more * self.latents + drawn) * 256 + few]
        )
        packed.sort()
        place = packed >> 8
        last = np.r_[place[1:] != place[:-1], True]
        place, count = place[last], np.minimum(packed[last] & 255, length[place[last] // self.latents])
        indptr = np.searchsorted(place, np.arange(n + 1) * self.latents)
        column, shape = place % self.latents, (n, self.latents)
        largest = (0.3 * np.sqrt(count) + 0.1).astype(np.float32)
        fired = sparse.csr_array((count.astype(np.int32), column, indptr), shape=shape)
        return sparse.csr_array((largest, column, indptr), shape=shape), fired, length

    def shards(self) -> Iterator[tuple[dict, np.ndarray]]:
        global _plan
        _plan = self
        numbers = range(-(-self.pairs // SHARD))
        if len(numbers) < 4:
            yield from map(self.shard, numbers)
            return
        with get_context("fork").Pool(os.cpu_count()) as pool:
            yield from pool.imap(_drawn, numbers)


_plan: Plan


def _drawn(shard: int) -> tuple[dict, np.ndarray]:
    return _plan.shard(shard)


def write(plan: Plan, out: Path) -> None:
    """Through the writer of the project, unless a whole harvest of this plan is there."""
    from trl_anatomy.errors import AnatomyError
    from trl_anatomy.reading.harvest import Harvest, stream_harvest

    key = {"benchmark": "scale", **{name: getattr(plan, name) for name in ("pairs", "latents", "n_topics", "live")}}
    try:
        if Harvest.open(out).key == key:
            return
    except AnatomyError:
        pass
    stream_harvest(out, plan.shards(), key, n_pairs=plan.pairs, d_sae=plan.latents, shard_pairs=SHARD)


class Memory:
    """Peak memory of this process: all of it, and the part that the system could not take back (anonymous pages)."""

    def __init__(self) -> None:
        self.anonymous = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.anonymous = max(self.anonymous, int(line.split()[1]))
            time.sleep(0.02)

    def gigabytes(self) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_rss_gb": round(peak / 2**20, 2), "peak_anonymous_gb": round(self.anonymous / 2**20, 2)}


def made_habits(pairs: int, groups: np.ndarray) -> object:
    """Every habit of the library on both sides, drawn: each third one differs between the sides."""
    from trl_anatomy.audit.counted import Counted
    from trl_anatomy.reading.habits import HABITS

    rng = np.random.default_rng([SEED, 3])
    values = np.empty((2, pairs, len(HABITS)))
    for k, habit in enumerate(HABITS.values()):
        for side in range(2):
            more = 0.01 * (k % 3 == 0 and side == 0)
            if habit.kind == "rate":
                values[side, :, k] = rng.random(pairs) < 0.02 + 0.01 * k + more
            else:
                values[side, :, k] = np.round((1 + more) * rng.gamma(2, 50, pairs))
    return Counted(values, HABITS, groups)


def audit(plan: Plan, harvest: Path, out: Path, contexts: int) -> dict:
    """What `run_audit` does with a finished harvest, with what it took and what it found."""
    import pyarrow as pa

    from trl_anatomy.audit import run
    from trl_anatomy.audit.config import AuditConfig
    from trl_anatomy.audit.finding_list import Shown, habit_lines, list_findings
    from trl_anatomy.audit.folder import write_audit
    from trl_anatomy.reading.harvest import Harvest

    memory, cpu, wall_timed = Memory(), {}, run.timed

    @contextmanager
    def timed(timings: dict[str, float], name: str) -> Iterator[None]:
        start = time.process_time()
        with wall_timed(timings, name):
            yield
        cpu[name] = round(time.process_time() - start, 1)
        print(f"{name}: {cpu[name]} s of CPU, {memory.gigabytes()}", file=sys.stderr, flush=True)

    run.timed = timed
    topic = np.concatenate([plan.topics(i) for i in range(-(-plan.pairs // SHARD))])
    prompt_groups = np.arange(plan.pairs) - (np.arange(plan.pairs) % 10 == 9)  # every tenth pair repeats a prompt

    def texts(i: int) -> tuple[str, str, str]:
        return f"tell me of subject{topic[i]}", f"word{i % 97} answer", f"word{i % 89} answer"

    config = AuditConfig(out=str(out), n_contexts=contexts, bootstrap=1000)
    counted, timings = made_habits(plan.pairs, prompt_groups), {}
    start, cpu_start = time.perf_counter(), time.process_time()
    with timed(timings, "open and check hashes"):
        read = Harvest.open(harvest)
    with timed(timings, "habit_lines"):
        lines = habit_lines(counted, config.seed)
    findings = run.analyse(read, config, texts, prompt_groups, counted=counted, lines=lines)
    with timed(timings, "findings"):
        table, n = findings.concepts, findings.concepts.num_rows
        for name, made in (("label", [f"label {i}" for i in range(n)]), ("label_score", [0.8] * n)):
            table = table.set_column(table.column_names.index(name), name, pa.array(made))
        listed, _ = list_findings(counted, read.rows, Shown.of(table, findings.shown), lines=lines, seed=config.seed)
    analysed = time.perf_counter() - start
    with timed(timings, "write the folder"):
        info = {"versions": {}, "model": {}, "sae": {}, "data": {}, "settings": config.settings(), **findings.info}
        write_audit(out, {**info, "timings": findings.timings}, findings.hypotheses, findings.concepts, findings.pairs)
    cpu["in all"] = round(time.process_time() - cpu_start, 1)  # also what belongs to no step
    entries = dict.fromkeys(SPANS, 0)
    for shard in read.shards():
        for span in SPANS:
            entries[span] += shard.count(span).nnz
    return {
        "pairs": plan.pairs,
        "latents": plan.latents,
        "live_latents_per_span": {span: round(n / plan.pairs) for span, n in entries.items()},
        "harvest_gb": round(sum(file.stat().st_size for file in harvest.iterdir()) / 1e9, 2),
        "cpu_seconds": cpu,
        "seconds": {
            **{name: round(timings[name], 1) for name in ("open and check hashes", "habit_lines")},
            **findings.timings,
            "findings": round(timings["findings"], 1),
            "analysis in all": round(analysed, 1),
            "until the folder is written": round(time.perf_counter() - start, 1),
        },
        **memory.gigabytes(),
        "findings_listed": listed.num_rows,
        "settings_used": findings.info["settings_used"],
        "notes": findings.info["notes"],
        "found": found(plan, topic, findings),
    }


def found(plan: Plan, topic: np.ndarray, findings: object) -> dict:
    """How much of what was planted the audit reports, and how much that was not."""
    concepts = [row for row in findings.concepts.to_pylist() if row["kind"] == "co-firing"]
    owner = np.full(plan.latents, -1)
    for k, features in enumerate(plan.communities):
        owner[features] = k
    of: dict[int, dict] = {}  # planted community -> the concept that is (almost) it
    for row in concepts:
        planted, n = np.unique(owner[row["features"]], return_counts=True)
        best, shared = int(planted[n.argmax()]), int(n.max())
        if best >= 0 and shared / (row["n_features"] + len(plan.communities[best]) - shared) >= 0.8:
            of[best] = row
    verdict = {"rises": 1, "falls": -1}
    signs = {k: verdict.get(row["verdict"], 0) for k, row in of.items()}
    moved = set(np.flatnonzero(plan.gap)) | set(plan.local[1])
    planted = [k for k in np.flatnonzero(plan.gap) if k in of]
    neutral = [k for k in of if k not in moved]
    expected = np.array([2 * 0.85 * plan.gap[k] for k in planted])
    predicted = np.array([of[k]["predicted"] for k in planted])
    name = {row["concept"]: k for k, row in of.items()}
    members: dict[str, list[int]] = {}
    for pair, contexts in enumerate(findings.pairs["contexts"].to_pylist()):
        for context in contexts:
            members.setdefault(context, []).append(pair)
    main = {context: int(np.bincount(topic[pairs]).argmax()) for context, pairs in members.items()}
    cells = {(int(t), int(k)) for t, k in plan.local.T if k in of}
    hits = set()
    for row in findings.hypotheses.filter(findings.hypotheses["differs"]).to_pylist():
        if row["view"] == "feature" and row["delta"] > 0:
            hits.add((main[row["context"]], name.get(row["concept"], -1)))
    return {
        "concepts": len(concepts),
        "communities_planted": len(plan.communities),
        "communities_recovered": len(of),
        "global_effects_planted": len(planted),
        "global_effects_reported_with_right_sign": int(sum(signs[k] == np.sign(plan.gap[k]) for k in planted)),
        "correlation_of_predicted_and_planted_shift": round(float(np.corrcoef(expected, predicted)[0, 1]), 4),
        "neutral_concepts": len(neutral),
        "neutral_concepts_reported": int(sum(signs[k] != 0 for k in neutral)),
        "topic_effects_planted": len(cells),
        "topic_effects_reported_in_their_topic": len(cells & hits),
    }


# The straightforward version: dense arrays, loops, scipy and scikit-learn ---------------------------------------------


def small(way: str, plan: Plan, harvest: Path, out: Path, contexts: int) -> dict:  # noqa: PLR0915
    """Graph, scores and tests in one of two ways; what was computed goes to `out`."""
    from trl_anatomy.audit import clusters, stats, views
    from trl_anatomy.audit.communities import fired_responses
    from trl_anatomy.audit.config import AuditConfig
    from trl_anatomy.reading.harvest import Harvest

    read = Harvest.open(harvest)
    groups = np.concatenate([plan.topics(i) for i in range(-(-plan.pairs // SHARD))]) % contexts
    memory, seconds = Memory(), {}

    def timed(name: str, work: object) -> object:
        start = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - start, 2)
        return result

    if way == "ours":

        def graph() -> np.ndarray:
            fired = fired_responses(read, 0.01, plan.pairs)
            return clusters.cofiring_graph(fired, clusters.live_features(fired, 10)).toarray()

        def tests() -> tuple[np.ndarray, ...]:
            welch, split = stats.compare_groups(scores.u, groups, contexts, scores.rows % 2)
            return welch.z, welch.p, stats.benjamini_hochberg(welch.p), split.delta_a, split.delta_b

        edges = timed("graph", graph)
        scores = timed("scores", lambda: views.activity(read, plan.communities))
        u, s = scores.u, scores.s
        z, p, q, a, b = timed("tests", tests)
        labels = timed("contexts", lambda: views.find_contexts(s, AuditConfig(n_contexts=contexts, min_context=2))[0])
    else:
        from scipy import stats as scipy_stats
        from sklearn.cluster import MiniBatchKMeans

        dense = {span: read.frequency(span).toarray() for span in ("chosen", "rejected")}

        def graph() -> np.ndarray:
            fired = np.concatenate([dense["chosen"] > np.float32(0.01), dense["rejected"] > np.float32(0.01)])
            n = len(fired)
            count = fired.sum(axis=0)
            live = np.flatnonzero((count >= 10) & (count <= n - 10))
            fired = fired[:, live].astype(np.float64)
            both, c = fired.T @ fired, fired.sum(axis=0)
            size = len(live)
            information, value = clusters.binary_information(both, c[:, None], c[None, :], n)
            chance = scipy_stats.chi2.sf(2 * n * information, 1)
            edge = (both * n > np.outer(c, c)) & (chance < 0.01 / (size * (size - 1) / 2))
            value = np.round(np.where(edge, value, 0), 12)
            np.fill_diagonal(value, 0)
            wanted = int(np.ceil(0.01 * size * (size - 1) / 2))
            upper = value[np.triu_indices(size, 1)]
            return np.where(value >= np.sort(upper)[-wanted], value, 0)

        def score() -> tuple[np.ndarray, np.ndarray]:
            u, s = (np.zeros((plan.pairs, len(plan.communities))) for _ in range(2))
            for m, features in enumerate(plan.communities):
                chosen, rejected = (dense[side][:, features] for side in ("chosen", "rejected"))
                above = (chosen > np.float32(0.01)).astype(float) - (rejected > np.float32(0.01))
                u[:, m] = above.mean(axis=1)
                s[:, m] = (chosen.astype(float) + rejected).sum(axis=1)
            return u, s

        def tests() -> tuple[np.ndarray, ...]:
            z, p, a, b = (np.full((contexts, u.shape[1]), np.nan) for _ in range(4))
            odd = read.rows % 2
            for k in range(contexts):
                inside = groups == k
                for m in range(u.shape[1]):
                    test = scipy_stats.ttest_ind(u[inside, m], u[~inside, m], equal_var=False)
                    z[k, m], p[k, m] = test.statistic, test.pvalue
                    for half, of in enumerate((a, b)):
                        mine = odd == half
                        of[k, m] = u[inside & mine, m].mean() - u[~inside & mine, m].mean()
            return z, p, scipy_stats.false_discovery_control(p.ravel()).reshape(p.shape), a, b

        edges = timed("graph", graph)
        u, s = timed("scores", score)
        z, p, q, a, b = timed("tests", tests)
        unit = s / np.linalg.norm(s, axis=1, keepdims=True)
        labels = timed("contexts", lambda: MiniBatchKMeans(contexts, random_state=0).fit_predict(unit) + 1)
    unit = s / np.maximum(np.linalg.norm(s, axis=1, keepdims=True), 1e-12)
    active = labels > 0
    sums = stats.one_hot(labels - 1, contexts) @ unit
    centre = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    fit = float((unit * centre[labels - 1]).sum(axis=1)[active].mean())
    np.savez(out, edges=edges, u=u, s=s, z=z, p=p, q=q, a=a, b=b)
    return {"seconds": seconds, "contexts_mean_cosine": round(fit, 4), **memory.gigabytes()}


def check_same(ours: Path, plain: Path) -> None:
    """Both ways give the same numbers, or the benchmark ends here."""
    one, two = np.load(ours), np.load(plain)
    for name in one.files:
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if name == "s" else {"rtol": 1e-8, "atol": 1e-9}
        np.testing.assert_allclose(one[name], two[name], err_msg=name, **tolerance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=260_000)
    parser.add_argument("--live", type=int, default=1000, help="latents that fire in a response (default 1000)")
    parser.add_argument("--small_pairs", type=int, default=8_000, help="pairs of the comparison")
    parser.add_argument("--folder", help="where the harvests stay (default: a temporary folder)")
    parser.add_argument("--results", default="benchmarks/results/scale.json")
    parser.add_argument("--part", choices=("write", "audit", "ours", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {"large": (65_536, 814, 512), "small": (8192, 160, 96)}
    large = Plan(args.pairs, *sizes["large"], args.live)
    little = Plan(args.small_pairs, *sizes["small"], 300)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if args.part == "write":
            write(large, folder / "large")
            write(little, folder / "small")
            return
        if args.part is not None:
            if args.part == "audit":
                result = audit(large, folder / "large", folder / "audit", sizes["large"][2])
            else:
                result = small(args.part, little, folder / "small", folder / f"{args.part}.npz", sizes["small"][2])
            print(json.dumps(result))
            return

        def part(name: str) -> dict:
            command = [sys.executable, __file__, "--part", name, "--folder", str(folder)]
            command += [f"--{key}={getattr(args, key)}" for key in ("pairs", "live", "small_pairs")]
            root = str(Path(__file__).parents[1])
            path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
            environment = {**os.environ, "PYTHONPATH": path}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}

        start, there = time.perf_counter(), (folder / "large").exists()
        part("write")
        written = None if there else round(time.perf_counter() - start, 1)
        compared = {name: part(name) for name in ("ours", "plain")}
        check_same(folder / "ours.npz", folder / "plain.npz")
        full = part("audit")
    model = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "unknown")
    results = {
        "command": f"python benchmarks/scale.py --pairs {args.pairs} --live {args.live}",
        "date": datetime.date.today().isoformat(),
        "device": {"cpu": model, "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", "all")},
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "scipy", "scikit-learn", "scikit-network")},
        "seed": SEED,
        "seconds_to_write_the_harvests": written,
        "full_size": full,
        "comparison": {
            "pairs": args.small_pairs,
            **dict(zip(("latents", "communities", "contexts"), sizes["small"], strict=True)),
            **compared,
        },
    }
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    Path(args.results).write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).is_file() else []


if __name__ == "__main__":
    main()
