"""The marker `gpu`: what needs a CUDA GPU is skipped without one, and `pytest -m gpu` picks what a GPU should run.

Where there is a GPU, that includes the tests that run kernels in Triton's interpreter elsewhere: they take the fixture
`device` of tests/kernels.
"""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_gpu = torch.cuda.is_available()
    for item in items:
        if has_gpu and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        elif not has_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
