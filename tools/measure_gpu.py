"""Measure on one GPU what README claims: speed of a Qwen-7B shape, error of 16-bit logits, ROUGE of the bundled model.

The part modes, which is not run unless it is named, builds and times every quantized mode of the Qwen-7B shape.

    python3 tools/measure_gpu.py --output figures.json

Runs from a bare checkout; the part rouge needs the package rouge-score. Each part is a command of examples/qwen or a
function here; one that fails prints its error and the others go on. The last thing printed is a table of figures beside
their targets. On a machine without a GPU the same runs with small numbers (--hidden_size 64 --num_layers 2 ...
--device cpu) show that it works, not how fast.
"""

import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "qwen"
CHECKPOINT = EXAMPLES / "tiny_qwen_chat"
sys.path[:0] = [str(ROOT), str(EXAMPLES)]

import torch  # noqa: E402
from backends import DATA_TYPES, Backend, EngineBackend, HfBackend  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402
from summarize import Task, make_tasks  # noqa: E402
from summary.rouge import new_scorer  # noqa: E402
from table import markdown_table  # noqa: E402
from texts.articles import BUNDLED_ARTICLES, load_articles  # noqa: E402

from tensorrt_llm import Engine  # noqa: E402
from tensorrt_llm.runtime.session import pick_device  # noqa: E402
from tensorrt_llm.tokenizer import load_tokenizer  # noqa: E402


@dataclass(frozen=True)
class MeasureArgs:
    output: Path = flag(help="JSON file for all figures")
    parts: list[str] = flag(["logits", "rouge", "speed"], help="what to measure, in this order")
    hidden_size: int = flag(4096, help="of the model whose speed is measured; the defaults are Qwen-7B")
    num_layers: int = flag(32, help="of the same model")
    num_heads: int = flag(32, help="of the same model")
    intermediate_size: int = flag(22016, help="of the same model: both branches of the MLP together")
    vocab_size: int = flag(151936, help="of the same model")
    batch_size: list[int] = flag([1, 32], help="batches whose speed is measured")
    input_len: int = flag(128, help="tokens of a prompt")
    output_len: int = flag(128, help="new tokens of a prompt")
    max_batch_size: int = flag(64, help="limit of the engine")
    max_input_len: int = flag(1024, help="limit of the engine")
    max_output_len: int = flag(1024, help="limit of the engine")
    articles: int = flag(500, help="articles to summarize")
    summary_batch_size: int = flag(32, help="articles at a time")
    logit_prompts: int = flag(32, help="articles, with their references, whose logits are compared")
    hf_model_dir: Path = flag(CHECKPOINT, help="trained checkpoint for logits and ROUGE")
    time_limit: float = flag(520.0, help="seconds for everything; a command that would run longer is ended")
    device: str | None = flag(None, help="cpu or cuda (default: cuda when there is one)")
    log_level: str = log_level_flag("warning")


# The longest command takes about half of this on an H100; one that hangs must not take the time of those after it.
LONGEST_COMMAND_SECONDS = 240.0

# Figure, what was measured, what is wanted: a dash where it is only for comparison.
Row = tuple[str, str, str]


class Clock:
    """What is left of the time for everything."""

    def __init__(self, limit: float) -> None:
        self._end = time.monotonic() + limit

    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)


def main(args: MeasureArgs) -> int:
    parts: dict[str, Callable[[MeasureArgs, Path, Clock], tuple[dict[str, Any], list[Row]]]] = {
        "logits": measure_logits,
        "rouge": measure_rouge,
        "speed": measure_speed,
        "modes": measure_modes,
    }
    unknown = [name for name in args.parts if name not in parts]
    if unknown:
        raise ValueError(f"--parts has {', '.join(unknown)}, expected some of {', '.join(parts)}")
    clock = Clock(args.time_limit)
    figures: dict[str, Any] = {"machine": describe_machine(pick_device(args.device))}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts:
            started = time.monotonic()
            try:
                figures[name], part_rows = parts[name](args, Path(folder), clock)
                rows += part_rows
            except Exception as error:  # the other parts are worth having
                traceback.print_exc()
                figures[name] = {"error": str(error)}
                rows.append((name, f"failed: {error}"[:100], ""))
            # Kept up to date, as a run may be ended from outside.
            args.output.write_text(json.dumps(figures, indent=2) + "\n")
            print(f"== {name}: {time.monotonic() - started:.0f} s, {clock.left():.0f} s left\n", flush=True)
    print(" ".join(f"{key} {value};" for key, value in figures["machine"].items()))
    print(markdown_table(("figure", "measured", "wanted"), rows))
    return int(any("error" in figures[name] for name in args.parts))


def describe_machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "commit": commit_of_checkout()}


def commit_of_checkout() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # a machine without git still measures
        return "unknown"
    return done.stdout.strip() or "unknown"


def run(clock: Clock, script: str, **flags: object) -> None:
    """Run a script of examples/qwen in a process of its own, its output on ours."""
    command = [sys.executable, str(EXAMPLES / script)]
    for name, value in flags.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            command += [f"--{name}", *map(str, values)]
    print("$", " ".join(command), flush=True)
    done = subprocess.run(command, timeout=min(clock.left(), LONGEST_COMMAND_SECONDS))
    if done.returncode:
        raise RuntimeError(f"{script} ended with code {done.returncode}")


def build(args: MeasureArgs, clock: Clock, checkpoint: Path, engine_dir: Path, dtype: str, **flags: object) -> None:
    run(clock, "build.py", hf_model_dir=checkpoint, output_dir=engine_dir, dtype=dtype, device=args.device, **flags)


# Speed of a Qwen-7B shape in FP16, beside Hugging Face in the same run


def measure_speed(args: MeasureArgs, folder: Path, clock: Clock) -> tuple[dict[str, Any], list[Row]]:
    checkpoint, engine_dir = folder / "shape", folder / "shape_engine"
    write_shape(args, checkpoint)
    started = time.monotonic()
    limits = {name: getattr(args, name) for name in ("max_batch_size", "max_input_len", "max_output_len")}
    build(args, clock, checkpoint, engine_dir, "float16", dummy_weights=True, **limits)
    build_seconds = time.monotonic() - started
    benchmark = partial(run, clock, "benchmark.py", engine_dir=engine_dir, device=args.device, input_len=args.input_len)
    output = folder / "benchmark.json"
    benchmark(
        backend="both",
        hf_model_dir=checkpoint,
        dummy_weights=True,
        data_type="fp16",
        batch_size=args.batch_size,
        output_len=args.output_len,
        output_json=output,
    )
    runs = json.loads(output.read_text())["runs"]
    # Once more in a fresh process: the file is in the page cache now, and compiled kernels are on disk.
    benchmark(backend="trt_llm", output_len=2, warm_up=0, repeats=1, output_json=output)
    ready = json.loads(output.read_text())["runs"][0]["ready_seconds"]
    rows = [
        (
            f"decode tokens/s, {row['name']}, batch {row['shape']['batch_size']}",
            f"{row['decode_tokens_per_second'] or 0:.1f}",
            speed_target(row),
        )
        for row in runs
    ]
    rows.append(("process start to ready, s", f"{ready:.1f}", "at most 15"))
    return {"build_seconds": build_seconds, "runs": runs, "ready_seconds": ready}, rows


# Flags of build.py for random weights of the forms that quantization makes.
INT4: dict[str, object] = {"use_weight_only": True, "weight_only_precision": "int4"}
SMOOTH_QUANT: dict[str, object] = {"use_smooth_quant": True}
MODES: dict[str, dict[str, object]] = {
    "FP16": {},
    "INT8 weights": {"use_weight_only": True},
    "INT8 weights and lm_head": {"use_weight_only": True, "quantize_lm_head": True},
    "INT4 weights": INT4,
    "INT4 weights g128": INT4 | {"per_group": True},
    "GPTQ": INT4 | {"weight_only_precision": "int4_gptq"},
    "AWQ": INT4 | {"weight_only_precision": "int4_awq"},
    "SmoothQuant static": SMOOTH_QUANT,
    "SmoothQuant per token, per channel": SMOOTH_QUANT | {"per_token": True, "per_channel": True},
    "FP16, INT8 KV": {"int8_kv_cache": True},
    "INT8 weights, INT8 KV": {"use_weight_only": True, "int8_kv_cache": True},
}


# Building and timing one takes 45 s on an H200; figures of those before are kept.
SECONDS_OF_A_MODE = 60.0


def measure_modes(args: MeasureArgs, folder: Path, clock: Clock) -> tuple[dict[str, Any], list[Row]]:
    """Decode speed at batch 1 of every mode, random weights; none should be slower than FP16."""
    checkpoint, engine_dir, output = folder / "modes", folder / "modes_engine", folder / "modes.json"
    write_shape(args, checkpoint)
    speeds: dict[str, float] = {}
    for name, flags in MODES.items():
        if clock.left() < SECONDS_OF_A_MODE:
            print(f"no time left for {name} and what follows")
            break
        build(args, clock, checkpoint, engine_dir, "float16", dummy_weights=True, max_batch_size=8, **flags)
        run(
            clock,
            "benchmark.py",
            engine_dir=engine_dir,
            device=args.device,
            input_len=args.input_len,
            output_len=args.output_len,
            output_json=output,
        )
        speeds[name] = json.loads(output.read_text())["runs"][0]["decode_tokens_per_second"]
        shutil.rmtree(engine_dir)  # a disk holds a few engines of 7B parameters
    rows = [
        (f"decode tokens/s, {name}, batch 1", f"{speed:.1f}", f"at least {speeds['FP16']:.1f}")
        for name, speed in speeds.items()
    ]
    return speeds, rows


def write_shape(args: MeasureArgs, checkpoint: Path) -> None:
    """A checkpoint folder with config.json only."""
    checkpoint.mkdir()
    config = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_heads,
        "kv_channels": args.hidden_size // args.num_heads,
        "intermediate_size": args.intermediate_size,
        "vocab_size": args.vocab_size,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 8192,
        "seq_length": 8192,
        "rotary_pct": 1.0,
        "rotary_emb_base": 10000,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "no_bias": True,
        "tie_word_embeddings": False,
    }
    (checkpoint / "config.json").write_text(json.dumps(config, indent=2))


def speed_target(row: dict[str, Any]) -> str:
    if row["name"].startswith("HF"):
        return "-"
    least = {1: "140", 32: "3000"}.get(row["shape"]["batch_size"])
    return f"at least {least}" if least else "-"


# Error of 16-bit logits, ours beside Hugging Face's own, both against Hugging Face in float32


def measure_logits(args: MeasureArgs, folder: Path, clock: Clock) -> tuple[dict[str, Any], list[Row]]:
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.hf_model_dir)
    tasks = make_tasks(tokenizer, load_articles(BUNDLED_ARTICLES, args.logit_prompts), 512, 100)
    hf32 = logits_of(partial(HfBackend, args.hf_model_dir, "fp32", device), tasks)
    figures: dict[str, Any] = {"prompts": len(tasks), "largest_logit": max(float(row.abs().max()) for row in hf32)}
    rows: list[Row] = []
    for data_type, dtype in DATA_TYPES.items():
        engine_dir = folder / f"logits_{data_type}"
        build(args, clock, args.hf_model_dir, engine_dir, dtype, max_input_len=512, max_output_len=128)
        ours = logit_error(logits_of(partial(open_engine, engine_dir, device), tasks), hf32)
        theirs = logit_error(logits_of(partial(HfBackend, args.hf_model_dir, data_type, device), tasks), hf32)
        figures[data_type] = {"ours": ours, "hf": theirs}
        for kind in ("max", "mean"):
            # In float32 Hugging Face is the yardstick itself, with no error to compare to.
            wanted = "-" if data_type == "fp32" else f"at most {theirs[kind]:.6f} (HF)"
            rows.append((f"logit error {dtype}, {kind} abs", f"{ours[kind]:.6f}", wanted))
    return figures, rows


def open_engine(engine_dir: Path, device: torch.device) -> Backend:
    return EngineBackend(Engine.from_dir(engine_dir, check_weights=False), engine_dir.name, device)


def logits_of(open_backend: Callable[[], Backend], tasks: Iterable[Task]) -> list[torch.Tensor]:
    backend = open_backend()
    logits = [backend.logits(task.scored_prompt + task.reference) for task in tasks]
    del backend
    gc.collect()  # a session and its graphs know each other
    return logits


def logit_error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> dict[str, float]:
    errors = [(a - b).abs().double() for a, b in zip(found, exact, strict=True)]
    count = sum(error.numel() for error in errors)
    return {
        "max": max(float(error.max()) for error in errors),
        "mean": sum(float(error.sum()) for error in errors) / count,
    }


# ROUGE of the bundled checkpoint, engines of three dtypes beside Hugging Face in float32


def measure_rouge(args: MeasureArgs, folder: Path, clock: Clock) -> tuple[dict[str, Any], list[Row]]:
    new_scorer()  # a missing package is found before engines are built
    engine_dirs = []
    for dtype in DATA_TYPES.values():
        engine_dirs.append(folder / f"summarize_{dtype}")
        build(
            args,
            clock,
            args.hf_model_dir,
            engine_dirs[-1],
            dtype,
            max_batch_size=args.summary_batch_size,
            max_input_len=512,
            max_output_len=128,
        )
    output = folder / "summarize.json"
    run(
        clock,
        "summarize.py",
        backend="both",
        engine_dir=engine_dirs,
        hf_model_dir=args.hf_model_dir,
        data_type="fp32",
        max_ite=args.articles,
        batch_size=args.summary_batch_size,
        device=args.device,
        output_json=output,
    )
    figures = json.loads(output.read_text())
    rows: list[Row] = []
    for row, dtype in zip(figures["runs"][1:], DATA_TYPES.values(), strict=True):
        difference = f"{row['rouge1_difference']['mean']:+.3f} of {row['rouge1']['mean']:.2f}"
        rows.append((f"ROUGE-1 {dtype} less HF float32", difference, "less than 0.3 away"))
        rows.append((f"tokens as HF float32, {dtype}", f"{row['token_agreement']:.2%}", "-"))
    return figures, rows


if __name__ == "__main__":
    run_script(main, MeasureArgs, __doc__)
