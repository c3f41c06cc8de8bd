# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The files of `accelerate_configs/`: accelerate knows every key of them, and starts what they promise."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from launching import free_port, launch


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "accelerate_configs"

# distributed type, processes
EXPECTED = {
    "cpu": (DistributedType.MULTI_GPU, 2),  # see the comment in cpu.yaml
    "single_gpu": (DistributedType.NO, 1),
    "multi_gpu": (DistributedType.MULTI_GPU, 8),
    "zero1": (DistributedType.DEEPSPEED, 8),
    "zero2": (DistributedType.DEEPSPEED, 8),
    "zero3": (DistributedType.DEEPSPEED, 8),
    "zero3_offload": (DistributedType.DEEPSPEED, 8),
    "zero3_2node": (DistributedType.DEEPSPEED, 16),
    "fsdp2": (DistributedType.FSDP, 8),
    "fsdp2_2node": (DistributedType.FSDP, 16),
}
TWO_NODES = [name for name in EXPECTED if name.endswith("_2node")]


def unknown_options(path: Path) -> list[str]:
    """
    Keys of the nested tables that are no option of `accelerate launch`.

    accelerate's loader looks at the outer keys only, and a misspelt inner one is ignored without a word.
    """
    options = {action.dest for action in launch_command_parser()._actions}
    tables = [value for value in yaml.safe_load(path.read_text()).values() if isinstance(value, dict)]
    return [key for table in tables for key in table if key not in options]


def launch_arguments(path: Path):
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    return arguments


def test_every_file_is_named():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_loads(name):
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_processes) == EXPECTED[name]
    assert config.use_cpu == (name == "cpu")
    assert config.mixed_precision == ("no" if name == "cpu" else "bf16")
    assert config.num_machines == (2 if name in TWO_NODES else 1)
    assert unknown_options(path) == []


def test_planted_keys_are_found(tmp_path):
    text = (CONFIGS / "fsdp2.yaml").read_text()
    planted = tmp_path / "inner.yaml"
    planted.write_text(text.replace("fsdp_reshard_after_forward", "fsdp_reshard_after_foward"))
    assert unknown_options(planted) == ["fsdp_reshard_after_foward"]
    planted = tmp_path / "outer.yaml"
    planted.write_text(text.replace("machine_rank", "machine_rang"))
    with pytest.raises(ValueError, match="machine_rang"):
        load_config_from_file(str(planted))


def deepspeed_plugin(name: str, monkeypatch):
    from accelerate.utils import DeepSpeedPlugin

    arguments = launch_arguments(CONFIGS / f"{name}.yaml")
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(arguments)
    for variable, value in environment.items():
        if variable.startswith("ACCELERATE_"):
            monkeypatch.setenv(variable, value)
    return DeepSpeedPlugin()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stage_reaches_deepspeed(stage, monkeypatch):
    pytest.importorskip("deepspeed")
    plugin = deepspeed_plugin(f"zero{stage}", monkeypatch)
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == stage
    assert plugin.zero3_save_16bit_model == (stage == 3)
    # Left open, so that the trainer's own setting holds.
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"


def test_fsdp2_reaches_pytorch(monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin

    environment = prepare_multi_gpu_env(launch_arguments(CONFIGS / "fsdp2.yaml"))
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


def test_offload_reaches_deepspeed(monkeypatch):
    pytest.importorskip("deepspeed")
    plugin = deepspeed_plugin("zero3_offload", monkeypatch)
    zero = plugin.deepspeed_config["zero_optimization"]
    assert (zero["stage"], zero["offload_param"]["device"], zero["offload_optimizer"]["device"]) == (3, "cpu", "cpu")


@pytest.mark.parametrize("name", TWO_NODES)
def test_two_nodes_differ_from_one_in_nothing_else(name):
    two, one = (yaml.safe_load((CONFIGS / f"{stem}.yaml").read_text()) for stem in (name, name.removesuffix("_2node")))
    assert two == {**one, "num_machines": 2, "num_processes": 16, "main_process_port": 29500}


# The others train in test_world_size.py
STARTED = ["single_gpu", "multi_gpu", "zero3_offload", *TWO_NODES]
STEP = """
import sys, torch
from launching import start_on_cpu
settings = start_on_cpu()
from accelerate import Accelerator
accelerator = Accelerator(cpu=settings["use_cpu"])
if accelerator.state.deepspeed_plugin is not None:
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    # Its own Adam for the CPU takes minutes to compile
    config |= {"train_micro_batch_size_per_gpu": 1, "zero_force_ds_cpu_optimizer": False}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.001))
losses = []
for _ in range(5):
    x = torch.ones(1, 64, device=accelerator.device) * (1 + accelerator.process_index)
    loss = (model(x) - 3.0 * x.mean()).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(accelerator.gather(loss.detach()[None]).sum().item())
weights = accelerator.get_state_dict(model)
if accelerator.is_main_process:
    kind, shape = accelerator.distributed_type.value, tuple(weights["0.weight"].shape)
    print(kind, accelerator.num_processes, shape, losses[-1] < losses[0], file=open(sys.argv[1], "w"))
accelerator.wait_for_everyone()
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTED)
def test_starts_and_learns(name, tmp_path, monkeypatch):
    """As it is, but for the number of processes and the precision; two nodes are two launchers on this machine."""
    kind, _ = EXPECTED[name]
    if kind == DistributedType.DEEPSPEED:
        pytest.importorskip("deepspeed")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    script, told = tmp_path / "step.py", tmp_path / "told.txt"
    script.write_text(STEP)
    if name in TWO_NODES:
        port = free_port()
        options = {"main_process_ip": "127.0.0.1", "main_process_port": port}
        nodes = [{**options, "machine_rank": rank} for rank in range(2)]
    else:
        nodes = [{"num_processes": min(EXPECTED[name][1], 2)}]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda node: launch(name, script, told, **node), nodes))
    # Without an accelerator what is meant for GPUs runs on a single CPU each
    assert told.read_text().split()[0] == (kind.value if kind != DistributedType.MULTI_GPU else "MULTI_CPU")
    assert told.read_text().split(" ", 1)[1].strip() == f"{1 if name == 'single_gpu' else 2} (64, 64) True"


def test_every_file_is_started():
    from test_world_size import KINDS

    assert {*STARTED, *KINDS} == set(EXPECTED)
