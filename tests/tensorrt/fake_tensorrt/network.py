"""The network that records: layers in the order in which they are added, each held to its rule in rules.py.

A layer is complete when somebody reads the dtype or shape of its output, or when the network is built; what is wrong
with it is said then. `recorded_layers` of a network, and `recorded_kind`, `recorded_inputs` and `recorded_outputs` of a
layer, are what the interpreter reads; all other public names are TensorRT's.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from .rules import RULES, Made
from .strict import ENUMS, ApiError, of_api
from .tensors import Dim, ITensor, Weights


class _Recorded:
    """What every layer is here, and IAttention, which is none."""

    def __init__(self, network: "INetworkDefinition", inputs: Sequence[ITensor], **attributes: Any) -> None:
        self._network = network
        self._inputs: list[ITensor | None] = []
        self._known: Made | None = None
        self._has_readers = False
        self._weights_copy: torch.Tensor | None = None
        self.recorded_kind = type(self).__name__
        for name, value in {"metadata": "", "num_ranks": None, **attributes}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "name", network._unnamed("layer"))
        for index, tensor in enumerate(inputs):
            self._connect(index, tensor)
        self._output = ITensor(network, self)
        network.recorded_layers.append(self)

    @property
    def recorded_inputs(self) -> list[ITensor | None]:
        return self._inputs

    @property
    def recorded_outputs(self) -> list[ITensor]:
        return [self._output]

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return 1

    def set_input(self, index: int, tensor: ITensor) -> None:
        if not 0 <= index <= 5:
            raise ApiError(f"layer {self.name} has no input {index}")
        self._before_change("input", tensor)
        self._connect(index, tensor)

    def get_input(self, index: int) -> ITensor | None:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor | None:
        return self._output if index == 0 else None

    def _connect(self, index: int, tensor: ITensor) -> None:
        if tensor._network is not self._network:
            raise ApiError(f"layer {self.name}: {tensor.name} is of another network")
        self._inputs += [None] * (index + 1 - len(self._inputs))
        self._inputs[index] = tensor
        if tensor._layer:
            tensor._layer._has_readers = True

    def _before_change(self, name: str, value: Any) -> None:
        """What follows from a layer is found again after it was changed, by all if somebody reads it already."""
        if isinstance(value, ITensor) and value._network is not self._network:
            raise ApiError(f"layer {self.name}: {name} is of another network")
        if name not in ("name", "metadata"):
            for layer in self._network.recorded_layers if self._has_readers else [self]:
                layer._known = None

    def _made(self) -> Made:
        if self._known is None:
            try:
                self._known = RULES[self.recorded_kind](self)
            except ApiError as error:
                raise ApiError(f"layer {self.name} ({self.recorded_kind}): {error}") from error
        return self._known

    def _operands(self, count: int | None) -> list[ITensor]:
        """The inputs, as many as there must be; None: one or more."""
        found = [tensor for tensor in self._inputs[:count] if tensor is not None]
        if not found or (count is not None and (len(found) != count or len(self._inputs) != count)):
            raise ApiError(f"{len(self._inputs)} inputs, expected {count or 'some'}")
        return found

    def _constant(self) -> torch.Tensor:
        """The values of a constant layer, as they are now or were when the network was built."""
        values: torch.Tensor = self.weights._values() if self._weights_copy is None else self._weights_copy
        return values.view(tuple(self.shape))


@of_api
class ILayer(_Recorded):
    pass


@of_api
class IConstantLayer(ILayer):
    pass


@of_api
class IGatherLayer(ILayer):
    pass


@of_api
class IMatrixMultiplyLayer(ILayer):
    pass


@of_api
class IElementWiseLayer(ILayer):
    pass


@of_api
class IUnaryLayer(ILayer):
    pass


@of_api
class IActivationLayer(ILayer):
    pass


@of_api
class IReduceLayer(ILayer):
    pass


@of_api
class ICastLayer(ILayer):
    pass


@of_api
class IIdentityLayer(ILayer):
    pass


@of_api
class IShapeLayer(ILayer):
    pass


@of_api
class IShuffleLayer(ILayer):
    pass


@of_api
class ISliceLayer(ILayer):
    pass


@of_api
class IConcatenationLayer(ILayer):
    pass


@of_api
class ISelectLayer(ILayer):
    pass


@of_api
class IRotaryEmbeddingLayer(ILayer):
    pass


@of_api
class IKVCacheUpdateLayer(ILayer):
    pass


@of_api
class IQuantizeLayer(ILayer):
    pass


@of_api
class IDequantizeLayer(ILayer):
    pass


@of_api
class IDistCollectiveLayer(ILayer):
    pass


@of_api
class IAttention(_Recorded):
    pass


@of_api
class INetworkDefinition:
    def __init__(self) -> None:
        self.name = ""
        self.recorded_layers: list[Any] = []
        self.recorded_inputs: list[ITensor] = []
        self.recorded_outputs: list[ITensor] = []
        self._num_names = 0

    @property
    def num_layers(self) -> int:
        return len(self.recorded_layers)

    @property
    def num_inputs(self) -> int:
        return len(self.recorded_inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.recorded_outputs)

    def _unnamed(self, what: str) -> str:
        self._num_names += 1
        return f"(unnamed {what} {self._num_names})"

    # Inputs and outputs

    def add_input(self, name: str, dtype: Any, shape: Sequence[int]) -> ITensor:
        if not all(dim >= -1 for dim in shape):
            raise ApiError(f"input {name} has shape {tuple(shape)}, expected sizes, or -1 for an unknown one")
        dims: tuple[Dim, ...] = tuple(f"{name}.{axis}" if dim == -1 else dim for axis, dim in enumerate(shape))
        tensor = ITensor(self, None, dtype, dims)
        tensor.name = name
        self.recorded_inputs.append(tensor)
        return tensor

    def mark_output(self, tensor: ITensor) -> None:
        if tensor._network is not self or tensor.is_network_input or tensor.is_network_output:
            raise ApiError(f"{tensor.name} cannot be an output: it is one, or an input, or of another network")
        tensor._is_output = True
        self.recorded_outputs.append(tensor)

    def get_layer(self, index: int) -> Any:
        return self.recorded_layers[index]

    def get_input(self, index: int) -> ITensor:
        return self.recorded_inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self.recorded_outputs[index]

    # Layers

    def add_constant(self, shape: Sequence[int], weights: Weights) -> Any:
        return IConstantLayer(self, [], shape=tuple(shape), weights=weights, _digest=weights._digest())

    def add_gather(self, data: ITensor, indices: ITensor, axis: int) -> Any:
        mode = ENUMS["GatherMode"].DEFAULT
        return IGatherLayer(self, [data, indices], axis=axis, mode=mode, num_elementwise_dims=0)

    def add_matrix_multiply(self, left: ITensor, left_op: Any, right: ITensor, right_op: Any) -> Any:
        return IMatrixMultiplyLayer(self, [left, right], op0=left_op, op1=right_op)

    def add_elementwise(self, left: ITensor, right: ITensor, op: Any) -> Any:
        return IElementWiseLayer(self, [left, right], op=op)

    def add_unary(self, x: ITensor, op: Any) -> Any:
        return IUnaryLayer(self, [x], op=op)

    def add_activation(self, x: ITensor, kind: Any) -> Any:
        return IActivationLayer(self, [x], type=kind)

    def add_reduce(self, x: ITensor, op: Any, axes: int, keep_dims: bool) -> Any:
        return IReduceLayer(self, [x], op=op, axes=axes, keep_dims=keep_dims)

    def add_cast(self, x: ITensor, to_type: Any) -> Any:
        return ICastLayer(self, [x], to_type=to_type)

    def add_identity(self, x: ITensor) -> Any:
        return IIdentityLayer(self, [x])

    def add_shape(self, x: ITensor) -> Any:
        return IShapeLayer(self, [x])

    def add_shuffle(self, x: ITensor) -> Any:
        attributes = dict(first_transpose=None, reshape_dims=None, second_transpose=None, zero_is_placeholder=True)
        return IShuffleLayer(self, [x], **attributes)

    def add_slice(self, x: ITensor, start: Sequence[int], shape: Sequence[int], stride: Sequence[int]) -> Any:
        return ISliceLayer(self, [x], start=tuple(start), shape=tuple(shape), stride=tuple(stride))

    def add_concatenation(self, inputs: Sequence[ITensor]) -> Any:
        return IConcatenationLayer(self, inputs, axis=0)

    def add_select(self, condition: ITensor, chosen: ITensor, other: ITensor) -> Any:
        return ISelectLayer(self, [condition, chosen, other])

    def add_rotary_embedding(
        self, x: ITensor, cos: ITensor, sin: ITensor, interleaved: bool, rotary_embedding_dim: int
    ) -> Any:
        attributes = dict(interleaved=interleaved, rotary_embedding_dim=rotary_embedding_dim)
        return IRotaryEmbeddingLayer(self, [x, cos, sin], **attributes)

    def add_kv_cache_update(self, cache: ITensor, update: ITensor, write_indices: ITensor, cache_mode: Any) -> Any:
        return IKVCacheUpdateLayer(self, [cache, update, write_indices], cache_mode=cache_mode)

    def add_attention_v2(self, query: ITensor, key: ITensor, value: ITensor, norm_op: Any, causal_kind: Any) -> Any:
        attributes = dict.fromkeys(("mask", "query_lengths", "key_value_lengths", "normalization_quantize_scale"))
        return IAttention(
            self, [query, key, value], norm_op=norm_op, causal_kind=causal_kind, decomposable=False, **attributes
        )

    def add_quantize(self, x: ITensor, scale: ITensor, output_type: Any) -> Any:
        return IQuantizeLayer(self, [x, scale], to_type=output_type, axis=-1, block_shape=None)

    def add_dequantize(self, x: ITensor, scale: ITensor, output_type: Any) -> Any:
        return IDequantizeLayer(self, [x, scale], to_type=output_type, axis=-1, block_shape=None)

    def add_dist_collective(self, x: ITensor, operation: Any, reduce_op: Any, root: int, groups: Sequence[int]) -> Any:
        return IDistCollectiveLayer(self, [x], _numbers=(operation, reduce_op, root, list(groups)))

    # The whole

    def _check(self) -> None:
        """All that can be said of a network that is complete."""
        for layer in self.recorded_layers:
            layer._made()
        self._check_names()
        if not self.recorded_outputs:
            raise ApiError("the network has no output")
        caches = Counter(
            layer.recorded_inputs[0].name
            for layer in self.recorded_layers
            if layer.recorded_kind == "IKVCacheUpdateLayer"
        )
        for layer in self.recorded_layers:
            if layer.recorded_kind == "IKVCacheUpdateLayer":
                cache, (output,) = layer.recorded_inputs[0], layer.recorded_outputs
                if not output.is_network_output:
                    raise ApiError(f"layer {layer.name}: its result {output.name} is no output of the network")
                if caches[cache.name] > 1:
                    raise ApiError(f"layer {layer.name}: {cache.name} is the cache of {caches[cache.name]} updates")
            if layer.recorded_kind == "IDistCollectiveLayer" and layer.num_ranks is None:
                raise ApiError(f"layer {layer.name}: num_ranks is not set")

    def _check_names(self) -> None:
        layers = Counter(layer.name for layer in self.recorded_layers)
        tensors = Counter(tensor.name for tensor in self.recorded_inputs)
        tensors.update(output.name for layer in self.recorded_layers for output in layer.recorded_outputs)
        for what, names in (("layers", layers), ("tensors", tensors)):
            twice = [name for name, count in names.items() if count > 1]
            if twice:
                raise ApiError(f"{what} share the name {twice[0]}")

    def _copy_weights(self) -> None:
        """An engine does not read the memory of weights any more; until it is built nobody may change it."""
        for layer in self.recorded_layers:
            if layer.recorded_kind == "IConstantLayer":
                if layer.weights._digest() != layer._digest:
                    raise ApiError(f"layer {layer.name}: the memory of its weights was changed before the build")
                layer._weights_copy = layer.weights._values().clone()
