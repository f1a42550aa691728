"""Claims on the terminal chat, with a runner that gives written replies in place of an engine."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cli_chat
import pytest
from chat_prompt import make_context
from command_line import run_script

from tensorrt_llm.limits import Limits
from tensorrt_llm.runtime import SamplingConfig
from tensorrt_llm.tokenizer import Tokenizer

LIMITS = Limits(max_batch_size=1, max_input_len=300, max_output_len=50, max_num_tokens=300, tokens_per_block=16)


class FakeRunner:
    """Stands for ModelRunner: gives the replies in turn and keeps what it was asked."""

    def __init__(self, replies: list[list[str]]) -> None:
        self.config = SimpleNamespace(limits=LIMITS, quant_mode=0, quant_algo="", verdict=None)
        self.replies = iter(replies)
        self.loaded_from: tuple[Path, str | None] | None = None
        self.prompts: list[list[int]] = []
        self.samplings: list[SamplingConfig] = []
        self.before_each_piece: Callable[[], object] = lambda: None

    def from_dir(self, engine_dir: Path, *, tokenizer: Tokenizer, device: str | None, opened: None) -> "FakeRunner":
        self.loaded_from = (engine_dir, device)
        return self

    def stream_text(self, ids: list[int], sampling: SamplingConfig) -> Iterator[str]:
        self.prompts.append(ids)
        self.samplings.append(sampling)
        for piece in next(self.replies):
            self.before_each_piece()
            yield piece
        self.before_each_piece()


class Terminal:
    """Runs a chat in which the user types `lines` and then closes the input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokenizer_dir: Path) -> None:
        self._monkeypatch = monkeypatch
        self._tokenizer_dir = tokenizer_dir
        self.runner = FakeRunner([])

    def chat(self, lines: list[str], replies: list[list[str]], *flags: str) -> int:
        typed = iter(lines)

        def read_line(prompt: str) -> str:
            print(prompt, end="")
            for line in typed:
                return line
            raise EOFError

        self.runner.replies = iter(replies)
        self._monkeypatch.setattr("builtins.input", read_line)
        self._monkeypatch.setattr(cli_chat, "ModelRunner", self.runner)
        return self.run_script("--engine_dir", "engine", "--tokenizer_dir", str(self._tokenizer_dir), *flags)

    def run_script(self, *flags: str) -> int:
        """The exit code of the script with these flags."""
        self._monkeypatch.setattr(sys, "argv", ["cli_chat.py", *flags])
        with pytest.raises(SystemExit) as leaving:
            run_script(cli_chat.main, cli_chat.ChatArgs, cli_chat.__doc__)
        assert isinstance(leaving.value.code, int)
        return leaving.value.code


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tokenizer_dir: Path) -> Terminal:
    return Terminal(monkeypatch, tokenizer_dir)


Capture = pytest.CaptureFixture[str]


# --- turns ------------------------------------------------------------------------------------------------------------


def test_a_chat_greets_answers_and_says_goodbye(terminal: Terminal, capsys: Capture) -> None:
    code = terminal.chat(["你好"], [["您好", "，我是", "通义千问。"]])
    expected = f"{cli_chat.GREETING}\nInput: Output: 您好，我是通义千问。\nInput: \n{cli_chat.FAREWELL}\n"
    assert (code, capsys.readouterr().out) == (0, expected)


def shown_before_each_piece(terminal: Terminal, capsys: Capture, *flags: str) -> list[str]:
    shown: list[str] = []
    terminal.runner.before_each_piece = lambda: shown.append(capsys.readouterr().out)
    terminal.chat(["q"], [["one ", "two"]], *flags)
    return [*shown[1:], capsys.readouterr().out]


def test_each_piece_is_shown_before_the_next_is_made(terminal: Terminal, capsys: Capture) -> None:
    first, second, rest = shown_before_each_piece(terminal, capsys)
    assert (first, second, rest[0]) == ("one ", "two", "\n")


def test_without_streaming_a_reply_is_shown_when_it_is_complete(terminal: Terminal, capsys: Capture) -> None:
    first, second, rest = shown_before_each_piece(terminal, capsys, "--no_stream")
    assert (first, second, rest.splitlines()[0]) == ("", "", "one two")


@pytest.mark.parametrize("flags", [[], ["--no_stream"]])
def test_the_next_question_comes_with_the_turns_before(
    terminal: Terminal, tokenizer: Tokenizer, flags: list[str]
) -> None:
    terminal.chat(["q1", "q2"], [["a", "1"], ["a2"]], *flags)
    _, expected = make_context(tokenizer, "q2", [("q1", "a1")])
    assert terminal.runner.prompts[1] == expected


def test_clear_forgets_the_turns_before(terminal: Terminal, tokenizer: Tokenizer, capsys: Capture) -> None:
    terminal.chat(["q1", "clear", "q2"], [["a1"], ["a2"]])
    _, expected = make_context(tokenizer, "q2")
    assert (terminal.runner.prompts[1], cli_chat.CLEARED in capsys.readouterr().out) == (expected, True)


def test_blank_lines_are_not_questions(terminal: Terminal) -> None:
    terminal.chat(["", "  ", "q"], [["a"]])
    assert len(terminal.runner.prompts) == 1


def test_the_system_prompt_is_in_the_prompt(terminal: Terminal, tokenizer: Tokenizer) -> None:
    terminal.chat(["q"], [["a"]], "--system", "Be brief.")
    assert terminal.runner.prompts == [make_context(tokenizer, "q", system="Be brief.")[1]]


def test_a_question_longer_than_the_engine_takes_is_cut(terminal: Terminal) -> None:
    terminal.chat(["x" * 1000], [["a"]])
    assert len(terminal.runner.prompts[0]) == LIMITS.max_input_len


def test_a_long_chat_never_outgrows_the_engine(terminal: Terminal) -> None:
    terminal.chat(["question"] * 20, [["x" * 30]] * 20)
    assert max(map(len, terminal.runner.prompts)) <= LIMITS.max_input_len


def test_the_window_of_the_checkpoint_bounds_the_prompt(terminal: Terminal, tokenizer_dir: Path) -> None:
    recommend(tokenizer_dir, max_window_size=200)
    terminal.chat(["x" * 1000], [["a"]])
    assert len(terminal.runner.prompts[0]) == 199


# --- leaving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["exit", "quit", "exit()", "quit()", " exit "])
def test_a_command_leaves(terminal: Terminal, capsys: Capture, command: str) -> None:
    code = terminal.chat([command, "q"], [])
    assert (code, terminal.runner.prompts, capsys.readouterr().out[-4:]) == (0, [], f"{cli_chat.FAREWELL}\n")


def interrupt(*_: object) -> str:
    raise KeyboardInterrupt


def test_an_interrupt_at_the_prompt_leaves(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(cli_chat, "read_questions", interrupt)
    assert (terminal.chat([], []), capsys.readouterr()[0][-5:]) == (0, f"\n{cli_chat.FAREWELL}\n")


def test_an_interrupt_during_a_reply_leaves(terminal: Terminal, capsys: Capture) -> None:
    terminal.runner.before_each_piece = interrupt
    code = terminal.chat(["q"], [["a"]])
    out, err = capsys.readouterr()
    assert (code, out[-5:], err) == (0, f"\n{cli_chat.FAREWELL}\n", "")


# --- settings ---------------------------------------------------------------------------------------------------------


def recommend(tokenizer_dir: Path, **settings: Any) -> None:
    (tokenizer_dir / "generation_config.json").write_text(json.dumps(settings))


def sampling_of(terminal: Terminal, *flags: str) -> SamplingConfig:
    terminal.chat(["q"], [["a"]], *flags)
    return terminal.runner.samplings[0]


def test_a_reply_ends_at_the_markers_of_the_chat(terminal: Terminal) -> None:
    sampling = sampling_of(terminal)
    assert (sampling.end_id, sampling.pad_id, tuple(sampling.stop_ids)) == (258, 258, (258, 257, 256))


def test_flags_set_the_sampling(terminal: Terminal) -> None:
    flags = "--temperature 0.5 --top_k 7 --top_p 0.25 --repetition_penalty 1.5 --random_seed 3 --max_new_tokens 9"
    sampling = sampling_of(terminal, *flags.split())
    chosen = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty, sampling.random_seed)
    assert (chosen, sampling.max_new_tokens) == ((0.5, 7, 0.25, 1.5, 3), 9)


def test_the_checkpoint_recommends_what_no_flag_sets(terminal: Terminal, tokenizer_dir: Path) -> None:
    recommend(tokenizer_dir, do_sample=True, top_k=0, top_p=0.8, repetition_penalty=1.1, max_new_tokens=11)
    sampling = sampling_of(terminal, "--top_p", "0.5")
    chosen = (sampling.top_k, sampling.top_p, sampling.repetition_penalty, sampling.max_new_tokens)
    assert chosen == (0, 0.5, 1.1, 11)


def test_a_zero_given_as_a_flag_counts(terminal: Terminal, tokenizer_dir: Path) -> None:
    recommend(tokenizer_dir, temperature=0.7, top_k=20)
    sampling = sampling_of(terminal, "--temperature", "0", "--top_k", "0")
    assert (sampling.temperature, sampling.top_k) == (0, 0)


def test_a_checkpoint_that_does_not_sample_is_greedy(terminal: Terminal, tokenizer_dir: Path) -> None:
    recommend(tokenizer_dir, do_sample=False, top_k=50, top_p=0.9, temperature=0.7)
    sampling = sampling_of(terminal)
    assert (sampling.top_k, sampling.temperature) == (1, 1.0)


def test_without_any_wish_a_reply_may_be_as_long_as_the_engine_allows(terminal: Terminal) -> None:
    assert sampling_of(terminal).max_new_tokens == LIMITS.max_output_len


def test_a_short_prompt_leaves_more_room_for_the_reply(terminal: Terminal) -> None:
    sampling = sampling_of(terminal, "--max_output_len", "1000")
    assert sampling.max_new_tokens == LIMITS.max_seq_len - len(terminal.runner.prompts[0])


@pytest.mark.parametrize(("flags", "device"), [([], None), (["--device", "cpu"], "cpu")])
def test_the_engine_is_loaded_on_the_device_asked_for(terminal: Terminal, flags: list[str], device: str | None) -> None:
    terminal.chat([], [], *flags)
    assert terminal.runner.loaded_from == (Path("engine"), device)


def test_a_checkpoint_that_is_no_chat_model_is_warned_about(
    terminal: Terminal, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recommend(tokenizer_dir, chat_format="raw")
    terminal.chat([], [])
    assert "recommends chat_format raw" in caplog.text


def test_what_quantization_cost_is_said_once_and_not_among_the_replies(terminal: Terminal, capsys: Capture) -> None:
    terminal.runner.config.quant_algo = "W8A16"
    assert terminal.chat(["你好", "再见"], [["a"], ["b"]]) == 0
    captured = capsys.readouterr()
    assert captured.err == "Accuracy: not measured\n" and "Accuracy" not in captured.out


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("config.json: bad"), FileNotFoundError(2, "No such file", "engine")])
def test_an_engine_that_cannot_be_loaded_is_one_line_and_exit_code_1(
    terminal: Terminal, capsys: Capture, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> FakeRunner:
        raise error

    terminal.runner.from_dir = refuse  # type: ignore[method-assign]
    code = terminal.chat([], [])
    assert (code, capsys.readouterr().err) == (1, f"cli_chat.py: error: {error}\n")


def test_a_folder_without_tokenizer_is_one_line_and_exit_code_1(terminal: Terminal, capsys: Capture) -> None:
    code = terminal.run_script("--engine_dir", "engine", "--tokenizer_dir", "absent")
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines), "absent" in lines[0]) == (1, 1, True)


@pytest.mark.parametrize("wrong", ["--temperature -1", "--max_new_tokens 0", "--top_k -5", "--top_p 1.5"])
def test_wrong_sampling_is_refused_before_the_engine_is_loaded(terminal: Terminal, capsys: Capture, wrong: str) -> None:
    name, value = wrong.removeprefix("--").split()
    code = terminal.chat(["q"], [["a"]], f"--{name}", value)
    assert (code, terminal.runner.loaded_from, f"{name} is {value}" in capsys.readouterr().err) == (1, None, True)


def test_a_system_prompt_too_long_for_the_engine_ends_the_chat_with_exit_code_1(
    terminal: Terminal, capsys: Capture
) -> None:
    code = terminal.chat(["q"], [["a"]], "--system", "x" * 300)
    assert (code, "the system prompt takes 309 tokens" in capsys.readouterr().err) == (1, True)


@pytest.mark.parametrize(
    "flags",
    [
        ["--tokenizer_dir", "t"],
        ["--engine_dir", "e"],
        ["--engine_dir", "e", "--tokenizer_dir", "t", "--top_k", "many"],
        ["--engine_dir", "e", "--tokenizer_dir", "t", "--log_level", "loud"],
    ],
)
def test_wrong_flags_are_exit_code_2(terminal: Terminal, flags: list[str]) -> None:
    assert terminal.run_script(*flags) == 2


def test_the_script_starts_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(cli_chat.__file__).resolve()), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "--engine_dir" in done.stdout) == (0, True)
