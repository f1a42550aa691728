"""Thousands of damaged and forged engine files: each is read or refused with a ValueError, quickly, whatever it says.

Damaged: bytes changed. Forged: the header's objects changed and all digests made right again, as by somebody who wants
to be believed. A forged file that is read must also give a session, or a ValueError.
"""

import json
import math
import struct
from copy import deepcopy
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from engine_files import EngineParts
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from models_for_tests import make_engine

from tensorrt_llm import Builder, Engine, Limits
from tensorrt_llm.runtime import Session

# One example takes milliseconds; the deadline is what "hang" means here.
FUZZ = settings(deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)

VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.0, 0.5, 1e308, 1e-320]
        + [math.nan, math.inf, -math.inf, "", "0", "1", "x", "\ud800", "\0", "é" * 300, "x" * 5000, [], {}, [[]], [{}]]
        + ["num_tokens", "num_blocks", "float32", "float16", "int8", "silu", "matmul", "gated_mlp", "input_ids"]
        + ["past_key_value_0", "ln_f.weight", "layers.0.mlp.gated_mlp/1", [2**62] * 8, [1] * 100, [2**62] * 50]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)
EDITS = st.lists(st.tuples(st.sampled_from(["set", "delete", "copy", "rename"]), st.floats(0, 1), VALUES), max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    limits = Limits(max_batch_size=2, max_input_len=8, max_output_len=8, max_num_tokens=8, tokens_per_block=4)
    engine = make_engine(limits=limits)
    engine.save(folder / "original")
    engine.save(folder / engine.config.engine_name)
    Builder.save_config(engine.config, folder / "config.json")
    return folder


def load(path: Path) -> Engine | None:
    """The engine, or None when it is refused as it should be."""
    try:
        return Engine.load(path)
    except ValueError as error:
        assert str(path) in str(error)
        return None


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    found = []
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        found.append((value, key))
        found += places(inner)
    return found


def edit(root: dict[str, Any], edits: list[tuple[str, float, Any]]) -> None:
    """Change JSON somewhere: a place is picked by its share of all places."""
    for action, share, value in edits:
        all_places = places(root)
        if not all_places:
            return
        container, key = all_places[min(int(share * len(all_places)), len(all_places) - 1)]
        if action == "delete":
            del container[key]
        elif action == "copy":
            other, other_key = all_places[crc32(repr(value).encode(errors="replace")) % len(all_places)]
            container[key] = deepcopy(other[other_key])
        elif action == "rename" and isinstance(container, dict):
            container[value if isinstance(value, str) else repr(value)] = container.pop(key)
        else:
            container[key] = deepcopy(value)


@settings(FUZZ, max_examples=1500)
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=5))
def test_damaged_bytes_are_found(folder: Path, changes: list[tuple[float, int]]) -> None:
    original = (folder / "original").read_bytes()
    raw = bytearray(original)
    for share, flips in changes:
        raw[min(int(share * len(raw)), len(raw) - 1)] ^= flips
    assume(raw != original)
    (folder / "damaged").write_bytes(raw)
    assert load(folder / "damaged") is None


@settings(FUZZ, max_examples=500)
@given(start=st.floats(0, 1), removed=st.integers(0, 40), inserted=st.binary(max_size=40))
def test_cut_and_inserted_bytes_are_found(folder: Path, start: float, removed: int, inserted: bytes) -> None:
    original = (folder / "original").read_bytes()
    place = int(start * len(original))
    raw = original[:place] + inserted + original[place + removed :]
    assume(raw != original)
    (folder / "damaged").write_bytes(raw)
    assert load(folder / "damaged") is None


@settings(FUZZ, max_examples=500)
@given(header=st.binary(max_size=300) | VALUES.map(lambda value: json.dumps({"__metadata__": value}).encode()))
def test_any_header_is_refused(folder: Path, header: bytes) -> None:
    (folder / "damaged").write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    assert load(folder / "damaged") is None


@settings(FUZZ, max_examples=3000)
@given(edits=EDITS)
def test_a_forged_engine_is_refused_or_gives_a_session(folder: Path, edits: list[tuple[str, float, Any]]) -> None:
    parts = EngineParts.read(folder / "original")
    tree = {"entries": parts.entries, "metadata": parts.metadata, "engine": parts.engine, "digests": parts.digests}
    edit(tree, edits)
    # What is gone or no object any more is written as it is: the file's writer needs these four only.
    parts.entries = tree["entries"] if isinstance(tree.get("entries"), dict) else {}
    parts.metadata = tree["metadata"] if isinstance(tree.get("metadata"), dict) else {}
    parts.engine, parts.digests = tree.get("engine"), tree.get("digests")
    assert_refused_or_gives_a_session(parts.write(folder / "forged"))


@settings(FUZZ, max_examples=1500)
@given(edits=EDITS)
def test_forged_nodes_are_refused_or_give_a_session(folder: Path, edits: list[tuple[str, float, Any]]) -> None:
    """As above, but most of these pass the checks of the file, and meet those of the executor."""
    parts = EngineParts.read(folder / "original")
    nodes = parts.engine["plan"]["nodes"]
    for action, share, value in edits:
        edit(nodes[crc32(repr(value).encode(errors="replace")) % len(nodes)], [(action, share, value)])
    assert_refused_or_gives_a_session(parts.write(folder / "forged"))


def assert_refused_or_gives_a_session(path: Path) -> None:
    engine = load(path)
    if engine is not None:
        try:
            Session(engine, "cpu", kv_cache_tokens=16)
        except ValueError:
            pass


@settings(FUZZ, max_examples=500)
@given(edits=EDITS)
def test_a_changed_config_json_is_refused_or_agrees(folder: Path, edits: list[tuple[str, float, Any]]) -> None:
    file = folder / "config.json"
    original = file.read_text()
    sections = json.loads(original)
    edit(sections, edits)
    try:
        file.write_text(json.dumps(sections))
        Engine.from_dir(folder)
    except ValueError as error:
        assert str(folder) in str(error)
    finally:
        file.write_text(original)
