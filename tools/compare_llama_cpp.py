"""Decode speed beside llama.cpp on this machine's CPU: the shape of Qwen2.5-0.5B, random weights, in one run.

    python3 -m venv llama
    CMAKE_ARGS=-DGGML_NATIVE=ON llama/bin/pip install llama-cpp-python gguf numpy
    python3 tools/compare_llama_cpp.py --work_dir comparison --llama_python llama/bin/python

Builds engines and writes GGUF files into --work_dir unless they are there, holds all of them in memory, and lets both
sides take turns at each mode; medians over all tokens of all turns. A turn is one greedy sequence. llama-cpp-python
is compiled for this processor and is no dependency of the project: it runs in a Python of its own.

Precision of each side: F16, all weights. Q8_0 beside our INT8, with a scale for each row instead of each 32 weights.
Q4_0 as llama-quantize makes it, whose output layer is Q8_0 at this width, beside our INT4 in groups of 128, whose
lm_head is INT8 too. llama.cpp rounds activations to 8 bits before Q8_0 and Q4_0 weights; ours stay as they are before
INT8, and have 16 bits before INT4.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "qwen")]

import torch  # noqa: E402
from benchmarking.read_rate import measure_read_rate  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402
from step_bytes import step_bytes_of_engine  # noqa: E402
from table import markdown_table  # noqa: E402

from tensorrt_llm import Engine  # noqa: E402
from tensorrt_llm.runtime import GenerationSession, SamplingConfig, Session  # noqa: E402

# Qwen2.5-0.5B's config.json, as far as a shape goes.
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
WEIGHT_ONLY = ("--use_weight_only", "--quantize_lm_head")
# Of a mode: llama.cpp's name, and flags of build.py.
MODES = {
    "F16": ("f16", ("--dtype", "float16")),
    "INT8 / Q8_0": ("q8_0", ("--dtype", "float16", *WEIGHT_ONLY)),
    "INT4 / Q4_0": ("q4_0", ("--dtype", "float16", *WEIGHT_ONLY, "--weight_only_precision", "int4", "--per_group")),
}
_INSTALL = "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf numpy"


@dataclass(frozen=True)
class CompareArgs:
    work_dir: Path = flag(help="where engines and GGUF files are, or will be written: 4 GB")
    llama_python: Path = flag(Path(sys.executable), help="a Python that has llama-cpp-python, gguf and numpy")
    threads: int = flag(2, help="of both sides")
    input_len: int = flag(32, help="tokens of the prompt")
    output_len: int = flag(48, help="tokens of a turn")
    turns: int = flag(5, help="of each side and mode, after one that does not count")
    log_level: str = log_level_flag("warning")


@dataclass(frozen=True)
class Turn:
    """Seconds of one sequence."""

    first: float
    each_next: list[float]


Side = Callable[[str], Turn]


def main(args: CompareArgs) -> None:
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    (args.work_dir / "config.json").write_text(json.dumps(SHAPE, indent=1))
    with ExitStack() as stack:
        llama, version = _start_llama(args, stack)
        engines = {mode: _engine(args, mode) for mode in MODES}
        tokens = args.input_len + args.output_len
        sessions = {
            mode: GenerationSession(Session(engine, "cpu", kv_cache_tokens=tokens)) for mode, engine in engines.items()
        }
        sides = (lambda mode: _our_turn(sessions[mode], args), llama)
        read_rate = measure_read_rate(torch.device("cpu"))
        rows = []
        for mode, engine in engines.items():
            ours, theirs = _alternate(mode, sides, args.turns)
            moved = step_bytes_of_engine(engine).of(1, args.input_len + args.output_len / 2)
            share = moved * _rate(ours) / read_rate
            rows.append(
                (
                    mode,
                    f"{_rate(ours):.1f}",
                    f"{_rate(theirs):.1f}",
                    f"{_rate(ours) / _rate(theirs):.2f}",
                    f"{moved / 1e6:.0f}",
                    f"{share:.0%}",
                    f"{_first(ours):.0f}",
                    f"{_first(theirs):.0f}",
                )
            )
    header = ("decode", "tokens/s", "llama.cpp", "ratio", "MB/token", "of read rate", "prompt, ms", "llama.cpp, ms")
    print(markdown_table(header, rows))
    print(
        f"{args.threads} threads, {args.input_len} in, {args.output_len} out, {args.turns} turns each; reads at "
        f"{read_rate / 1e9:.1f} GB/s; torch {torch.__version__}, llama-cpp-python {version}"
    )


def _alternate(mode: str, sides: tuple[Side, ...], turns: int) -> list[list[Turn]]:
    """The turns of each side, one after the other; the first of each only warms up."""
    found: list[list[Turn]] = [[] for _ in sides]
    for _ in range(turns + 1):
        for side, kept in zip(sides, found, strict=True):
            kept.append(side(mode))
    return [kept[1:] for kept in found]


def _rate(turns: list[Turn]) -> float:
    """Tokens per second of the median token after the first."""
    return 1 / median([seconds for turn in turns for seconds in turn.each_next])


def _first(turns: list[Turn]) -> float:
    return median([turn.first for turn in turns]) * 1e3


def _our_turn(session: GenerationSession, args: CompareArgs) -> Turn:
    seconds, started = [], time.perf_counter()
    prompt = list(range(1, args.input_len + 1))
    for _ in session.stream([prompt], SamplingConfig(max_new_tokens=args.output_len)):
        now = time.perf_counter()
        seconds.append(now - started)
        started = now
    return Turn(seconds[0], seconds[1:])


def _engine(args: CompareArgs, mode: str) -> Engine:
    llama_name, flags = MODES[mode]
    folder = args.work_dir / llama_name
    if not folder.exists():
        command = [sys.executable, str(ROOT / "examples/qwen/build.py"), "--hf_model_dir", str(args.work_dir)]
        command += ["--output_dir", str(folder), "--dummy_weights", "--max_batch_size", "1", *flags]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return Engine.from_dir(folder)


def _start_llama(args: CompareArgs, stack: ExitStack) -> tuple[Side, str]:
    """llama.cpp in a process that answers a line for each turn, and the version of llama-cpp-python."""
    command = [str(args.llama_python), str(ROOT / "tools/llama_cpp_decode.py"), str(args.work_dir), str(args.threads)]
    command += [str(args.input_len + args.output_len), *(name for name, _ in MODES.values())]
    try:
        process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    except OSError as error:
        raise ValueError(f"--llama_python {args.llama_python} does not run: {error}") from error
    stack.callback(process.kill)

    def answer() -> Any:
        assert process.stdout
        # The gguf package shows its progress on stdout.
        for line in process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise ValueError(f"llama.cpp's side ended; {args.llama_python} needs: {_INSTALL}")

    version = answer()["version"]

    def turn(mode: str) -> Turn:
        assert process.stdin
        process.stdin.write(f"{MODES[mode][0]} {args.input_len} {args.output_len}\n")
        process.stdin.flush()
        seconds = answer()
        return Turn(seconds["first"], seconds["next"])

    return turn, version


if __name__ == "__main__":
    run_script(main, CompareArgs, __doc__)
