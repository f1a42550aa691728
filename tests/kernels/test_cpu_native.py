"""The kernels in C: what a row's bits may depend on, what is refused, threads and processes."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from cpu_tables import needs_native
from paged_steps import PagedSteps, Setting

from tensorrt_llm.kernels import Kernel, StepShape, quantized_reference, reference
from tensorrt_llm.kernels.cpu.native import native_kernels
from tensorrt_llm.quantization.quantize import quantize_weight

pytestmark = needs_native
KERNELS = native_kernels()
# Name -> op, attributes, bits and group size.
WEIGHTS = {
    "float32": ("matmul", {}, 0, 0),
    "float16": ("matmul", {}, 0, 0),
    "bfloat16": ("matmul", {}, 0, 0),
    "int8": ("weight_only_quant_matmul", {"bits": 8, "has_zero": False}, 8, 0),
    "int8 g48": ("weight_only_quant_matmul", {"bits": 8, "has_zero": True}, 8, 48),
    "int4": ("weight_only_quant_matmul", {"bits": 4, "has_zero": False}, 4, 0),
    "int4 g128": ("weight_only_quant_matmul", {"bits": 4, "has_zero": False}, 4, 128),
    "int4 g96": ("weight_only_quant_matmul", {"bits": 4, "has_zero": True}, 4, 96),
}


@pytest.fixture
def threads() -> Iterator[None]:
    """Sets the pool back to torch's number of threads."""
    yield
    set_threads(torch.get_num_threads())


def set_threads(count: int) -> None:
    from tensorrt_llm.kernels.cpu.native import compiled

    compiled.set_threads(count)


class Matmul:
    """A random weight [n, k], prepared: a call multiplies."""

    def __init__(self, name: str, rows: int, columns: int, dtype: str = "float16") -> None:
        op, attributes, bits, group_size = WEIGHTS[name]
        self.kernel: Kernel = KERNELS[op]
        self.attributes = attributes | {"dtype": dtype}
        weight = torch.randn(rows, columns)
        if bits:
            quantized = quantize_weight(weight, bits, group_size)
            zero = torch.randint(-8, 9, quantized.scale.shape, dtype=torch.int16)
            operands = (quantized.weight, quantized.scale, *((zero,) if attributes["has_zero"] else ()))
        else:
            operands = (weight.to(getattr(torch, name)),)
        self.operands = (*operands, torch.randn(rows))
        assert self.kernel.prepare
        self.prepared = self.kernel.prepare(*self.operands, **self.attributes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel.run(x, *self.prepared, **self.attributes)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_row_does_not_depend_on_its_batch_nor_on_threads(name: str, x_dtype: torch.dtype, threads: None) -> None:
    matmul = Matmul(name, rows=237, columns=1920, dtype="float32")
    x = torch.randn(67, 1920).to(x_dtype)
    set_threads(1)
    alone = torch.cat([matmul(row[None]) for row in x])
    for count, tokens in ((1, 67), (2, 67), (3, 2), (2, 3), (2, 34), (3, 1)):
        set_threads(count)
        assert torch.equal(matmul(x[:tokens]), alone[:tokens]), (count, tokens)


@pytest.mark.parametrize("columns", [192, 1152, 2304])
@pytest.mark.parametrize("tokens", [1, 6])
def test_int4_of_float32_has_its_precision(tokens: int, columns: int) -> None:
    matmul = Matmul("int4 g96", rows=45, columns=columns, dtype="float32")
    x = torch.randn(tokens, columns)
    weight, scale, zero, bias = matmul.operands
    wanted = quantized_reference.weight_only_quant_matmul(
        x.double(), weight, scale.double(), zero, bias.double(), bits=4, has_zero=True, dtype="float32"
    )
    torch.testing.assert_close(matmul(x), wanted, rtol=0, atol=columns**0.5 * 16 * 2**-22)


def test_the_noise_of_int4_is_below_that_of_float16() -> None:
    """Two digits a segment, beside outliers a thousand times as large as the rest: the worst case.

    A step is amax / 32512, off by 1 / sqrt(12) of it in 128 columns: 1.0e-4 amax. Float16 rounds the outlier alone by
    1.4e-4 to 2.8e-4 of it.
    """
    matmul = Matmul("int4 g128", rows=64, columns=4096, dtype="float32")
    exact = torch.randn(64, 4096)
    exact[:, ::500] *= 1000
    x = exact.half()
    weight, scale, bias = matmul.operands

    def wanted(x: torch.Tensor) -> torch.Tensor:
        attributes = {"bits": 4, "has_zero": False, "dtype": "float32"}
        return quantized_reference.weight_only_quant_matmul(x.double(), weight, scale.double(), bias, **attributes)

    assert (matmul(x) - wanted(x)).square().mean() < (wanted(x) - wanted(exact)).square().mean()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_not_finite_stays_so_in_its_row(name: str, tokens: int, bad: float) -> None:
    matmul = Matmul(name, rows=40, columns=384, dtype="float32")
    x = torch.randn(tokens, 384)
    x[tokens // 2, 133] = bad
    is_finite = matmul(x).isfinite()
    expected = torch.ones(tokens, dtype=torch.bool)
    expected[tokens // 2] = False
    assert torch.equal(is_finite.any(1), expected) and torch.equal(is_finite.all(1), expected)


@pytest.mark.parametrize("name", WEIGHTS)
def test_zeros_give_the_bias(name: str) -> None:
    matmul = Matmul(name, rows=9, columns=384, dtype="float32")
    assert torch.equal(matmul(torch.zeros(3, 384)), matmul.operands[-1].expand(3, 9))


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_tokens_give_no_rows_and_gaps_in_x_are_no_matter(name: str) -> None:
    matmul = Matmul(name, rows=9, columns=384)
    assert matmul(torch.randn(0, 384)).shape == (0, 9)
    wide = torch.randn(4, 768)
    assert torch.equal(matmul(wide[:, ::2]), matmul(wide[:, ::2].clone()))


def test_what_the_kernels_cannot_take_is_refused() -> None:
    matmul = Matmul("float16", rows=9, columns=64)
    with pytest.raises(ValueError, match="x has 63 columns, but the weight has 64"):
        matmul(torch.randn(2, 63))
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(ValueError, match=f"not with {dtype}"):
            matmul(torch.ones(2, 64, dtype=dtype))


@pytest.mark.parametrize(
    ("op", "weights", "attributes"),
    [
        ("matmul", (torch.ones(4, 8, dtype=torch.int8),), {}),
        ("matmul", (torch.ones(4, 8), torch.ones(3)), {}),
        ("gated_mlp", (torch.ones(4, 8), torch.ones(3, 8)), {}),
        ("gated_mlp", (torch.ones(4, 8), torch.ones(4, 8).half()), {}),
        ("weight_only_quant_matmul", (torch.ones(4, 8), torch.ones(4, 1)), {"bits": 8, "has_zero": False}),
        (
            "weight_only_quant_matmul",
            (torch.ones(4, 8, dtype=torch.int8), torch.ones(3, 1)),
            {"bits": 8, "has_zero": False},
        ),
        (
            "weight_only_quant_matmul",
            (torch.ones(4, 8, dtype=torch.uint8), torch.ones(4, 2), torch.ones(4, 1, dtype=torch.int16)),
            {"bits": 4, "has_zero": True},
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(op: str, weights: tuple[torch.Tensor, ...], attributes: dict) -> None:
    prepare = KERNELS[op].prepare
    assert prepare
    with pytest.raises(ValueError):
        prepare(*weights, **attributes, dtype="float16")


def test_a_pool_of_other_heads_is_refused() -> None:
    steps = PagedSteps([(5, 1, 1)], Setting(), torch.float32)

    def with_more_heads(qkv: torch.Tensor, *rest: torch.Tensor, **attributes: Any) -> torch.Tensor:
        heads = {"num_heads": 2, "num_kv_heads": 1}
        return KERNELS["gpt_attention"].run(qkv, *rest, **attributes | heads)

    with pytest.raises(ValueError, match="qkv has|x has|KV pool is"):
        steps.run(with_more_heads)


def test_calls_of_several_threads_wait_for_each_other(threads: None) -> None:
    set_threads(2)
    matmuls = [Matmul(name, rows=500, columns=384) for name in WEIGHTS]
    inputs = [torch.randn(tokens, 384) for tokens in (1, 2, 40)]
    pairs = [(matmul, x) for matmul in matmuls for x in inputs] * 4
    wanted = [matmul(x) for matmul, x in pairs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: pair[0](pair[1]), pairs))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def _multiply_and_send(matmul: Matmul, x: torch.Tensor, pipe: Connection) -> None:
    pipe.send(matmul(x).tolist())


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_process_starts_threads_of_its_own(threads: None) -> None:
    set_threads(2)
    matmul, x = Matmul("int8", rows=999, columns=256), torch.randn(1, 256)
    wanted = matmul(x)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_multiply_and_send, args=(matmul, x, there))
    process.start()
    assert here.poll(60), "the forked process hangs"
    assert here.recv() == wanted.tolist()
    process.join(60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decodes_do_not_depend_on_threads(dtype: torch.dtype, threads: None) -> None:
    steps = PagedSteps([(n, 1, 1) for n in (1, 7, 16, 63, 200)], Setting(6, 3, 40, rotary_dim=32), dtype, 16)
    results = []
    for count in (1, 2, 3):
        set_threads(count)
        results.append(steps.run(KERNELS["gpt_attention"].run))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_decodes_read_and_write_an_int8_pool() -> None:
    """Keys and values may differ from the reference by one level, where a float lies between two."""
    lengths, heads, kv_heads, size, block_size = [5, 33, 16], 4, 2, 24, 16
    setting = {"num_heads": heads, "num_kv_heads": kv_heads, "head_size": size, "rotary_base": 10000.0}
    setting |= {"rotary_dim": size, "ntk_length": 0, "logn_length": 16}
    pool = torch.randint(-127, 128, (10, 2, kv_heads, block_size, size), dtype=torch.int8)
    scales = torch.rand(10, 2, kv_heads, block_size) / 127
    tables = (torch.randperm(9) + 1).int().view(3, 3)
    ints = [torch.tensor(values, dtype=torch.int32) for values in ([n - 1 for n in lengths], [0, 1, 2, 3], lengths)]
    arguments = (*ints, torch.ones(3, dtype=torch.int32), tables)
    step = StepShape(3, 3, 0, 0, 1, max(lengths))
    qkv = torch.randn(3, (heads + 2 * kv_heads) * size)
    pools = [(pool.clone(), scales.clone()) for _ in range(2)]
    found, wanted = (
        attention(qkv, own_pool, *arguments, own_scales, step=step, **setting)
        for attention, (own_pool, own_scales) in zip(
            (KERNELS["gpt_attention"].run, reference.gpt_attention), pools, strict=True
        )
    )
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    assert (pools[0][0].int() - pools[1][0].int()).abs().max() <= 1
    torch.testing.assert_close(pools[0][1], pools[1][1], rtol=1e-5, atol=0)
