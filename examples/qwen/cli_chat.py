"""Chat with an engine in a terminal: several turns, the reply shown as it is written.

Settings of sampling come from the flags, else from the checkpoint's generation_config.json, else from SamplingConfig;
lengths are bounded by the engine alone. Knows nothing of tensors and steps: that is the runtime's work.
"""

import argparse
import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

# The package may not be installed: a checkout alone is enough to run the examples.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from chat_prompt import DEFAULT_SYSTEM, make_context, stop_words_for  # noqa: E402

from tensorrt_llm.runtime import ModelRunner, SamplingConfig  # noqa: E402
from tensorrt_llm.tokenizer import GenerationDefaults, Tokenizer, load_tokenizer, read_generation_defaults  # noqa: E402

logger = logging.getLogger(__name__)

CHAT_FORMAT = "chatml"
LEAVE_COMMANDS = ("exit", "quit", "exit()", "quit()")
CLEAR_COMMAND = "clear"

GREETING = "欢迎使用通义千问！直接输入问题即可开始对话；输入 clear 清空历史，输入 exit 退出。"
CLEARED = "历史已清空，我们重新开始吧。"
FAREWELL = "再见！"


@dataclass(frozen=True)
class ChatArgs:
    """What the command line says. None: see the module docstring."""

    engine_dir: str
    tokenizer_dir: str
    max_new_tokens: int | None = None
    system: str = DEFAULT_SYSTEM
    no_stream: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    random_seed: int | None = None
    device: str | None = None
    log_level: str = "error"


def parse_args(argv: list[str] | None = None) -> ChatArgs:
    parser = argparse.ArgumentParser(description="Chat with a Qwen engine.", allow_abbrev=False)
    add = parser.add_argument
    add("--engine_dir", required=True, help="folder that build.py wrote")
    add("--tokenizer_dir", required=True, help="folder of the checkpoint: its tokenizer and generation_config.json")
    add("--max_new_tokens", "--max_output_len", type=_positive, help="longest reply in tokens")
    add("--system", help="system prompt")
    add("--no_stream", action="store_true", help="show a reply only when it is complete")
    add("--temperature", type=float, help="0 is greedy; has no effect while top_k is 1")
    add("--top_k", type=int, help="1 is greedy, 0 keeps every token")
    add("--top_p", type=float, help="keep the likeliest tokens that together reach this probability")
    add("--repetition_penalty", type=float, help="above 1: repeat less")
    add("--random_seed", type=int, help="the same seed and the same chat give the same replies")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--log_level", choices=("debug", "info", "warning", "error"), help="what is logged on stderr")
    parser.set_defaults(**{field.name: field.default for field in fields(ChatArgs) if field.default is not MISSING})
    return ChatArgs(**vars(parser.parse_args(argv)))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def make_sampling(args: ChatArgs, defaults: GenerationDefaults, tokenizer: Tokenizer) -> SamplingConfig:
    """How replies are sampled and what ends them; their length is decided turn by turn."""
    recommended: dict[str, Any] = {"repetition_penalty": defaults.repetition_penalty}
    if defaults.do_sample is not False:
        recommended |= {"temperature": defaults.temperature, "top_k": defaults.top_k, "top_p": defaults.top_p}
    flags = ("temperature", "top_k", "top_p", "repetition_penalty", "random_seed")
    demanded = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    chosen = {name: value for name, value in recommended.items() if value is not None} | demanded
    stop = stop_words_for(tokenizer, CHAT_FORMAT)
    return SamplingConfig(
        end_id=stop.ids[0], pad_id=stop.ids[0], stop_ids=stop.ids, stop_strings=stop.strings, **chosen
    )


def read_questions() -> Iterator[str]:
    """What the user types, without blank lines, until a leave command or the end of input."""
    while True:
        try:
            line = input("Input: ").strip()
        except EOFError:
            print()  # the line of the prompt ends here
            return
        if line in LEAVE_COMMANDS:
            return
        if line:
            yield line


def answer(runner: ModelRunner, ids: list[int], sampling: SamplingConfig, stream: bool) -> str:
    """Show the reply to a prompt, and return it."""
    print("Output: ", end="", flush=True)
    pieces = []
    for piece in runner.stream_text(ids, sampling):
        pieces.append(piece)
        if stream:
            print(piece, end="", flush=True)
    reply = "".join(pieces)
    print("" if stream else reply)
    return reply


def chat(args: ChatArgs) -> None:
    tokenizer = load_tokenizer(args.tokenizer_dir)
    defaults = read_generation_defaults(args.tokenizer_dir)
    if defaults.chat_format not in (None, CHAT_FORMAT):
        logger.warning("the checkpoint recommends chat_format %s: it may not be able to chat", defaults.chat_format)
    sampling = make_sampling(args, defaults, tokenizer)
    sampling.validate()
    runner = ModelRunner.from_dir(args.engine_dir, tokenizer=tokenizer, device=args.device)
    limits = runner.config.limits
    # Where the checkpoint recommends no window, the engine alone is the limit. (A window's bound is strict.)
    window = defaults.max_window_size or limits.max_input_len + 1
    longest_reply = args.max_new_tokens or defaults.max_new_tokens or limits.max_output_len
    history: list[tuple[str, str]] = []
    print(GREETING)
    for question in read_questions():
        if question == CLEAR_COMMAND:
            history.clear()
            print(CLEARED)
            continue
        _, ids = make_context(tokenizer, question, history, args.system, limits.max_input_len, window, CHAT_FORMAT)
        max_new_tokens = min(longest_reply, limits.max_seq_len - len(ids))
        reply = answer(runner, ids, replace(sampling, max_new_tokens=max_new_tokens), stream=not args.no_stream)
        history.append((question, reply))
    print(FAREWELL)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=args.log_level.upper())
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that is not UTF-8 gets "?" for what it cannot show, instead of ending the chat.
            stream.reconfigure(errors="replace")
    try:
        chat(args)
    except KeyboardInterrupt:
        print(f"\n{FAREWELL}")
    except (ValueError, OSError) as error:
        print(f"cli_chat.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
