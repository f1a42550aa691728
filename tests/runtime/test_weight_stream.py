"""Weights from an engine file to a device, read ahead: all of them, in order, within bounds; and what goes wrong.

The CPU takes the place of the device: the threads, the order and the bounds are the same there.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from models_for_tests import make_config, make_engine, on_cpu, random_prompts

from tensorrt_llm import Engine
from tensorrt_llm.kernels import kernels_for, reference_kernels
from tensorrt_llm.runtime import GenerationSession, SamplingConfig, Session, executor
from tensorrt_llm.runtime.executor import Executor
from tensorrt_llm.runtime.walk import walk
from tensorrt_llm.runtime.weight_stream import ReadAhead, WeightStream, read_ahead
from tensorrt_llm.weight_digests import DigestCheck
from tensorrt_llm.weight_file import WeightFile

CPU = torch.device("cpu")
SMALL = ReadAhead(num_readers=3, buffer_bytes=48, device_bytes=1000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    engine = make_engine(make_config(num_hidden_layers=3))
    engine.save(tmp_path / "test.engine")
    return tmp_path / "test.engine"


@pytest.fixture
def file(path: Path) -> WeightFile:
    return open_unchecked(path)


def open_unchecked(path: Path) -> WeightFile:
    weights = Engine.load(path, check_weights=False).weights
    assert isinstance(weights, WeightFile)
    return weights


def flip_last_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def streamed_to_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Executors read through a WeightStream, as for a GPU; gives the names taken."""
    taken: list[str] = []

    @contextmanager
    def read(weights: WeightFile, order: list[str], device: torch.device) -> Iterator[Callable[[str], torch.Tensor]]:
        stream = WeightStream(weights, order, device, SMALL)

        def take(name: str) -> torch.Tensor:
            taken.append(name)
            return stream.take(name)

        with stream.open():
            yield take

    monkeypatch.setattr(executor, "read_ahead", read)
    return taken


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "weight reader"]


def settle(stream: WeightStream) -> int:
    """Bytes ahead once the readers wait for room."""
    previous = -1
    while stream.bytes_ahead != previous:
        previous = stream.bytes_ahead
        time.sleep(0.02)
    return previous


@pytest.mark.parametrize("buffer_bytes", [1, 48, 1 << 20])
@pytest.mark.parametrize("num_readers", [1, 5])
def test_every_weight_arrives_as_it_is_in_the_file(file: WeightFile, num_readers: int, buffer_bytes: int) -> None:
    stream = WeightStream(file, list(file), CPU, ReadAhead(num_readers, buffer_bytes, device_bytes=500))
    with stream.open():
        for name in file:
            weight = stream.take(name)
            assert weight.dtype == file[name].dtype and torch.equal(weight, file[name])
    assert stream.bytes_ahead == 0 and not reader_threads()


def test_weights_come_in_any_order_that_is_asked_for(file: WeightFile) -> None:
    order = list(file)[::-1][:7]
    stream = WeightStream(file, order, CPU, SMALL)
    with stream.open():
        assert all(torch.equal(stream.take(name), file[name]) for name in order)


def test_reading_ahead_is_bounded(file: WeightFile) -> None:
    """However long the weights are not taken, and a weight that is too large has the room for itself."""
    sizes = {name: spec.num_bytes for name, spec in file.specs.items()}
    limit = sorted(sizes.values())[-4]
    stream = WeightStream(file, list(file), CPU, ReadAhead(4, 48, device_bytes=limit))
    most = 0
    with stream.open():
        for name in file:
            ahead = settle(stream)
            most = max(most, ahead)
            assert ahead <= max(limit, sizes[name])
            stream.take(name)
    assert most > limit


def test_a_weight_is_not_held_after_it_was_taken(file: WeightFile) -> None:
    stream = WeightStream(file, list(file), CPU, SMALL)
    with stream.open():
        taken = [weakref.ref(stream.take(name).untyped_storage()) for name in list(file)[:4]]
        assert not set(list(file)[:4]) & set(stream._arriving)
        assert not any(storage() for storage in taken)


def test_leaving_early_ends_the_readers(file: WeightFile) -> None:
    stream = WeightStream(file, list(file), CPU, SMALL)
    with pytest.raises(KeyboardInterrupt), stream.open():
        stream.take(next(iter(file)))
        raise KeyboardInterrupt
    assert not reader_threads()


def test_a_file_that_was_cut_after_it_was_opened_is_named(path: Path, file: WeightFile) -> None:
    os.truncate(path, path.stat().st_size - 1)
    last = list(file)[-1]
    stream = WeightStream(file, list(file), CPU, ReadAhead(2, 48, device_bytes=1 << 20))
    with pytest.raises(ValueError, match=rf"{path}: ends at byte \d+, within weight {last}: "), stream.open():
        for name in file:
            stream.take(name)
    with pytest.raises(ValueError, match=f"{path}: ends at byte"):
        file.file.check()


def test_a_file_that_cannot_be_read_is_named(path: Path, file: WeightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    stream = WeightStream(file, list(file), CPU)
    with pytest.raises(ValueError, match=rf"{path}: cannot be read at byte \d+: Input/output error"), stream.open():
        stream.take(next(iter(file)))


def test_a_device_without_memory_says_so_itself(file: WeightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts have a message of their own for it."""

    def fail(*arguments: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    stream = WeightStream(file, list(file), CPU)
    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(torch.OutOfMemoryError), stream.open():
        stream.take(next(iter(file)))


def test_a_read_that_gives_few_bytes_is_continued(file: WeightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, place: preadv(fd, [buffers[0][:5]], place))
    stream = WeightStream(file, list(file), CPU, SMALL)
    with stream.open():
        assert all(torch.equal(stream.take(name), file[name]) for name in file)


@pytest.mark.parametrize("tied", [False, True])
def test_an_executor_takes_weights_in_the_order_of_the_plan(
    tmp_path: Path, streamed_to_cpu: list[str], tied: bool
) -> None:
    make_engine(make_config(num_hidden_layers=2, tie_word_embeddings=tied)).save(tmp_path / "test.engine")
    engine = Engine.load(tmp_path / "test.engine")
    Executor(engine.plan, engine.weights, reference_kernels(), CPU)
    names = set(engine.weights)
    assert streamed_to_cpu == list(dict.fromkeys(n for node in engine.plan.nodes for n in node.inputs if n in names))
    assert set(streamed_to_cpu) == names


@pytest.mark.parametrize("options", [{}, {"reference": True}])
def test_a_session_of_streamed_weights_gives_the_same(
    path: Path, streamed_to_cpu: list[str], monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    config = SamplingConfig(max_new_tokens=5, return_dict=True, gather_context_logits=True)
    streamed = on_cpu(Engine.load(path), **options).decode_batch(random_prompts([3, 20], 11), config)
    assert streamed_to_cpu
    monkeypatch.undo()
    mapped = on_cpu(Engine.load(path), **options).decode_batch(random_prompts([3, 20], 11), config)
    assert all(map(torch.equal, streamed["context_logits"], mapped["context_logits"]))


def test_a_node_that_refuses_its_weights_ends_the_readers(path: Path, streamed_to_cpu: list[str]) -> None:
    engine = Engine.load(path)
    kernels = kernels_for(CPU)
    with pytest.raises(ValueError, match="no kernel for"):
        Executor(engine.plan, engine.weights, {"embedding": kernels["embedding"]}, CPU)
    assert not reader_threads()


def test_the_cpu_is_given_the_mapping(path: Path, file: WeightFile) -> None:
    """Not a copy, and no thread."""
    name = next(iter(file))
    with read_ahead(file, list(file), CPU) as read:
        assert read(name).data_ptr() == file[name].data_ptr() and not reader_threads()


# Digests


def test_an_engine_may_be_opened_before_its_weights_are_checked(path: Path) -> None:
    flip_last_bit(path)
    Engine.load(path, check_weights=False)


@pytest.mark.parametrize("use", [on_cpu, lambda engine: next(walk(engine, [[1, 2]], CPU))])
def test_what_uses_an_unchecked_engine_finds_the_damage(path: Path, use: Callable[[Engine], object]) -> None:
    flip_last_bit(path)
    last = list(open_unchecked(path))[-1]
    with pytest.raises(ValueError, match=f"^{path}: weight {last} has SHA-256 .*altered or damaged"):
        use(Engine.load(path, check_weights=False))


def test_damage_is_the_error_also_where_something_failed_over_it(path: Path) -> None:
    flip_last_bit(path)
    with pytest.raises(ValueError, match="altered or damaged") as caught, open_unchecked(path).file.checking():
        raise ValueError("weights do not fit")
    assert "weights do not fit" in str(caught.value.__context__)


def test_a_failure_over_a_sound_file_stays_what_it_is(file: WeightFile) -> None:
    with pytest.raises(ValueError, match="^weights do not fit$"), file.file.checking():
        raise ValueError("weights do not fit")


def test_an_interrupt_does_not_wait_for_digests(file: WeightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DigestCheck, "finish", lambda check: pytest.fail("waited"))
    with pytest.raises(KeyboardInterrupt), file.file.checking():
        raise KeyboardInterrupt


def test_weights_are_checked_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tensorrt_llm.weight_digests")
    engine = Engine.load(path)
    on_cpu(engine)
    on_cpu(engine)
    assert caplog.text.count("every weight has a SHA-256") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gpu_has_the_weights_of_the_file(tmp_path: Path, dtype: str) -> None:
    """Larger than the buffers together, with a limit that makes readers wait, on the stream that uses them."""
    device = torch.device("cuda", torch.cuda.current_device())
    shapes = {"hidden_size": 512, "head_size": 256, "mlp_hidden_size": 1024, "vocab_size": 3001}
    make_engine(make_config(num_hidden_layers=4, **shapes), dtype=dtype).save(tmp_path / "test.engine")
    file = open_unchecked(tmp_path / "test.engine")
    stream = WeightStream(file, list(file), device, ReadAhead(4, 1 << 16, device_bytes=1 << 21))
    with stream.open():
        doubled = [stream.take(name) * 2 for name in file]
    assert all(torch.equal(found.cpu(), file[name] * 2) for found, name in zip(doubled, file, strict=True))


@pytest.mark.gpu
def test_a_gpu_session_keeps_kernels_beside_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    import triton

    if triton.knobs.runtime.interpret:
        pytest.skip("nothing is compiled")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with triton.knobs.cache.scope():
        session = GenerationSession(Session(Engine.load(path), "cuda", kv_cache_tokens=256))
        session.decode_batch([[1, 2, 3]], SamplingConfig(max_new_tokens=2))
    assert any((tmp_path / "kernel_cache").rglob("*.cubin"))
