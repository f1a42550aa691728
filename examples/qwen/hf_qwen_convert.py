"""Convert a Hugging Face Qwen checkpoint into an FT folder, for build.py --ft_dir_path.

    python hf_qwen_convert.py -i Qwen-7B-Chat -o ft/7b --smoothquant auto

With --smoothquant the folder holds int8 weights and all that SmoothQuant needs, calibrated on text; ft/layout.py says
what lies where. Weights stream layer by layer: host memory stays at a few tensors, whatever the model's size.
"""

import json
import math
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# A bare checkout works too, as on a GPU machine where nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from calibration.float_engine import float_engine  # noqa: E402
from checkpoint.hf_checkpoint import HfCheckpoint  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402
from ft.export import FtExport, Observed  # noqa: E402
from ft.folder import CALIBRATION_FILE, CONFIG_FILE, FtFolder, write_config  # noqa: E402
from host_memory import peak_host_bytes  # noqa: E402
from staging import staging_dir  # noqa: E402
from texts.calibration_text import (  # noqa: E402
    BUNDLED_TEXT,
    CalibrationText,
    load_calibration_text,
    needs_tokenizer,
)
from token_files import write_npy  # noqa: E402
from tqdm import tqdm  # noqa: E402
from weight import check_complete  # noqa: E402

from tensorrt_llm.disk import check_room, gib  # noqa: E402
from tensorrt_llm.dtype import PRECISIONS  # noqa: E402
from tensorrt_llm.models import QWenConfig  # noqa: E402
from tensorrt_llm.models.qwen.config import QWEN1, QWEN2  # noqa: E402
from tensorrt_llm.quantization.calibrate import observe_layers  # noqa: E402
from tensorrt_llm.runtime.session import pick_device  # noqa: E402
from tensorrt_llm.tokenizer import load_tokenizer  # noqa: E402

_MODELS = {QWEN1: "qwen", QWEN2: "qwen2"}
# Inputs of each linear layer that the search for alpha looks at.
_SEARCHED_ROWS = 128


@dataclass(frozen=True)
class ConvertArgs:
    in_file: Path = flag(help="folder of the Hugging Face checkpoint", aliases=("--in-file", "-i"))
    out_dir: Path = flag(help="folder in which <ranks>-gpu is made", aliases=("--out-dir", "-o"))
    tensor_parallelism: int = flag(
        1, help="tensor-parallel ranks to split the weights for", aliases=("--tensor-parallelism", "-tp")
    )
    processes: int = flag(1, help="layers that are converted at the same time; each takes memory", aliases=("-p",))
    calibrate_kv_cache: bool = flag(
        False,
        help="write the original's scale of an int8 KV cache; --int8_kv_cache of build.py does without",
        aliases=("--calibrate-kv-cache", "-kv"),
    )
    smoothquant: str | None = flag(
        None,
        help="write int8 weights, smoothed with this alpha from 0 to 1 (0.5 is a good one), or auto: for each layer "
        "the best with a scale per token and channel",
        aliases=("-sq",),
    )
    model: str | None = flag(
        None, help="generation of the model (default: the checkpoint's)", choices=tuple(_MODELS.values())
    )
    storage_type: str = flag(
        "float16", help="dtype of the weights that are not int8", choices=PRECISIONS, aliases=("--storage-type", "-t")
    )
    keep_unquantized: bool = flag(
        False, help="with --smoothquant: also write the weights as they were, for other modes than SmoothQuant"
    )
    calibration_text: Path | None = flag(
        None,
        help="what is read: .jsonl[.gz], .txt, or token ids in .npy or .csv (default: the bundled training articles)",
        aliases=("--calibration-text",),
    )
    calibration_tokens: int = flag(8192, help="tokens of that text to read", aliases=("--calibration-tokens",))
    max_input_len: int = flag(512, help="tokens of one text; longer ones are cut")
    dataset_cache_dir: Path | None = flag(
        None, help="refused: no dataset is downloaded, see --calibration_text", aliases=("--dataset-cache-dir",)
    )
    device: str | None = flag(None, help="where calibration runs: cpu or cuda (default: cuda when there is one)")
    log_level: str = log_level_flag("warning")

    @property
    def calibrates(self) -> bool:
        return self.smoothquant is not None or self.calibrate_kv_cache


def main(args: ConvertArgs) -> None:
    started = time.monotonic()
    check_flags(args)
    alpha = parse_alpha(args.smoothquant)
    config = QWenConfig.from_hf_dir(args.in_file)
    args = replace(args, model=checked_model(args.model, config))
    checkpoint = HfCheckpoint(args.in_file)
    check_complete(checkpoint, config)
    text = calibration_text(args, config) if args.calibrates else None
    target = args.out_dir / f"{args.tensor_parallelism}-gpu"
    with staging_dir(args.out_dir) as staging:
        folder = FtFolder(
            staging / target.name,
            config,
            args.tensor_parallelism,
            args.storage_type,
            args.smoothquant,
            has_unquantized=args.smoothquant is None or args.keep_unquantized,
            has_kv_scale=args.calibrate_kv_cache,
        )
        check_target(target, folder)
        folder.path.mkdir()
        device = pick_device(args.device)
        export = FtExport(checkpoint, folder, alpha, device)
        with closing(turns(args, config, text, device)) as observed:
            alphas = export.write(observed, args.processes)
        settings = asdict(args)
        if alpha is None and alphas[0]:
            settings |= {f"smoothquant_alpha.{name}": [seen[name] for seen in alphas] for name in alphas[0]}
        if text:
            write_npy(folder.path / CALIBRATION_FILE, padded(text))
        hf_config = json.loads((args.in_file / "config.json").read_text(encoding="utf-8"))
        write_config(folder, hf_config, settings)
        publish(folder, target)
    print(
        f"Converted in {time.monotonic() - started:.1f} s, peak host memory {gib(peak_host_bytes())}, "
        f"folder size {gib(folder.num_bytes)}"
    )
    print(f"FT folder: {target}")


def check_flags(args: ConvertArgs) -> None:
    """Refuse flags that contradict each other or would have no effect."""
    for name in ("tensor_parallelism", "processes", "calibration_tokens", "max_input_len"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least 1")
    if args.dataset_cache_dir is not None:
        raise ValueError(
            f"--dataset-cache-dir is {args.dataset_cache_dir}, but no dataset is downloaded; give your own text with "
            f"--calibration_text FILE, or leave both out for the bundled one"
        )
    if args.keep_unquantized and args.smoothquant is None:
        raise ValueError("--keep_unquantized is given without --smoothquant: the weights are written anyway")
    if args.calibration_text is not None and not args.calibrates:
        raise ValueError("--calibration_text is given without --smoothquant or --calibrate-kv-cache: nothing reads it")


def parse_alpha(text: str | None) -> float | None:
    """The number of --smoothquant; None for auto, and when there is nothing to smooth."""
    if text is None or text == "auto":
        return None
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 <= alpha <= 1:
        raise ValueError(f"--smoothquant is {text!r}, expected a number from 0 to 1, or auto")
    return alpha


def checked_model(name: str | None, config: QWenConfig) -> str:
    found = _MODELS[config.architecture]
    if name not in (None, found):
        raise ValueError(f"--model is {name}, but the checkpoint is a {config.architecture}, expected {found}")
    return found


def check_target(target: Path, folder: FtFolder) -> None:
    """There must be room, and what the folder replaces must be an FT folder."""
    if target.exists() and not (target.is_dir() and ((target / CONFIG_FILE).exists() or not any(target.iterdir()))):
        raise ValueError(f"{target}: exists and has no {CONFIG_FILE}, expected an FT folder to replace, or a free name")
    check_room(target, folder.num_bytes, "folder")


def calibration_text(args: ConvertArgs, config: QWenConfig) -> CalibrationText:
    file = args.calibration_text or BUNDLED_TEXT
    tokenizer = load_tokenizer(args.in_file) if needs_tokenizer(file) else None
    return load_calibration_text(file, tokenizer, config.vocab_size, args.max_input_len, args.calibration_tokens)


def turns(
    args: ConvertArgs, config: QWenConfig, text: CalibrationText | None, device: torch.device
) -> Generator[Observed | None]:
    """For each layer what calibration saw of it, or None; with a bar."""
    observed: Iterable[Observed | None] = [None] * config.num_hidden_layers
    if text:
        rows_kept = _SEARCHED_ROWS if args.smoothquant == "auto" else 0
        engine = float_engine(args.in_file, config)
        observed = observe_layers(engine, text.texts, device, dtype=args.storage_type, rows_kept=rows_kept)
    yield from tqdm(observed, total=config.num_hidden_layers, unit="layer", desc="convert")


def padded(text: CalibrationText) -> np.ndarray:
    """Token ids int32 [texts, longest], with -1 behind the shorter ones."""
    ids = np.full((len(text.texts), max(map(len, text.texts))), -1, dtype=np.int32)
    for row, tokens in zip(ids, text.texts, strict=True):
        row[: len(tokens)] = tokens
    return ids


def publish(folder: FtFolder, target: Path) -> None:
    """Put the finished folder in its place; one that stood there goes with the staging folder."""
    expected = {CONFIG_FILE, *(file.name for file in folder.layout.files(folder.parts))}
    written = {file.name for file in folder.path.iterdir()} - {CALIBRATION_FILE}
    assert written == expected, f"written but not expected: {written - expected}, missing: {expected - written}"
    if target.exists():
        target.rename(folder.path.with_name("replaced"))
    folder.path.rename(target)


if __name__ == "__main__":
    run_script(main, ConvertArgs, __doc__)
