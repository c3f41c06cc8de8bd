# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`recipes/grpo_bandit.py`: what it refuses before it writes anything; in two processes; when it is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recipe_runs
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_agents.agent_config import read_agent_config


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "recipes" / "grpo_bandit.py"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
SMALL = ["--num_transcripts", "12", "--num_eval_episodes", "6", "--rollout_batch_size", "8", "--disable_tqdm", "true"]
ONE_GROUP = ["--per_device_train_batch_size", "4", "--num_generations", "4", "--gradient_accumulation_steps", "1"]
ONE_GROUP += ["--rollout_batch_size", "4", "--save_steps", "1", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def recipe():
    return recipe_runs.recipe("grpo_bandit")


def arguments_of(recipe, *arguments):
    return recipe_runs.parse(recipe, recipe.DEFAULT_CONFIG, "--use_cpu", *arguments)


MISTAKES = {
    "a setting": (["--repetition_penalty", 1.1], "repetition_penalty=1.1"),
    "few seeds": (["--num_train_seeds", 2], "2 seeds to train on"),
    "an unreachable action": (["--action_pattern", r"ACTION=(\d)"], "No pattern can produce the legal action"),
    "no episodes to compare": (["--num_eval_episodes", 0], "num_eval_episodes=0: give more than 0"),
    "the environment": (["--env_kwargs", '{"horizon": 0}'], "horizon=0"),
    "a player": (["--players", "nobody"], "'nobody' is unknown"),
    "a game": (["--env_id", "trl_agents/TicTacToe-v0"], "TicTacToe-v0.*no argument .* Its arguments: opponent"),
    "nothing to resume": (["--resume_from_checkpoint", "true"], "holds no whole checkpoint: .* use 'auto'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_the_warm_up(recipe, tmp_path, mistake):
    arguments, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        recipe.main(*arguments_of(recipe, "--output_dir", tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trusted", [True, False])
def test_remote_code_reaches_model_and_tokenizer(recipe, tmp_path, monkeypatch, trusted):
    class Reached(Exception):
        pass

    def from_pretrained(name, **kwargs):
        raise Reached(kwargs["trust_remote_code"])

    monkeypatch.setattr(recipe.AutoTokenizer, "from_pretrained", from_pretrained)
    settings = ["--model_name_or_path", "some/model", "--trust_remote_code", trusted, "--output_dir", tmp_path]
    arguments = arguments_of(recipe, *settings)
    with pytest.raises(Reached, match=str(trusted)):
        recipe.main(*arguments)
    assert arguments[1].model_init_kwargs["trust_remote_code"] is trusted


def test_an_environment_without_an_end_of_its_own(recipe, tmp_path):
    """It hung at the very start, in the scripted players, and then would have in the warm-up."""
    limited = ["--env_id", "gymnasium:CliffWalking-v1", "--env_kwargs", "{}", "--max_turns", 5, "--max_steps", 1]
    limited += ["--players", "random", "--eval_temperature", 0.25, "--invalid_action", "end", "--output_dir", tmp_path]
    recipe.main(*arguments_of(recipe, *limited, *SMALL, *ONE_GROUP))
    table = json.loads((tmp_path / "metrics.json").read_text())
    assert list(table["shortened"]) == ["random", "before", "after"]
    assert all(value["mean"] == 1 for value in table["shortened"].values())
    how = [read_agent_config(tmp_path / folder) for folder in ("", "warmup")]
    assert how[0] == how[1] and how[0].max_turns == 5
    assert (how[0].temperature, how[0].invalid_action) == (0.25, "end")
    with pytest.raises(ValueError, match="other settings .*max_turns 5, now 6"):
        recipe.main(*arguments_of(recipe, *limited, "--max_turns", 6, *SMALL, *ONE_GROUP))


def test_resuming_finds_the_warm_up_done(recipe, tmp_path, monkeypatch):
    """
    It was made anew, in the place of the one that the checkpoints began from; and `Trainer` said that `lm_head.weight`
    was missing, which is the embeddings' under another name.
    """
    warned = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda message, *args: warned.append(message))

    def start(*changes):
        short = ["--env_kwargs", '{"n_arms": 2, "horizon": 3}', *SMALL, *ONE_GROUP]
        recipe.main(*arguments_of(recipe, *short, "--output_dir", tmp_path, *changes))

    def files():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "warmup").rglob("*")}

    start("--max_steps", 1)
    made = files()
    start("--max_steps", 2, "--resume_from_checkpoint", "true")
    assert files() == made and not [message for message in warned if "missing keys" in message]
    logged = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in logged if "loss" in log] == [1, 2]
    for changed, told in (("--env_kwargs", '{"n_arms": 3}'), "now .*'n_arms': 3"), (("--seed", 1), "seed 0, now 1"):
        with pytest.raises(ValueError, match=f"other settings .*{told}.*delete the folder"):
            start("--max_steps", 3, "--resume_from_checkpoint", "true", *changed)
    assert files() == made


# -- as a user starts it ----------------------------------------------------------------------------------------------

# An environment that notes which process played which seeds
RECORDING = """\
import os
from pathlib import Path

import gymnasium
from trl_agents.envs import Bandit


class Recorded(Bandit):
    def reset(self, *, seed=None, options=None):
        with open(Path(__file__).with_name(f"rank{os.environ['RANK']}.txt"), "a") as file:
            file.write(f"{seed}\\n")
        return super().reset(seed=seed, options=options)


gymnasium.register("Recorded-v0", entry_point=Recorded, order_enforce=False, disable_env_checker=True)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    (tmp_path / "recording.py").write_text(RECORDING)
    output_dir = tmp_path / "out"
    command = [*LAUNCH, "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), str(SCRIPT), "--use_cpu"]
    # 2 episodes a process and groups of 4: a process on its own would refuse to start
    command += ["--per_device_train_batch_size", "2", "--steps_per_generation", "1", "--num_generations", "4"]
    command += ["--max_steps", "2", "--env_id", "recording:Recorded-v0", *SMALL, "--output_dir", str(output_dir)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert set(metrics["regret"]) == {"random", "ucb", "thompson", "before", "after"}
    for name in ("regret.png", "learning_curve.png"):
        assert (output_dir / name).read_bytes().startswith(b"\x89PNG")
    played = [[int(seed) for seed in (tmp_path / f"rank{rank}.txt").read_text().split()] for rank in range(2)]
    training = [[seed for seed in seeds if seed < 4096] for seeds in played]
    # Two rollouts of one group each, whose four episodes lie on both processes; each process's first reset is a probe
    assert sorted(set(training[0])) == sorted(set(training[1])) and len(training[0]) == len(training[1])
    assert done.stdout.count("| after |") == 1, "more than one process reported"


@pytest.mark.slow
def test_ctrl_c_ends_it_and_keeps_what_was_learnt(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--use_cpu",
        "--max_steps",
        "100000",
        *SMALL,
        "--output_dir",
        str(tmp_path),
    ]
    command += ["--per_device_train_batch_size", "4", "--num_generations", "4", "--save_steps", "1"]
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        # A shell that starts us in the background makes us ignore Ctrl-C, and what we start inherits that
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130  # a thread that hangs would keep it alive
    finally:
        process.kill()
        process.wait()
    told = log.read_text()
    assert f"Interrupted. '{tmp_path}' keeps warmup, checkpoint-" in told and "Traceback" not in told
    assert "Training: 100000 updates" in told
    assert not (tmp_path / "metrics.json").exists()
    AutoTokenizer.from_pretrained(tmp_path / "warmup")
    AutoModelForCausalLM.from_pretrained(tmp_path / "warmup")
