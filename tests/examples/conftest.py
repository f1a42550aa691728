"""A tokenizer for the scripts of single bytes: one id per byte."""

import base64
from pathlib import Path

import pytest

from tensorrt_llm.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """A Qwen-1 tokenizer without merges: one id per byte, <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258."""
    lines = (f"{base64.b64encode(bytes([value])).decode()} {value}\n" for value in range(256))
    (tmp_path / "qwen.tiktoken").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)
