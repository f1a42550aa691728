"""Generate with an engine: text in and text out, or token ids in and token ids out.

    python run.py --engine_dir engines/7b --tokenizer_dir Qwen-7B-Chat --input_text "你好，请问你叫什么？"
    python run.py --engine_dir engines/7b --input_file prompts.npy --output_npy sequences.npy --max_new_tokens 64

Texts are wrapped in the chat template unless --no_prompt_template is given; token ids go in as they are.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A bare checkout works too, as on a GPU machine where nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from early_start import begin_start  # noqa: E402

# Before torch is imported, which takes seconds: meanwhile weights are checked, and the GPU starts.
OPENED = begin_start(sys.argv[1:]) if __name__ == "__main__" else None

from chat_prompt import DEFAULT_SYSTEM, make_context, stop_words_for  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402
from table import markdown_table  # noqa: E402
from token_files import READABLE, read_prompts, read_token_ids, write_csv, write_npy  # noqa: E402

from tensorrt_llm import Engine, EngineConfig  # noqa: E402
from tensorrt_llm.inspect import accuracy_of, is_quantized  # noqa: E402
from tensorrt_llm.runtime import ModelRunner, SamplingConfig  # noqa: E402
from tensorrt_llm.runtime.engine_folder import open_engine  # noqa: E402
from tensorrt_llm.runtime.layer_comparison import LayerComparison, compare_layers  # noqa: E402
from tensorrt_llm.tokenizer import Tokenizer, load_tokenizer  # noqa: E402

DEFAULT_PROMPT = "你好，请问你叫什么？"
PROFILED_RUNS = 10


@dataclass(frozen=True)
class RunArgs:
    engine_dir: Path = flag(help="folder that build.py wrote")
    tokenizer_dir: Path | None = flag(None, help="folder of the checkpoint's tokenizer; without it ids go in and out")
    input_text: list[str] = flag([], help=f"prompts (default with a tokenizer: {DEFAULT_PROMPT})")
    input_file: Path | None = flag(
        None,
        help="prompts from a file: npy or csv of token ids, txt with one prompt a line",
        aliases=("--input_tokens",),
    )
    max_input_length: int | None = flag(None, help="cut longer prompts to so many tokens (default: the engine's limit)")
    max_new_tokens: int = flag(200, help="new tokens per prompt", aliases=("--max_output_len",))
    output_csv: Path | None = flag(None, help="write full sequences as csv of token ids instead of printing")
    output_npy: Path | None = flag(None, help="write full sequences as int32 npy instead of printing")
    output_logits_npy: Path | None = flag(None, help="write the float32 logits of each new token, for one prompt")
    no_prompt_template: bool = flag(False, help="take texts as they are; special tokens written in them are honoured")
    system: str = flag(DEFAULT_SYSTEM, help="system prompt of the chat template")
    temperature: float = flag(1.0, help="0 is greedy")
    top_k: int = flag(1, help="1 is greedy, 0 keeps every token")
    top_p: float = flag(0.0, help="keep the likeliest tokens that together reach this probability; 0 keeps all")
    repetition_penalty: float = flag(1.0, help="above 1: repeat less")
    presence_penalty: float = flag(0.0, help="above 0: fewer tokens that came before")
    frequency_penalty: float = flag(0.0, help="above 0: fewer tokens the more often they came")
    length_penalty: float = flag(1.0, help="accepted; only beam search would use it")
    min_length: int = flag(1, help="new tokens before an end token may come")
    random_seed: int | None = flag(None, help="the same seed gives the same output")
    end_id: int | None = flag(None, help="token id that ends a sequence (default: the tokenizer's, else none)")
    stop: list[str] = flag([], help="texts that end a sequence")
    num_beams: int = flag(1, help="only 1 is supported: there is no beam search yet")
    streaming: bool = flag(False, help="print text as it comes, in whole characters")
    streaming_interval: int = flag(1, help="tokens between two pieces of streamed text")
    debug_mode: bool = flag(False, help="compare each layer of the first prompt with the float32 reference, and stop")
    run_profiling: bool = flag(False, help=f"also time {PROFILED_RUNS} runs after a warm-up")
    device: str | None = flag(None, help="cpu, cuda or cuda:N (default: cuda if there is one)")
    log_level: str = log_level_flag("error")
    use_py_session: bool = flag(False, help="accepted: there is one session")

    def check(self) -> None:
        """Raise a ValueError for flags that are out of range or do not go together."""
        for name in ("streaming_interval", "max_input_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}, expected at least 1")
        if self.streaming and (self.output_csv or self.output_npy or self.output_logits_npy):
            raise ValueError("--streaming prints as text comes, expected no --output_* file with it")


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    text: str | None  # as the user gave it; None for ids


def main(args: RunArgs) -> None:
    args.check()
    tokenizer = load_tokenizer(args.tokenizer_dir) if args.tokenizer_dir else None
    if args.debug_mode:
        engine = open_engine(args.engine_dir, opened=OPENED)
        if not isinstance(engine, Engine):
            raise ValueError("--debug_mode looks into our own engines, and this is a plan of TensorRT")
        print_accuracy(engine.config)
        print_layers(engine, read_inputs(args, tokenizer, engine.config.limits.max_input_len)[0], args.device)
        return
    runner = ModelRunner.from_dir(args.engine_dir, tokenizer=tokenizer, device=args.device, opened=OPENED)
    print_accuracy(runner.config)
    prompts = read_inputs(args, tokenizer, runner.config.limits.max_input_len)
    sampling = make_sampling(args, tokenizer, runner, prompts)
    if args.streaming:
        stream(runner, prompts, sampling, args.streaming_interval)
    else:
        generate(runner, prompts, sampling, args)
    if args.run_profiling:
        print_profile(runner, prompts, sampling)


def print_accuracy(config: EngineConfig) -> None:
    """What quantization cost, on stderr: stdout is for answers."""
    if is_quantized(config):
        print(f"Accuracy: {accuracy_of(config)}", file=sys.stderr)


def read_inputs(args: RunArgs, tokenizer: Tokenizer | None, max_input_len: int) -> list[Prompt]:
    """The prompts of the flags or the file, texts wrapped in the chat template."""
    longest = args.max_input_length or max_input_len
    if args.input_file and args.input_text:
        raise ValueError("--input_text and --input_file are both given, expected one of them")
    if args.input_file and args.input_file.suffix not in READABLE:
        raise ValueError(f"--input_file {args.input_file} ends in {args.input_file.suffix!r}, expected {READABLE}")
    if args.input_file and args.input_file.suffix != ".txt":
        pad_ids = tokenizer.stop_ids if tokenizer else () if args.end_id is None else (args.end_id,)
        rows = read_token_ids(args.input_file, pad_ids)
        return [Prompt(row[-args.max_input_length :] if args.max_input_length else row, None) for row in rows]
    texts = read_prompts(args.input_file) if args.input_file else args.input_text or [DEFAULT_PROMPT]
    if tokenizer is None:
        raise ValueError("text prompts need --tokenizer_dir; without it give token ids with --input_file")
    return [Prompt(encode(text, tokenizer, args, longest), text) for text in texts]


def encode(text: str, tokenizer: Tokenizer, args: RunArgs, longest: int) -> list[int]:
    if not text:
        raise ValueError("a prompt of --input_text is empty")
    if args.no_prompt_template:
        ids = tokenizer.encode_with_specials(text)
        return ids[-longest:] if args.max_input_length else ids
    # The window is the engine's: nothing else bounds a single question.
    return make_context(tokenizer, text, (), args.system, longest, max_window_size=longest + 1)[1]


def make_sampling(
    args: RunArgs, tokenizer: Tokenizer | None, runner: ModelRunner, prompts: list[Prompt]
) -> SamplingConfig:
    """The flags as a SamplingConfig; max_new_tokens is clipped to what the engine has room for after each prompt."""
    stop_ids = stop_words_for(tokenizer, "raw" if args.no_prompt_template else "chatml").ids if tokenizer else ()
    room = [runner.config.limits.max_seq_len - len(prompt.ids) for prompt in prompts]
    return SamplingConfig(
        end_id=stop_ids[0] if args.end_id is None and stop_ids else args.end_id,
        stop_ids=stop_ids,
        stop_strings=args.stop,
        max_new_tokens=[
            max(1, min(args.max_new_tokens, tokens)) if args.max_new_tokens > 0 else args.max_new_tokens
            for tokens in room
        ],
        num_beams=args.num_beams,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        length_penalty=args.length_penalty,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        min_length=args.min_length,
        random_seed=args.random_seed,
        gather_generation_logits=args.output_logits_npy is not None,
    )


def generate(runner: ModelRunner, prompts: list[Prompt], sampling: SamplingConfig, args: RunArgs) -> None:
    """Run all prompts; write the files that are asked for, print when none is."""
    if args.output_logits_npy and len(prompts) != 1:
        raise ValueError(f"--output_logits_npy takes one prompt, found {len(prompts)}")
    output = runner.generate([prompt.ids for prompt in prompts], sampling, return_dict=True)
    sequences = output["output_ids"][:, 0].numpy()  # [prompts, longest prompt + most new tokens]
    if args.output_csv:
        write_csv(args.output_csv, sequences)
    if args.output_npy:
        write_npy(args.output_npy, sequences)
    if args.output_logits_npy:
        write_npy(args.output_logits_npy, output["generation_logits"][0].numpy())
    if args.output_csv or args.output_npy or args.output_logits_npy:
        return
    for index, prompt in enumerate(prompts):
        print_input(prompt)
        print(f"Output: {describe_output(output, index, len(prompt.ids))}")


def print_input(prompt: Prompt) -> None:
    print(f'Input: "{prompt.text}"' if prompt.text is not None else f"Input: {prompt.ids}")


def describe_output(output: dict[str, Any], index: int, start: int) -> str:
    """The new text, or the new ids where there is no tokenizer."""
    if "texts" in output:
        return f'"{output["texts"][index]}"'
    end = output["sequence_lengths"][index, 0]
    return str(output["output_ids"][index, 0, start:end].tolist())


def stream(runner: ModelRunner, prompts: list[Prompt], sampling: SamplingConfig, interval: int) -> None:
    """Print new text as it comes: one prompt as running text, several as lines that begin with the prompt's number."""
    for index, prompt in enumerate(prompts):
        print(f"[{index}] " if len(prompts) > 1 else "", end="")
        print_input(prompt)
    if len(prompts) == 1:
        print("Output: ", end="", flush=True)
    for index, piece in pieces_of(runner, prompts, sampling, interval):
        if len(prompts) == 1:
            print(piece, end="", flush=True)
        else:
            print(f"[{index}] {piece}", flush=True)
    if len(prompts) == 1:
        print()


def pieces_of(
    runner: ModelRunner, prompts: list[Prompt], sampling: SamplingConfig, interval: int
) -> Iterator[tuple[int, str]]:
    """(prompt, text or ids of at least `interval` new tokens), the rest of a prompt when it ends."""
    has_text = runner.session.tokenizer is not None
    held = [""] * len(prompts)
    count = [0] * len(prompts)
    for token in runner.session.stream([prompt.ids for prompt in prompts], sampling):
        index = token.prompt_index
        held[index] += token.text if has_text else f"{token.token_id} "
        count[index] += 1
        if held[index] and (count[index] % interval == 0 or token.finish_reason):
            yield index, held[index]
            held[index] = ""


def print_layers(engine: Engine, prompt: Prompt, device: str | None) -> None:
    """The table of --debug_mode."""
    print_input(prompt)
    rows = compare_layers(engine, prompt.ids, device)
    header = ("tensor", "shape", "mean", "sum", "max abs", "reference: mean", "sum", "max abs", "relative error")
    print(markdown_table(header, [layer_cells(row) for row in rows]))
    parted = next((row for row in rows if not row.agrees), None)
    if parted is None:
        print(f"All tensors agree with the float32 reference (relative error at most {rows[0].tolerance:g}).")
    else:
        print(f"First apart: {parted.name}, relative error {parted.relative_error:.3g}, allowed {parted.tolerance:g}.")


def layer_cells(row: LayerComparison) -> tuple[str, ...]:
    numbers = [
        number for summary in (row.engine, row.reference) for number in (summary.mean, summary.sum, summary.max_abs)
    ]
    return (row.name, str(list(row.shape)), *(f"{number:.5g}" for number in (*numbers, row.relative_error)))


def print_profile(runner: ModelRunner, prompts: list[Prompt], sampling: SamplingConfig) -> None:
    """Medians over runs of all prompts together."""
    time_run(runner, prompts, sampling)  # kernels are compiled and caches are warm after one
    runs = [time_run(runner, prompts, sampling) for _ in range(PROFILED_RUNS)]
    print(f"Profile of {len(prompts)} prompts, medians of {PROFILED_RUNS} runs:")
    print(f"  time to first token  {statistics.median(run.first_token for run in runs) * 1e3:.2f} ms")
    print(f"  time per token       {statistics.median(run.per_token for run in runs) * 1e3:.2f} ms")
    print(f"  new tokens/s         {statistics.median(run.tokens / run.total for run in runs):.1f}")


@dataclass(frozen=True)
class Timing:
    """Seconds, and new tokens of all prompts. `first_token` is when every prompt has one."""

    first_token: float
    total: float
    tokens: int
    most_tokens: int  # of one prompt

    @property
    def per_token(self) -> float:
        """Seconds between two tokens of a prompt."""
        return (self.total - self.first_token) / max(1, self.most_tokens - 1)


def time_run(runner: ModelRunner, prompts: list[Prompt], sampling: SamplingConfig) -> Timing:
    started = time.perf_counter()
    first = started
    counts = [0] * len(prompts)
    for token in runner.session.stream([prompt.ids for prompt in prompts], sampling):
        if counts[token.prompt_index] == 0:
            first = time.perf_counter()
        counts[token.prompt_index] += 1
    return Timing(first - started, time.perf_counter() - started, sum(counts), max(counts))


if __name__ == "__main__":
    run_script(main, RunArgs, __doc__)
