"""The Triton kernels of the fused head without a card: their arithmetic under triton's interpreter, and that they compile.

The interpreter is chosen when triton is first imported, for the whole process; so the laws, in fused_head_triton_laws.py, run in a
child process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: the extra 'dev' has it on Linux x86-64 only"
)
LAWS = Path(__file__).with_name("fused_head_triton_laws.py")


def test_the_laws_hold_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(LAWS)]

    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)  # 3 kernels, each for 3 cards, seconds apiece
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_for_cards_to_tensor_core_instructions(
    capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    for longest in (8, 128):
        text, shared_bytes = compile_maximum(capability, dtype, longest)
        assert any(name in text for name in ("wgmma", "mma.sync", "tcgen05")), longest
        assert shared_bytes <= 99 * 1024, longest  # the least that a card of capability 8.0 or later has: 8.6 and 8.9
    compile_row_sum(capability, dtype)


def compile_maximum(capability: int, dtype: str, longest: int) -> tuple[str, int]:
    """Return the kernel's PTX and its bytes of shared memory."""
    from sparsekd.students import head_triton

    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    tiles = head_triton.maximum_tiles(longest, torch_dtype)
    constants: dict[str, object] = {"NEEDS_WINNERS": True, "PRECISION": head_triton.product_precision(torch_dtype)}
    constants |= {name: tiles[name] for name in ("TOKENS", "TERMS", "WIDTH")} | {"hidden_stride_d": 1, "embeddings_stride_d": 1}
    types = {"hidden_TD": f"*{dtype}", "embeddings_VD": f"*{dtype}", "floor_V": "*fp32", "maximum_BV": "*fp32"}
    types |= {"bounds_B": "*i32", "winner_BV": "*i32"}
    aligned = ("hidden_TD", "embeddings_VD", "width", "hidden_stride_t", "embeddings_stride_v")
    options = {name: tiles[name] for name in ("num_warps", "num_stages")}
    return compiled(head_triton._maximum_kernel, types, constants, aligned, capability, options)


def compile_row_sum(capability: int, dtype: str) -> None:
    from sparsekd.students import head_triton

    types = {"matrix": f"*{dtype}", "weight_A": f"*{dtype}", "sums_SD": f"*{dtype}", "of_A": "*i32", "bounds_S": "*i32"}
    compiled(head_triton._row_sum_kernel, types, {"ENTRIES": 32, "WIDTH": 128, "stride_column": 1}, (), capability, {})


def compiled(kernel, types, constants, aligned, capability, options):  # type: ignore[no-untyped-def]
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    found = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={**options, "enable_fp_fusion": True},
    )
    return found.asm["ptx"], found.metadata.shared
