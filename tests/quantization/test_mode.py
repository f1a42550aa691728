"""QuantMode has 0.7.1's bits and means what it meant."""

import pytest

from tensorrt_llm.quantization import QuantMode


def test_bits_are_those_of_config_json() -> None:
    names = "INT4_WEIGHTS INT8_WEIGHTS ACTIVATIONS PER_CHANNEL PER_TOKEN PER_GROUP INT8_KV_CACHE".split()
    assert [QuantMode[name] for name in names] == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        (QuantMode(0), 0),
        (QuantMode.use_weight_only(), 2),
        (QuantMode.use_weight_only(use_int4_weights=True), 1),
        (QuantMode.use_weight_only(True, per_group=True), 33),
        (QuantMode.use_smooth_quant(), 6),
        (QuantMode.use_smooth_quant(per_token=True, per_channel=True), 30),
        (QuantMode.use_weight_only().set_int8_kv_cache(), 66),
    ],
)
def test_modes_have_the_numbers_of_old_engines(mode: QuantMode, value: int) -> None:
    assert int(mode) == value


def test_queries_tell_modes_apart() -> None:
    int8, int4 = QuantMode.use_weight_only(), QuantMode.use_weight_only(True, per_group=True)
    static, dynamic = QuantMode.use_smooth_quant(), QuantMode.use_smooth_quant(per_token=True)
    assert [mode.is_weight_only() for mode in (QuantMode(0), int8, int4, static)] == [False, True, True, False]
    assert (int8.is_int8_weight_only(), int8.is_int4_weight_only()) == (True, False)
    assert (int4.is_int8_weight_only(), int4.is_int4_weight_only(), int4.has_per_group_scaling()) == (False, True, True)
    assert (static.has_act_static_scaling(), dynamic.has_act_static_scaling()) == (True, False)
    assert dynamic.has_per_token_dynamic_scaling() and not dynamic.has_per_channel_scaling()
    assert int8.set_int8_kv_cache().has_int8_kv_cache() and not int8.has_int8_kv_cache()


@pytest.mark.parametrize(
    "facts",
    [
        {"quantize_activations": True},
        {"quantize_weights": True, "quantize_activations": True, "use_int4_weights": True},
        {"quantize_weights": True, "per_token": True},
        {"per_group": True},
    ],
)
def test_combinations_without_a_meaning_are_refused(facts: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="quantize"):
        QuantMode.from_description(**facts)
