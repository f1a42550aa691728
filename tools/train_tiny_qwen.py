"""Train the bundled tiny Qwen: generated data in, a Qwen-1 checkpoint in Hugging Face layout out.

    python tools/train_tiny_qwen.py                  # data, tokenizer, training, export, evaluation
    python tools/train_tiny_qwen.py --evaluate 500   # only measure the checkpoint that is there

The bundled checkpoint was trained on two CPU cores with AVX-512 BF16 that other programs used as well: 3200 steps,
about 6 million tokens, 25 minutes at 700 to 5900 tokens/s, stopped and resumed twice (which skips the rest of a chunk
of data and may cost a little reproducibility). It has 4.59 M parameters. Greedy decoding of the first 500 held-out
articles gives ROUGE-1 92.2, ROUGE-2 84.7, ROUGE-L 92.2; against the references of other articles the same summaries
get 14.1, 1.9 and 11.7. It still fails at addition ("3 plus 4 is 10").

The training model is transformers' Qwen2ForCausalLM, which computes the same function as Qwen-1 for sequences up to
`seq_length`; only the names differ (see `to_qwen`). Interrupt it and run it again: it goes on from the last saved
state. This file knows nothing of the engine.
"""

import argparse
import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file, save_file
from tiny_qwen_data import (
    CHAT_SYSTEM,
    SUMMARIZE_SYSTEM,
    ChatTokenizer,
    chat_row,
    check_disjoint,
    draw_articles,
    draw_chat,
    read_ranks,
    read_rows,
    summarize_query,
    tokenizer_texts,
    train_bpe,
    write_ranks,
    write_rows,
)
from transformers import Qwen2Config, Qwen2ForCausalLM

logger = logging.getLogger(__name__)

CHATS = (
    ("你好，请问你叫什么？",),
    ("Hello!", "Who are you?", "Goodbye!"),
    ("My name is Clara Norwood.", "What is 3 plus 4?", "What is my name?"),
    ("你好！", "法国的首都是哪里？", "谢谢，再见。"),
)


@dataclass(frozen=True)
class Settings:
    output: Path = Path("examples/qwen/tiny_qwen_chat")
    data: Path = Path("examples/qwen/data")
    state: Path = Path("build/tiny_qwen")  # resumable training state
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    # Each thread works through its own share of a batch, and they meet once a step: on a busy machine that is far
    # faster than several threads inside each operation, which wait for the slowest one hundreds of times a step.
    threads: int = 1 if torch.cuda.is_available() else 2
    seed: int = 0
    evaluate: int = 0  # only evaluate, on so many test articles

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    mlp_width: int = 768
    num_ranks: int = 2048
    seq_length: int = 512

    steps: int = 3200
    batch_tokens: int = 2048
    chunk_examples: int = 768
    chat_share: float = 0.33
    chat_chunks: int = 12  # the first chunks are all chats, whose repeat-after-me turns teach copying in short texts
    # Answers always count; of the other tokens only this share does. They repeat the article's names, which helps
    # copying to form, but most of them cannot be predicted.
    rest_share: float = 0.15
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    cooldown: float = 0.3  # the last share of the steps, over which the rate falls to zero
    weight_decay: float = 0.05
    save_minutes: float = 4.0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    if not settings.evaluate:
        tokenizer = make_data(settings)
        train(settings, tokenizer)
    evaluate(settings, count=settings.evaluate or 500)


# --------------------------------------------------------------------------------------------------------------------
# Data.


def make_data(settings: Settings) -> ChatTokenizer:
    """Write tokenizer, test articles and calibration text; equal seeds give equal files."""
    ranks = train_bpe(tokenizer_texts(random.Random(f"{settings.seed} tokenizer"), 6000), settings.num_ranks)
    settings.output.mkdir(parents=True, exist_ok=True)
    write_ranks(settings.output / "qwen.tiktoken", ranks)

    test = draw_articles(random.Random(f"{settings.seed} test"), 600)
    test_texts = frozenset(article.text for article in test)
    rng = random.Random(f"{settings.seed} calibration")
    calibration = draw_articles(rng, 400, exclude=test_texts)
    check_disjoint((article.text for article in calibration), test_texts)
    write_rows(settings.data / "summarize_test.jsonl.gz", (a.row(f"test-{i}") for i, a in enumerate(test)))
    write_rows(
        settings.data / "calibration_train.jsonl.gz",
        [
            *(article.row(f"train-{i}") for i, article in enumerate(calibration)),
            *(chat_row(draw_chat(rng)) for _ in range(200)),
        ],
    )
    return ChatTokenizer(ranks)


@dataclass(frozen=True)
class Batch:
    """Examples of about one length, padded on the right."""

    ids: torch.Tensor  # [examples, length]
    counts: torch.Tensor  # [examples, length - 1]: whether the prediction of the next token is trained

    def split(self, num_parts: int) -> list["Batch"]:
        """At most `num_parts` batches; a part without an example would have no loss."""
        return [Batch(self.ids[i::num_parts], self.counts[i::num_parts]) for i in range(min(num_parts, len(self.ids)))]


def batches(settings: Settings, tokenizer: ChatTokenizer, first_chunk: int) -> Iterator[tuple[int, Batch]]:
    """Endless fresh training data, chunk after chunk, never a test article; yields the chunk with each batch."""
    test_texts = frozenset(row["article"] for row in read_rows(settings.data / "summarize_test.jsonl.gz"))
    chunk = first_chunk
    while True:
        rng = random.Random(f"{settings.seed} train {chunk}")
        num_chats = round(settings.chunk_examples * (1 if chunk < settings.chat_chunks else settings.chat_share))
        articles = draw_articles(rng, settings.chunk_examples - num_chats, exclude=test_texts)
        check_disjoint((article.text for article in articles), test_texts)
        examples = [tokenizer.example(SUMMARIZE_SYSTEM, [(summarize_query(a.text), a.summary)]) for a in articles]
        examples += [tokenizer.example(CHAT_SYSTEM, draw_chat(rng)) for _ in range(num_chats)]
        examples.sort(key=lambda example: len(example[0]))
        groups = group_by_tokens(examples, settings.batch_tokens)
        rng.shuffle(groups)
        for group in groups:
            yield chunk, pad_batch(group, tokenizer.endoftext, settings.rest_share, rng)
        chunk += 1


Example = tuple[list[int], list[bool]]  # ids, and whether the assistant produced each


def group_by_tokens(examples: Sequence[Example], batch_tokens: int) -> list[list[Example]]:
    """Cut sorted examples into groups of at most `batch_tokens` after padding."""
    groups: list[list[Example]] = [[]]
    for example in examples:
        if (len(groups[-1]) + 1) * len(example[0]) > batch_tokens:
            groups.append([])
        groups[-1].append(example)
    return groups


def pad_batch(group: Sequence[Example], pad: int, rest_share: float, rng: random.Random) -> Batch:
    length = max(len(ids) for ids, _ in group)
    ids = torch.full((len(group), length), pad)
    counts = torch.zeros((len(group), length), dtype=torch.bool)
    for row, (tokens, answered) in enumerate(group):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        counts[row, : len(tokens)] = torch.tensor([is_answer or rng.random() < rest_share for is_answer in answered])
    return Batch(ids, counts[:, 1:])


# --------------------------------------------------------------------------------------------------------------------
# Training.


def qwen2_config(config: dict[str, Any]) -> Qwen2Config:
    """The Qwen2 configuration that computes what a Qwen-1 configuration means, up to its seq_length."""
    return Qwen2Config(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"] // 2,
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rotary_emb_base"]},
        tie_word_embeddings=False,
    )


def qwen_config(settings: Settings, num_tokens: int) -> dict[str, Any]:
    """config.json of the checkpoint; the vocabulary is padded to a multiple of 128."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "vocab_size": math.ceil(num_tokens / 128) * 128,
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "kv_channels": settings.hidden_size // settings.num_heads,
        "intermediate_size": 2 * settings.mlp_width,
        "layer_norm_epsilon": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 4 * settings.seq_length,
        "seq_length": settings.seq_length,
        "rotary_pct": 1.0,
        "rotary_emb_base": 10000,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "no_bias": True,
        "tie_word_embeddings": False,
        "scale_attn_weights": True,
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "use_cache": True,
        "use_flash_attn": "auto",
        "softmax_in_fp32": False,
        "use_cache_quantization": False,
        "use_cache_kernel": False,
        "bf16": True,
        "fp16": False,
        "fp32": False,
        "torch_dtype": "bfloat16",
        "tokenizer_class": "QWenTokenizer",
    }


def make_model(config: dict[str, Any], device: str) -> Qwen2ForCausalLM:
    """A model with bf16 weights. `model.to(bfloat16)` would round the RoPE frequencies too, as no engine does."""
    with torch.device(device):
        model = Qwen2ForCausalLM(qwen2_config(config))
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    return model


@torch.no_grad()
def look_back(model: Qwen2ForCausalLM, distances: Sequence[int], num_pairs: int = 8, strength: float = 4.7) -> None:
    """Let head i of the first layer start out looking `distances[i]` tokens back.

    Copying needs heads that know the token before each token, and finding those is what takes a small model long.
    RoPE turns pair j of q and k by position * frequency[j], so constant biases that differ by one turn of
    distance * frequency[j] score highest at exactly that distance. The fastest pairs tell neighbours apart best.
    """
    attention = model.model.layers[0].self_attn
    half = attention.head_dim // 2
    frequency = model.model.rotary_emb.inv_freq[:num_pairs]
    for head, distance in enumerate(distances):
        first = head * attention.head_dim
        q, k = attention.q_proj.bias, attention.k_proj.bias
        q[first : first + num_pairs] = strength
        k[first : first + num_pairs] = strength * torch.cos(distance * frequency)
        k[first + half : first + half + num_pairs] = strength * torch.sin(distance * frequency)


class MasterWeights:
    """A bf16 model is trained through fp32 copies, so that small updates are not rounded away.

    All of the model computing in bf16 is 1.5 times as fast on the CPU as autocast, and what trains is what ships.
    Matrices inside the layers go to Muon, which learns to copy in fewer steps than AdamW; the rest goes to AdamW.
    """

    def __init__(self, model: Qwen2ForCausalLM, settings: Settings) -> None:
        self.weights = list(model.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]
        names = [name for name, _ in model.named_parameters()]
        is_matrix = [
            name.startswith("model.layers.") and weight.ndim == 2
            for name, weight in zip(names, self.weights, strict=True)
        ]
        matrices = [master for master, muon in zip(self.masters, is_matrix, strict=True) if muon]
        others = [master for master, muon in zip(self.masters, is_matrix, strict=True) if not muon]
        decay = settings.weight_decay
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices[i :: settings.threads], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            for i in range(settings.threads)
        ]
        self.optimizers.append(torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True))

    def step(self, rate: float, gradients: Sequence[torch.Tensor], pool: Executor) -> None:
        """Apply `gradients` at learning rate `rate`."""
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        list(pool.map(lambda optimizer: optimizer.step(), self.optimizers))
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)

    def state(self) -> dict[str, Any]:
        return {"masters": self.masters, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for weight, master, saved in zip(self.weights, self.masters, state["masters"], strict=True):
                master.copy_(saved)
                weight.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def train(settings: Settings, tokenizer: ChatTokenizer) -> None:
    """Train to `settings.steps`, saving the state and exporting the checkpoint every few minutes and at the end."""
    config = qwen_config(settings, tokenizer.num_tokens)
    model = make_model(config, settings.device)
    look_back(model, distances=(1, 2))
    masters = MasterWeights(model, settings)
    step, chunk, trained_seconds = load_state(settings, masters)
    logger.info("%.2f M parameters on %s, from step %d", count_parameters(model) / 1e6, settings.device, step)

    meter = Meter(trained_seconds)
    saved_at = time.monotonic()
    stream = batches(settings, tokenizer, chunk)
    pool = ThreadPoolExecutor(settings.threads)
    while step < settings.steps:
        chunk, batch = next(stream)
        loss, gradients = loss_and_gradients(model, batch.split(settings.threads), pool)
        step += 1
        masters.step(settings.learning_rate * rate_factor(step, settings), gradients, pool)
        meter.add(step, batch.ids.numel(), loss)
        if time.monotonic() - saved_at > 60 * settings.save_minutes or step == settings.steps:
            save_state(settings, masters, step, chunk + 1, meter.trained_seconds)
            export(settings, model, config, tokenizer)
            saved_at = time.monotonic()


def loss_and_gradients(
    model: Qwen2ForCausalLM, parts: Sequence[Batch], pool: Executor
) -> tuple[float, list[torch.Tensor]]:
    """Mean cross entropy of the tokens that count in all parts, and its fp32 gradients; one thread for each part."""
    num_counted = sum(int(part.counts.sum()) for part in parts)
    weights = list(model.parameters())

    def work(part: Batch) -> tuple[float, tuple[torch.Tensor, ...]]:
        loss = answer_loss(model, part) / num_counted
        return loss.item(), torch.autograd.grad(loss, weights)

    losses, gradients = zip(*pool.map(work, parts), strict=True)
    totals = [torch.stack(shares).sum(0, dtype=torch.float32) for shares in zip(*gradients, strict=True)]
    return sum(losses), totals


def answer_loss(model: Qwen2ForCausalLM, batch: Batch) -> torch.Tensor:
    """Summed cross entropy of the tokens that count; logits are computed for these only."""
    ids, counts = batch.ids.to(model.device), batch.counts.to(model.device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # [examples, length - 1, hidden]
    logits = model.lm_head(hidden[counts])  # [counted tokens, vocab]
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][counts], reduction="sum")


def rate_factor(step: int, settings: Settings) -> float:
    """Linear warm-up, a plateau, and a linear fall to zero, so a longer run can go on from a plateau state."""
    cooldown_steps = settings.cooldown * settings.steps
    return min(1.0, step / settings.warmup_steps, (settings.steps - step) / cooldown_steps)


def count_parameters(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


class Meter:
    """Logs step, mean loss and tokens per second every 30 seconds."""

    def __init__(self, trained_seconds: float) -> None:
        self.started = time.monotonic() - trained_seconds
        self.restart()

    def restart(self) -> None:
        self.since, self.tokens, self.losses = time.monotonic(), 0, list[float]()

    @property
    def trained_seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, step: int, tokens: int, loss: float) -> None:
        self.tokens += tokens
        self.losses.append(loss)
        if (elapsed := time.monotonic() - self.since) > 30:
            mean = sum(self.losses) / len(self.losses)
            logger.info(
                "step %d  loss %.3f  %.0f tokens/s  %.1f min",
                step,
                mean,
                self.tokens / elapsed,
                self.trained_seconds / 60,
            )
            self.restart()


def save_state(settings: Settings, masters: MasterWeights, step: int, chunk: int, trained_seconds: float) -> None:
    settings.state.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "chunk": chunk, "trained_seconds": trained_seconds, **masters.state()}
    torch.save(state, settings.state / "new.pt")
    os.replace(settings.state / "new.pt", settings.state / "state.pt")


def load_state(settings: Settings, masters: MasterWeights) -> tuple[int, int, float]:
    """Step, chunk of data and seconds trained so far; zeros when nothing was saved."""
    path = settings.state / "state.pt"
    if not path.exists():
        return 0, 0, 0.0
    state = torch.load(path, map_location=settings.device)
    masters.load_state(state)
    return state["step"], state["chunk"], state["trained_seconds"]


# --------------------------------------------------------------------------------------------------------------------
# Checkpoint: Qwen-1 names and files.

# Qwen2 names on the right; several of them are joined along the output dimension.
MODEL_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "ln_1.weight": ("input_layernorm.weight",),
    "attn.c_attn.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn.c_attn.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "ln_2.weight": ("post_attention_layernorm.weight",),
    "mlp.w1.weight": ("mlp.up_proj.weight",),
    "mlp.w2.weight": ("mlp.gate_proj.weight",),
    "mlp.c_proj.weight": ("mlp.down_proj.weight",),
}


def to_qwen(weights: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Qwen2 weights under the names of Qwen-1."""
    renamed = {name: weights[source] for name, source in MODEL_NAMES.items()}
    for i in range(num_layers):
        for name, sources in LAYER_NAMES.items():
            renamed[f"transformer.h.{i}.{name}"] = torch.cat([weights[f"model.layers.{i}.{s}"] for s in sources])
    return {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in renamed.items()}


def from_qwen(weights: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """The inverse of `to_qwen`."""
    renamed = {source: weights[name] for name, source in MODEL_NAMES.items()}
    for i in range(num_layers):
        for name, sources in LAYER_NAMES.items():
            parts = weights[f"transformer.h.{i}.{name}"].chunk(len(sources))
            renamed |= {f"model.layers.{i}.{s}": part for s, part in zip(sources, parts, strict=True)}
    return renamed


def export(settings: Settings, model: Qwen2ForCausalLM, config: dict[str, Any], tokenizer: ChatTokenizer) -> None:
    """Write everything of the checkpoint but qwen.tiktoken, which is there already."""
    generation = {
        "chat_format": "chatml",
        "eos_token_id": tokenizer.endoftext,
        "pad_token_id": tokenizer.endoftext,
        "max_window_size": settings.seq_length,
        "max_new_tokens": 100,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.8,
    }
    tokenizer_config = {"tokenizer_class": "QWenTokenizer", "model_max_length": config["max_position_embeddings"]}
    files = {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": tokenizer_config}
    for name, content in files.items():
        (settings.output / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = to_qwen(dict(model.state_dict()), settings.num_layers)
    save_file(weights, settings.output / "model.safetensors", metadata={"format": "pt"})
    (settings.output / "model.safetensors").chmod(0o644)  # save_file makes it readable by its owner only


def load_checkpoint(path: Path, device: str) -> tuple[Qwen2ForCausalLM, ChatTokenizer]:
    config = json.loads((path / "config.json").read_text())
    model = make_model(config, device)
    model.load_state_dict(from_qwen(load_file(path / "model.safetensors"), config["num_hidden_layers"]))
    return model.train(False), ChatTokenizer(read_ranks(path / "qwen.tiktoken"))


# --------------------------------------------------------------------------------------------------------------------
# Evaluation.


def evaluate(settings: Settings, count: int) -> None:
    """Print a few chats, and the ROUGE of `count` held-out articles beside that of shuffled references."""
    model, tokenizer = load_checkpoint(settings.output, settings.device)
    for questions in CHATS:
        turns: list[tuple[str, str]] = []
        for question in questions:
            (answer,) = generate(model, tokenizer, [tokenizer.prompt(CHAT_SYSTEM, turns, question)])
            turns.append((question, answer))
            print(f"user: {question}\nassistant: {answer}")
        print()

    rows = read_rows(settings.data / "summarize_test.jsonl.gz")[:count]
    prompts = [tokenizer.prompt(SUMMARIZE_SYSTEM, [], summarize_query(row["article"])) for row in rows]
    started = time.monotonic()
    outputs = [text for i in range(0, count, 100) for text in generate(model, tokenizer, prompts[i : i + 100])]
    seconds = time.monotonic() - started
    references = [row["highlights"] for row in rows]
    print(f"Article: {rows[0]['article']}\nHighlights: {references[0]}\nSummary: {outputs[0]}\n")
    print(f"{len(rows)} held-out articles in {seconds:.0f} s")
    print("ROUGE F of the summaries:          ", rouge(outputs, references))
    print("the same, references moved by one: ", rouge(outputs, references[1:] + references[:1]))


def rouge(outputs: Sequence[str], references: Sequence[str]) -> str:
    """Mean F measures times 100."""
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(reference, output) for reference, output in zip(references, outputs, strict=True)]
    return "  ".join(f"{kind} {100 * sum(s[kind].fmeasure for s in scores) / len(scores):.2f}" for kind in kinds)


@torch.inference_mode()
def generate(
    model: Qwen2ForCausalLM, tokenizer: ChatTokenizer, prompts: Sequence[list[int]], max_new_tokens: int = 100
) -> list[str]:
    """Greedy answers, padded on the left as one batch."""
    length = max(len(prompt) for prompt in prompts)
    padded = [[tokenizer.endoftext] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids = model.generate(  # type: ignore[misc]
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=[tokenizer.im_end, tokenizer.im_start, tokenizer.endoftext],
        pad_token_id=tokenizer.endoftext,
    )
    return [tokenizer.decode(row).strip() for row in ids[:, length:].tolist()]


def parse_settings() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return Settings(**vars(parser.parse_args()))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main(parse_settings())
