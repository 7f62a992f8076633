"""The Triton kernels compile for Hopper, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from patience import patience

pytest.importorskip("triton", reason="Triton is not installed")

COMPILE = """
import subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_dgpo.ops import fused

FLOATS = {"scale", "inverse_temperature"}

def check(kernel, constants, types):
    signature = {
        name: "constexpr" if name in constants
        else types.get(name, "*i64" if name == "columns_ptr" else "*fp32") if name.endswith("_ptr")
        else "fp32" if name in FLOATS else "i32"
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    # A stack would hold spilled registers.
    assert "STACK:0 " in usage.stdout, usage.stdout
    print(kernel.__name__)

half = {"logits_ptr": "*bf16", "reference_ptr": "*fp16", "out_ptr": "*bf16"}
reduce = {"HAS_REFERENCE": True, "ROWS": 1, "BLOCK": fused._REDUCE_BLOCK}
merge = {"HAS_REFERENCE": True, "ROWS": 16, "TILES": 64}
gradient = {"HAS_ENTROPY": True, "ROWS": 1, "BLOCK": fused._GRADIENT_BLOCK}
# An integer that is 1 becomes a constant: chunks of one token, shards of one tile.
for ones in ({}, {"tokens": 1}, {"tiles": 1}):
    check(fused._reduce_kernel, reduce | ones, half)
    check(fused._merge_kernel, merge | ones, {})
    check(fused._gradient_kernel, gradient | ones, half)
"""


def test_kernels_compile_for_hopper(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=patience()
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["_reduce_kernel", "_merge_kernel", "_gradient_kernel"] * 3
