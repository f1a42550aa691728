"""What Triton makes of the kernels for Hopper at Qwen-7B shapes, read from the machine code; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="the CUDA kernels need triton")

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
if not all((NVIDIA_TOOLS / tool).exists() for tool in ("ptxas", "nvdisasm", "cuobjdump")):
    pytest.skip("this triton has no compiler for NVIDIA GPUs", allow_module_level=True)

GLOBAL_WRITES = ("STG", "RED.", "ATOM")
ATTENTION = [f"{case}_{dtype}" for case in ("prefill", "decode", "grouped_decode") for dtype in ("float16", "bfloat16")]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """{case: {kernel: facts}}, from a process of its own: under TRITON_INTERPRET nothing can be compiled."""
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hopper_sass.py"))],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert program.returncode == 0, program.stderr
    facts: dict[str, dict[str, Any]] = json.loads(program.stdout)
    return facts


def count(facts: dict[str, Any], *prefixes: str) -> int:
    """How many instructions begin with one of `prefixes`."""
    return sum(number for opcode, number in facts["opcodes"].items() if opcode.startswith(prefixes))


def test_no_kernel_spills_registers(compiled: dict[str, dict[str, Any]]) -> None:
    spilling = [
        (case, kernel)
        for case, kernels in compiled.items()
        for kernel, facts in kernels.items()
        if facts["stack"] or count(facts, "LDL", "STL")
    ]
    assert not spilling


def test_a_kernel_that_starts_early_reads_only_weights_and_step_inputs_before_it_waits(
    compiled: dict[str, dict[str, Any]],
) -> None:
    before_wait = {
        (case, kernel): facts["before_wait"]
        for case, kernels in compiled.items()
        for kernel, facts in kernels.items()
        if facts["before_wait"] is not None
    }
    assert {kernel for _, kernel in before_wait} == {
        "_stream_rows", "_multiply_tiles", "_rms_norm", "_rope_kv", "_silu_mul", "_quantize", "_decode_one_head",
        "_combine_splits", "_add_splits", "_resident_rows", "_ring_rows", "_ring_tiles", "_wgmma_tiles",
        "_wgmma_plain",
    }  # fmt: skip
    writes = [name for name, opcodes in before_wait.items() if any(op.startswith(GLOBAL_WRITES) for op in opcodes)]
    reads = {kernel for (_, kernel), opcodes in before_wait.items() if any(op.startswith("LDG") for op in opcodes)}
    assert not writes and reads == {
        "_stream_rows", "_rms_norm", "_rope_kv", "_quantize", "_decode_one_head", "_resident_rows",
        "_ring_rows", "_ring_tiles", "_wgmma_tiles", "_wgmma_plain",
    }  # fmt: skip


def test_every_kernel_moves_128_bits_at_a_time(compiled: dict[str, dict[str, Any]]) -> None:
    wide = ("LDG.E.128", "LDG.E.EF.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E.128", "UTMALDG.2D")
    narrow = [
        (case, kernel)
        for case, kernels in compiled.items()
        for kernel, facts in kernels.items()
        if not count(facts, *wide)
    ]
    assert not narrow


@pytest.mark.parametrize("case", [f"{case}_float16_int8" for case in ("prefill", "decode", "grouped_decode")])
def test_int8_keys_and_values_are_copied_to_shared_memory_ahead_of_use(compiled: dict[str, Any], case: str) -> None:
    (attention,) = (facts for name, facts in compiled[case].items() if name.startswith(("_prefill", "_decode")))
    assert count(attention, "LDGSTS.E.BYPASS") >= 4
    assert count(attention, "LDGSTS") <= 64, "no thread copies scales that another one copies too"
    assert count(attention, "LDG.E.128") <= 24, "only q, and what the splits left, is loaded through registers"


@pytest.mark.parametrize("case", ATTENTION)
def test_keys_and_values_are_copied_to_shared_memory_ahead_of_use(compiled: dict[str, Any], case: str) -> None:
    (attention,) = (facts for name, facts in compiled[case].items() if name.startswith(("_prefill", "_decode")))
    assert count(attention, "LDGSTS.E.BYPASS.128") >= 16
    assert count(attention, "LDG.E.128") <= 24, "only q, and what the splits left, is loaded through registers"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float16_int8"])
def test_prefill_runs_on_wgmma(compiled: dict[str, Any], dtype: str) -> None:
    assert count(compiled[f"prefill_{dtype}"]["_prefill"], "HGMMA.64x64x16.F32", "HGMMA.64x128x16.F32") >= 16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float16_int8"])
def test_grouped_decode_runs_on_tensor_cores_and_one_head_does_not(compiled: dict[str, Any], dtype: str) -> None:
    assert count(compiled[f"grouped_decode_{dtype}"]["_decode_grouped_heads"], "HMMA.16816.F32") >= 16
    assert count(compiled[f"decode_{dtype}"]["_decode_one_head"], "HMMA", "HGMMA") == 0


@pytest.mark.parametrize("case", [f"{case}_float32" for case in ("prefill", "grouped_decode")])
def test_float32_attention_multiplies_exactly(compiled: dict[str, Any], case: str) -> None:
    assert all(count(facts, "HMMA", "HGMMA") == 0 for facts in compiled[case].values())


@pytest.mark.parametrize(
    ("case", "num_warps", "programs"),
    [("some_decodes", 2, 8), ("short_decodes", 2, 8), ("decode", 4, 4)],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float16_int8"])
def test_enough_decode_programs_fit_an_sm(
    compiled: dict[str, Any], case: str, dtype: str, num_warps: int, programs: int
) -> None:
    """decode_one_head.py counts on them to keep the memory busy."""
    facts = compiled[f"{case}_{dtype}"]["_decode_one_head"]
    assert facts["registers"] * num_warps * 32 * programs <= 65536
    assert facts["shared"] * programs <= 227 * 1024


@pytest.mark.parametrize(("tokens", "dtype"), [(16, "float16"), (64, "float16"), (16, "bfloat16")])
@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_weight_only_tiles_run_on_wgmma(compiled: dict[str, Any], bits: str, tokens: int, dtype: str) -> None:
    facts = compiled[f"{bits}_{tokens}_{dtype}"]["_multiply_tiles"]
    assert count(facts, f"HGMMA.64x{tokens}x16.F32") >= 8
    assert count(facts, "I2F") <= 8, "weights are unpacked without conversions, zero points are not"


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_streamed_weights_stay_in_the_lanes_that_loaded_them(compiled: dict[str, Any], bits: str) -> None:
    facts = compiled[f"{bits}_1_float16"]["_stream_rows"]
    assert count(facts, "STS", "STSM") <= 24, "sums, one for each row and scale"
    assert count(facts, "I2F") <= 8, "weights are unpacked without conversions, zero points are not"


def test_a_ring_is_filled_before_the_wait_and_takes_few_registers(compiled: dict[str, dict[str, Any]]) -> None:
    rings = {case: facts["_ring_rows"] for case, facts in compiled.items() if "_ring_rows" in facts}
    assert len(rings) == 16
    for case, facts in rings.items():
        assert facts["before_wait"].count("LDGSTS.E.BYPASS.128") >= 8, case  # 128 bytes a lane
        assert facts["registers"] <= 128, case
        # The weight, and x beside it, come from shared memory 16 bytes at a time, and scales two or more.
        assert count(facts, "LDS.128") * 4 >= count(facts, "HMMA.16816.F32") >= 8, case
        assert count(facts, "LDS.U16", "LDS.U8", "LDGSTS.E.BYPASS.64") == 0, case


def test_ring_tiles_are_filled_before_the_wait_and_share_an_sm(compiled: dict[str, dict[str, Any]]) -> None:
    rings = {case: facts["_ring_tiles"] for case, facts in compiled.items() if case.startswith("ring_tiles_")}
    assert len(rings) >= 25
    for case, facts in rings.items():
        assert facts["before_wait"].count("LDGSTS.E.BYPASS.128") >= 8, case  # 128 bytes a lane
        assert not any(opcode.startswith("LDG.") for opcode in facts["before_wait"]), case
        assert facts["registers"] <= 200, case
        if case.endswith("_8_0"):  # what is chosen for 8 tokens
            assert 2 * facts["shared"] <= 227 * 1024, case
        assert count(facts, "HMMA.16816.F32", "IMMA.16832.S8.S8") >= 8, case
        assert count(facts, "LDSM") >= 4 and count(facts, "I2F") <= 32, case


def test_products_on_warpgroups_do_not_wait_for_each_other(compiled: dict[str, dict[str, Any]]) -> None:
    tiles = {case: facts["_wgmma_tiles"] for case, facts in compiled.items() if case.startswith("wgmma_")}
    assert len(tiles) == 9
    for case, facts in tiles.items():
        _, token_tile, row_tile, bits, _ = case.split("_")
        consumers, planes = int(row_tile) // 64, 16 // int(bits.removeprefix("int"))
        assert count(facts, f"HGMMA.64x{token_tile}x16.F32") == consumers * planes * 4, case
        # A wait for each plane and a few around the loop; the compiler's own would come behind each instruction.
        assert count(facts, "WARPGROUP.DEPBAR") <= consumers * planes, case
        assert count(facts, "STG.E.128") >= 4 and count(facts, "I2F") <= 8 * consumers, case
        assert facts["registers"] * 32 * 4 * (consumers + 1) <= 65536 and facts["shared"] <= 227 * 1024, case


def test_plain_products_on_warpgroups_wait_once_for_each_stage(compiled: dict[str, dict[str, Any]]) -> None:
    tiles = {case: facts["_wgmma_plain"] for case, facts in compiled.items() if case.startswith("plain_")}
    assert len(tiles) == 16
    for case, facts in tiles.items():
        _, token_tile, row_tile, dtype, _ = case.split("_")
        consumers, is_integer = int(row_tile) // 64, dtype == "int8"
        tokens = min(int(token_tile), 128) if is_integer or consumers == 3 else int(token_tile)
        opcode = f"IGMMA.64x{tokens}x32.S8.S8" if is_integer else f"HGMMA.64x{tokens}x16.F32"
        assert count(facts, opcode) == count(facts, "HGMMA", "IGMMA") == consumers * 4 * int(token_tile) // tokens, case
        # One in the loop and one behind it; the compiler's own would come behind each instruction.
        assert count(facts, "WARPGROUP.DEPBAR") == 2 * consumers, case
        assert count(facts, "LDSM") == 0 and count(facts, "STG.E.128") >= 4, case
        assert facts["registers"] * 32 * 4 * (consumers + 1) <= 65536 and facts["shared"] <= 227 * 1024, case


def test_integers_are_multiplied_as_integers(compiled: dict[str, Any]) -> None:
    for tokens, kernel in ((64, "_multiply_tiles"), (512, "_wgmma_plain")):
        assert count(compiled[f"w8a8_{tokens}_float16"][kernel], "IGMMA") >= 4
    assert count(compiled["w8a8_1_float16"]["_stream_rows"], "IDP.4A") >= 32


def test_products_are_rounded_before_they_become_integers(compiled: dict[str, Any]) -> None:
    fused = [
        (case, kernel)
        for case, kernels in compiled.items()
        for kernel, facts in kernels.items()
        if facts["fused_roundings"]
    ]
    assert not fused
