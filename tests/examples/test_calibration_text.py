"""Calibration text: every format gives token ids, and none of it is what accuracy is shown on."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from texts.articles import BUNDLED_ARTICLES
from texts.calibration_text import BUNDLED_TEXT, load_calibration_text, needs_tokenizer, random_text

from tensorrt_llm.tokenizer import load_tokenizer

CHECKPOINT = BUNDLED_ARTICLES.parents[1] / "tiny_qwen_chat"
TOKENIZER = load_tokenizer(CHECKPOINT)
VOCAB = 2304


def records(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_no_calibration_text_is_an_evaluation_article() -> None:
    shown = {record["article"] for record in records(BUNDLED_ARTICLES)}
    assert shown and not shown & {record.get("article") for record in records(BUNDLED_TEXT)}


def test_the_bundled_text_fills_its_budget() -> None:
    text = load_calibration_text(BUNDLED_TEXT, TOKENIZER, VOCAB, max_length=128, max_tokens=1000)
    assert 998 <= text.num_tokens <= 1000 and all(2 <= len(ids) <= 128 for ids in text.texts)


def test_seeds_draw_other_texts() -> None:
    first, again, other = (
        load_calibration_text(BUNDLED_TEXT, TOKENIZER, VOCAB, 64, 500, seed).texts for seed in (0, 0, 1)
    )
    assert first == again != other


def test_what_judges_reads_other_texts_than_what_calibrates() -> None:
    calibrates, judges = (
        load_calibration_text(BUNDLED_TEXT, TOKENIZER, VOCAB, 512, budget, from_end=from_end).texts
        for budget, from_end in ((16384, False), (1024, True))
    )
    assert not set(map(tuple, calibrates)) & set(map(tuple, judges))


def test_an_article_is_asked_and_answered(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"article": "It rained.", "highlights": "Rain."}))
    (ids,) = load_calibration_text(file, TOKENIZER, VOCAB, 200, 200).texts
    text = TOKENIZER.decode(ids, skip_special_tokens=False)
    assert text.endswith("It rained. TL;DR:<|im_end|>\n<|im_start|>assistant\nRain.<|im_end|>")


def test_a_chat_keeps_its_turns(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    file.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    (ids,) = load_calibration_text(file, TOKENIZER, VOCAB, 200, 200).texts
    expected = "\n".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in turns)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == expected


def test_plain_text_and_ids_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line\n\nanother\n")
    np.save(tmp_path / "b.npy", np.array([[5, 6, 7], [8, 9, -1]], dtype=np.int32))
    lines = load_calibration_text(tmp_path / "a.txt", TOKENIZER, VOCAB, 99, 99).texts
    assert sorted(TOKENIZER.decode(ids) for ids in lines) == ["another", "one line"]
    assert sorted(load_calibration_text(tmp_path / "b.npy", None, VOCAB, 99, 99).texts) == [[5, 6, 7], [8, 9]]
    assert needs_tokenizer(tmp_path / "a.txt") and not needs_tokenizer(tmp_path / "b.npy")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"article": "x"}', "found article, expected article and highlights, messages, or text"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "an answer at the end"),
        ("a.jsonl", "{", "record 1: not readable"),
        ("a.csv", "1,2,9999", "holds token id 9999, expected 0 to 2303"),
        ("a.csv", "1", "no text of 2 or more tokens"),
        ("a.pdf", "x", "found a .pdf, expected .jsonl"),
    ],
)
def test_what_is_no_text_is_named(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words.replace(".", r"\.")) as caught:
        load_calibration_text(tmp_path / name, TOKENIZER, VOCAB, 99, 99)
    assert str(tmp_path / name) in str(caught.value)


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="takes a tokenizer; give token ids"):
        load_calibration_text(tmp_path / "a.txt", None, VOCAB, 99, 99)


def test_random_text_fits_the_vocabulary() -> None:
    text = random_text(7, max_length=5, max_tokens=23)
    assert len(text.texts) == 4 and all(len(ids) == 5 and set(ids) <= set(range(7)) for ids in text.texts)
