"""Modules: named trees of parameters whose call adds nodes to the network in work. Knows no op and no file."""

from collections.abc import Iterator
from typing import Any

from .network import Tensor, default_net
from .parameter import Parameter


class Module:
    """Assigning a Module or Parameter to an attribute registers it under that name."""

    def __init__(self) -> None:
        self._modules: dict[str, Module] = {}
        self._parameters: dict[str, Parameter] = {}
        self._name = ""  # under which the parent holds this module

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Module):
            self._modules[name] = value
            value._take_name(name)
        elif isinstance(value, Parameter):
            self._parameters[name] = value
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._name:
            return self.forward(*args, **kwargs)
        with default_net().scope(self._name):
            return self.forward(*args, **kwargs)

    def _take_name(self, name: str) -> None:
        self._name = name

    def named_modules(self, prefix: str = "") -> "Iterator[tuple[str, Module]]":
        """Every module below, itself first under the name `prefix`, in the order of assignment."""
        yield prefix, self
        for name, child in self._modules.items():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter once, by the first dotted path that leads to it."""
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, parameter in module._parameters.items():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield (f"{path}.{name}" if path else name), parameter

    def register_network_output(self, name: str, value: Tensor) -> None:
        """Keep `value` readable in a debug run, under `name`."""
        default_net().mark(name, value)


class ModuleList(Module):
    """Modules in a row, named by their index."""

    def __init__(self, modules: list[Module]) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            setattr(self, str(index), module)

    def _take_name(self, name: str) -> None:
        # A list is never called itself, so its members carry its name in front of their index.
        for index, module in enumerate(self):
            module._take_name(f"{name}.{index}")

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> Any:
        return list(self._modules.values())[index]
