"""Quantize the layers of a Hugging Face Qwen checkpoint to INT4 with GPTQ or AWQ, calibrated on text.

    python quantize.py --model_dir Qwen-7B-Chat --export_path Qwen-7B-Chat-Int4 --qformat int4_gptq

Writes a folder that tools for published INT4 checkpoints read, and build.py (--quant_ckpt_path). Layer by layer: memory
holds the activations of the calibration text and a few tensors, whatever the model's size.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

# A bare checkout works too, as on a GPU machine where nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from calibration.awq_layers import Awq  # noqa: E402
from calibration.calibrated_layers import Calibration  # noqa: E402
from calibration.float_engine import float_engine  # noqa: E402
from calibration.gptq_layers import Gptq  # noqa: E402
from calibration.int4_packing import Int4Format, awq_format, gptq_format  # noqa: E402
from calibration.quantized_folder import FolderWriter, check_sizes, estimate_bytes  # noqa: E402
from checkpoint.hf_checkpoint import HfCheckpoint  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402
from host_memory import peak_host_bytes  # noqa: E402
from staging import staging_dir  # noqa: E402
from texts.calibration_text import BUNDLED_TEXT, load_calibration_text, needs_tokenizer  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tensorrt_llm.disk import check_room, gib  # noqa: E402
from tensorrt_llm.dtype import PRECISIONS, torch_dtype  # noqa: E402
from tensorrt_llm.models import QWenConfig  # noqa: E402
from tensorrt_llm.runtime.session import pick_device  # noqa: E402
from tensorrt_llm.tokenizer import load_tokenizer  # noqa: E402

GPTQ, AWQ = "int4_gptq", "int4_awq"
_ERRORS_SHOWN = 3


@dataclass(frozen=True)
class QuantizeArgs:
    model_dir: Path = flag(help="folder of the Hugging Face checkpoint", aliases=("--hf_model_dir",))
    export_path: Path = flag(help="folder to write, a name that is free", aliases=("--output_dir",))
    qformat: str = flag(help="GPTQ in AutoGPTQ's format, or AWQ in AutoAWQ's", choices=(GPTQ, AWQ))
    dtype: str = flag("float16", help="dtype of scales and of everything that is not quantized", choices=PRECISIONS)
    group_size: int = flag(128, help="inputs that share a scale; -1 for one scale per output")
    desc_act: bool = flag(False, help="GPTQ: sort inputs into groups by activation, with a g_idx; slower to run")
    asym: bool = flag(False, help="GPTQ: zero points too; AWQ always has them")
    calibration_text: Path = flag(
        BUNDLED_TEXT,
        help="what is read: .jsonl[.gz], .txt, or token ids in .npy or .csv; never what accuracy is shown on",
    )
    calib_size: int = flag(128, help="texts to read at most")
    calib_tokens: int = flag(16384, help="tokens of all texts at most: activations of all are in memory")
    max_length: int = flag(512, help="tokens of one text; longer ones are cut")
    tokenizer_dir: Path | None = flag(None, help="folder of the tokenizer (default: model_dir)")
    seed: int = flag(0, help="draws the texts")
    device: str | None = flag(None, help="where it runs: cpu or cuda (default: cuda when there is one)")
    log_level: str = log_level_flag("warning")

    @property
    def columns_per_group(self) -> int:
        """0 for whole rows."""
        return max(self.group_size, 0)


def main(args: QuantizeArgs) -> None:
    started = time.monotonic()
    check_flags(args)
    config = QWenConfig.from_hf_dir(args.model_dir)
    engine = float_engine(args.model_dir, config)
    check_sizes(config, args.columns_per_group)
    check_target(args, config)
    calibration = Calibration(engine, calibration_texts(args, config), pick_device(args.device))
    errors: dict[str, float] = {}
    with staging_dir(args.export_path.parent) as staging, torch.inference_mode():
        folder = FolderWriter(staging / "folder", HfCheckpoint(args.model_dir), config, args.dtype, layout_of(args))
        folder.path.mkdir()
        folder.write_embedding()
        layers = tqdm(
            method_of(args).layers(calibration), total=config.num_hidden_layers, unit="layer", desc="quantize"
        )
        for layer, made in enumerate(layers):
            folder.write_layer(layer, made.parameters)
            errors |= {f"layers.{layer}.{name}": error for name, error in made.errors.items()}
        folder.write_output()
        folder.finish()
        folder.path.rename(args.export_path)
    print_summary(args, folder, sum(map(len, calibration.texts)), errors, time.monotonic() - started)


def method_of(args: QuantizeArgs) -> Gptq | Awq:
    dtype = torch_dtype(args.dtype)
    if args.qformat == AWQ:
        return Awq(args.columns_per_group, dtype)
    return Gptq(args.columns_per_group, args.desc_act, symmetric=not args.asym, scale_dtype=dtype)


def layout_of(args: QuantizeArgs) -> Int4Format:
    if args.qformat == AWQ:
        return awq_format(args.group_size)
    return gptq_format(args.group_size, desc_act=args.desc_act, symmetric=not args.asym)


def check_flags(args: QuantizeArgs) -> None:
    """Refuse numbers out of range, and flags that would have no effect."""
    for name, least in (("calib_size", 1), ("calib_tokens", 2), ("max_length", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least {least}")
    if args.group_size != -1 and args.group_size < 1:
        raise ValueError(
            f"--group_size is {args.group_size}, expected a positive number, or -1 for one scale per output"
        )
    if args.qformat == AWQ and (args.desc_act or args.asym):
        name = "--desc_act" if args.desc_act else "--asym"
        raise ValueError(f"{name} is given with --qformat {AWQ}, but belongs to {GPTQ}")
    if args.desc_act and args.group_size == -1:
        raise ValueError("--desc_act is given with --group_size -1, but it sorts inputs into groups; leave one out")


def check_target(args: QuantizeArgs, config: QWenConfig) -> None:
    """There must be room, and nothing is overwritten."""
    path = args.export_path
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--export_path {path} exists, expected a name that is free, or an empty folder")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"--export_path {path} lies in {existing}, which is a file, expected a folder")
    check_room(path, estimate_bytes(config, args.columns_per_group, args.dtype), "folder")


def calibration_texts(args: QuantizeArgs, config: QWenConfig) -> list[list[int]]:
    file = args.calibration_text
    tokenizer = load_tokenizer(args.tokenizer_dir or args.model_dir) if needs_tokenizer(file) else None
    text = load_calibration_text(file, tokenizer, config.vocab_size, args.max_length, args.calib_tokens, args.seed)
    return text.texts[: args.calib_size]


def print_summary(
    args: QuantizeArgs, folder: FolderWriter, num_tokens: int, errors: dict[str, float], seconds: float
) -> None:
    worst = sorted(errors, key=lambda name: errors[name], reverse=True)[:_ERRORS_SHOWN]
    listed = ", ".join(f"{name} {errors[name]:.3f}" for name in worst)
    print(f"Relative errors of outputs: mean {sum(errors.values()) / len(errors):.3f}, largest {listed}")
    print(
        f"Quantized in {seconds:.1f} s on {num_tokens} tokens, peak host memory {gib(peak_host_bytes())}, folder size "
        f"{gib(folder.num_bytes)}"
    )
    print(f"Quantized checkpoint: {args.export_path}")


if __name__ == "__main__":
    run_script(main, QuantizeArgs, __doc__)
