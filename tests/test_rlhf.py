# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""RLHF and DPO as a user runs them, with everything small: stages, figures, pictures, and mistakes told first."""

import dataclasses
import json
import math

import pytest
import recipe_runs
import yaml
from recipe_runs import RECIPES, parse, recipe

from trl_agents.preferences import PreferenceArguments


NAMES = ("rlhf", "dpo")
DATA = ["--dataset_kwargs", '{"n": 24}', "--num_test", 5, "--sft_epochs", 2, "--sft_batch_size", 8]
DATA += ["--rm_batch_size", 8, "--disable_tqdm", "true", "--logging_steps", 1]
SMALL = {
    "rlhf": [*DATA, "--max_steps", 5, "--per_device_train_batch_size", 2, "--max_completion_length", 6],
    "dpo": [*DATA, "--per_device_train_batch_size", 8, "--max_new_tokens", 6],
}
MEASURES = ["proxy reward", "true utility", "kl", "words"]


def run(name: str, *arguments, small: bool = True):
    return recipe_runs.run(f"{name}.py", *(SMALL[name] if small else []), *arguments, timeout=3000)


@pytest.mark.parametrize("config", sorted(path.stem for name in NAMES for path in RECIPES.glob(f"configs/{name}_*")))
def test_every_config_parses(config, tmp_path):
    path = RECIPES / "configs" / f"{config}.yaml"
    arguments = parse(recipe(config.split("_")[0]), path, "--output_dir", str(tmp_path))
    for key, value in yaml.safe_load(path.read_text()).items():  # every line has an effect
        parsed = [getattr(args, key) for args in arguments if hasattr(args, key)]
        assert key in ("output_dir", "bf16", "report_to") or value in parsed, key


def test_both_recipes_begin_with_the_same_stages():
    shared = {field.name for field in dataclasses.fields(PreferenceArguments)}
    tiny = [yaml.safe_load((RECIPES / "configs" / f"{name}_tiny.yaml").read_text()) for name in NAMES]
    rlhf, dpo = ({key: value for key, value in given.items() if key in shared} for given in tiny)
    assert rlhf == dpo and "sft_epochs" in rlhf


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """RLHF, and DPO beside it."""
    output_dir = tmp_path_factory.mktemp("rlhf")
    result = run("rlhf", "--output_dir", output_dir)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((output_dir / "metrics.json").read_text())
    stamps = {path: path.stat().st_mtime for path in output_dir.glob("*/model.safetensors")}
    assert "| ppo_no_kl |" in result.stdout
    result = run("dpo", "--output_dir", output_dir)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| dpo |" in result.stdout
    return output_dir, metrics, stamps


def test_rlhf_reports_proxy_utility_and_kl(finished):
    _, metrics, _ = finished
    assert list(metrics) == [*MEASURES, "curves"]
    for measure in MEASURES:
        assert list(metrics[measure]) == ["sft", "ppo", "ppo_no_kl"]
        for value in metrics[measure].values():
            assert value["low"] <= value["mean"] <= value["high"]
    assert metrics["kl"]["sft"]["mean"] == 0 < metrics["kl"]["ppo"]["mean"]


def test_the_curves_hold_every_rollout(finished):
    """The KL is known in the run without it too: that is what its tiny beta is for."""
    _, metrics, _ = finished
    assert list(metrics["curves"]) == ["ppo", "ppo_no_kl"]
    for curve in metrics["curves"].values():
        assert list(curve) == ["step", "kl", "proxy reward", "true utility"]
        assert curve["step"] == [1, 5]  # four updates on each rollout
        assert all(math.isfinite(value) for values in curve.values() for value in values)


def test_the_stages_are_where_they_belong(finished):
    output_dir, _, stamps = finished
    assert {path.parent.name for path in stamps} == {"start", "sft", "reward_model", "ppo", "ppo_no_kl"}
    for name in ("ppo", "ppo_no_kl"):
        assert (output_dir / name / "value_head.safetensors").exists()
        assert "true utility" in (output_dir / name / "README.md").read_text()
        assert (output_dir / f"replies_{name}.txt").read_text().count("\n> ") == 5
    assert (output_dir / "overoptimization.png").read_bytes().startswith(b"\x89PNG")
    betas = [json.loads((output_dir / name / "stage.json").read_text())["beta"] for name in ("ppo", "ppo_no_kl")]
    assert betas[0] > 0.01 and 0 < betas[1] < 1e-4


def test_dpo_finds_the_first_stages_done(finished):
    output_dir, rlhf, stamps = finished
    assert {path: path.stat().st_mtime for path in stamps} == stamps
    assert (output_dir / "dpo" / "model.safetensors").exists()
    assert (output_dir / "dpo" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert list(metrics) == MEASURES
    for measure in MEASURES:  # the same model, prompts and seeds, and no sampling in between
        assert list(metrics[measure]) == ["sft", "dpo"]
    assert metrics["kl"]["dpo"]["mean"] > 0
    assert "| dpo |" in (output_dir / "dpo" / "README.md").read_text()


def test_other_preferences_have_a_proxy_only(tmp_path):
    rows = [{"prompt": f"Is {n} even? ", "chosen": "Yes.", "rejected": "No, never."} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    files = ["--dataset", tmp_path / "pairs.jsonl", "--test_dataset", tmp_path / "pairs.jsonl"]
    arguments = [*files, "--dataset_kwargs", "{}", "--methods", "ppo", "--output_dir", tmp_path / "out"]
    result = run("rlhf", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics) == ["proxy reward", "kl", "words", "curves"]
    assert list(metrics["curves"]["ppo"]) == ["step", "kl", "proxy reward"]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("rlhf", ["--beta", "0"], "beta=0.0"),
        ("rlhf", ["--kl_in", "loss"], "kl_in='loss'"),
        ("rlhf", ["--use_peft", "true"], "separate_critic=True trains"),
        ("rlhf", ["--resume_from_checkpoint", "somewhere"], "leave resume_from_checkpoint out"),
        ("rlhf", ["--dataset", "pairs.json", "--dataset_kwargs", "{}"], "--test_dataset"),
        ("rlhf", ["--no_kl_steps", "0"], "no_kl_steps=0: give more than 0"),
        ("rlhf", ["--reward_weights", "2"], "reward_weights=.*leave it out"),
        ("rlhf", ["--value_head_init", "normal"], "value_head_init='normal': .*leave it out"),
        ("rlhf", ["--max_completion_length", "0"], "max_completion_length=0: give more than 0"),
        ("rlhf", ["--num_train", "4"], "4 prompts to train on, but each generation batch takes 128"),
        ("dpo", ["--max_new_tokens", "0"], "max_new_tokens=0: give more than 0"),
        ("rlhf", ["--num_train", "0"], "num_train=0: give more than 0"),
        ("dpo", ["--rm_epochs", "0"], "rm_epochs=0.0: give more than 0"),
        ("dpo", ["--num_test", "-1"], "num_test=-1: give more than 0"),
        ("dpo", ["--dataset_kwargs", '{"nois": 1}'], "nois is unknown"),
        ("dpo", ["--load_in_8bit", "true"], "add use_peft"),
    ],
)
def test_mistakes_are_told_first(tmp_path, name, arguments, said):
    module = recipe(name)
    settings = parse(module, module.DEFAULT_CONFIG, *arguments, "--output_dir", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=said):
        module.main(*settings)
    assert not (tmp_path / "out").exists(), "something was written before the error"


@pytest.mark.slow
def test_the_default_recipe_overoptimises_without_the_kl(tmp_path):
    """The main promise: the true utility rises with the KL, and falls below its peak without it."""
    result = run("rlhf", "--output_dir", tmp_path, "--disable_tqdm", "true", small=False)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    proxy, utility = metrics["proxy reward"], metrics["true utility"]
    assert utility["ppo"]["low"] > utility["sft"]["high"]
    assert proxy["ppo_no_kl"]["low"] > proxy["ppo"]["high"] > proxy["sft"]["high"]
    assert utility["ppo_no_kl"]["high"] < utility["ppo"]["low"]
    assert utility["ppo_no_kl"]["high"] < max(metrics["curves"]["ppo_no_kl"]["true utility"]) - 1
    assert metrics["kl"]["ppo_no_kl"]["low"] > metrics["kl"]["ppo"]["high"]


@pytest.mark.slow
@pytest.mark.long
def test_default_dpo_raises_the_true_utility(tmp_path):
    result = run("dpo", "--output_dir", tmp_path, "--disable_tqdm", "true", small=False)
    assert result.returncode == 0, result.stderr[-3000:]
    utility = json.loads((tmp_path / "metrics.json").read_text())["true utility"]
    assert utility["dpo"]["low"] > utility["sft"]["high"]
