"""Articles as the ids that a backend is given: to be summarized, and followed by their reference summaries."""

from collections.abc import Sequence
from dataclasses import dataclass

from texts.articles import Article
from texts.summary_prompt import summary_prompt, summary_query

from tensorrt_llm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Task:
    """One article as ids."""

    highlights: str
    prompt: list[int]
    scored_prompt: list[int]  # the prompt, or with less of the article where the reference does not fit behind it
    reference: list[int]


def make_tasks(
    tokenizer: Tokenizer, articles: Sequence[Article], max_input_length: int, max_new_tokens: int
) -> list[Task]:
    tasks = []
    for article, highlights in articles:
        query = summary_query(article)
        reference = tokenizer.encode(highlights)[:max_new_tokens]
        prompt = scored_prompt = summary_prompt(tokenizer, query, max_input_length)
        if len(prompt) + len(reference) > max_input_length:
            scored_prompt = summary_prompt(tokenizer, query, max_input_length - len(reference))
        tasks.append(Task(highlights, prompt, scored_prompt, reference))
    return tasks
