"""How a model is quantized, as the set of bits that 0.7.1 wrote into config.json. Knows no tensor."""

from enum import IntFlag


class QuantMode(IntFlag):
    """Bits of 0.7.1. PER_CHANNEL and PER_TOKEN belong to SmoothQuant, PER_GROUP to weight-only modes."""

    INT4_WEIGHTS = 1
    INT8_WEIGHTS = 2
    ACTIVATIONS = 4
    PER_CHANNEL = 8
    PER_TOKEN = 16
    PER_GROUP = 32
    INT8_KV_CACHE = 64

    @classmethod
    def from_description(
        cls,
        quantize_weights: bool = False,
        quantize_activations: bool = False,
        per_token: bool = False,
        per_channel: bool = False,
        per_group: bool = False,
        use_int4_weights: bool = False,
        use_int8_kv_cache: bool = False,
    ) -> "QuantMode":
        """The mode that these facts describe; a combination without a meaning is a ValueError."""
        if quantize_activations and (not quantize_weights or use_int4_weights or per_group):
            raise ValueError("quantized activations go with INT8 weights without groups")
        if (per_token or per_channel) and not quantize_activations:
            raise ValueError("per_token and per_channel belong to quantized activations (SmoothQuant)")
        if (per_group or use_int4_weights) and not quantize_weights:
            raise ValueError("per_group and use_int4_weights belong to quantized weights")
        mode = cls(0)
        if quantize_weights:
            mode |= cls.INT4_WEIGHTS if use_int4_weights else cls.INT8_WEIGHTS
        for is_set, bit in (
            (quantize_activations, cls.ACTIVATIONS),
            (per_token, cls.PER_TOKEN),
            (per_channel, cls.PER_CHANNEL),
            (per_group, cls.PER_GROUP),
            (use_int8_kv_cache, cls.INT8_KV_CACHE),
        ):
            if is_set:
                mode |= bit
        return mode

    @classmethod
    def use_weight_only(cls, use_int4_weights: bool = False, per_group: bool = False) -> "QuantMode":
        return cls.from_description(quantize_weights=True, use_int4_weights=use_int4_weights, per_group=per_group)

    @classmethod
    def use_smooth_quant(cls, per_token: bool = False, per_channel: bool = False) -> "QuantMode":
        return cls.from_description(
            quantize_weights=True, quantize_activations=True, per_token=per_token, per_channel=per_channel
        )

    def set_int8_kv_cache(self) -> "QuantMode":
        """This mode with an INT8 KV cache: a new value, like all of 0.7.1's setters."""
        return self | QuantMode.INT8_KV_CACHE

    def is_weight_only(self) -> bool:
        return bool(self & (self.INT4_WEIGHTS | self.INT8_WEIGHTS)) and not self & self.ACTIVATIONS

    def is_int4_weight_only(self) -> bool:
        return self.is_weight_only() and bool(self & self.INT4_WEIGHTS)

    def is_int8_weight_only(self) -> bool:
        return self.is_weight_only() and bool(self & self.INT8_WEIGHTS)

    def has_per_group_scaling(self) -> bool:
        return bool(self & self.PER_GROUP)

    def has_act_and_weight_quant(self) -> bool:
        """SmoothQuant: INT8 activations times INT8 weights."""
        return bool(self & self.ACTIVATIONS)

    def has_per_token_dynamic_scaling(self) -> bool:
        return bool(self & self.PER_TOKEN)

    def has_act_static_scaling(self) -> bool:
        return self.has_act_and_weight_quant() and not self.has_per_token_dynamic_scaling()

    def has_per_channel_scaling(self) -> bool:
        return bool(self & self.PER_CHANNEL)

    def has_int8_kv_cache(self) -> bool:
        return bool(self & self.INT8_KV_CACHE)

    def quantizes_weights(self) -> bool:
        return bool(self & (self.INT4_WEIGHTS | self.INT8_WEIGHTS))
