# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What every test runs under. The environment is set here, before any test imports torch or the Hub's client."""

import os


for _name, _value in {
    "HF_HUB_OFFLINE": "1",  # no test may need a network
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",  # its threads and the environments' processes do not mix
    "MPLBACKEND": "Agg",
    # The models are tiny: a second thread brings little on an idle machine, and on a busy one its spinning costs six
    # times the work. A fixed number also keeps sums in the same order. Subprocesses inherit it.
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests where there is no CUDA device. (`slow` tests are left out by `addopts` in pyproject.toml.)"""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
