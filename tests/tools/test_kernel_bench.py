"""tools/kernel_bench.py times all of its parts, and says what of the ceilings they reach."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_bench import BenchArgs, Ceilings, Row, main

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--hidden_size 64 --intermediate_size 256 --num_heads 2 --vocab_size 99 --rounds 1 --dtype float32"


def run_bench(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "kernel_bench.py", "--device", "cpu", *SMALL.split(), *flags]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_every_part_is_timed(tmp_path: Path) -> None:
    flags = "--modes fp16 w8a8 --tokens 1 2 --batch_size 2 --context 70 --prompt 10".split()
    done = run_bench(*flags, "--output", tmp_path / "kernels.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "kernels.json").read_text())
    names = [f"{row['mode']} {row['name']}" for row in figures["rows"]]
    assert all(row["seconds"] > 0 and row["share_of_ceiling"] > 0 for row in figures["rows"])
    for name in (
        "fp16 layers.0.attention.qkv 192 x 64, 1 tokens",
        "w8a8 layers.0.mlp 256 x 64, 2 tokens",
        "fp16 lm_head 99 x 64, 2 tokens",
        "w8a8 quantize_per_token 128 float32, 1 tokens",
        "fp16 add_rms_norm 64 float32, 1 tokens",
        "float32 KV decode 2 x 70",
        "int8 KV decode 2 x 70",
        "float32 KV prompt 10",
    ):
        assert name in names and f"| {name}" in done.stdout


@pytest.mark.parametrize(("flag", "value"), [("modes", "fp8"), ("parts", "all"), ("tokens", 3)])
def test_an_unknown_choice_is_named(flag: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"--{flag} has {value}, expected some of"):
        main(BenchArgs(**{flag: [value]}))


def test_the_share_is_that_of_the_ceiling_which_binds() -> None:
    ceilings = Ceilings(read_bytes=1e12, operations=1e14)
    assert ceilings.share(Row("fp16", "read", "", 2e-6, 1_000_000)) == pytest.approx(0.5)
    assert ceilings.share(Row("fp16", "multiply", "", 2e-6, 10, 100_000_000)) == pytest.approx(0.5)
    assert ceilings.share(Row("w8a8", "multiply", "", 2e-6, 10, 100_000_000)) == pytest.approx(0.25)
