"""What a benchmark asks for: equal prompts, files of lengths, and ShareGPT by the original's rules."""

import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import pytest
from benchmarking.workload import (
    Shape,
    SharegptLimits,
    Workload,
    equal_requests,
    is_sharegpt,
    random_prompts,
    read_entries,
    requests_of_lengths,
    requests_of_sharegpt,
)
from chat_prompt import make_context

from tensorrt_llm.tokenizer import Tokenizer

WORKLOADS = Path(__file__).resolve().parents[2] / "examples" / "qwen" / "workloads"
LIMITS = SharegptLimits(max_input_len=200, max_new_tokens=20)
PATH = Path("sharegpt.json")


def talk(*turns: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": turn} for turn in turns]}


def usable(tokenizer: Tokenizer, *conversations: Any) -> Workload:
    """All of them that are used."""
    count = len(conversations)
    while True:
        try:
            return requests_of_sharegpt(PATH, conversations, count, tokenizer, LIMITS, 0)
        except ValueError:
            count -= 1


def test_equal_requests_are_random_and_the_same_every_time() -> None:
    workload = equal_requests(Shape(3, 50, 7), vocab_size=11, seed=0)
    assert workload == equal_requests(Shape(3, 50, 7), vocab_size=11, seed=0)
    assert workload != equal_requests(Shape(3, 50, 7), vocab_size=11, seed=1)
    assert workload.prompts[0] != workload.prompts[1]
    assert {token for prompt in workload.prompts for token in prompt} == set(range(11))
    assert (workload.input_tokens, workload.output_tokens) == (150, 21)


def test_asking_for_less_changes_no_prompt() -> None:
    workload = Workload(PATH, [[1], [2]], [1, 9]).asking_for(3)
    assert (workload.prompts, workload.output_lens) == ([[1], [2]], [1, 3])


def test_a_file_of_lengths_gives_random_ids_of_these_lengths(tmp_path: Path) -> None:
    path = tmp_path / "three.json"
    path.write_text(json.dumps([{"input_len": length, "output_len": length + 1} for length in (5, 1, 3)]))
    workload = requests_of_lengths(path, read_entries(path), None, vocab_size=11, seed=4)
    assert [len(prompt) for prompt in workload.prompts] == [5, 1, 3] and workload.output_lens == [6, 2, 4]
    assert workload.prompts == random_prompts([5, 1, 3], 11, 4)
    assert (workload.name, workload.shape) == ("three", None)


def test_fewer_prompts_are_the_first_ones_of_a_file_of_lengths() -> None:
    entries = [{"input_len": 5, "output_len": 6}, {"input_len": 1, "output_len": 2}]
    assert requests_of_lengths(PATH, entries, 1, 11, 0).output_lens == [6]
    with pytest.raises(ValueError, match="sharegpt.json: holds 2 requests, expected the 3 of --num_prompts"):
        requests_of_lengths(PATH, entries, 3, 11, 0)


@pytest.mark.parametrize(("name", "count", "longest"), [
    ("sharegpt_like_100_max1024", 100, 2048),
    ("sharegpt_like_100_max2048", 100, 4096),
    ("sharegpt_like_1000_max1024", 1000, 2048),
])  # fmt: skip
def test_the_files_beside_the_script_are_lengths(name: str, count: int, longest: int) -> None:
    entries = read_entries(WORKLOADS / f"{name}.json")
    assert len(entries) == count and not is_sharegpt(entries)
    assert max(entry["input_len"] + entry["output_len"] for entry in entries) <= longest


def test_a_conversation_is_its_first_two_turns(tokenizer: Tokenizer) -> None:
    workload = usable(tokenizer, talk("a question", "an answer", "more"))
    assert workload.prompts == [make_context(tokenizer, "a question")[1]]
    assert workload.output_lens == [len("an answer")]  # a token is a byte


def test_conversations_without_an_answer_or_with_a_short_one_are_left_out(tokenizer: Tokenizer) -> None:
    assert usable(tokenizer, talk("a question"), talk(), talk("q", "abc"), talk("q", "abcd")).output_lens == [4]


def test_a_long_prompt_is_cut_and_a_long_conversation_left_out(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    answers = ["x" * 20, "x" * 21]
    with caplog.at_level(logging.WARNING):
        workload = usable(tokenizer, *(talk("q" * 500, answer) for answer in answers))
    assert [len(prompt) for prompt in workload.prompts] == [200] and workload.output_lens == [20]
    assert not caplog.records, "thousands of cut questions are no news"


def test_the_sample_is_that_of_the_seed_in_its_order(tokenizer: Tokenizer) -> None:
    conversations = [talk("q", "x" * length) for length in range(4, 20)]
    found = requests_of_sharegpt(PATH, conversations, 5, tokenizer, LIMITS, 3)
    assert found.output_lens == random.Random(3).sample(range(4, 20), 5)


def test_too_few_conversations_are_counted(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="sharegpt.json: 1 of 2 conversations are within max_input_len 200 .* the 100"):
        requests_of_sharegpt(PATH, [talk("q", "a"), talk("q", "abcd")], None, tokenizer, LIMITS, 0)


@pytest.mark.parametrize(("text", "message"), [
    (None, "cannot be read (No such file or directory)"),
    ("{", "not JSON"),
    ("[]", "holds [], expected a list of requests or conversations"),
    ('{"input_len": 1}', "expected a list of requests or conversations"),
    ("[3]", "entry 0 is 3, expected an object with input_len and output_len"),
    ('[{"input_len": 1, "output_len": 2}, {"input_len": 1}]', "entry 1 is {'input_len': 1}, expected an object with"),
    ('[{"input_len": 0, "output_len": 2}]', "entry 0 is"),
    ('[{"input_len": true, "output_len": 2}]', "entry 0 is"),
    ('[{"conversations": []}, {"conversations": [{"from": "gpt"}]}]', "entry 1 is"),
    ('[{"conversations": []}, {"input_len": 1, "output_len": 1}]', 'entry 1 is {\'input_len\': 1, \'output_len\': 1}, '
     'expected an object with "conversations"'),
])  # fmt: skip
def test_a_malformed_dataset_names_the_file_and_the_entry(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "dataset.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"--dataset {path}: ") + ".*" + re.escape(message)):
        read_entries(path)
