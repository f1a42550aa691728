"""One small byte-pair vocabulary, trained here, written in both formats: so both tokenizers must give the same ids.

Ids 0-255 are the single bytes, the merges follow in order, then the special tokens.
"""

import base64
import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tensorrt_llm.tokenizer import QWEN_PATTERN, QWEN_SPECIALS, HfTokenizer, QwenTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog doesn't mind; it's asleep, and they'll wait.",
    "你好，请问你叫什么？您好，我是来自达摩院的大规模语言模型，我叫通义千问。你好你好，请问请问。",
    "In 2023 the port was written in 45 days.\n\nThe  second  paragraph\thas odd   spaces.\r\n",
    "Grüße aus Köln, ça va? 👍👍 emoji 👩‍💻 and 한국어 日本語 العربية",
] * 4


def byte_characters() -> list[str]:
    """The visible character that byte-level BPE writes for each byte."""
    visible = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    hidden = (chr(code) for code in range(256, 512))
    return [chr(value) if value in visible else next(hidden) for value in range(256)]


def new_fast_tokenizer(model: models.BPE) -> Tokenizer:
    """A tokenizer with the normalizer, pre-tokenizer and decoder of Qwen1.5's tokenizer.json."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="session")
def trained() -> Tokenizer:
    characters = byte_characters()
    learner = new_fast_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=characters, show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    vocab = {character: value for value, character in enumerate(characters)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = new_fast_tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens(list(QWEN_SPECIALS))
    return tokenizer


@pytest.fixture(scope="session")
def hf_dir(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    trained.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def qwen_dir(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    byte_of = {character: value for value, character in enumerate(byte_characters())}
    ranks = trained.get_vocab(with_added_tokens=False)
    lines = (
        f"{base64.b64encode(bytes(byte_of[character] for character in token)).decode()} {rank}\n"
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "qwen.tiktoken").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def hf(hf_dir: Path) -> HfTokenizer:
    return HfTokenizer(hf_dir / "tokenizer.json")


@pytest.fixture(scope="session")
def qwen(qwen_dir: Path) -> QwenTokenizer:
    return QwenTokenizer(qwen_dir / "qwen.tiktoken")


@pytest.fixture(params=["qwen", "hf"])
def tokenizer(request: pytest.FixtureRequest) -> QwenTokenizer | HfTokenizer:
    """Each kind in turn: a claim on this fixture holds for both."""
    chosen: QwenTokenizer | HfTokenizer = request.getfixturevalue(request.param)
    return chosen
