# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The files of `accelerate_configs/`: accelerate knows every key of them, and starts what they promise."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


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
    "fsdp2": (DistributedType.FSDP, 8),
}


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


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stage_reaches_deepspeed(stage, monkeypatch):
    pytest.importorskip("deepspeed")
    from accelerate.utils import DeepSpeedPlugin

    arguments = launch_arguments(CONFIGS / f"zero{stage}.yaml")
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(arguments)
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
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


def test_cpu_starts_two_processes_that_know_each_other(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from accelerate import Accelerator\n"
        "accelerator = Accelerator(cpu=True)\n"
        "total = accelerator.reduce(torch.ones(1), 'sum').item()\n"
        "with open(f'{sys.argv[1]}/{accelerator.process_index}.txt', 'w') as file:\n"
        "    file.write(f'{accelerator.num_processes} {total}')\n"
        "accelerator.wait_for_everyone()\n"
        "accelerator.end_training()\n"  # else the first to leave may take the other down
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu.yaml")]
    done = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_text() for path in tmp_path.glob("*.txt")} == {"0.txt": "2 2.0", "1.txt": "2 2.0"}
