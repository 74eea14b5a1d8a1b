"""The kernels under Triton's interpreter and on a GPU where there is one, and compiled for a GPU in any case."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton (the dev extra installs it on Linux)")

CHECKS = Path(__file__).parent / "kernel_checks.py"


@pytest.mark.parametrize("where", ["interpreter", "gpu"])
def test_kernels_compute_what_plain_torch_computes(where: str) -> None:
    if where == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    # Triton decides at import whether to interpret, so each has a process of its own.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if where == "interpreter" else {}
    command = [sys.executable, "-m", "pytest", str(CHECKS), "-x", "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=environment, cwd=CHECKS.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"\d{2,} passed", run.stdout)
    assert "skipped" not in run.stdout


def compiled_usage(kernel: Any, types: dict[str, str], options: dict[str, Any], aligned: bool, path: Path) -> str:
    """What cuobjdump says of registers and stack of a kernel compiled for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    settings = {name: options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in options}
    constants = {name: value for name, value in options.items() if name not in settings}
    whole = [i for i, kind in enumerate(types.values()) if kind.startswith("*") or kind == "i32"]
    source = ASTSource(
        kernel,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in whole} if aligned else {},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=settings)
    path.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def edit_types(x: str, rows: str) -> dict[str, str]:
    pointers = {"x": x, "read": rows, "write": rows, "bias": "fp32", "threshold": "fp32", "kth": "fp32", "fire": "u8"}
    types = {name: f"*{kind}" for name, kind in {**pointers, "y": x}.items()}
    return types | dict.fromkeys(("n", "d", "u", "x_row"), "i32") | {"strength": "fp32"}


# The largest block of each kind needs the most registers; unaligned widths need more than aligned ones.
@pytest.mark.parametrize(
    ("x", "rows", "kind", "mode", "aligned"),
    [
        ("bf16", "bf16", "half", "compare", True),
        ("bf16", "bf16", "half", "compare", False),
        ("bf16", "bf16", "half", "given", False),
        ("fp32", "fp32", "exact", "compare", True),
        ("bf16", "fp32", "exact", "given", True),
    ],
)
def test_edits_compile_without_spills(x: str, rows: str, kind: str, mode: str, aligned: bool, tmp_path: Path) -> None:
    from trl_anatomy.ops import _triton_edit_rows as module

    exact = kind == "exact"
    options = {
        "MODE": mode,
        "HAS_KTH": mode == "compare",
        "EXACT": exact,
        **module.settings(module._MOST_ROWS[kind], exact),
    }
    usage = compiled_usage(module.edit_rows_kernel, edit_types(x, rows), options, aligned, tmp_path / "edit")
    assert "STACK:0 " in usage, usage


@pytest.mark.parametrize("aligned", [True, False])
def test_pooling_compiles_without_spills(aligned: bool, tmp_path: Path) -> None:
    from trl_anatomy.ops import _triton_pool as module

    fold = {"z": "*fp32", "bar": "*fp32", "pieces": "*i32", "maximum": "*fp32", "count": "*i32"}
    fold |= dict.fromkeys(("width", "z_row", "maximum_row", "count_row"), "i32")
    assert "STACK:0 " in compiled_usage(module.fold_kernel, fold, module.FOLD, aligned, tmp_path / "fold")
    project = {"h": "*bf16", "directions": "*fp32", "pieces": "*i32", "out": "*fp32"}
    project |= dict.fromkeys(("d", "k", "h_row"), "i32")
    options = {"MAXIMUM": True, "BLOCK_K": module._MOST_DIRECTIONS, **module.PROJECT}
    assert "STACK:0 " in compiled_usage(module.project_kernel, project, options, aligned, tmp_path / "project")
