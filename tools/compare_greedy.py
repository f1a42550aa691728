"""Show that an engine's greedy tokens are those of its reference path, up to ties: summaries of the bundled articles.

    python tools/compare_greedy.py --engine_dir engines/fp16 engines/int8 --device cuda
    python tools/compare_greedy.py --build_dir compared --quantized --device cuda

The reference path interprets the same engine file in float32. It need not write summaries of its own: it reads what the
fast kernels wrote, and as long as its largest logit is the token that follows, it would have written the same. Where it
first is another, the two part. That must be next to a tie: the gap between the reference's logits of the two tokens may
be no wider than

    tolerance = 2 * error      error = the largest difference between logits of the two paths along other texts,
                                       the reference summaries

as two rows of logits that are nowhere further apart than `error` can disagree about the largest across no wider gap.
Wrong kernels must not excuse themselves, so the error itself has a bound,

    error <= ERROR_UNITS * unit * the largest logit, by magnitude          (FLOAT32_ERROR_UNITS in float32)

with the unit of the dtype's last place at 1, or 1/127 where activations or the KV cache are int8: there a difference in
the last place turns into a step of the integers here and there. The exit code is 1 if a gap or an error is beyond.

Articles are cut so that the longest summary fits behind a prompt in the engine's max_input_len. --build_dir keeps
engines of the checkpoint in float32, float16 and bfloat16, with --quantized of all of measure_quantization.py's modes.
"""

import gc
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "qwen"
CHECKPOINT = EXAMPLES / "tiny_qwen_chat"
sys.path[:0] = [str(ROOT), str(EXAMPLES)]

import torch  # noqa: E402
from backends import EngineBackend  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402
from measure_quantization import MeasureArgs, build_command, make, make_engines  # noqa: E402
from summarize import SummarizeArgs  # noqa: E402
from summary.engine_folders import EngineFolder, find_engines  # noqa: E402
from summary.exam import progress  # noqa: E402
from summary.tasks import Task, make_tasks  # noqa: E402
from summary.teacher_forcing import follow_references  # noqa: E402
from table import markdown_table  # noqa: E402
from texts.articles import BUNDLED_ARTICLES, load_articles  # noqa: E402

from tensorrt_llm import Engine, EngineConfig  # noqa: E402
from tensorrt_llm.dtype import torch_dtype  # noqa: E402
from tensorrt_llm.quantization import QuantMode  # noqa: E402
from tensorrt_llm.runtime import SamplingConfig  # noqa: E402
from tensorrt_llm.runtime.session import pick_device  # noqa: E402
from tensorrt_llm.tokenizer import load_tokenizer  # noqa: E402

logger = logging.getLogger("compare_greedy")

# Found on the bundled checkpoint: 0.6 to 2 units in float16 and bfloat16, where each result is rounded, 5 with int8
# weights, 2 to 5 with int8 activations. In float32 sums, and scores before a softmax, round most, in either path: 4
# units on a CPU, where both have them in the same order, 95 on an H100. Transformers' own float32 is 41 units from its
# float64 along these articles.
ERROR_UNITS, FLOAT32_ERROR_UNITS = 16, 160


@dataclass(frozen=True)
class CompareArgs:
    engine_dir: list[Path] = flag([], help="folders that build.py wrote, or that hold such folders")
    build_dir: Path | None = flag(None, help="build engines in this folder, as far as they are not there, and add them")
    quantized: bool = flag(False, help="build every quantized mode in float16, too")
    hf_model_dir: Path = flag(CHECKPOINT, help="the checkpoint, for its tokenizer and to build from")
    articles: int = flag(500, help="bundled articles to summarize, the first ones")
    batch_size: int = flag(32, help="articles at a time")
    max_new_tokens: int = flag(100, help="longest summary in tokens")
    output_markdown: Path | None = flag(None, help="also write the table to this file")
    device: str | None = flag(None, help="cpu or cuda (default: cuda when there is one)")
    log_level: str = log_level_flag("warning")


@dataclass(frozen=True)
class Comparison:
    """One engine, its fast kernels beside its reference path."""

    name: str
    num_articles: int
    gaps: list[float]  # of each article that differs, where it first does
    error: float
    largest_error: float  # that there may be

    @property
    def tolerance(self) -> float:
        return 2 * self.error

    @property
    def is_within(self) -> bool:
        # Written so that NaN is not.
        return self.error <= self.largest_error and all(gap <= self.tolerance for gap in self.gaps)

    def cells(self) -> tuple[str, ...]:
        return (
            self.name,
            str(self.num_articles),
            str(self.num_articles - len(self.gaps)),
            str(len(self.gaps)),
            f"{max(self.gaps):.2g}" if self.gaps else "-",
            f"{self.tolerance:.2g}",
            f"{self.error:.2g}",
            f"{self.largest_error:.2g}",
            "equal up to ties" if self.is_within else "BEYOND",
        )


HEADER = (
    "engine", "articles", "equal", "differing", "largest gap", "tolerance", "logit error", "bound of it", "verdict",
)  # fmt: skip


def main(args: CompareArgs) -> int:
    if args.build_dir is None and not args.engine_dir:
        raise ValueError("there is no engine to compare, expected --engine_dir or --build_dir")
    folders = [*args.engine_dir, *build_engines(args)]
    device = pick_device(args.device)
    comparisons = [compare(engine, args, device) for engine in find_engines(folders)]
    table = markdown_table(HEADER, [comparison.cells() for comparison in comparisons])
    print(table)
    if args.output_markdown:
        args.output_markdown.write_text(table + "\n", encoding="utf-8")
    return int(not all(comparison.is_within for comparison in comparisons))


def build_engines(args: CompareArgs) -> list[Path]:
    """Their folder, if any are to be built."""
    if args.build_dir is None:
        return []
    engines = args.build_dir / "engines"
    building = MeasureArgs(args.build_dir, args.hf_model_dir, batch_size=args.batch_size, device=args.device)
    for dtype in ("float32", "float16", "bfloat16"):
        make(engines / dtype, *build_command(replace(building, dtype=dtype), engines / dtype))
    if args.quantized:
        make_engines(building, engines)
    return [engines]


def compare(engine: EngineFolder, args: CompareArgs, device: torch.device) -> Comparison:
    """Open the engine twice, one after the other, as each takes the memory of the device."""
    tokenizer = load_tokenizer(args.hf_model_dir)
    sampling = SummarizeArgs(max_new_tokens=args.max_new_tokens).sampling(tokenizer)
    longest = engine.config.limits.max_input_len - args.max_new_tokens
    tasks = make_tasks(tokenizer, load_articles(BUNDLED_ARTICLES, args.articles), longest, args.max_new_tokens)
    everything = range(len(tasks))

    fast = EngineBackend(Engine.from_dir(engine.path), engine.name, device)
    written = write_summaries(fast, tasks, sampling, args.batch_size)
    fast_logits = follow_references(fast, tasks, keep=everything).logits
    del fast
    gc.collect()  # a session and its graphs know each other

    reference = EngineBackend(Engine.from_dir(engine.path), f"{engine.name}, reference", device, reference=True)
    exact_logits = follow_references(reference, tasks, keep=everything).logits
    pairs = zip(progress(tasks, reference.name), written, strict=True)
    gaps = [first_gap(reference, task.prompt, ids) for task, ids in pairs]
    largest_logit = float(torch.stack([rows.abs().max() for rows in exact_logits.values()]).max())
    # Of tensors, as Python's max would lose a NaN that does not come first.
    errors = torch.stack([(fast_logits[index] - exact_logits[index]).abs().max() for index in everything])
    logger.info("%s: %d of %d articles differ", engine.name, sum(gap is not None for gap in gaps), len(tasks))
    return Comparison(
        engine.name,
        len(tasks),
        [gap for gap in gaps if gap is not None],
        error=float(errors.max()),
        largest_error=error_units(engine.config) * unit_of(engine.config) * largest_logit,
    )


def write_summaries(
    backend: EngineBackend, tasks: Sequence[Task], sampling: SamplingConfig, batch_size: int
) -> list[list[int]]:
    prompts = [task.prompt for task in tasks]
    starts = progress(range(0, len(prompts), batch_size), backend.name)
    return [ids for start in starts for ids in backend.generate(prompts[start : start + batch_size], sampling)]


def first_gap(reference: EngineBackend, prompt: list[int], written: list[int]) -> float | None:
    """How far the first token that the reference would not have written is below the one it would; None: no token."""
    # The row of a token scores the next one.
    rows = reference.logits(prompt + written[:-1])[len(prompt) - 1 :]
    tokens = torch.tensor(written)
    differing = (rows.argmax(-1) != tokens).nonzero()
    if not len(differing):
        return None
    row = rows[differing[0, 0]]
    return float(row.max() - row[tokens[differing[0, 0]]])


def error_units(config: EngineConfig) -> int:
    """How many of `unit_of` the two paths may be apart, in logits of magnitude 1."""
    return FLOAT32_ERROR_UNITS if unit_of(config) == torch.finfo(torch.float32).eps else ERROR_UNITS


def unit_of(config: EngineConfig) -> float:
    """The coarsest step that a number of magnitude 1 is rounded to on its way through the network."""
    mode = QuantMode(config.quant_mode)
    steps = [torch.finfo(torch_dtype(config.precision)).eps]
    if mode.has_act_and_weight_quant() or mode.has_int8_kv_cache():
        steps.append(1 / 127)
    return max(steps)


if __name__ == "__main__":
    run_script(main, CompareArgs, __doc__)
