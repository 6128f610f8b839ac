"""Nothing here may need a network; remote code goes to a folder of this test run."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Writes into the JUnit report which client a test speaks for (see compatibility.py)."""
    for item in items:
        for mark in item.iter_markers("client"):
            item.user_properties.append(("client", "\t".join(mark.args)))
