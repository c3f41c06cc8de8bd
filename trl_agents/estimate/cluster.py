# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The machine: its GPUs, their number, how they are connected, and how training is spread over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Any

import yaml


GIB = 2**30


def _check_numbers(described: Any, names: Iterable[str], zero: bool = False) -> None:
    """Raises `ValueError` for what is no number, or not above 0."""
    for name in names:
        value = getattr(described, name)
        if not isinstance(value, (int, float)) or not (0 < value < inf or zero and value == 0):
            raise ValueError(f"{name}={value!r}: give a number {'of at least' if zero else 'above'} 0.")


@dataclass(frozen=True)
class GPU:
    """
    Args:
        name (`str`):
            What it is called.
        memory_gib (`float`):
            Memory.
        memory_gbps (`float`):
            Bandwidth of the memory in GB/s.
        bf16_tflops (`float`):
            Dense matrix products in bfloat16.
        fp32_tflops (`float`):
            The same in float32, as PyTorch does them by default (no TF32).
        link_gbps (`float`):
            To the other GPUs of the node, one direction, in GB/s.
    """

    name: str
    memory_gib: float
    memory_gbps: float
    bf16_tflops: float
    fp32_tflops: float
    link_gbps: float

    def __post_init__(self):
        _check_numbers(self, [field.name for field in fields(self) if field.name != "name"])


# From NVIDIA's and AMD's public data sheets: dense figures, without sparsity; NVLink, Infinity Fabric and PCIe one
# way, which is half of what the sheets add up. bfloat16 of the GeForce cards is with float32 accumulation.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("B200", 180, 8000, 2250, 75, 900),  # DGX B200 data sheet
        GPU("H200", 141, 4800, 989, 67, 450),  # H200 data sheet, SXM
        GPU("H100", 80, 3350, 989, 67, 450),  # H100 data sheet, SXM5
        GPU("H100-PCIe", 80, 2000, 756, 51, 64),  # H100 data sheet, PCIe 5
        GPU("A100", 80, 2039, 312, 19.5, 300),  # A100 80GB data sheet, SXM4
        GPU("A100-40GB", 40, 1555, 312, 19.5, 300),  # A100 data sheet, SXM4
        GPU("L40S", 48, 864, 362, 91.6, 32),  # L40S data sheet, PCIe 4
        GPU("A6000", 48, 768, 154.8, 38.7, 32),  # RTX A6000 data sheet, PCIe 4
        GPU("A10", 24, 600, 125, 31.2, 32),  # A10 data sheet, PCIe 4
        GPU("L4", 24, 300, 121, 30.3, 32),  # L4 data sheet, PCIe 4
        GPU("RTX4090", 24, 1008, 165.2, 82.6, 32),  # Ada architecture white paper, PCIe 4
        GPU("RTX3090", 24, 936, 71, 35.6, 32),  # Ampere GA102 white paper, PCIe 4
        GPU("MI300X", 192, 5300, 1307.4, 163.4, 448),  # MI300X data sheet
    )
}


@dataclass(frozen=True)
class Sharding:
    """
    How training is spread over processes.

    Args:
        kind (`str`, *optional*, defaults to `"none"`):
            `"none"` (one process), `"ddp"`, `"zero1"`, `"zero2"`, `"zero3"` or `"fsdp"`.
        offload_optimizer, offload_parameters (`bool`, *optional*, defaults to `False`):
            Whether DeepSpeed keeps optimizer states, or weights, in the host's memory.
    """

    kind: str = "none"
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def deepspeed(self) -> bool:
        return self.kind.startswith("zero")

    @property
    def stage(self) -> int:
        """ZeRO's, of which FSDP is the third; 0 shares out nothing."""
        return {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}.get(self.kind, 0)


@dataclass(frozen=True)
class Cluster:
    """
    Args:
        gpu ([`GPU`]):
            Of which all are alike.
        n_gpus (`int`, *optional*, defaults to `1`):
            In all.
        n_nodes (`int`, *optional*, defaults to `1`):
            Over how many computers.
        network_gbps (`float`, *optional*, defaults to `50.0`):
            Between nodes, for each GPU, one way, in GB/s: 50 is one 400 Gbit/s adapter a GPU.
        sharding ([`Sharding`], *optional*):
            How training is spread.
        efficiency (`float`, *optional*, defaults to `0.4`):
            Share of the peak that large matrix products reach within a model: usual are 0.35 to 0.5.
        bandwidth_efficiency (`float`, *optional*, defaults to `0.7`):
            Share of the memory's and the links' bandwidth that is reached.
        op_seconds (`float`, *optional*, defaults to `6e-6`):
            What PyTorch takes to start one operation: a decoding step without a graph is often nothing else.
        reserved_gib (`float`, *optional*, defaults to `1.5`):
            Of each GPU's memory, what CUDA and its libraries take.
        device (`str`, *optional*, defaults to `"cuda"`):
            `"cpu"` for computers without a GPU, where TRL computes the output head otherwise.
    """

    gpu: GPU
    n_gpus: int = 1
    n_nodes: int = 1
    network_gbps: float = 50.0
    sharding: Sharding = Sharding()
    efficiency: float = 0.4
    bandwidth_efficiency: float = 0.7
    op_seconds: float = 6e-6
    reserved_gib: float = 1.5
    device: str = "cuda"

    def __post_init__(self):
        _check_numbers(self, ("network_gbps", "efficiency", "bandwidth_efficiency"))
        _check_numbers(self, ("op_seconds", "reserved_gib"), zero=True)
        for name in ("efficiency", "bandwidth_efficiency"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is a share of the peak: give at most 1.")
        for name in ("n_gpus", "n_nodes"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r}: give a whole number.")
        if self.n_gpus < 1 or self.n_nodes < 1 or self.n_gpus % self.n_nodes:
            raise ValueError(
                f"{self.n_gpus} GPUs on {self.n_nodes} nodes: give at least one of each, and as many GPUs on each "
                "node."
            )

    @property
    def link(self) -> float:
        """Bytes a second between neighbours in a ring over all GPUs: its slowest link counts."""
        slowest = self.gpu.link_gbps if self.n_nodes == 1 else min(self.gpu.link_gbps, self.network_gbps)
        return slowest * 1e9 * self.bandwidth_efficiency

    @property
    def bandwidth(self) -> float:
        """Bytes a second from a GPU's memory."""
        return self.gpu.memory_gbps * 1e9 * self.bandwidth_efficiency

    def flops(self, n_bytes: float) -> float:
        """Operations a second of matrix products with numbers of so many bytes."""
        return (self.gpu.bf16_tflops if n_bytes <= 2 else self.gpu.fp32_tflops) * 1e12 * self.efficiency


def _as_number(value: Any) -> Any:
    """YAML takes 6e-6, without a point, for a text."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def find_gpu(name: str) -> GPU:
    """A GPU of the catalogue by its name, however it is spelled."""

    def plain(text: str) -> str:
        return "".join(letter for letter in text.lower() if letter.isalnum())

    for known, gpu in GPUS.items():
        if plain(known) == plain(name):
            return gpu
    raise ValueError(
        f"There is no GPU {name!r} in the catalogue, which has {', '.join(GPUS)}. Describe another in a file: "
        f"--cluster FILE.yaml with `gpu: {{{', '.join(f'{field.name}: ...' for field in fields(GPU))}}}`."
    )


def read_cluster(path: str | Path, **changes: Any) -> Cluster:
    """
    A cluster from a YAML file with the arguments of [`Cluster`]; `gpu` is a name of the catalogue or the arguments of
    [`GPU`].

    Args:
        path (`str` or `Path`):
            The file.
        **changes:
            Arguments in place of the file's; None leaves the file's.
    """
    given = {name: _as_number(value) for name, value in read_settings(path).items()}
    known = {field.name for field in fields(Cluster)} - {"sharding"}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{path} says {', '.join(unknown)}, and a cluster has {', '.join(sorted(known))}.")
    if changes.get("gpu") is None and "gpu" not in given:
        raise ValueError(f"{path} names no GPU: add `gpu: H100`, or its figures.")
    if isinstance(given.get("gpu"), Mapping):
        try:
            figures = {name: value if name == "name" else _as_number(value) for name, value in given["gpu"].items()}
            given["gpu"] = GPU(**{"name": "GPU", **figures})
        except TypeError as error:
            names = ", ".join(field.name for field in fields(GPU))
            raise ValueError(f"{path} describes a GPU otherwise than by {names}: {error}.") from None
    elif "gpu" in given:
        given["gpu"] = find_gpu(str(given["gpu"]))
    return Cluster(**{**given, **{name: value for name, value in changes.items() if value is not None}})


def read_accelerate(path: str | Path) -> tuple[Sharding, int, int]:
    """A file of `accelerate launch`: how training is spread, over how many GPUs, on how many nodes."""
    given = read_settings(path)
    if "distributed_type" not in given:
        raise ValueError(f"{path} has no `distributed_type`: give a file of accelerate_configs/.")
    kind = str(given["distributed_type"])
    n_gpus, n_nodes = given.get("num_processes", 1), given.get("num_machines", 1)
    if not (isinstance(n_gpus, int) and isinstance(n_nodes, int)):
        raise ValueError(f"{path} has num_processes={n_gpus!r} and num_machines={n_nodes!r}: give whole numbers.")
    sharding = Sharding()
    if kind == "DEEPSPEED":
        settings = given.get("deepspeed_config") or {}
        if settings.get("deepspeed_config_file"):
            raise ValueError(f"{path} leaves everything to a file of DeepSpeed's own, which is not read here.")
        stage = settings.get("zero_stage", 2)
        if stage not in (1, 2, 3):
            raise ValueError(f"{path} has zero_stage={stage!r}, and known are 1, 2 and 3.")
        offload = {name: settings.get(f"offload_{name}_device", "none") for name in ("optimizer", "param")}
        sharding = replace(
            sharding,
            kind=f"zero{stage}",
            offload_optimizer=offload["optimizer"] not in ("none", None),
            offload_parameters=offload["param"] not in ("none", None),
        )
    elif kind == "FSDP":
        offload = bool((given.get("fsdp_config") or {}).get("fsdp_offload_params"))
        sharding = replace(sharding, kind="fsdp", offload_optimizer=offload, offload_parameters=offload)
    elif kind.startswith("MULTI_"):
        sharding = replace(sharding, kind="ddp" if n_gpus > 1 else "none")
    return sharding, n_gpus, n_nodes


def read_settings(path: str | Path) -> dict[str, Any]:
    """A YAML file of settings. Raises `ValueError` for what is none."""
    try:
        given = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds no settings (NAME: VALUE).")
    return given
