"""Chat with an engine in a terminal: several turns, the reply shown as it is written.

    python cli_chat.py --engine_dir engines/7b --tokenizer_dir Qwen-7B-Chat

Settings of sampling come from the flags, else from the checkpoint's generation_config.json, else from SamplingConfig;
prompt and reply never exceed the engine's limits. `clear` forgets the turns before; `exit`, Ctrl-D and Ctrl-C leave.
"""

import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# A bare checkout works too, as on a GPU machine where nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from early_start import begin_start  # noqa: E402

# Before torch is imported, which takes seconds: meanwhile weights are checked, and the GPU starts.
OPENED = begin_start(sys.argv[1:]) if __name__ == "__main__" else None

from chat_prompt import DEFAULT_SYSTEM, make_context, stop_words_for  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402

from tensorrt_llm.inspect import accuracy_of, is_quantized  # noqa: E402
from tensorrt_llm.runtime import ModelRunner, SamplingConfig  # noqa: E402
from tensorrt_llm.tokenizer import GenerationDefaults, Tokenizer, load_tokenizer, read_generation_defaults  # noqa: E402

logger = logging.getLogger("cli_chat")

CHAT_FORMAT = "chatml"
LEAVE_COMMANDS = ("exit", "quit", "exit()", "quit()")
CLEAR_COMMAND = "clear"

GREETING = "欢迎使用通义千问！直接输入问题即可开始对话；输入 clear 清空历史，输入 exit 退出。"
CLEARED = "历史已清空，我们重新开始吧。"
FAREWELL = "再见！"

_DEFAULT = "default: generation_config.json's"


@dataclass(frozen=True)
class ChatArgs:
    engine_dir: Path = flag(help="folder that build.py wrote")
    tokenizer_dir: Path = flag(help="folder of the checkpoint: its tokenizer and generation_config.json")
    max_new_tokens: int | None = flag(
        None,
        help=f"longest reply in tokens ({_DEFAULT}, else the engine's max_output_len)",
        aliases=("--max_output_len",),
    )
    system: str = flag(DEFAULT_SYSTEM, help="system prompt")
    no_stream: bool = flag(False, help="show a reply only when it is complete")
    temperature: float | None = flag(None, help=f"0 is greedy; no effect while top_k is 1 ({_DEFAULT}, else 1.0)")
    top_k: int | None = flag(None, help=f"1 is greedy, 0 keeps every token ({_DEFAULT}, else 1)")
    top_p: float | None = flag(None, help=f"keep the likeliest tokens that together reach it ({_DEFAULT}, else all)")
    repetition_penalty: float | None = flag(None, help=f"above 1: repeat less ({_DEFAULT}, else 1.0)")
    random_seed: int | None = flag(None, help="the same seed and the same chat give the same replies")
    device: str | None = flag(None, help="cpu or cuda (default: cuda when there is one)")
    log_level: str = log_level_flag("error")


def make_sampling(args: ChatArgs, defaults: GenerationDefaults, tokenizer: Tokenizer) -> SamplingConfig:
    """How replies are sampled and what ends them. How long they may get is decided turn by turn."""
    recommended: dict[str, Any] = {"repetition_penalty": defaults.repetition_penalty}
    if defaults.do_sample is not False:
        recommended |= {"temperature": defaults.temperature, "top_k": defaults.top_k, "top_p": defaults.top_p}
    flags = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "random_seed")
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
    runner = ModelRunner.from_dir(args.engine_dir, tokenizer=tokenizer, device=args.device, opened=OPENED)
    if is_quantized(runner.config):
        print(f"Accuracy: {accuracy_of(runner.config)}", file=sys.stderr)
    limits = runner.config.limits
    # Where the checkpoint recommends no window, the engine alone is the limit. (A window's bound is strict.)
    window = limits.max_input_len + 1 if defaults.max_window_size is None else defaults.max_window_size
    wishes = (args.max_new_tokens, defaults.max_new_tokens, limits.max_output_len)
    longest_reply = next(wish for wish in wishes if wish is not None)
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


def main(args: ChatArgs) -> None:
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that is not UTF-8 shows "?" for what it does not know, instead of ending the chat.
            stream.reconfigure(errors="replace")
    try:
        chat(args)
    except KeyboardInterrupt:
        print(f"\n{FAREWELL}")


if __name__ == "__main__":
    run_script(main, ChatArgs, __doc__)
