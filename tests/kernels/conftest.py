"""Where the Triton kernels run: on the GPU when there is one, else on CPU tensors through Triton's interpreter."""

import importlib.util
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cpu_tables import cpu_table  # noqa: F401

if not torch.cuda.is_available():
    # Triton reads the switch while it decorates its own functions. Other tests may have imported it by now
    # (transformers does), so its Python modules are read anew; the compiled one cannot be, and need not.
    os.environ["TRITON_INTERPRET"] = "1"
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]:
        del sys.modules[name]
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime import interpreter

        patch_tensor = interpreter._patch_lang_tensor

        def patch_tensor_index(tensor: type, scope: Any) -> None:
            """Triton 3.6 keeps scalars as arrays of one element, which numpy >= 2.4 refuses to turn into an int."""
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patch_tensor_index

        def exact_dot(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
            """In float64, and rounded once: numpy's sums in float32 depend on how many rows there are, and where."""
            kind = d.data.dtype
            wide = np.int32 if kind == np.int32 else np.float64
            product = np.matmul(a.data.astype(wide), b.data.astype(wide))
            return interpreter.TensorHandle((product + d.data).astype(kind), d.dtype.scalar)

        interpreter.InterpreterBuilder.create_dot = exact_dot

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    """New random inputs every run; a failing test's captured output names the seed to set here."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty and empty_like return is NaN or -128, so an element that a kernel forgets is seen."""

    def poison(make: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -128)

    monkeypatch.setattr(torch, "empty", partial(poison, torch.empty))
    monkeypatch.setattr(torch, "empty_like", partial(poison, torch.empty_like))
