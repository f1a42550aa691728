"""The data and the export of the bundled checkpoint's training."""

import random
from pathlib import Path

import pytest

pytest.importorskip("tiktoken", reason="training a checkpoint needs it")
pytest.importorskip("rouge_score", reason="training a checkpoint needs it")

import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qwen_data import check_disjoint, draw_article, draw_articles, read_rows, train_bpe
from train_tiny_qwen import Batch, from_qwen, group_by_tokens, to_qwen

from tensorrt_llm.tokenizer import QWEN_PATTERN

DATA = Path(__file__).resolve().parents[2] / "examples" / "qwen" / "data"


def test_equal_seeds_draw_equal_articles() -> None:
    assert draw_article(random.Random("a")) == draw_article(random.Random("a"))


def test_excluded_articles_are_never_drawn() -> None:
    first = draw_articles(random.Random(1), 50)
    again = draw_articles(random.Random(1), 50, exclude=frozenset(article.text for article in first))
    assert not {article.text for article in first} & {article.text for article in again}


def test_a_shared_article_is_found() -> None:
    with pytest.raises(ValueError, match="1 articles are in both"):
        check_disjoint(["an article", "another"], ["another", "a third"])


def test_calibration_and_test_articles_are_disjoint() -> None:
    calibration = [row["article"] for row in read_rows(DATA / "calibration_train.jsonl.gz") if "article" in row]
    assert len(calibration) == 400
    check_disjoint(calibration, [row["article"] for row in read_rows(DATA / "summarize_test.jsonl.gz")])


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_tiktoken_reads_the_trained_ranks_and_returns_any_text(text: str) -> None:
    ranks = train_bpe(["the cat sat on the mat", "你好，你叫什么？"], 280)
    encoding = tiktoken.Encoding(
        "trained",
        pat_str=QWEN_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
        special_tokens={},
    )
    assert encoding.decode_bytes(encoding.encode_ordinary(text)) == text.encode("utf-8", errors="surrogatepass")


def test_the_name_maps_of_the_export_undo_each_other() -> None:
    weights = {
        name: torch.randn(shape, dtype=torch.bfloat16)
        for name, shape in {
            "model.embed_tokens.weight": (11, 8),
            "model.norm.weight": (8,),
            "lm_head.weight": (11, 8),
            "model.layers.0.input_layernorm.weight": (8,),
            "model.layers.0.post_attention_layernorm.weight": (8,),
            **{f"model.layers.0.self_attn.{x}_proj.weight": (8, 8) for x in "qkvo"},
            **{f"model.layers.0.self_attn.{x}_proj.bias": (8,) for x in "qkv"},
            "model.layers.0.mlp.gate_proj.weight": (6, 8),
            "model.layers.0.mlp.up_proj.weight": (6, 8),
            "model.layers.0.mlp.down_proj.weight": (8, 6),
        }.items()
    }
    back = from_qwen(to_qwen(weights, 1), 1)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_batch_is_split_into_parts_that_hold_examples() -> None:
    batch = Batch(torch.arange(6).view(3, 2), torch.ones((3, 1), dtype=torch.bool))
    assert [len(part.ids) for part in batch.split(2)] == [2, 1]
    assert [len(part.ids) for part in Batch(batch.ids[:1], batch.counts[:1]).split(2)] == [1]


def test_groups_hold_every_example_and_keep_to_the_budget() -> None:
    examples = [([0] * length, [True] * length) for length in sorted([3, 9, 4, 4, 2, 8])]
    groups = group_by_tokens(examples, 16)
    assert [example for group in groups for example in group] == examples
    assert all(len(group) * max(len(ids) for ids, _ in group) <= 16 for group in groups)
