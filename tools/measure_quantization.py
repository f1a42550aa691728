"""The table of all quantized engines of one checkpoint: builds every mode, then summarizes with all of them.

    python tools/measure_quantization.py --output_dir quantization --device cpu

Everything is kept under --output_dir: converted and quantized checkpoints, engines, and the table as text, JSON and
Markdown with its chart. What is there already is not made again, so an interrupted run goes on where it was.
"""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "qwen"
sys.path[:0] = [str(ROOT), str(EXAMPLES)]

from command_line import flag, run_script  # noqa: E402


@dataclass(frozen=True)
class MeasureArgs:
    output_dir: Path = flag(help="folder for everything that is made")
    hf_model_dir: Path = flag(EXAMPLES / "tiny_qwen_chat", help="the checkpoint")
    dtype: str = flag("float16", help="dtype of all engines")
    alpha: str = flag("auto", help="SmoothQuant's alpha, a number or auto")
    max_ite: int = flag(500, help="articles to summarize")
    batch_size: int = flag(32, help="articles at a time")
    max_input_len: int = flag(512, help="longest prompt of the engines")
    allow_accuracy_loss: bool = flag(False, help="build what misses its gate, too, and show it")
    device: str | None = flag(None, help="cpu or cuda (default: cuda when there is one)")


@dataclass(frozen=True)
class Sources:
    """Folders that engines are built from."""

    ft: Path
    gptq: Path
    awq: Path


def main(args: MeasureArgs) -> None:
    engines = args.output_dir / "engines"
    make_engines(args, engines)
    run(
        EXAMPLES / "summarize.py",
        *("--backend", "both", "--hf_model_dir", args.hf_model_dir, "--engine_dir", engines),
        *("--max_ite", args.max_ite, "--batch_size", args.batch_size),
        *("--output_json", args.output_dir / "table.json", "--output_markdown", args.output_dir / "table.md"),
        *("--output_chart", args.output_dir / "chart.png", "--log_level", "info"),
        *on_device(args),
    )


def make_engines(args: MeasureArgs, folder: Path) -> None:
    """An engine of every mode below `folder`."""
    for name, flags in modes(make_sources(args)):
        make(folder / name, *build_command(args, folder / name), *flags)


def modes(sources: Sources) -> Iterator[tuple[str, list[object]]]:
    """Every mode by the name of its engine's folder, with and without an INT8 KV cache."""
    int4: list[object] = ["--use_weight_only", "--weight_only_precision", "int4"]
    smooth = ["--use_smooth_quant", "--ft_dir_path", sources.ft]
    by_name: dict[str, list[object]] = {
        "plain": [],
        "int8": ["--use_weight_only"],
        "int8_lm_head": ["--use_weight_only", "--quantize_lm_head"],
        "int4": int4,
        "int4_g128": [*int4, "--per_group"],
        "int4_gptq": [*int4[:2], "int4_gptq", "--quant_ckpt_path", sources.gptq],
        "int4_awq": [*int4[:2], "int4_awq", "--quant_ckpt_path", sources.awq],
        "sq_tensor": smooth,
        "sq_channel": [*smooth, "--per_channel"],
        "sq_token": [*smooth, "--per_token"],
        "sq_token_channel": [*smooth, "--per_token", "--per_channel"],
    }
    for name, flags in by_name.items():
        yield name, flags
        yield f"{name}_int8kv", [*flags, "--int8_kv_cache"]


def make_sources(args: MeasureArgs) -> Sources:
    """Convert and quantize the checkpoint, as far as that was not done before."""
    ft = args.output_dir / "ft"
    make(
        ft,
        EXAMPLES / "hf_qwen_convert.py",
        *("--in_file", args.hf_model_dir, "--out_dir", ft, "--smoothquant", args.alpha),
        *on_device(args),
    )
    quantized = {}
    for qformat in ("int4_gptq", "int4_awq"):
        quantized[qformat] = args.output_dir / qformat
        make(
            quantized[qformat],
            EXAMPLES / "quantize.py",
            *("--hf_model_dir", args.hf_model_dir, "--export_path", quantized[qformat], "--qformat", qformat),
            *on_device(args),
        )
    return Sources(ft, quantized["int4_gptq"], quantized["int4_awq"])


def build_command(args: MeasureArgs, output_dir: Path) -> list[object]:
    limits = ("--max_batch_size", args.batch_size, "--max_input_len", args.max_input_len, "--max_output_len", 256)
    command = [EXAMPLES / "build.py", "--hf_model_dir", args.hf_model_dir, "--output_dir", output_dir]
    loss = ["--allow_accuracy_loss"] if args.allow_accuracy_loss else []
    return [*command, "--dtype", args.dtype, *limits, *loss, *on_device(args)]


def on_device(args: MeasureArgs) -> list[object]:
    return ["--device", args.device] if args.device else []


def make(folder: Path, *command: object) -> None:
    """Run a script that makes `folder`, unless it is there."""
    if not folder.exists():
        run(*command)


def run(script: object, *flags: object) -> None:
    command = [sys.executable, *map(str, (script, *flags))]
    print(f"$ {shlex.join(command[1:])}", flush=True)
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"{Path(str(script)).name} failed, see above")


if __name__ == "__main__":
    run_script(main, MeasureArgs, __doc__)
