"""The digest of a weight: the formula, at sizes around the piece; damage anywhere is found, and waiting is helping."""

import hashlib
import os
import threading
from pathlib import Path

import pytest
from models_for_tests import make_config, make_engine

from tensorrt_llm import Engine, weight_digests
from tensorrt_llm.engine_file import EngineFile
from tensorrt_llm.weight_digests import PIECE_BYTES, DigestCheck, piece_digest, pieces_of, weight_digest

PIECE = 64


@pytest.fixture(params=[1, 2, 5])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    count: int = request.param
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))
    return count


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_digests, "PIECE_BYTES", PIECE)


@pytest.fixture
def path(tmp_path: Path, small_pieces: None) -> Path:
    """An engine whose weights have up to 90 pieces."""
    make_engine(make_config(num_hidden_layers=2)).save(tmp_path / "test.engine")
    return tmp_path / "test.engine"


def digest_by_the_book(data: bytes, piece_bytes: int) -> str:
    """As the format's description has it, without the code that is tested."""
    digests = b""
    while data:
        digests += hashlib.sha256(data[:piece_bytes]).digest()
        data = data[piece_bytes:]
    return hashlib.sha256(digests).hexdigest()


class Bytes:
    """Weights in memory, for a check."""

    def __init__(self, weights: dict[str, bytes]) -> None:
        self.weights = weights
        self.sizes = {name: len(data) for name, data in weights.items()}

    def read(self, name: str, begin: int, into: memoryview) -> None:
        into[:] = self.weights[name][begin : begin + len(into)]


def digest_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "weight digest"]


# The formula


def test_the_piece_of_the_format_is_16_mib() -> None:
    assert PIECE_BYTES == 16 * 1024 * 1024


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 7 * PIECE + 5])
def test_the_digest_is_that_of_the_digests_of_pieces(size: int, small_pieces: None, cores: int) -> None:
    data = os.urandom(size)
    weights = Bytes({"before": b"x" * PIECE, "weight": data})
    expected = digest_by_the_book(data, PIECE)
    assert weight_digest(map(piece_digest, pieces_of(memoryview(data)))) == expected
    assert DigestCheck(weights.read, weights.sizes).finish()["weight"] == expected


@pytest.mark.parametrize("size", [PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1])
def test_it_is_so_at_the_size_of_the_format(size: int) -> None:
    weights = Bytes({"weight": bytes(size)})
    digests = DigestCheck(weights.read, weights.sizes).finish()
    assert digests == {"weight": digest_by_the_book(weights.weights["weight"], 16 << 20)}


def test_weights_without_bytes_and_no_weights_have_digests_too(cores: int) -> None:
    weights = Bytes({"empty": b""})
    assert DigestCheck(weights.read, weights.sizes).finish() == {"empty": hashlib.sha256(b"").hexdigest()}
    assert DigestCheck(weights.read, {}).finish() == {}


def test_a_saved_engine_holds_the_digests_of_the_formula(path: Path, cores: int) -> None:
    engine = Engine.load(path)
    assert engine.file
    stated = engine.file.metadata_object("weights_sha256")
    for name, weight in engine.weights.items():
        assert stated[name] == digest_by_the_book(weight.numpy().tobytes(), PIECE)


# The check


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, 2 * PIECE, -PIECE - 1, -1])
def test_one_bit_in_any_piece_is_found(path: Path, place: int, cores: int) -> None:
    """In the first, the second and the last one of the largest weight, and the weight is named."""
    file = EngineFile(path)
    name = max(file.tensors, key=lambda name: file.place(name)[1])
    begin, num_bytes = file.place(name)
    assert num_bytes > 3 * PIECE
    raw = bytearray(path.read_bytes())
    raw[begin + place % num_bytes] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"^{path}: weight {name} has SHA-256 .*, expected .*altered or damaged$"):
        Engine.load(path)


def test_pieces_that_changed_places_are_found(path: Path) -> None:
    file = EngineFile(path)
    name = max(file.tensors, key=lambda name: file.place(name)[1])
    begin, _ = file.place(name)
    raw = bytearray(path.read_bytes())
    first, second = raw[begin : begin + PIECE], raw[begin + PIECE : begin + 2 * PIECE]
    assert first != second
    raw[begin : begin + 2 * PIECE] = second + first
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"weight {name} has SHA-256"):
        Engine.load(path)


def test_a_failed_check_is_made_anew(path: Path, cores: int) -> None:
    sound = path.read_bytes()
    file = EngineFile(path)
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(ValueError, match="altered or damaged"):
            file.check()
    path.write_bytes(sound)
    file.check()


def test_a_file_that_is_cut_while_it_is_checked_is_named(path: Path, cores: int) -> None:
    file = EngineFile(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"^{path}: ends at byte \d+, within weight .*: the file was truncated$"):
        file.check()
    assert not digest_threads()


def test_a_thread_that_fails_ends_the_others(small_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    read: list[int] = []

    def fail(name: str, begin: int, into: memoryview) -> None:
        read.append(begin)
        raise MemoryError

    with pytest.raises(MemoryError):
        DigestCheck(fail, {"weight": 1000 * PIECE}).finish()
    assert len(read) <= 4 and not digest_threads()


def test_the_check_goes_on_by_itself_and_leaves_one_core(small_pieces: None, cores: int) -> None:
    weights = Bytes({"weight": bytes(20 * PIECE)})
    may_read = threading.Event()

    def read(name: str, begin: int, into: memoryview) -> None:
        may_read.wait()
        weights.read(name, begin, into)

    check = DigestCheck(read, weights.sizes)
    threads = digest_threads()
    assert len(threads) == cores - 1 and all(thread.daemon for thread in threads)
    may_read.set()
    for thread in threads:
        thread.join()
    assert len(check._digests) == (20 if threads else 0)
    assert check.finish() == {"weight": digest_by_the_book(bytes(20 * PIECE), PIECE)}


# The file, before there is an engine


def test_a_check_that_was_begun_is_the_one_that_is_finished(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is begun, and by whom; and what was checked is not checked again."""
    made: list[DigestCheck] = []
    make = DigestCheck.__init__

    def count(check: DigestCheck, *arguments: object) -> None:
        made.append(check)
        make(check, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DigestCheck, "__init__", count)
    file = EngineFile(path)
    file.begin_check()
    file.begin_check()
    Engine.of_file(file)
    file.begin_check()
    file.check()
    assert len(made) == 1


def test_opening_a_file_starts_no_thread(path: Path) -> None:
    engine = Engine.load(path, check_weights=False)
    assert engine.file and not digest_threads()


@pytest.mark.parametrize(
    ("surplus", "message"), [(-1, "lm_head.weight is .* within the file"), (1, "tensors do not fill it")]
)
def test_a_check_is_not_begun_on_a_file_of_another_size(path: Path, surplus: int, message: str) -> None:
    os.truncate(path, path.stat().st_size + surplus)
    file = EngineFile(path)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        file.begin_check()
    assert not digest_threads()


@pytest.mark.parametrize("offsets", [None, [], [0], [0, "1"], [-1, 4], [4, 0], [0, 2**60], [0, 1.5], {"0": 1}])
def test_offsets_that_lead_nowhere_are_refused(path: Path, offsets: object) -> None:
    file = EngineFile(path)
    file.tensors["ln_f.weight"]["data_offsets"] = offsets
    with pytest.raises(ValueError, match=f"^{path}: tensor ln_f.weight is .*expected data_offsets within the file"):
        file.begin_check()
