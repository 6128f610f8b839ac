"""Nothing here may need a network; remote code goes to a folder of this test run; memory starts as NaN."""

import functools
import gc
import os
import tempfile
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.utils._device import _device_constructors

torch.set_num_threads(1)
# A slow machine is no reason to fail.
ANY_MACHINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=15, derandomize=True, **ANY_MACHINE)
settings.register_profile("exhaustive", max_examples=100, print_blob=True, **ANY_MACHINE)
settings.load_profile("default")


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`make` with NaN in the place of uninitialised numbers, so that a result shows who has read them."""

    @functools.wraps(make)
    def filled(*args, **kwargs) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor:
            return tensor
        with torch.no_grad():
            return tensor.fill_(torch.nan) if tensor.is_floating_point() or tensor.is_complex() else tensor

    return filled


_device_constructors()  # `with torch.device(…)` remembers these functions the first time, and must know the real ones.
torch.empty, torch.empty_like, torch.empty_strided = map(poisoned, (torch.empty, torch.empty_like, torch.empty_strided))
torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)


def pytest_collection_finish() -> None:
    """What has been imported stays: accelerate collects garbage whenever training starts, and would walk through it."""
    gc.freeze()


LONG = ("training", "compile", "accelerate", "clients", "warm_start", "faults", "unbounded", "state_tracking", "peft")
"""The files that take longest begin first, or one would run on alone (with --no-loadscope-reorder)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Writes into the JUnit report which client a test speaks for (see compatibility.py)."""
    order = [f"test_{name}" for name in LONG]
    items.sort(key=lambda item: order.index(item.path.stem) if item.path.stem in order else len(order))
    for item in items:
        for mark in item.iter_markers("client"):
            item.user_properties.append(("client", "\t".join(mark.args)))
