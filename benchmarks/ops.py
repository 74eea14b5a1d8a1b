"""What the operations of trl_anatomy.ops cost beside plain torch, torch.compile, sae-lens and their floors.

Results are compared before anything is timed. Then all variants of a row run in turn, in one process, round after
round; a ratio is the median over rounds of the ratio within a round. On a CPU one thread is used and its own CPU time
is taken, so that waiting for a busy machine does not count (sharing its caches still does). On a GPU the shapes are
those of Llama-3.1-8B with 65,536 latents and bfloat16.

    python benchmarks/ops.py
"""

import argparse
import ctypes
import datetime
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_anatomy.ops import span_harvest as harvest_module
from trl_anatomy.ops.ablate_features import ablate_features
from trl_anatomy.ops.pooled_projection import pooled_projection
from trl_anatomy.ops.project_out import project_out
from trl_anatomy.ops.span_harvest import span_harvest_threshold
from trl_anatomy.reading.sae import SAE

Variants = dict[str, Callable[[], Any]]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
# Tokens of the harvest, of the ablation and of the projections; widths of model and SAE; latents kept by TopK.
SIZES = (
    {"harvest": 16384, "ablate": 16384, "project": 32768, "d": 4096, "latents": 65536, "k": 128}
    if GPU
    else {"harvest": 1024, "ablate": 256, "project": 16384, "d": 768, "latents": 16384, "k": 64}
)


def time_variants(variants: Variants, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each variant in each round; short ones are called until 50 ms have passed."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    repeats = {}
    for name, run in variants.items():
        run()
        start = _now()
        run()
        repeats[name] = max(1, round(0.05 / max(_now() - start, 1e-6)))
    names = list(variants)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = _now()
            for _ in range(repeats[name]):
                variants[name]()
            seconds[name].append((_now() - start) / repeats[name])
    return seconds


def _now() -> float:
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def report(op: str, what: str, variants: Variants, rounds: int, goals: dict[str, tuple[str, float]]) -> dict[str, Any]:
    """Time a row and print it; goals: variant -> (">=" or "<=", its seconds by ours, or ours by its)."""
    seconds = time_variants(variants, rounds)
    row: dict[str, Any] = {
        "op": op,
        "what": what,
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
        "milliseconds": {},
        "ratios": {},
        "goals": {},
    }
    for name, values in seconds.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        row["milliseconds"][name] = {"median": 1e3 * middle, "min": 1e3 * low, "max": 1e3 * high}
        ratios = sorted(other / own for other, own in zip(values, seconds["ours"], strict=True))
        row["ratios"][name] = {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}
    for name, (sign, goal) in goals.items():
        if name not in row["ratios"]:
            continue
        ratio = row["ratios"][name]["median"]
        figure = ratio if sign == ">=" else 1 / ratio
        met = figure >= goal if sign == ">=" else figure <= goal
        label = f"{name} / ours {sign} {goal}" if sign == ">=" else f"ours / {name} {sign} {goal}"
        row["goals"][label] = {"figure": figure, "met": met}
    print(f"\n{op}: {what}", flush=True)
    for name, values in row["milliseconds"].items():
        ratio = row["ratios"][name]
        print(
            f"  {name:<34} {values['median']:10.2f} ms (min {values['min']:.2f}, max {values['max']:.2f})"
            f"   {ratio['median']:.2f}x ours ({ratio['min']:.2f} to {ratio['max']:.2f})"
        )
    for label, found in row["goals"].items():
        print(f"  {'met   ' if found['met'] else 'MISSED'} {label}: {found['figure']:.2f}")
    return row


def spans_of(n_tokens: int) -> list[int]:
    """Bounds of spans of 10 to 180 tokens, as prompts and responses have them."""
    lengths = torch.randint(10, 180, (n_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    bounds = [0]
    while bounds[-1] < n_tokens:
        bounds.append(min(n_tokens, bounds[-1] + lengths.pop()))
    return bounds


def random(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def make_sae(architecture: str, d: int, latents: int, k: int) -> Any:
    """A random sae-lens SAE on which about `k` latents fire per token."""
    import sae_lens as sl

    settings = {"d_in": d, "d_sae": latents, "device": DEVICE}
    if architecture == "topk":
        sae: Any = sl.TopKSAE(sl.TopKSAEConfig(k=k, **settings))
    else:
        sae = sl.JumpReLUSAE(sl.JumpReLUSAEConfig(**settings))
    with torch.no_grad():
        sae.W_enc.copy_(random(d, latents, seed=1, scale=d**-0.5))
        sae.W_dec.copy_(random(latents, d, seed=2, scale=d**-0.5))
        if architecture == "jumprelu":
            sae.threshold.fill_(float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - k / latents))))
    return sae.requires_grad_(False)


def pool_slices(codes: Tensor, bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    parts = [codes[a:b] for a, b in pairwise(bounds)]
    return torch.stack([part.amax(0) for part in parts]), torch.stack([(part > 0).sum(0) for part in parts])


def pool_padded(encode: Callable[[Tensor], Tensor], h: Tensor, bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Spans in batches of eight, padded to the longest, as a training loop has them."""
    maximum, count = [], []
    for first in range(0, len(bounds) - 1, 8):
        edges = bounds[first : first + 9]
        parts = [h[a:b] for a, b in pairwise(edges)]
        codes = encode(torch.nn.utils.rnn.pad_sequence(parts, batch_first=True))
        lengths = torch.tensor([len(part) for part in parts], device=h.device)
        mask = torch.arange(codes.shape[1], device=h.device) < lengths[:, None]
        codes = codes * mask[..., None]
        maximum.append(codes.amax(1))
        count.append((codes > 0).sum(1))
    return torch.cat(maximum), torch.cat(count)


def bare_product(h: Tensor, encoder: Tensor) -> None:
    """The tiles of span_harvest without the fold: its floor."""
    block, tile_bytes = harvest_module._TILES["cpu" if not GPU else "other"]
    for start in range(0, len(h), block):
        x = h[start : start + block]
        width = max(64, tile_bytes // (4 * len(x)))
        for first in range(0, encoder.shape[1], width):
            harvest_module._product(x, encoder[:, first : first + width])


def check_pooled(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], flips: float) -> None:
    """Maxima agree where both fire; firing sets agree but for a share of `flips`."""
    both = (found[1] > 0) & (wanted[1] > 0)
    differ = ((found[1] != wanted[1]).sum() / (wanted[1] > 0).sum()).item()
    assert differ <= flips, f"{differ:.2%} of the firing sets differ"
    tolerance = 1e-4 if flips < 1e-3 else 5e-2
    torch.testing.assert_close(found[0][both], wanted[0][both].float(), rtol=tolerance, atol=tolerance)


def compiled(function: Callable[[Tensor], Tensor], *args: Tensor) -> Callable[[Tensor], Tensor] | None:
    """`function` by torch.compile, warmed up (on h and a gradient, where given); None where there is no compiler."""
    try:
        fast: Callable[[Tensor], Tensor] = torch.compile(function, dynamic=False)
        fast(*args) if len(args) == 1 else forward_backward(fast, *args)
    except Exception as error:  # inductor raises its own kinds
        print(f"(torch.compile left out: {type(error).__name__}: {str(error).splitlines()[0][:100]})")
        return None
    return fast


def peak_extra(run: Callable[[], Any]) -> float | None:
    """MiB that `run` held at most beyond what it started from and what it returns; None where it cannot be told."""
    run()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would be used again, unseen
            before = _process_memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            result = run()
            peak = _process_memory("VmHWM") - before
        except (OSError, AttributeError):
            return None
    return (peak - sum(tensor.nbytes for tensor in result)) / (1 << 20)


def _process_memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


@torch.no_grad()
def harvest_rows(
    rounds: int, n: int, d: int, latents: int, k: int, architectures: Sequence[str] = ("jumprelu", "topk")
) -> list[dict[str, Any]]:
    h, bounds, rows = random(n, d, seed=3, dtype=DTYPE), spans_of(n), []
    what = f"{n} tokens, {len(bounds) - 1} spans, d {d}, {latents} latents"
    for architecture in architectures:
        inner = make_sae(architecture, d, latents, k)
        lens, sae = inner.encode, SAE(inner)
        encoder = sae._inner.W_enc

        def ours(sae: SAE = sae) -> tuple[Tensor, Tensor]:
            return sae.pool_spans(h, bounds, 64 << 20)

        wanted = pool_slices(lens(h.float()), bounds)
        check_pooled(ours(), wanted, 1e-3)
        check_pooled(pool_padded(lens, h.float(), bounds), wanted, 1e-3)
        variants: Variants = {
            "ours": ours,
            "product alone (floor)": lambda encoder=encoder: bare_product(h.float(), encoder),
            "sae-lens flat": lambda lens=lens: pool_slices(lens(h.float()), bounds),
            "sae-lens padded": lambda lens=lens: pool_padded(lens, h.float(), bounds),
        }
        if architecture == "jumprelu":
            fast = compiled(lambda x, inner=inner: inner.encode(x), h.float())
            if fast:
                variants["torch.compile encode, flat"] = lambda fast=fast: pool_slices(fast(h.float()), bounds)
        goals = {"sae-lens flat": (">=", 2.0)}
        if architecture == "jumprelu" and not GPU:
            goals |= {"sae-lens padded": (">=", 3.5), "product alone (floor)": ("<=", 1.15)}
        elif architecture == "jumprelu":
            small, bias, bar = encoder.bfloat16(), inner.b_enc, inner.threshold
            half = make_sae(architecture, d, latents, k).to(dtype=torch.bfloat16)

            def ours_16(small: Tensor = small, bias: Tensor = bias, bar: Tensor = bar) -> tuple[Tensor, Tensor]:
                return span_harvest_threshold(h, small, bias, bar, bounds, prepare=lambda x: x)

            check_pooled(ours_16(), wanted, 0.05)
            variants = {
                "ours": ours_16,
                "ours, float32": ours,
                "product alone (floor)": lambda small=small: bare_product(h, small),
                "sae-lens flat, bfloat16": lambda half=half: pool_slices(half.encode(h), bounds),
                **{name: run for name, run in variants.items() if name.startswith("sae-lens")},
            }
            goals = {
                "product alone (floor)": ("<=", 1.15),
                "sae-lens flat, bfloat16": (">=", 2.0),
                "sae-lens flat": (">=", 10.0),
            }
        row = report("span_harvest", f"{architecture}, {what}", variants, rounds, goals)
        row["peak_extra_mib"] = {"ours": peak_extra(variants["ours"])}
        row["peak_extra_mib"]["sae-lens flat"] = peak_extra(variants["sae-lens flat"])
        longer, edges = h.repeat(4, 1), [0, *(b + n * i for i in range(4) for b in bounds[1:])]
        row["peak_extra_mib"]["ours, 4x the tokens"] = peak_extra(
            lambda sae=sae, longer=longer, edges=edges: sae.pool_spans(longer, edges, 64 << 20)
        )
        print("  peak extra MiB:", {name: round(v, 1) if v else v for name, v in row["peak_extra_mib"].items()})
        rows.append(row)
    return rows


def all_harvest_rows(rounds: int) -> list[dict[str, Any]]:
    model = [SIZES[key] for key in ("d", "latents", "k")]
    rows = harvest_rows(rounds, SIZES["harvest"], *model)
    # A CPU works in blocks of fewer tokens than a batch of the audit has.
    return rows if GPU else rows + harvest_rows(rounds, 4 * SIZES["harvest"], *model, architectures=("jumprelu",))


def forward_backward(edit: Callable[[Tensor], Tensor], h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    x = h.detach().requires_grad_()
    y = edit(x)
    (dx,) = torch.autograd.grad(y, x, g)
    return y.detach(), dx


def check_edit(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    tolerance = 1e-4 if torch.float32 == DTYPE else 5e-2
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def ablate_rows(rounds: int, n: int, d: int, latents: int, k: int) -> list[dict[str, Any]]:
    h, g = random(n, d, seed=3, dtype=DTYPE), random(n, d, seed=4, dtype=DTYPE)
    inner, rows = make_sae("jumprelu", d, latents, k), []
    sae = SAE(inner)
    w_enc, w_dec, bias, bar = (t.to(DTYPE) for t in (inner.W_enc, inner.W_dec, inner.b_enc, inner.threshold))
    for u in (16, 128 if GPU else 256):
        features = list(range(0, latents, latents // u))
        own = tuple(t.to(DTYPE) for t in sae.rows(features))
        chosen = torch.zeros(latents, device=DEVICE, dtype=DTYPE)
        chosen[features] = 1

        def full(x: Tensor, chosen: Tensor = chosen) -> Tensor:
            pre = torch.addmm(bias, x, w_enc)
            return x - (torch.relu(pre) * (pre > bar) * chosen) @ w_dec

        def two_products(x: Tensor, own: tuple[Tensor, ...] = own) -> Tensor:
            encoder, b, threshold, decoder = own
            z = torch.addmm(b, x, encoder.T)
            return torch.addmm(x, z * (z > threshold), decoder, alpha=-1)

        def op(x: Tensor, own: tuple[Tensor, ...] = own) -> Tensor:
            return ablate_features(x, *own)

        wanted = forward_backward(full, h, g)
        check_edit(forward_backward(op, h, g), wanted)
        check_edit(forward_backward(two_products, h, g), wanted)
        variants: Variants = {
            "ours": lambda op=op: forward_backward(op, h, g),
            "two addmm by autograd": lambda f=two_products: forward_backward(f, h, g),
            "full encode by autograd": lambda full=full: forward_backward(full, h, g),
            "two copies of h (floor)": lambda: (h.clone(), g.clone()),
        }
        fast = compiled(two_products, h, g)
        if fast:
            variants["two addmm by torch.compile"] = lambda fast=fast: forward_backward(fast, h, g)
        goals = {"two addmm by autograd": (">=", 1.5)} if GPU else {}
        if not GPU:
            goals["full encode by autograd"] = (">=", 150.0 if u <= 16 else 20.0)
        what = f"forward and backward, {u} latents, {n} tokens, d {d}, {latents} latents in all"
        rows.append(report("ablate_features", what, variants, rounds, goals))
    return rows


def project_rows(rounds: int, n: int, d: int) -> list[dict[str, Any]]:
    h, g, rows = random(n, d, seed=3, dtype=DTYPE), random(n, d, seed=4, dtype=DTYPE), []
    for r in (1, 8):
        basis = torch.linalg.qr(random(d, r, seed=5))[0].T.contiguous()
        same = basis.to(DTYPE)

        def eager(x: Tensor, basis: Tensor = same) -> Tensor:
            return x - (x @ basis.T) @ basis

        def op(x: Tensor, basis: Tensor = basis) -> Tensor:
            return project_out(x, basis)

        check_edit(forward_backward(op, h, g), forward_backward(eager, h, g))
        for part, wrap in (("forward", None), ("forward and backward", forward_backward)):

            def variant(f: Callable[[Tensor], Tensor], wrap: Any = wrap) -> Callable[[], Any]:
                return (lambda: wrap(f, h, g)) if wrap else (lambda: f(h))

            variants: Variants = {"ours": variant(op), "eager": variant(eager)}
            variants["copy of h (floor)"] = (lambda: (h.clone(), g.clone())) if wrap else (lambda: h.clone())
            fast = compiled(eager, h, g) if wrap else compiled(eager, h)
            if fast:
                variants["torch.compile"] = variant(fast)
            goals = {"eager": (">=", 1.8 if GPU else 1.3)} | ({"copy of h (floor)": ("<=", 1.2)} if GPU else {})
            rows.append(report("project_out", f"{part}, r {r}, {n} tokens, d {d}", variants, rounds, goals))
    return rows


@torch.no_grad()
def pool_rows(rounds: int, n: int, d: int, k: int = 8) -> list[dict[str, Any]]:
    h, directions, bounds, rows = random(n, d, seed=3, dtype=DTYPE), random(k, d, seed=6), spans_of(n), []
    for reduce in ("max", "mean"):

        def eager(reduce: str = reduce) -> Tensor:
            scores = h.float() @ directions.T
            parts = [scores[a:b] for a, b in pairwise(bounds)]
            return torch.stack([part.amax(0) if reduce == "max" else part.mean(0) for part in parts])

        def op(reduce: str = reduce) -> Tensor:
            return pooled_projection(h, directions, bounds, reduce=reduce)

        torch.testing.assert_close(op(), eager(), rtol=1e-4, atol=1e-4)
        variants: Variants = {
            "ours": op,
            "eager, span by span": eager,
            "product alone (floor)": lambda: h.to(DTYPE) @ directions.to(DTYPE).T,
        }
        what = f"{reduce}, {k} directions, {n} tokens, {len(bounds) - 1} spans, d {d}"
        rows.append(report("pooled_projection", what, variants, rounds, {}))
    return rows


ROWS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "span_harvest": all_harvest_rows,
    "ablate_features": lambda rounds: ablate_rows(rounds, *(SIZES[key] for key in ("ablate", "d", "latents", "k"))),
    "project_out": lambda rounds: project_rows(rounds, SIZES["project"], SIZES["d"]),
    "pooled_projection": lambda rounds: pool_rows(rounds, SIZES["project"], SIZES["d"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each row (default 7)")
    parser.add_argument("--only", choices=list(ROWS), help="measure one operation again, and keep the others' rows")
    parser.add_argument("--results", default=f"benchmarks/results/ops_{DEVICE}.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    file = Path(args.results)
    rows = json.loads(file.read_text())["rows"] if args.only and file.exists() else []
    rows = [row for row in rows if row["op"] != args.only]
    for op, measure in ROWS.items():
        if args.only in (None, op):
            rows += measure(args.rounds)
    rows.sort(key=lambda row: list(ROWS).index(row["op"]))
    versions = {}
    for name in ("torch", "triton", "sae-lens"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    results = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if GPU else platform.machine(),
        "threads": None if GPU else 1,
        "dtype": str(DTYPE).removeprefix("torch."),
        "python": platform.python_version(),
        "versions": versions,
        "rows": rows,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    missed = [f"{row['op']} ({label})" for row in rows for label, goal in row["goals"].items() if not goal["met"]]
    print(f"\ngoals missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
