# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Every `_qlora` YAML trains and saves on a CPU, in nf4, and its adapter loads on the model it was trained on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from recipe_runs import RECIPES, ROOT, parse, recipe
from scripted import save_tiny_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig

from trl_agents.lora import ADAPTER_FOLDER, StageAdapters, merge_adapter
from trl_agents.preferences import recommendation_demonstrations
from trl_agents.recipe import check_stages


CONFIGS = {path.stem.removesuffix("_qlora"): path for path in sorted((RECIPES / "configs").glob("*_qlora.yaml"))}
STANDARD = {
    "use_peft": True,
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": True,
    "lora_target_modules": "all-linear",
    "optim": "paged_adamw_8bit",
}
# Small, on data that need no network; a paged 8-bit optimizer is for GPUs
SMALL = ["--optim", "adamw_torch", "--dtype", "float32", "--bf16", "false", "--use_cpu", "true", "--max_steps", 1]
SMALL += ["--gradient_checkpointing", "false", "--disable_tqdm", "true", "--per_device_train_batch_size", 2]
SMALL += ["--gradient_accumulation_steps", 1, "--learning_rate", 0.01, "--warmup_steps", 0, "--save_strategy", "no"]
PLAYED = ["--max_completion_length", 8, "--num_generations", 2, "--num_eval_episodes", 2, "--num_transcripts", 4]
FOUR = ["--per_device_train_batch_size", 4, "--num_generations", 4]  # that some do better than others
SUMS = '{"n": 8, "min_steps": 1, "max_steps": 1, "max_value": 9}'
ASKED = ["--dataset", "arithmetic", "--dataset_kwargs", SUMS, "--num_test", 2, "--sft_batch_size", 4]
PREFERRED = ["--dataset", "recommendations", "--sft_epochs", 1, "--rm_epochs", 1, "--sft_batch_size", 4]
PREFERRED += ["--rm_batch_size", 4, "--num_train", 8, "--num_test", 2]
ONE_UPDATE = ["--steps_per_generation", 1, "--num_iterations", 1]
ARGUMENTS = {
    "grpo_bandit": PLAYED,
    "contextual_bandit": [*PLAYED, "--env_kwargs", '{"n_arms": 5, "horizon": 8}', *FOUR],
    "exploration": [*PLAYED, "--mechanisms", "none"],
    "ppo_tictactoe": [
        "--max_completion_length",
        8,
        "--num_eval_episodes",
        2,
        "--num_transcripts",
        4,
        "--num_iterations",
        1,
    ]
    + ["--generation_batch_size", 2],
    "reft": [*ASKED, *ONE_UPDATE, "--max_completion_length", 8, "--warmup_epochs", 1, "--sft_epochs", 1],
    "r1": [*ASKED, "--max_completion_length", 8, "--num_generations", 2, "--methods", "zero", "--num_votes", 1]
    + ["--base_epochs", 1],
    "rlhf": [*PREFERRED, *ONE_UPDATE, "--max_completion_length", 8],
    "dpo": [*PREFERRED, "--max_new_tokens", 8],
    "expert_iteration": ["--dataset", "arithmetic", "--arithmetic", SUMS, "--num_eval", 2, "--max_new_tokens", 24]
    + [
        "--rounds",
        1,
        "--num_samples",
        2,
        "--min_reward",
        "null",
        "--warmup_epochs",
        40,
        "--warmup_learning_rate",
        0.01,
    ],
}
# The stages that train an adapter, each with the stage that it is trained on
STAGES = {
    "exploration": {"rlft_none": "warmup"},
    "reft": {"warmup": "start", "sft": "start", "reft": "warmup"},
    "r1": {"zero": "base"},
    "rlhf": {"sft": "start", "ppo": "sft"},
    "dpo": {"sft": "start", "dpo": "sft"},
    "expert_iteration": {"warmup": "start", "round_1": "warmup"},
}


def test_every_main_recipe_has_one():
    assert set(CONFIGS) == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_they_say_what_qlora_is(name, tmp_path):
    given = yaml.safe_load(CONFIGS[name].read_text())
    assert {key: given[key] for key in STANDARD} == STANDARD
    _, args, model_args = parse(recipe(name), CONFIGS[name], "--output_dir", tmp_path)
    assert model_args.dtype == "bfloat16" and args.gradient_checkpointing
    assert not getattr(args, "separate_critic", False)  # a second trunk, trained in full


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_it_trains_and_saves(name, tmp_path):
    pytest.importorskip("bitsandbytes")
    module, arguments = recipe(name), [*SMALL, *ARGUMENTS[name]]
    if name in ("dpo", "rlhf"):  # their demonstrations are on the Hub
        recommendation_demonstrations(8, split="train").to_json(tmp_path / "demonstrations.json")
        arguments += ["--sft_dataset", tmp_path / "demonstrations.json"]
    module.main(*parse(module, CONFIGS[name], "--output_dir", tmp_path, *arguments))
    stages = STAGES.get(name)
    if stages is None:  # one stage, which saves its adapter
        check_adapter(tmp_path, tmp_path / "warmup")
        assert not (tmp_path / "model.safetensors").exists()
        return
    for stage, base in stages.items():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / stage)  # merged
        assert whole.dtype == torch.float32 and not hasattr(whole, "peft_config")
        # A model that knows nothing is paid nothing, and R1-Zero begins with one
        adapted = check_adapter(tmp_path / stage / ADAPTER_FOLDER, tmp_path / base, learnt=stage != "zero")
        ids = torch.arange(3, 12)[None]
        torch.testing.assert_close(whole(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-3)


def check_adapter(folder: Path, base: Path, learnt: bool = True) -> PeftModel:
    """It loads on the model it was trained on, and has learnt."""
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 16
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    moved = {name: value for name, value in model.named_parameters() if "lora_B" in name}
    assert len(moved) == 14  # all linear layers
    assert any(value.any() for value in moved.values()) or not learnt
    return model


@pytest.mark.slow
def test_zero2_on_two_processes(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("deepspeed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher += [str(ROOT / "tests" / "test_recipes_distributed.py"), "2", str(RECIPES / "grpo_bandit.py")]
    small = [str(value) for value in SMALL]
    at = small.index("--use_cpu")  # DeepSpeed's own device says so
    small[at : at + 2] = []
    command = [*launcher, "--config", str(CONFIGS["grpo_bandit"]), "--output_dir", str(tmp_path), *small]
    command += [str(value) for value in ARGUMENTS["grpo_bandit"]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    check_adapter(tmp_path, tmp_path / "warmup")


# -- the pieces -------------------------------------------------------------------------------------------------------


def make_adapter(base: Path, folder: Path) -> PeftModel:
    from peft import get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return model


def test_an_adapter_is_merged_into_whole_weights(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    adapted = make_adapter(base, tmp_path / "stage").eval()
    merge_adapter(base, tmp_path / "stage")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "stage")
    ids = torch.arange(5)[None]
    torch.testing.assert_close(whole(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)
    assert sorted(path.name for path in (tmp_path / "stage" / ADAPTER_FOLDER).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "stage" / ADAPTER_FOLDER)
    torch.testing.assert_close(again(ids).logits, adapted(ids).logits)
    with pytest.raises(ValueError, match="holds no adapter"):
        merge_adapter(base, tmp_path / "stage")


def test_without_an_adapter_nothing_changes(tmp_path):
    adapters = StageAdapters()
    assert adapters.trainer == adapters.config == adapters.settings == {} and adapters.of_reward_model() is adapters
    adapters.merge("nowhere", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_stage_depends_on_its_adapter():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"])
    adapters = StageAdapters(config, None, "bfloat16")
    assert adapters.settings == {"adapter": [4, 8, ["q_proj", "v_proj"], None, "bfloat16"]}
    assert adapters.config == {"model_init_kwargs": {"dtype": "bfloat16"}}
    judge = adapters.of_reward_model()
    assert judge.peft.task_type == "SEQ_CLS" and judge.peft.modules_to_save == ["score"] and judge.quantization is None


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"load_in_4bit": True}, "add use_peft"),
        ({"use_peft": True, "attn_implementation": "eager"}, "leave out attn_implementation"),
    ],
)
def test_what_stages_with_adapters_refuse(tmp_path, model, said):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    check_stages(args, ModelConfig(use_peft=True, load_in_4bit=True, dtype="bfloat16"), adapters=True)
    with pytest.raises(ValueError, match=said):
        check_stages(args, ModelConfig(**model), adapters=True)
