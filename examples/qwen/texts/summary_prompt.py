"""What a model is asked to summarize an article with: the original port's prompt. Knows no dataset and no metric."""

from chat_prompt import make_context

from tensorrt_llm.tokenizer import Tokenizer

# Results compare with published ones only if this stays as it is, letter by letter.
SYSTEM_PROMPT = (
    "You are a useful assistant, please directly output the corresponding summary according to the article "
    "entered by the user."
)


def summary_query(article: str) -> str:
    """The user's turn."""
    return f"{article} TL;DR: ".strip().replace(" n't", "n't")


def summary_prompt(tokenizer: Tokenizer, query: str, max_length: int) -> list[int]:
    """The ids themselves go to every backend: encoding the text again would let an article write special tokens."""
    # The window's bound is strict, and only the length of the input is to count.
    _, ids = make_context(tokenizer, query, None, SYSTEM_PROMPT, max_length, max_window_size=max_length + 1)
    return ids
