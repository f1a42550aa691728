"""Builder, engine and execution contexts: what they check of a network, its profiles, shapes and addresses.

An engine is the recorded network, found again by the bytes that stand for it, and executed by the interpreter. So it
lives as long as the process that built it.
"""

import ctypes
import enum
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .network import INetworkDefinition
from .strict import ENUMS, ApiError, of_api
from .tensors import TORCH_DTYPES, ITensor

_plans: dict[int, tuple[INetworkDefinition, list["IOptimizationProfile"]]] = {}
_numbers = itertools.count(1)
Interpret = Callable[[Any, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


@of_api
class Logger:
    def __init__(self, min_severity: Any = None) -> None:
        self.min_severity = min_severity or Severity.WARNING

    def log(self, severity: Any, message: str) -> None:
        print(severity.name, message)


# The members of Severity are the class's own as well.
for _member in Severity:
    setattr(Logger, _member.name, _member)
Logger.Severity = Severity  # type: ignore[attr-defined]


@of_api
class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, name: str, smallest: Sequence[int], likely: Sequence[int], largest: Sequence[int]) -> None:
        shapes = tuple(map(tuple, (smallest, likely, largest)))
        if len(set(map(len, shapes))) != 1 or not all(a <= b <= c for a, b, c in zip(*shapes, strict=True)):
            raise ApiError(f"the shapes {shapes} of {name} do not grow from the smallest to the largest")
        self._shapes[name] = shapes

    def get_shape(self, name: str) -> list[tuple[int, ...]]:
        return list(self._shapes[name])


@of_api
class IBuilderConfig:
    def __init__(self) -> None:
        self._flags = {ENUMS["BuilderFlag"].TF32}
        self._pools: dict[Any, int] = {}
        self._profiles: list[IOptimizationProfile] = []

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._pools[pool] = size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools[pool]

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1


@of_api
class Builder:
    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    @property
    def logger(self) -> Logger:
        return self._logger

    def create_network(self, flags: int) -> INetworkDefinition:
        if flags:
            raise ApiError(f"flags are {flags}: networks of TensorRT 11 are strongly typed without any")
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes:
        network._check()
        if ENUMS["MemoryPoolType"].WORKSPACE not in config._pools:
            raise ApiError("the workspace has no limit: attention that is taken apart may need gigabytes of it")
        if not config._profiles:
            raise ApiError("the config has no optimization profile, and the network has unknown dims")
        for index, profile in enumerate(config._profiles):
            _check_profile(network, profile, index)
        network._copy_weights()
        number = next(_numbers)
        _plans[number] = network, config._profiles
        return json.dumps({"plan of the fake": number}).encode()


def _check_profile(network: INetworkDefinition, profile: IOptimizationProfile, index: int) -> None:
    """Every input of unknown dims has shapes that fit it, and dims of one name have one size."""
    unknown = set(profile._shapes) - {tensor.name for tensor in network.recorded_inputs}
    if unknown:
        raise ApiError(f"profile {index} has shapes of {sorted(unknown)}, which are no inputs")
    for kind in range(3):
        sizes: dict[str, int] = {}
        for tensor in network.recorded_inputs:
            if -1 not in tensor.shape and tensor.name not in profile._shapes:
                continue
            if tensor.name not in profile._shapes:
                raise ApiError(f"profile {index} has no shapes of {tensor.name}, which has unknown dims")
            _match(tensor, profile._shapes[tensor.name][kind], sizes, f"profile {index}")
        for layer in network.recorded_layers:
            if layer.recorded_kind == "IKVCacheUpdateLayer":
                cache, update, _ = layer.recorded_inputs
                length, places = sizes.get(str(update._dims[2]), 0), cache.shape[2]
                if length > places:
                    raise ApiError(f"profile {index}: {length} new tokens for {cache.name} of {places} places")


def _match(tensor: ITensor, shape: Sequence[int], sizes: dict[str, int], where: str) -> None:
    """`shape` against the dims of `tensor`; `sizes` gains those of its names."""
    if len(shape) != len(tensor._dims):
        raise ApiError(f"{where}: {tensor.name} has {len(tensor._dims)} dims, not those of {tuple(shape)}")
    for dim, size in zip(tensor._dims, shape, strict=True):
        expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
        if size != expected:
            raise ApiError(f"{where}: {tensor.name} has shape {tuple(shape)}, where {dim} is {expected}")


@of_api
class Runtime:
    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized: bytes) -> "ICudaEngine | None":
        """None for what is no plan of this process, as TensorRT gives it for a plan that it cannot load."""
        try:
            number = json.loads(bytes(serialized))["plan of the fake"]
        except (ValueError, KeyError, TypeError):
            return None
        return ICudaEngine(*_plans[number]) if number in _plans else None


@of_api
class ICudaEngine:
    def __init__(self, network: INetworkDefinition, profiles: list[IOptimizationProfile]) -> None:
        self._network, self._profiles = network, profiles
        self._tensors = {tensor.name: tensor for tensor in (*network.recorded_inputs, *network.recorded_outputs)}
        self._aliases = {
            layer.recorded_outputs[0].name: layer.recorded_inputs[0].name
            for layer in network.recorded_layers
            if layer.recorded_kind == "IKVCacheUpdateLayer"
        }

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def num_layers(self) -> int:
        return self._network.num_layers

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = ENUMS["TensorIOMode"]
        return modes.INPUT if self._tensors[name].is_network_input else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def get_tensor_location(self, name: str) -> Any:
        return ENUMS["TensorLocation"].DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return self._profiles[profile_index].get_shape(name)

    def get_aliased_input_tensor(self, name: str) -> str:
        return self._aliases.get(name, "")

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 256 * (1 + profile_index)

    def create_execution_context(self, strategy: Any) -> "IExecutionContext":
        return IExecutionContext(self, strategy)


@of_api
class IExecutionContext:
    def __init__(self, engine: ICudaEngine, strategy: Any) -> None:
        self._engine = engine
        self._is_user_managed = strategy == ENUMS["ExecutionContextAllocationStrategy"].USER_MANAGED
        self._profile: int | None = None
        self._memory_bytes = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    @property
    def active_optimization_profile(self) -> int:
        return -1 if self._profile is None else self._profile

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self.infer_shapes()

    def set_optimization_profile_async(self, profile_index: int, stream: int) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return False
        self._profile = profile_index
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        if not self._is_user_managed:
            raise ApiError("device memory is set for a context that has its own")
        self._memory_bytes = size if memory else 0

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """False for a shape outside of the profile."""
        if self._profile is None:
            raise ApiError("an input gets a shape before the context has a profile")
        ranges = self._engine._profiles[self._profile]._shapes.get(name)
        if ranges is None:
            raise ApiError(f"{name} has no shape to be set")
        smallest, _, largest = ranges
        if len(shape) != len(smallest):
            return False
        if not all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors:
            raise ApiError(f"{name} is no input or output")
        self._addresses[name] = memory
        return bool(memory)

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name, self._engine._tensors[name].shape)

    def infer_shapes(self) -> list[str]:
        """The inputs whose shapes are missing."""
        return [
            tensor.name
            for tensor in self._engine._network.recorded_inputs
            if -1 in tensor.shape and tensor.name not in self._shapes
        ]

    def execute_async_v3(self, stream: int) -> bool:
        self._check_ready()
        network = self._engine._network
        sizes: dict[str, int] = {}
        feeds = {}
        for tensor in network.recorded_inputs:
            shape = self._shapes.get(tensor.name, tensor.shape)
            _match(tensor, shape, sizes, "execution")
            feeds[tensor.name] = _memory_at(self._addresses[tensor.name], tensor, shape)
        for name, value in _interpret(network, feeds).items():
            if name not in self._engine._aliases:
                tensor = self._engine._tensors[name]
                _memory_at(self._addresses[name], tensor, tuple(value.shape)).copy_(value)
        return True

    def _check_ready(self) -> None:
        engine = self._engine
        if self._profile is None:
            raise ApiError("the context has no profile")
        if self.infer_shapes():
            raise ApiError(f"inputs {self.infer_shapes()} have no shape")
        missing = sorted(set(engine._tensors) - set(self._addresses))
        if missing:
            raise ApiError(f"{missing} have no address")
        needed = engine.get_device_memory_size_for_profile_v2(self._profile)
        if self._is_user_managed and self._memory_bytes < needed:
            raise ApiError(f"the context has {self._memory_bytes} bytes of device memory, its profile needs {needed}")
        for output, cache in engine._aliases.items():
            if self._addresses[output] != self._addresses[cache]:
                raise ApiError(f"{output} and its cache {cache} have different addresses")


def _memory_at(address: int, tensor: ITensor, shape: Sequence[int]) -> torch.Tensor:
    dtype = TORCH_DTYPES[tensor.dtype]
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if not num_bytes:
        return torch.empty(tuple(shape), dtype=dtype)
    raw = torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)
    return raw.view(dtype).view(tuple(shape))


def _interpret(network: INetworkDefinition, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # The interpreter knows the fake, and is needed here only when something is executed.
    from interpreter import interpret

    return interpret(network, feeds)
