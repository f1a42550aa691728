"""Reading checkpoints tensor by tensor, whole and damaged."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.hf_checkpoint import HfCheckpoint
from checkpoints import Storage, write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

TENSORS = {
    "matrix": torch.arange(42, dtype=torch.float32).reshape(6, 7),
    "half": torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(torch.float16),
    "brain": torch.randn(3, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
}


@pytest.fixture(params=[("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)], ids=lambda p: f"{p[0]}-{p[1]}")
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    storage, shards = request.param
    write_tensors(tmp_path, TENSORS, storage, shards)
    return tmp_path


def test_names_shapes_and_dtypes_are_known_at_once(written: Path) -> None:
    found = {name: (info.shape, info.dtype) for name, info in HfCheckpoint(written).tensors().items()}
    assert found == {
        "matrix": ((6, 7), "float32"),
        "half": ((5, 4), "float16"),
        "brain": ((3,), "bfloat16"),
        "scalar": ((), "float32"),
    }


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_bit_for_bit(written: Path, name: str) -> None:
    read = HfCheckpoint(written).read(name)
    assert read.dtype == TENSORS[name].dtype and torch.equal(read, TENSORS[name])


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 5), (5, 6), (3, 3)])
def test_rows_are_read(written: Path, start: int, stop: int) -> None:
    assert torch.equal(HfCheckpoint(written).read_rows("matrix", start, stop), TENSORS["matrix"][start:stop])


def test_rows_of_a_vector_are_read(written: Path) -> None:
    assert torch.equal(HfCheckpoint(written).read_rows("brain", 1, 3), TENSORS["brain"][1:3])


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (2, 5), (6, 7)])
def test_columns_are_read_contiguous(written: Path, start: int, stop: int) -> None:
    columns = HfCheckpoint(written).read_columns("matrix", start, stop)
    assert columns.is_contiguous() and torch.equal(columns, TENSORS["matrix"][:, start:stop])


def test_a_dropped_tensor_leaves_no_mapping_behind(written: Path) -> None:
    checkpoint = HfCheckpoint(written)
    total = sum(int(checkpoint.read_rows(name, 0, 2).numel()) for name in ("matrix", "half", "brain"))
    assert total and str(written) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("storage", ["safetensors", "bin"])
def test_integers_are_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype, storage: Storage) -> None:
    words = (torch.arange(42) * 2_654_435_761).to(dtype).reshape(6, 7)
    write_tensors(tmp_path, {"words": words}, storage, 1)
    checkpoint = HfCheckpoint(tmp_path)
    assert torch.equal(checkpoint.read("words"), words)
    assert torch.equal(checkpoint.read_rows("words", 2, 5), words[2:5])
    assert torch.equal(checkpoint.read_columns("words", 1, 6), words[:, 1:6])


def test_other_dtypes_are_listed_but_not_read(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"flags": torch.ones(4, dtype=torch.bool)}, "safetensors", 1)
    checkpoint = HfCheckpoint(tmp_path)
    assert checkpoint.tensors()["flags"].dtype == "bool"
    with pytest.raises(ValueError, match="model.safetensors: flags is bool, expected float32, float16, bfloat16, int8"):
        checkpoint.read("flags")


def test_one_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    write_tensors(tmp_path, TENSORS, "safetensors", 1)
    file = (tmp_path / "model.safetensors").rename(tmp_path / "any.safetensors")
    checkpoint = HfCheckpoint(file)
    assert checkpoint.directory == tmp_path and torch.equal(checkpoint.read("matrix"), TENSORS["matrix"])


@pytest.mark.parametrize("shards", [1, 3])
def test_a_name_given_for_the_shards_comes_first(tmp_path: Path, shards: int) -> None:
    write_tensors(tmp_path, {"old": torch.zeros(1)}, "safetensors", 1)
    (tmp_path / "new").mkdir()
    write_tensors(tmp_path / "new", TENSORS, "safetensors", shards)
    for file in (tmp_path / "new").iterdir():
        content = file.read_bytes()
        if file.suffix == ".json":
            content = content.replace(b"model-", b"mine-")
        (tmp_path / file.name.replace("model", "mine")).write_bytes(content)
    assert set(HfCheckpoint(tmp_path, ("mine",)).tensors()) == set(TENSORS)


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"old": torch.zeros(1)}, "bin", 1)
    write_tensors(tmp_path, {"new": torch.zeros(1)}, "safetensors", 1)
    assert set(HfCheckpoint(tmp_path).tensors()) == {"new"}


# ---- damaged folders: one ValueError that names the file ----


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        HfCheckpoint(tmp_path / "nowhere")


def test_shards_without_an_index_are_listed(tmp_path: Path) -> None:
    write_tensors(tmp_path, TENSORS, "safetensors", 2)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="no weights found, expected .*index.json.*model-00001-of-00002.safetensors"):
        HfCheckpoint(tmp_path)


@pytest.mark.parametrize("storage", ["safetensors", "bin"])
def test_a_missing_shard_is_named(tmp_path: Path, storage: Storage) -> None:
    write_tensors(tmp_path, TENSORS, storage, 2)
    next(tmp_path.glob(f"*-00002-of-00002.{storage}")).unlink()
    with pytest.raises(ValueError, match=f"00002-of-00002.{storage}: cannot be read .No such file"):
        HfCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "index.json: not valid JSON"),
        (b"[" * 50_000, "index.json: not valid JSON"),
        (b"[]", "index.json: weight_map is missing"),
        (b"{}", "index.json: weight_map is missing"),
        (b'{"weight_map": {"matrix": 3}}', "index.json: matrix is in 3, expected the name of a .safetensors file"),
        (b'{"weight_map": {"matrix": "../x.safetensors"}}', "index.json: matrix is in '../x.safetensors', expected"),
        (b'{"weight_map": {"matrix": "x.bin"}}', "index.json: matrix is in 'x.bin', expected"),
        (
            b'{"weight_map": {"ghost": "model-00001-of-00002.safetensors"}}',
            "00001-of-00002.safetensors: has no tensor ghost",
        ),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index: bytes, message: str) -> None:
    write_tensors(tmp_path, TENSORS, "safetensors", 2)
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(ValueError, match=message):
        HfCheckpoint(tmp_path)


def test_a_truncated_safetensors_file_says_how_much_is_there(tmp_path: Path) -> None:
    content = save({"matrix": TENSORS["matrix"]})
    (tmp_path / "model.safetensors").write_bytes(content[:-50])
    with pytest.raises(ValueError, match="model.safetensors: 118 bytes of data, expected 168 .*: truncated"):
        HfCheckpoint(tmp_path)


def test_a_file_longer_than_its_header_says_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(save({"matrix": TENSORS["matrix"]}) + bytes(3))
    with pytest.raises(ValueError, match="model.safetensors: 171 bytes of data, expected 168"):
        HfCheckpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 40])
def test_a_header_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(save(TENSORS)[:size])
    with pytest.raises(ValueError, match=f"model.safetensors: {size} bytes, expected 8 and a header of"):
        HfCheckpoint(tmp_path)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": entry(shape=[2, 3])}, r"x has 16 bytes, expected 24 for float32 \[2, 3\]"),
        ({"x": entry(data_offsets=[0, 32])}, r"x has 32 bytes, expected 16"),
        ({"x": entry(data_offsets=[16, 0])}, r"x has -16 bytes, expected 16"),
        ({"x": entry(shape=[-2, -2])}, "the header's entry of x is damaged"),
        ({"x": entry(shape=[2**62] * 100)}, "the header's entry of x is damaged"),
        ({"x": entry(shape="22")}, "the header's entry of x is damaged"),
        ({"x": entry(dtype=None)}, "the header's entry of x is damaged"),
        ({"x": []}, "the header's entry of x is damaged"),
        ({"x": entry(), "y": entry()}, "y starts at byte 0 of the data, expected 16"),
        ({"x": entry(data_offsets=[4, 20])}, "x starts at byte 4 of the data, expected 0"),
        ([], "the header is a list, expected an object"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ValueError, match=f"model.safetensors: {message}"):
        HfCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_recognized(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ValueError, match=f"{name}: is a git-lfs pointer.*git lfs pull"):
        HfCheckpoint(tmp_path)


class Payload:
    """What a hostile pickle looks like: loading it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    target = tmp_path / "made-by-the-pickle"
    content = {"weight": Payload(target)}
    if zipped:
        torch.save(content, tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="pytorch_model.bin: .* without pickled code"):
        HfCheckpoint(tmp_path)
    assert not target.exists()


def test_a_truncated_bin_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path, TENSORS, "bin", 1)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="pytorch_model.bin: [0-9]+ bytes .*expected a whole zip file"):
        HfCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], {"epoch": 3}, {"x": torch.eye(2).to_sparse()}, {1: torch.zeros(2)}]
)
def test_a_bin_that_is_no_dict_of_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: .*expected a (dict of tensors|name and a dense tensor)"):
        HfCheckpoint(tmp_path)


# ---- adversarial files: a readable checkpoint or a ValueError, nothing else ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


def assert_readable_or_value_error(folder: Path) -> None:
    try:
        checkpoint = HfCheckpoint(folder)
        for name, info in checkpoint.tensors().items():
            assert checkpoint.read(name).shape == info.shape
    except ValueError as error:
        assert str(folder) in str(error)


MUTATIONS = {"position": st.integers(0, 400), "cut": st.integers(0, 12), "inserted": st.binary(max_size=12)}


@settings(max_examples=2000, deadline=None)
@given(**MUTATIONS)
def test_any_mutated_safetensors_file_is_readable_or_a_value_error(
    folder: Path, position: int, cut: int, inserted: bytes
) -> None:
    content = save(TENSORS)
    (folder / "model.safetensors").write_bytes(content[:position] + inserted + content[position + cut :])
    assert_readable_or_value_error(folder)


@settings(max_examples=500, deadline=None)
@given(position=st.integers(0, 1500), cut=st.integers(0, 12), inserted=st.binary(max_size=12))
def test_any_mutated_bin_is_readable_or_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, cut: int, inserted: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "bin"
    folder.mkdir(exist_ok=True)
    write_tensors(folder, {"matrix": TENSORS["matrix"]}, "bin", 1)
    file = folder / "pytorch_model.bin"
    content = file.read_bytes()
    file.write_bytes(content[:position] + inserted + content[position + cut :])
    assert_readable_or_value_error(folder)
