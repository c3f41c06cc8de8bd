# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`trl-agents estimate`: every YAML is read, accelerate's files and a cluster's own, mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trl_agents.cli import main
from trl_agents.estimate.cluster import Cluster, Sharding, find_gpu, read_accelerate, read_cluster
from trl_agents.estimate.plan import find_script, read_plan
from trl_agents.estimate.shape import read_shape


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
BANDIT = ROOT / "recipes" / "configs" / "grpo_bandit_paper.yaml"
TINY = ROOT / "recipes" / "configs" / "grpo_bandit_tiny.yaml"
EIGHT = Cluster(find_gpu("H100"), 8)


def error_of(capsys, *arguments):
    assert main(["estimate", *map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


# -- what a YAML asks for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_is_read(config):
    plan = read_plan(config, EIGHT if "paper" in config.stem else Cluster(find_gpu("H100")), positions=4096)
    assert config.stem.startswith(plan.recipe)
    assert plan.rows >= 1 and 1 <= plan.mean_row_length <= plan.row_length <= 4096
    assert (plan.episode is None) == (plan.trainer in ("dpo", "sft")) == (plan.episodes == 0)
    assert (plan.adapter is not None and plan.adapter.bits == 4) == ("qlora" in config.stem)


def test_what_a_yaml_leaves_open_is_the_trainers():
    """grpo_bandit_paper.yaml on 8 GPUs: 16 episodes a rollout are 2 a GPU, in two updates on 50 turns each."""
    plan = read_plan(BANDIT, EIGHT, positions=8192)
    assert (plan.trainer, plan.episodes, plan.side_by_side, plan.rows, plan.updates) == ("grpo", 2, 2, 50, 2)
    assert plan.episode.n_turns == 50 and plan.episode.reply == 256 and plan.row_length <= 2048
    assert plan.kl and plan.reference and plan.checkpointing and plan.bf16 and plan.weight_bytes == 2
    assert plan.optimizer == "adafactor" and plan.attention == "eager" and plan.old_logps
    one = read_plan(BANDIT, Cluster(find_gpu("H100")), positions=8192)
    assert (one.episodes, one.updates) == (16, 16)


def test_changes_and_lengths_are_the_users():
    changes = {"per_device_train_batch_size": 2, "beta": 0.0, "use_peft": True, "lora_r": 8, "bf16": False}
    plan = read_plan(BANDIT, EIGHT, changes, reply_tokens=64, prompt_tokens=100, turns=3, env_delay=0.5)
    assert plan.episodes == 2 and plan.updates == 1 and not plan.kl and plan.adapter.rank == 8 and not plan.bf16
    assert plan.episode.n_turns == 3 and plan.episode.contexts[0] == 100 and plan.episode.reply == 64
    assert plan.row_length > plan.mean_row_length and plan.env_delay == 0.5
    assert read_plan(TINY, EIGHT, turns=100).episode.n_turns == 100


def test_one_turn_tasks_have_no_environment():
    plan = read_plan(ROOT / "recipes" / "configs" / "rlhf_paper.yaml", EIGHT, prompt_tokens=500)
    assert plan.trainer == "ppo" and plan.separate_critic and plan.reward_model and plan.kl
    assert plan.episode.n_turns == 1 and plan.row_length == 553 and plan.episodes == 64 and plan.updates == 4
    dpo = read_plan(ROOT / "recipes" / "configs" / "dpo_paper.yaml", EIGHT)
    assert dpo.rows == 16 and dpo.row_length == 640 and dpo.reference  # chosen and rejected


def test_the_recipe_is_found_by_the_yamls_name(tmp_path):
    assert find_script(BANDIT).stem == "grpo_bandit"
    own = tmp_path / "mine.yaml"
    own.write_text(TINY.read_text())
    with pytest.raises(ValueError, match="mine.yaml.*--recipe"):
        read_plan(own, EIGHT)
    assert read_plan(own, EIGHT, script=ROOT / "recipes" / "grpo_bandit.py").recipe == "grpo_bandit"
    with pytest.raises(ValueError, match="parse_arguments"):
        read_plan(own, EIGHT, script=ROOT / "recipes" / "loop.py")


# -- machines ---------------------------------------------------------------------------------------------------------


def test_accelerates_files_are_read(tmp_path):
    def kind(name):
        return read_accelerate(ROOT / "accelerate_configs" / f"{name}.yaml")

    assert kind("zero2") == (Sharding("zero2"), 8, 1)
    assert kind("zero3")[0].stage == 3 and kind("fsdp2")[0].kind == "fsdp" and kind("multi_gpu")[0].kind == "ddp"
    assert kind("single_gpu") == (Sharding("none"), 1, 1)
    text = (ROOT / "accelerate_configs" / "zero3.yaml").read_text()
    other = tmp_path / "offload.yaml"
    other.write_text(text.replace("device: none", "device: cpu").replace("num_machines: 1", "num_machines: 2"))
    sharding, n_gpus, n_nodes = read_accelerate(other)
    assert sharding.offload_optimizer and sharding.offload_parameters and (n_gpus, n_nodes) == (8, 2)
    with pytest.raises(ValueError, match="no `distributed_type`"):
        read_accelerate(TINY)


def test_a_cluster_of_ones_own(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("gpu: {memory_gib: 10, memory_gbps: 1, bf16_tflops: 2, fp32_tflops: 1, link_gbps: 3}\nn_gpus: 4\n")
    cluster = read_cluster(file, n_nodes=2, n_gpus=None)
    assert cluster.gpu.memory_gib == 10 and (cluster.n_gpus, cluster.n_nodes) == (4, 2)
    file.write_text("gpu: A100\nnetwork_gbps: 25\n")
    assert read_cluster(file).gpu is find_gpu("A100")
    for text, said in {
        "n_gpus: 4": "no GPU",
        "gpu: A100\ngpus: 4": "gpus",
        "gpu: {memory: 3}": "memory_gib",
        "gpu: A100\nn_gpus: 3\nn_nodes: 2": "3 GPUs on 2 nodes",
        "- a": "no settings",
        "a: [": "no YAML",
        "gpu: A100\nn_gpus: two": "n_gpus='two': give a whole number",
        "gpu: A100\nefficiency: 0": "efficiency=0: give a number above 0",
        "gpu: A100\nbandwidth_efficiency: 70": "bandwidth_efficiency=70 is a share",
        "gpu: A100\nreserved_gib: -1": "reserved_gib=-1.* of at least 0",
        "gpu: {memory_gib: 0, memory_gbps: 1, bf16_tflops: 2, fp32_tflops: 1, link_gbps: 3}": "memory_gib=0",
        "gpu: {memory_gib: 8, memory_gbps: fast, bf16_tflops: 2, fp32_tflops: 1, link_gbps: 3}": "memory_gbps='fast'",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_cluster(file)


def test_yamls_numbers_without_a_point(tmp_path):
    """PyYAML takes them for text."""
    file = tmp_path / "cluster.yaml"
    file.write_text("gpu: A100\nop_seconds: 8e-6\nreserved_gib: 0\n")
    cluster = read_cluster(file)
    assert cluster.op_seconds == 8e-6 and cluster.reserved_gib == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 5}", "zero_stage=5, and known are 1, 2 and 3"),
        ("distributed_type: MULTI_GPU\nnum_processes: many", "num_processes='many'"),
    ],
)
def test_files_that_say_what_there_is_not(tmp_path, text, said):
    file = tmp_path / "accelerate.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_accelerate(file)


def test_models_are_found_where_they_are(tmp_path):
    shape = read_shape("tiny")
    assert read_shape(None).n_parameters == shape.n_parameters
    shape.config.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert read_shape(name).n_parameters == shape.n_parameters
    assert read_shape("tiny", {"num_hidden_layers": 4}).n_layers == 4
    assert read_shape("google/gemma-2-2b").n_parameters == read_shape("google/gemma-2-2b-it").n_parameters
    with pytest.raises(ValueError, match="no n_layer"):
        read_shape("tiny", {"n_layer": 4})
    with pytest.raises(ValueError, match="num_hidden_layers=0: give at least 1"):
        read_shape("tiny", {"num_hidden_layers": 0})
    with pytest.raises(ValueError, match="refuses hidden_size='big'"):
        read_shape("tiny", {"hidden_size": "big"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no model"):
        read_shape(tmp_path / "empty")
    (tmp_path / "bert.json").write_text('{"model_type": "no_such"}')
    with pytest.raises(ValueError, match="no config.json"):
        read_shape(tmp_path / "bert.json")


# -- as a user types it -----------------------------------------------------------------------------------------------


def test_an_estimate_is_printed_and_written(tmp_path, capsys):
    file = tmp_path / "deep" / "estimate.json"
    assert main(["estimate", str(TINY), "--gpu", "l4", "--method", "lora", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    for part in ("LoRA of rank 16", "1 x L4 (24 GiB)", "KV cache", "fits: 22.5 GiB there", "bottleneck: rollout"):
        assert part in said, said
    found = json.loads(file.read_text())
    assert (
        found["recipe"] == "grpo_bandit" and found["adapter"]["rank"] == 16 and found["cluster"]["gpu"]["name"] == "L4"
    )
    assert found["memory"]["peak"] == max(sum(found["memory"][when].values()) for when in ("update", "rollout"))


def test_accelerates_file_says_how_many_gpus_there_are(tmp_path, capsys):
    command = ["estimate", str(TINY), "--accelerate_config", str(ROOT / "accelerate_configs" / "zero2.yaml")]
    assert main([*command, "--gpus", "4", "--set", "per_device_train_batch_size=2", "beta=0"]) == 0
    said = capsys.readouterr().out
    assert "4 x H100" in said and "zero2" in said and "reference" not in said and "2 rows" in said


def test_mistakes_are_told(tmp_path, capsys):
    assert "no YAML nowhere.yaml" in error_of(capsys, "nowhere.yaml")
    assert "no GPU 'H101'" in error_of(capsys, TINY, "--gpu", "H101")
    assert "NAME=VALUE" in error_of(capsys, TINY, "--set", "beta")
    assert "no folder 'no/such-model'" in error_of(capsys, TINY, "--model", "no/such-model")
    assert "There is no file nowhere.yaml" in error_of(capsys, TINY, "--accelerate_config", "nowhere.yaml")
    assert "generation_batch_size" in error_of(capsys, TINY, "--set", "num_generations=3")
    assert "betta" in error_of(capsys, TINY, "--set", "betta=1")
    assert "gradient_accumulation_steps=0" in error_of(capsys, TINY, "--set", "gradient_accumulation_steps=0")
    assert "--env_delay -1.0" in error_of(capsys, TINY, "--env_delay", "-1")
    broken = tmp_path / "grpo_bandit_mine.yaml"
    for text, said in {"a: [1": "is no YAML", "- a": "holds no settings", "": "holds no settings"}.items():
        broken.write_text(text)
        assert said in error_of(capsys, broken, "--recipe", ROOT / "recipes" / "grpo_bandit.py")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The Hub is not asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
