"""config.json of both generations: what is read, what is refused, and that nothing else can happen."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorrt_llm.models.qwen.config import EXPECTED, KEYS, QWEN1, QWEN2, QWenConfig

QWEN_7B_CHAT: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 32768,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "softmax_in_fp32": False,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_cache_quantization": False,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 151936,
}
FIRST_RELEASE_7B: dict[str, Any] = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["QWenLMHeadModel"],
    "attn_pdrop": 0.0,
    "ffn_hidden_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "model_type": "qwen",
    "n_embd": 4096,
    "n_head": 32,
    "n_inner": None,
    "n_layer": 32,
    "n_positions": 32768,
    "no_bias": True,
    "padded_vocab_size": 151936,
    "pos_emb": "rotary",
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 151936,
}
QWEN2_HALF_B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# As transformers 5 writes the same model.
QWEN2_HALF_B_TODAY: dict[str, Any] = {key: value for key, value in QWEN2_HALF_B.items() if key != "rope_theta"} | {
    "layer_types": ["full_attention"] * 24,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
}
SAMPLES = {QWEN1: QWEN_7B_CHAT, QWEN2: QWEN2_HALF_B}


def read(data: Any) -> QWenConfig:
    return QWenConfig.from_dict(data, "config.json")


def with_key(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `data` with "key" or "object.key" set."""
    outer, _, inner = key.partition(".")
    return data | {outer: {inner: value} if inner else value}


def test_qwen_7b_chat_is_read() -> None:
    assert read(QWEN_7B_CHAT) == QWenConfig(
        architecture=QWEN1,
        vocab_size=151936,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_size=128,
        mlp_hidden_size=11008,
        norm_epsilon=1e-6,
        rotary_base=10000.0,
        seq_length=8192,
        max_position_embeddings=32768,
        use_dynamic_ntk=True,
        use_logn_attn=True,
        tie_word_embeddings=False,
    )


def test_the_first_release_names_mean_the_same() -> None:
    assert read(FIRST_RELEASE_7B) == read(QWEN_7B_CHAT)


def test_qwen2_is_read() -> None:
    assert read(QWEN2_HALF_B) == QWenConfig(
        architecture=QWEN2,
        vocab_size=151936,
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_size=64,
        mlp_hidden_size=4864,
        norm_epsilon=1e-6,
        rotary_base=1e6,
        seq_length=32768,
        max_position_embeddings=32768,
        use_dynamic_ntk=False,
        use_logn_attn=False,
        tie_word_embeddings=True,
    )


def test_transformers_5_spelling_of_qwen2_means_the_same() -> None:
    assert read(QWEN2_HALF_B_TODAY) == read(QWEN2_HALF_B)


def test_a_qwen2_head_dim_overrides_hidden_size_over_heads() -> None:
    assert read(QWEN2_HALF_B | {"head_dim": 128}).head_size == 128


def test_an_unscaled_rope_scaling_is_read() -> None:
    assert read(QWEN2_HALF_B | {"rope_scaling": {"type": "default"}}).rotary_base == 1e6


def test_a_config_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_HALF_B))
    assert QWenConfig.from_hf_dir(tmp_path) == read(QWEN2_HALF_B)


def test_another_architecture_is_refused_by_name_with_those_supported() -> None:
    with pytest.raises(
        ValueError, match=r"config.json: architectures is \['LlamaFor.*QWenLMHeadModel.*Qwen2ForCausalLM"
    ):
        read(QWEN_7B_CHAT | {"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("architecture", [QWEN1, QWEN2])
def test_a_contradicting_model_type_is_refused(architecture: str) -> None:
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        read(SAMPLES[architecture] | {"model_type": "llama"})


@pytest.mark.parametrize(
    ("architecture", "key"),
    [(architecture, key) for architecture, table in EXPECTED.items() for key in table],
)
@pytest.mark.parametrize("value", ["other", 7, [1], 0.5])
def test_every_option_that_changes_the_function_is_refused_by_name(architecture: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"config.json: {key.partition('.')[0]}"):
        read(with_key(SAMPLES[architecture], key, value))


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        (architecture, key, expected)
        for architecture, table in EXPECTED.items()
        for key, (expected, _) in table.items()
        if expected is not None
    ],
)
def test_the_expected_value_of_every_option_is_accepted(architecture: str, key: str, value: Any) -> None:
    assert read(with_key(SAMPLES[architecture], key, value)) == read(SAMPLES[architecture])


def test_a_quantized_checkpoint_is_refused_with_its_method_and_the_flags_that_read_it() -> None:
    with pytest.raises(ValueError, match="quant_method is 'gptq'.*build.py .*--weight_only_precision int4_gptq"):
        read(QWEN_7B_CHAT | {"quantization_config": {"bits": 4, "quant_method": "gptq"}})


def test_who_reads_quantized_weights_accepts_a_quantization_config() -> None:
    data = QWEN_7B_CHAT | {"quantization_config": {"bits": 4, "quant_method": "gptq"}}
    assert QWenConfig.from_dict(data, "config.json", accepts_quantized=True) == read(QWEN_7B_CHAT)


def test_yarn_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="rope_scaling.type is 'yarn'"):
        read(QWEN2_HALF_B | {"rope_scaling": {"factor": 4.0, "type": "yarn"}})


def test_a_sliding_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="layer_types is .*sliding_attention"):
        read(QWEN2_HALF_B | {"layer_types": ["full_attention", "sliding_attention"]})


REQUIRED = [
    (architecture, keys[0])
    for architecture, table in KEYS.items()
    for field, keys in table.items()
    if field != "tie_word_embeddings" and keys != ("head_dim",)
]


@pytest.mark.parametrize(("architecture", "key"), REQUIRED)
@pytest.mark.parametrize("gone", ["absent", "null"])
def test_a_missing_key_is_named(architecture: str, key: str, gone: str) -> None:
    data = SAMPLES[architecture] | {key: None}
    if gone == "absent":
        del data[key]
    with pytest.raises(ValueError, match=rf"config.json: {key} .*is missing, expected"):
        read(data)


@pytest.mark.parametrize(("architecture", "key"), REQUIRED)
@pytest.mark.parametrize("value", ["4096", -1, [4], {}, 10**400, float("nan"), float("inf"), -0.5])
def test_a_wrong_type_or_range_is_refused_by_key(architecture: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"config.json: {key} is .*, expected"):
        read(SAMPLES[architecture] | {key: value})


@pytest.mark.parametrize("value", [0, True, 4096.0])
def test_an_integer_is_neither_zero_nor_a_boolean_nor_a_float(value: Any) -> None:
    with pytest.raises(ValueError, match="hidden_size is .*, expected an integer from 1 to"):
        read(QWEN_7B_CHAT | {"hidden_size": value})


def test_two_spellings_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size is 4096 but n_embd is 2048"):
        read(QWEN_7B_CHAT | {"n_embd": 2048})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            QWEN_7B_CHAT | {"kv_channels": 64},
            "hidden_size .* is 4096, expected num_attention_heads 32 x kv_channels 64",
        ),
        (QWEN_7B_CHAT | {"intermediate_size": 11007}, "intermediate_size .* is 11007, expected an even number"),
        (QWEN2_HALF_B | {"hidden_size": 900}, "hidden_size is 900, expected a multiple of num_attention_heads 14"),
        (QWEN2_HALF_B | {"num_key_value_heads": 4}, "num_attention_heads is 14, expected a multiple of the 4"),
        (QWEN2_HALF_B | {"head_dim": 63}, "head size is 63, expected an even number"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(data)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"vocab_size": ' + b"9" * 9999 + b"}"])
def test_a_file_that_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        QWenConfig.from_hf_dir(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "7", '"text"'])
def test_a_top_level_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json: the top level is .*, expected an object"):
        QWenConfig.from_hf_dir(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.json: cannot be read"):
        QWenConfig.from_hf_dir(tmp_path / "nowhere")


def test_a_config_made_by_hand_is_checked_too() -> None:
    facts = vars(read(QWEN2_HALF_B)) | {"num_key_value_heads": 0}
    with pytest.raises(ValueError, match="num_key_value_heads is 0, expected an integer from 1"):
        QWenConfig(**facts)


# ---- adversarial files: a valid config or a ValueError, nothing else ----

JSON_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-2, max_value=4)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, "default", "full_attention", QWEN1, QWEN2, "silu", 2**31, 1e308])
)
JSON_VALUES = st.recursive(
    JSON_SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
ALL_KEYS = sorted(
    {"architectures", "layer_types"}
    | {key for table in EXPECTED.values() for key in table}
    | {key for table in KEYS.values() for keys in table.values() for key in keys}
)
MUTATIONS = st.lists(st.tuples(st.sampled_from(ALL_KEYS), JSON_VALUES | st.just("delete")), min_size=1, max_size=4)
BASES = st.sampled_from([QWEN_7B_CHAT, FIRST_RELEASE_7B, QWEN2_HALF_B, QWEN2_HALF_B_TODAY])


def assert_valid_or_value_error(folder: Path) -> None:
    try:
        config = QWenConfig.from_hf_dir(folder)
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert config.num_attention_heads % config.num_key_value_heads == 0 and config.head_size % 2 == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


@settings(max_examples=3000, deadline=None)
@given(base=BASES, mutations=MUTATIONS)
def test_any_mutated_value_is_a_config_or_a_value_error(folder: Path, base: dict[str, Any], mutations: Any) -> None:
    data = dict(base)
    for key, value in mutations:
        data = with_key(data, key, value)
        if value == "delete":
            del data[key.partition(".")[0]]
    (folder / "config.json").write_text(json.dumps(data))
    assert_valid_or_value_error(folder)


@settings(max_examples=1500, deadline=None)
@given(base=BASES, position=st.integers(0, 1000), cut=st.integers(0, 20), inserted=st.binary(max_size=8))
def test_any_mutated_bytes_are_a_config_or_a_value_error(
    folder: Path, base: dict[str, Any], position: int, cut: int, inserted: bytes
) -> None:
    content = json.dumps(base).encode()
    (folder / "config.json").write_bytes(content[:position] + inserted + content[position + cut :])
    assert_valid_or_value_error(folder)
