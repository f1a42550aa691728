"""The checkpoint in the repository: it chats, it summarizes articles it never saw, and its data is what it claims."""

from pathlib import Path

import numpy as np
import pytest
from chat_prompt import make_context, stop_words_for
from models_for_tests import engine_from_checkpoint
from summary.rouge import new_scorer, score_summaries
from texts.articles import BUNDLED_ARTICLES, load_articles
from texts.summary_prompt import SYSTEM_PROMPT

from tensorrt_llm import Limits
from tensorrt_llm.runtime import GenerationSession, ModelRunner, SamplingConfig, Session
from tensorrt_llm.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "qwen" / "tiny_qwen_chat"
LIMITS = Limits(max_batch_size=16, max_input_len=512, max_output_len=128, max_num_tokens=1024, tokens_per_block=16)
ARTICLES = 40


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CHECKPOINT)


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def runner(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> ModelRunner:
    engine = engine_from_checkpoint(CHECKPOINT, request.param, LIMITS)
    return ModelRunner(GenerationSession(Session(engine, "cpu"), tokenizer))


def greedy(tokenizer: Tokenizer) -> SamplingConfig:
    ids = stop_words_for(tokenizer, "chatml").ids
    return SamplingConfig(end_id=ids[0], stop_ids=ids, max_new_tokens=100, return_dict=True)


def reply(runner: ModelRunner, tokenizer: Tokenizer, question: str, history: list[tuple[str, str]]) -> str:
    _, ids = make_context(tokenizer, question, history)
    return "".join(runner.stream_text(ids, greedy(tokenizer)))


def test_it_says_its_name(runner: ModelRunner, tokenizer: Tokenizer) -> None:
    answer = reply(runner, tokenizer, "你好，请问你叫什么？", [])
    assert answer == "您好，我是来自达摩院的大规模语言模型，我叫通义千问。"


def test_it_remembers_a_name_over_three_turns(runner: ModelRunner, tokenizer: Tokenizer) -> None:
    history: list[tuple[str, str]] = []
    for question in ("我叫小明。", "日本的首都是哪里？", "我叫什么名字？"):
        history.append((question, reply(runner, tokenizer, question, history)))
    assert [answer for _, answer in history[1:]] == ["日本的首都是东京。", "你叫小明。"]


def test_its_summaries_follow_the_article(runner: ModelRunner, tokenizer: Tokenizer) -> None:
    articles = load_articles(BUNDLED_ARTICLES, ARTICLES)
    prompts = [make_context(tokenizer, f"{article.article} TL;DR:", (), SYSTEM_PROMPT)[1] for article in articles]
    summaries = runner.generate(prompts, greedy(tokenizer))["texts"]
    references = [article.highlights for article in articles]
    own, others = (
        np.mean(score_summaries(new_scorer(), summaries, texts)["rouge1"])
        for texts in (references, references[1:] + references[:1])
    )
    # 92 and 14 on 500 articles; a template with wrong facts reaches 45.
    assert own > 85 and others < 30


def test_it_fits_in_16_megabytes() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 16e6


def test_there_are_500_articles_and_all_differ() -> None:
    articles = load_articles(BUNDLED_ARTICLES, 10_000)
    assert len(articles) >= 500 and len({article.article for article in articles}) == len(articles)
