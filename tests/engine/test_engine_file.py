"""Engine files: written whole or not at all, read back bit for bit, refused when anything is not as written."""

import json
import os
import re
import shutil
import struct
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling.compile_model import compile_model
from engine_files import EngineParts, rewrite
from models_for_tests import LIMITS, make_config, make_engine, on_cpu, random_prompts
from safetensors import safe_open
from safetensors.torch import save_file

from tensorrt_llm import Builder, Engine, Limits, Mapping
from tensorrt_llm.models import QWenForCausalLM
from tensorrt_llm.runtime import SamplingConfig

PRECISIONS = ("float32", "float16", "bfloat16")


def write_folder(folder: Path, dtype: str = "float32") -> Path:
    """An engine folder as build.py leaves it; the path of the engine file."""
    engine = make_engine(dtype=dtype)
    path = folder / engine.config.engine_name
    engine.save(path)
    Builder.save_config(engine.config, folder / "config.json")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


def refusal(path: Path) -> str:
    """What loading says, which must begin with the file's name and take one line."""
    with pytest.raises(ValueError) as caught:
        Engine.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 4000
    return message


# What is written


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_an_engine_comes_back_as_it_was(tmp_path: Path, dtype: str) -> None:
    engine = make_engine(dtype=dtype)
    engine.save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine")
    assert (loaded.config, loaded.plan) == (engine.config, engine.plan)
    assert list(loaded.weights) == list(engine.weights)
    for name, weight in engine.weights.items():
        assert loaded.weights[name].dtype == weight.dtype and torch.equal(loaded.weights[name], weight)


def test_marks_come_back_in_the_order_of_the_network(tmp_path: Path) -> None:
    """Of eleven layers, whose names have another order as text."""
    engine = make_engine(make_config(num_hidden_layers=11))
    engine.save(tmp_path / "engine")
    assert list(Engine.load(tmp_path / "engine").plan.marks) == list(engine.plan.marks)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_loaded_engine_gives_the_logits_of_the_one_in_memory(tmp_path: Path, dtype: str) -> None:
    engine = make_engine(dtype=dtype)
    engine.save(tmp_path / "engine")
    config = SamplingConfig(max_new_tokens=5, return_dict=True, gather_context_logits=True)
    first, second = (
        on_cpu(candidate).decode_batch(random_prompts([3, 20], 11), config)
        for candidate in (engine, Engine.load(tmp_path / "engine"))
    )
    assert torch.equal(first["output_ids"], second["output_ids"])
    assert all(map(torch.equal, first["context_logits"], second["context_logits"]))


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_an_engine_is_a_safetensors_file(tmp_path: Path, dtype: str) -> None:
    path = write_folder(tmp_path, dtype)
    engine = Engine.load(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "tensorrt_llm.engine"
        assert set(file.keys()) == set(engine.weights)
        assert all(torch.equal(file.get_tensor(name), weight) for name, weight in engine.weights.items())


def test_weights_begin_at_an_aligned_offset(path: Path) -> None:
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + length) % 256 == 0


def test_equal_builds_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (tmp_path / name for name in "ab")
    for path in (first, second):
        make_engine().save(path)
    assert first.read_bytes() == second.read_bytes()


def test_a_tied_weight_lies_in_the_file_once(tmp_path: Path) -> None:
    engine = make_engine(make_config(tie_word_embeddings=True))
    engine.save(tmp_path / "engine")
    assert "lm_head.weight" not in Engine.load(tmp_path / "engine").weights


def test_weights_are_read_one_at_a_time(tmp_path: Path) -> None:
    """When a weight is asked for, those before it are gone: the host never holds two."""
    model = QWenForCausalLM(make_config(), "float32")
    read: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def load(shape: tuple[int, ...]) -> torch.Tensor:
        alive.append(sum(reference() is not None for reference in read))
        tensor = torch.ones(shape)
        read.append(weakref.ref(tensor))
        return tensor

    for _, parameter in model.named_parameters():
        parameter.set_loader(partial(load, parameter.shape))
    compile_model(model, LIMITS).save(tmp_path / "engine")
    assert alive == [0] * len(read)


def test_each_weight_is_announced_once_in_order(tmp_path: Path) -> None:
    engine = make_engine()
    announced: list[str] = []
    engine.save(tmp_path / "engine", announced.append)
    assert announced == list(engine.weights)


def test_config_json_describes_the_engine(tmp_path: Path, path: Path) -> None:
    sections = json.loads((tmp_path / "config.json").read_text())
    assert set(sections) == {"builder_config", "plugin_config"}
    assert sections["builder_config"]["precision"] == "float32"
    assert sections["builder_config"]["max_input_len"] == Engine.load(path).config.limits.max_input_len


def test_an_engine_is_found_by_its_folder(tmp_path: Path, path: Path) -> None:
    assert Engine.from_dir(tmp_path).config == Engine.load(path).config


def test_an_engine_of_several_ranks_is_found_by_rank_and_not_run(tmp_path: Path) -> None:
    engines = []
    for rank in range(2):
        model = QWenForCausalLM(make_config(), "float32", Mapping(2, rank, tp_size=2))
        for _, parameter in model.named_parameters():
            parameter.value = torch.full(parameter.shape, float(rank))
        engines.append(compile_model(model, LIMITS))
        engines[-1].save(tmp_path / engines[-1].config.engine_name)
    Builder.save_config(engines[0].config, tmp_path / "config.json")
    assert [Engine.from_dir(tmp_path, rank).config.rank for rank in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="build with --world_size 1"):
        on_cpu(Engine.from_dir(tmp_path, 1))


# Written whole or not at all


def failing_engine(failure: BaseException) -> Engine:
    """An engine whose weight in the middle cannot be read."""
    model = QWenForCausalLM(make_config(), "float32")
    for name, parameter in model.named_parameters():
        parameter.value = torch.zeros(parameter.shape)
        if name == "layers.0.mlp.fc.weight":

            def fail() -> torch.Tensor:
                raise failure

            parameter.set_loader(fail)
    return compile_model(model, LIMITS)


@pytest.mark.parametrize("failure", [ValueError("shard is damaged"), KeyboardInterrupt(), OSError(5, "I/O error")])
def test_a_weight_that_fails_leaves_nothing_behind(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises((ValueError, KeyboardInterrupt)):
        failing_engine(failure).save(tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_engine_before_it_as_it_was(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match="shard is damaged"):
        failing_engine(ValueError("shard is damaged")).save(path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 2


def test_a_parameter_without_data_is_named(tmp_path: Path) -> None:
    engine = compile_model(QWenForCausalLM(make_config(), "float32"), LIMITS)
    with pytest.raises(ValueError, match="parameter vocab_embedding.weight has no data"):
        engine.save(tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="the engine takes .* the disk has 0.00 GiB free"):
        make_engine().save(tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match="cannot write the engine: No space left on device"):
        make_engine().save(tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot write the engine: No such file or directory"):
        make_engine().save(tmp_path / "missing" / "engine")


# What is refused


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1, -100])
def test_a_truncated_file_is_refused(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    refusal(path)


def test_surplus_bytes_are_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    assert "truncated or of another engine" in refusal(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such engine file" in refusal(tmp_path / "absent.engine")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    assert "no such engine file" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_flipped_bit_in_the_header_is_found(path: Path, share: float) -> None:
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    raw[8 + int(share * (length - 1))] ^= 1
    path.write_bytes(raw)
    refusal(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_flipped_bit_in_the_weights_names_the_weight(path: Path, share: float) -> None:
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    raw[8 + length + int(share * (len(raw) - 9 - length))] ^= 1
    path.write_bytes(raw)
    assert "the file was altered or damaged" in refusal(path)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**63, 2**64 - 1])
def test_a_lying_header_length_is_refused(path: Path, length: int) -> None:
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert f"header length is {length}" in refusal(path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "not an engine of this project" in refusal(tmp_path / "model.safetensors")


def entry(parts: EngineParts, name: str = "ln_f.weight") -> dict[str, Any]:
    return parts.entries[name]


Change = Callable[[EngineParts], object]
LIES: dict[str, tuple[Change, str]] = {
    "another version": (lambda parts: parts.metadata.update(format_version="0"), "format_version is '0'.*rebuild"),
    "the version before": (
        lambda parts: parts.metadata.update(format_version="3"),
        "format_version is '3', this version reads '4'; rebuild the engine",
    ),
    "another format": (lambda parts: parts.metadata.update(format="onnx"), "format is 'onnx'"),
    "no digest": (lambda parts: parts.metadata.pop("header_sha256"), "header_sha256 is None"),
    "a wider shape": (lambda parts: entry(parts).update(shape=[2**40]), "tensor ln_f.weight is"),
    "offsets of another tensor": (
        lambda parts: entry(parts).update(data_offsets=[0, 32]),
        "tensor ln_f.weight is",
    ),
    "offsets beyond the file": (
        lambda parts: entry(parts).update(data_offsets=[2**60, 2**60 + 32]),
        "tensor ln_f.weight is",
    ),
    "negative offsets": (lambda parts: entry(parts).update(data_offsets=[-32, 0]), "tensor ln_f.weight is"),
    "another dtype": (lambda parts: entry(parts).update(dtype="F64"), "tensor ln_f.weight is"),
    "no entry": (lambda parts: parts.entries.pop("ln_f.weight"), "tensor ln_f.weight is None"),
    "a surplus tensor": (
        lambda parts: parts.entries.update(extra={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
        "tensors that the plan does not name: extra",
    ),
    "more data": (lambda parts: setattr(parts, "data", parts.data + bytes(4)), "truncated or of another engine"),
    "a shape in header and plan": (
        lambda parts: (
            entry(parts).update(shape=[2**40]),
            parts.engine["plan"]["weights"][-2].update(shape=[2**40]),
        ),
        "is .*2, 'shape'|tensor ln_f.weight is",
    ),
    "no weight digest": (lambda parts: parts.digests.pop("ln_f.weight"), "weights_sha256 names other weights"),
    "a wrong weight digest": (
        lambda parts: parts.digests.update({"ln_f.weight": "1" * 64}),
        "weight ln_f.weight has SHA-256",
    ),
    "no plan": (lambda parts: parts.engine.pop("plan"), "metadata engine has .*expected config and plan"),
    "a plan that is a list": (lambda parts: parts.engine.update(plan=[]), "plan is list, expected dict"),
    "a node that reads nothing": (
        lambda parts: parts.engine["plan"]["nodes"][0].update(inputs=["nobody"]),
        "reads 'nobody', which nothing before it makes",
    ),
    "a missing node": (lambda parts: parts.engine["plan"]["nodes"].pop(2), "which nothing before it makes"),
    "another output": (
        lambda parts: parts.engine["plan"].update(outputs={"loss": parts.engine["plan"]["outputs"]["logits"]}),
        "outputs are .*expected logits",
    ),
    "logits that are something else": (
        lambda parts: parts.engine["plan"].update(outputs={"logits": "input_ids"}),
        "logits are",
    ),
    "no pool": (lambda parts: parts.engine["config"].update(num_layers=2), "past_key_value_1 is None"),
    "another head size": (lambda parts: parts.engine["config"].update(head_size=8), "past_key_value_0 is"),
    "another vocabulary": (lambda parts: parts.engine["config"].update(vocab_size=12), "logits are .*expected"),
    "another precision": (lambda parts: parts.engine["config"].update(precision="float16"), "past_key_value_0 is"),
    "an unknown precision": (lambda parts: parts.engine["config"].update(precision="int3"), "precision is 'int3'"),
    "a limit of zero": (
        lambda parts: parts.engine["config"]["limits"].update(max_batch_size=0),
        "max_batch_size is 0",
    ),
    "an unknown config key": (lambda parts: parts.engine["config"].update(color="red"), "expected exactly"),
    "a base that is not a number": (
        lambda parts: parts.engine["config"].update(rotary_base=float("nan")),
        "rotary_base is nan, expected a positive number",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_although_its_digest_is_right(path: Path, lie: str) -> None:
    change, message = LIES[lie]
    rewrite(path, change)
    assert re.search(message, refusal(path)), refusal(path)


def test_the_files_put_together_here_are_read(path: Path) -> None:
    """The lies above are refused for what they say, not for how they are written."""
    rewrite(path, lambda parts: None)
    Engine.load(path)


# config.json beside the engine


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    sections = json.loads(file.read_text())
    sections["builder_config"] |= changes
    file.write_text(json.dumps(sections))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 12}, "vocab_size is 12, but .* has 11"),
        ({"max_input_len": 10**6}, "max_input_len is 1000000, but .* has 128"),
        ({"precision": "float16"}, "qwen_float16_tp1_rank0.engine: no such engine file"),
        ({"precision": "../x"}, "precision is '../x', expected a plain name"),
        ({"name": "x" * 1000}, "File name too long|no such engine file"),
        ({"tensor_parallel": "1"}, "tensor_parallel is '1', expected int"),
        ({"tensor_parallel": 2}, "tp2_rank0.engine: no such engine file"),
    ],
)
def test_an_edited_config_json_is_refused(path: Path, changes: dict[str, object], message: str) -> None:
    edit_config(path.parent, **changes)
    with pytest.raises(ValueError, match=message):
        Engine.from_dir(path.parent)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"builder_config": []}', b"[" * 100_000])
def test_a_broken_config_json_is_refused(path: Path, content: bytes) -> None:
    (path.parent / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json: "):
        Engine.from_dir(path.parent)


def test_a_folder_without_config_json_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json: cannot be read .*is .* a folder that build.py wrote\?"):
        Engine.from_dir(tmp_path)


def test_an_engine_file_in_the_place_of_a_folder_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read .Not a directory"):
        Engine.from_dir(path)


# Limits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"max_batch_size": True}, "max_batch_size is True"),
        ({"max_input_len": 2**31}, "max_input_len is 2147483648"),
        ({"max_input_len": 2**31 - 1}, r"max_input_len \+ max_output_len"),
        ({"tokens_per_block": 48}, "tokens_per_block is 48, expected a power of two"),
        ({"max_num_tokens": 7}, "max_num_tokens is 7 but a step of max_batch_size=8"),
        ({"max_output_len": 1.5}, "max_output_len is 1.5"),
    ],
)
def test_a_limit_out_of_range_is_named(changes: dict[str, Any], message: str) -> None:
    numbers = {"max_batch_size": 8, "max_input_len": 9, "max_output_len": 9, "max_num_tokens": 9, "tokens_per_block": 8}
    with pytest.raises(ValueError, match=message):
        Limits(**numbers | changes)


# Plans that hang together but are no calls of their ops


def node_of(parts: EngineParts, op: str) -> dict[str, Any]:
    return next(node for node in parts.engine["plan"]["nodes"] if node["op"] == op)


FORGERIES: dict[str, tuple[Change, str]] = {
    "an unknown op": (lambda parts: node_of(parts, "gated_mlp").update(op="exec"), "no kernel for exec on cpu"),
    "a weight before a value": (
        lambda parts: node_of(parts, "gated_mlp")["inputs"].reverse(),
        "reads a weight before a value",
    ),
    "an operand too few": (lambda parts: node_of(parts, "gated_mlp")["inputs"].pop(), "is no call of gated_mlp"),
    "an unknown attribute": (lambda parts: node_of(parts, "matmul")["attrs"].update(alpha=1), "is no call of matmul"),
    "a missing attribute": (
        lambda parts: node_of(parts, "gpt_attention")["attrs"].pop("rotary_base"),
        "is no call of gpt_attention",
    ),
    "a list where a dtype belongs": (
        lambda parts: node_of(parts, "gated_mlp")["attrs"].update(dtype=[1504, 1536]),
        "weights do not fit in .*gated_mlp",
    ),
    "weights of different widths": (
        lambda parts: node_of(parts, "gated_mlp")["inputs"].__setitem__(2, "layers.0.mlp.proj.weight"),
        "weights do not fit in .*gated_mlp",
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_node_gives_no_session(path: Path, forgery: str) -> None:
    change, message = FORGERIES[forgery]
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        on_cpu(Engine.load(path))
