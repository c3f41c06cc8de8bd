# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Pushing to the Hub, against a stand-in on this computer: all of the agent arrives, somebody else can let it play, and
no failure of the network costs a run anything.
"""

import contextlib
import copy
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.utils._http
import pytest
import torch
import transformers.utils.hub
from datasets import Dataset
from hub_server import TOKEN, HubServer
from huggingface_hub import constants, hf_api
from launching import free_port, let_gloo_go_at_exit
from peft import LoraConfig
from scripted import Pay, ScriptedTrainer, acts, make_config, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from trl_agents import AgentGRPOConfig, AgentGRPOTrainer, AgentPPOConfig, AgentPPOTrainer, hub, make_env
from trl_agents.agent_config import AGENT_CONFIG_FILE
from trl_agents.episodes import read_episodes
from trl_agents.evaluation import held_out_seeds
from trl_agents.hub import Token, push_folder
from trl_agents.recipe import stage_arguments
from trl_agents.report import push_stages, report_stages
from trl_agents.tables import Interval, markdown_table, summarize
from trl_agents.tiny import make_tiny_model
from trl_agents.value_head import VALUE_HEAD_FILE


SCRIPT = acts("abc", "b?", "s", "cbs")
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
MODEL_FILES = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
CARD_FILES = {"README.md", "learning_curve.png", "sample_episodes.txt", "sample_episodes.jsonl"}
AGENT_FILES = MODEL_FILES | CARD_FILES | {VALUE_HEAD_FILE, AGENT_CONFIG_FILE}


class ScriptedPPOTrainer(ScriptedTrainer, AgentPPOTrainer):
    """The real trainer, whose model's replies are written down."""


@contextlib.contextmanager
def pointed_at(url):
    """This process's client talks to `url`, without waiting between its attempts."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", cache)
        patch.setattr(hf_api.api, "endpoint", url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda _: None}))
        patch.setenv("HF_TOKEN", TOKEN)
        yield


@pytest.fixture
def server(tmp_path):
    with HubServer() as server, pointed_at(server.url):
        yield server


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def make(folder, model, trainer_class=ScriptedPPOTrainer, **settings):
    """A trainer of two steps that writes and pushes a checkpoint after each."""
    defaults = {
        "num_generations": 1,
        "env_kwargs": {"actions": "abcs"},
        "invalid_action": "end",
        "value_head_init": "normal",
        "save_strategy": "steps",
        "save_steps": 1,
        "push_to_hub": True,
        "hub_model_id": "agent",
        "hub_always_push": True,
    }
    peft_config = settings.pop("peft_config", None)
    args = make_config(folder, AgentPPOConfig, **(defaults | settings))
    trainer = trainer_class(model, env=Pay, args=args, peft_config=peft_config)
    trainer.script = SCRIPT
    return trainer


def commits(server, repo="someone/agent"):
    return server.repositories[repo].commits[1:]


def told_in(caplog, at_least=0):
    """The messages about pushes that failed, without the client's own. Those of jobs come late."""
    give_up = time.monotonic() + 20
    while True:
        messages = [record.message for record in caplog.records if record.name == "trl_agents.hub"]
        if len(messages) >= at_least or time.monotonic() > give_up:
            return messages
        time.sleep(0.01)


def files_of(folder):
    return {path.name for path in Path(folder).iterdir()}


# -- what arrives -----------------------------------------------------------------------------------------------------


PUSHED = {  # the commits of two steps, a checkpoint after each
    "end": [],
    "every_save": ["Training in progress, step 1", "Training in progress, step 2"],
    "checkpoint": [f"Training in progress, step {step}{what}" for step in (1, 2) for what in ("", ", checkpoint")],
    "all_checkpoints": [
        f"Training in progress, step {step}{what}" for step in (1, 2) for what in ("", ", checkpoint")
    ],
}


@pytest.mark.parametrize("strategy", PUSHED)
def test_checkpoints(server, model_dir, tmp_path, strategy):
    trainer = make(tmp_path / "out", model_dir, hub_strategy=strategy)
    trainer.train()
    assert [message for message, _ in commits(server)] == PUSHED[strategy]
    for step in (1, 2) if strategy != "end" else ():
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        pushed = next(files for message, files in commits(server) if message.endswith(f"step {step}"))
        assert pushed.keys() >= AGENT_FILES
        for name in ("model.safetensors", VALUE_HEAD_FILE):
            assert pushed[name] == (checkpoint / name).read_bytes()
        assert "| training episodes: `agents/return_mean` |" in pushed["README.md"].decode()
    folder = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}.get(strategy)
    kept = {name for name in server.repositories["someone/agent"].files if "checkpoint" in name}
    if folder is None:
        assert not kept
    else:
        assert kept >= {f"{folder}/{name}" for name in ("optimizer.pt", "trainer_state.json", "agent_state.json")}
        assert strategy == "all_checkpoints" or {name.split("/")[0] for name in kept} == {folder}


def test_at_the_end(server, model_dir, tmp_path):
    trainer = make(tmp_path / "out", model_dir, save_strategy="no")
    trainer.train()
    trainer.card_results = "| player | return |\n|---|---|\n| after | 5 |"
    info = trainer.push_to_hub()
    assert info.oid == server.repositories["someone/agent"].sha
    ((message, files),) = commits(server)
    assert message == "End of training" and files.keys() >= AGENT_FILES - {"learning_curve.png"}
    card = files["README.md"].decode()
    assert 'from_pretrained("someone/agent")' in card and "| after | 5 |" in card and "None" not in card.split("##")[0]
    assert "sample_episodes.jsonl" in card and "2402.03300" not in card and "1707.06347" in card
    episodes = read_episodes(tmp_path / "out" / "sample_episodes.jsonl")
    assert [episode.env_kwargs for episode in episodes] == [{"actions": "abcs"}] * len(episodes) and episodes
    assert {len(episode.trajectory.turns) for episode in episodes} <= {1, 2, 3}
    texts = files["sample_episodes.txt"].decode()
    assert all(str(episode.trajectory.seed) in texts for episode in episodes) and "ACTION=" in texts


def test_saving_pushes_and_what_is_there_already_is_not_sent_again(server, model_dir, tmp_path):
    trainer = make(tmp_path / "out", model_dir)
    trainer.train()
    trainer.save_model()
    trainer.push_to_hub()
    sent = [path for method, path in server.requests if path.startswith("/lfs/")]
    assert len(sent) == len(set(sent))
    weights = {content["model.safetensors"] for _, content in commits(server)[1:]}
    assert len(weights) == 1


def test_the_token_stays_at_home(server, model_dir, tmp_path):
    token, os.environ["HF_TOKEN"] = os.environ["HF_TOKEN"], "another"
    try:
        trainer = make(tmp_path / "out", model_dir, hub_token=TOKEN, hub_strategy="all_checkpoints")
        trainer.train()
        trainer.push_to_hub()
    finally:
        os.environ["HF_TOKEN"] = token
    files = server.repositories["someone/agent"].files
    assert "training_args.bin" in files and len(commits(server)) >= 4
    assert not [name for name, content in files.items() if TOKEN.encode() in content]
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert saved.hub_token is None and saved.learning_rate == trainer.args.learning_rate


def test_an_adapter(server, model_dir, tmp_path):
    """From a base model on the Hub it is pulled as it was trained; of one in a folder the card warns."""
    push_folder(model_dir, "someone/base")
    trainer = make(
        tmp_path / "out", "someone/base", peft_config=LoraConfig(**LORA), save_strategy="no", hub_model_id=None
    )
    trainer.train()
    trainer.push_to_hub()
    files = server.repositories["someone/out"].files  # without a name it is the folder's
    assert {"adapter_model.safetensors", "adapter_config.json", VALUE_HEAD_FILE} | CARD_FILES <= files.keys()
    assert "model.safetensors" not in files and "is an adapter" not in files["README.md"].decode()
    pulled = AutoModelForCausalLM.from_pretrained("someone/out")
    ids = torch.tensor([[5, 6, 7]])
    trained = trainer.model.eval()
    assert torch.allclose(pulled.eval()(ids).logits, trained(ids).logits, atol=1e-5)
    with trained.disable_adapter():
        assert not torch.allclose(pulled(ids).logits, trained(ids).logits, atol=1e-5)
    at_home = make(tmp_path / "home", model_dir, peft_config=LoraConfig(**LORA), push_to_hub=False)
    at_home.create_model_card()
    assert (
        f"its base model is a folder of the computer that trained it, `{model_dir}`"
        in (tmp_path / "home" / "README.md").read_text()
    )


def test_a_critic_is_pulled_with_its_policy(server, model_dir, tmp_path):
    trainer = make(tmp_path / "out", model_dir, save_strategy="no")
    trainer.train()
    trainer.push_to_hub()
    again = make(tmp_path / "again", "someone/agent", push_to_hub=False)
    assert torch.equal(again.value_head.weight, trainer.value_head.weight) and trainer.value_head.weight.any()


PLAY = """
import json, re, sys
from huggingface_hub import snapshot_download

folder = snapshot_download("someone/agent")
card = open(folder + "/README.md").read()
exec(re.search(r"```python\\n(from transformers import AutoModelForCausalLM.*?)```", card, re.S)[1])
"""


@pytest.mark.slow
def test_somebody_else_lets_it_play(tmp_path):
    """A fresh process that knows the repository only, and runs the code of its card, gets the measured returns."""
    settings = {"n_arms": 3, "horizon": 4}
    folder = make_tiny_model(
        lambda: make_env("trl_agents/Bandit-v0", **settings),
        tmp_path / "warm",
        n_transcripts=96,
        disable_tqdm=True,
        use_cpu=True,
    )
    with HubServer() as server, pointed_at(server.url):
        args = make_config(
            tmp_path / "out",
            AgentGRPOConfig,
            env_kwargs=settings,
            eval_temperature=0.0,
            max_completion_length=32,
            max_steps=1,
            push_to_hub=True,
            hub_model_id="agent",
        )
        trainer = AgentGRPOTrainer(folder, env="trl_agents/Bandit-v0", args=args)
        trainer.train()
        played = trainer.play(held_out_seeds(8))
        trainer.card_results = markdown_table(summarize({"after": played}))
        trainer.close_environments()
        trainer.push_to_hub()
        assert all(turn.parsed.is_valid for trajectory in played for turn in trajectory.turns)
        fresh = run_fresh([sys.executable, "-c", PLAY], server.url, tmp_path)
    assert fresh.returncode == 0, fresh.stderr[-3000:]
    returns = [float(number) for number in re.findall(r"return (-?[\d.]+)", fresh.stdout)]
    assert len(set(returns)) > 1
    assert returns == [pytest.approx(trajectory.return_, abs=0.01) for trajectory in played]
    assert f"{sum(returns) / 8:.2f} [" in (tmp_path / "out" / "README.md").read_text()


def run_fresh(command, url, home, **environment):
    """A command in a process of its own, which knows of this computer's Hub only where it is."""
    known = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    own = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(home / "hf_home")}
    return subprocess.run(
        command, env=known | own | environment, capture_output=True, text=True, timeout=600, cwd=home
    )


# -- what may go wrong ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nobody_there():
    with pointed_at(f"http://127.0.0.1:{free_port()}"):
        yield None


@contextlib.contextmanager
def somebody(failure=None, token=TOKEN):
    with HubServer() as server, pointed_at(server.url), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", token)
        server.fail(failure)
        yield server


FAILURES = {  # how, under which name, and what is told
    "refused": (nobody_there, "someone/agent", "Connect"),
    "503": (lambda: somebody(503), "someone/agent", "503"),
    "silent": (lambda: somebody("hang"), "someone/agent", "Timeout"),
    "token": (lambda: somebody(token="hf_wrong_token"), "someone/agent", "hf auth login"),
    "broken token": (lambda: somebody(), "someone/agent", "***"),
    "forbidden": (lambda: somebody(), "nobody/agent", "hf auth login"),
    "name": (lambda: somebody(), "some one/agent!", "use one like"),
    "offline": (lambda: somebody(), "someone/agent", "Unset HF_HUB_OFFLINE"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_no_repository(model_dir, tmp_path, caplog, monkeypatch, failure):
    """From the start to the end: the run is made, is saved, and says how it is pushed later."""
    monkeypatch.setattr(hub, "SECONDS_TO_CREATE", 0.2)
    how, name, told = FAILURES[failure]
    out = tmp_path / "out"
    with how():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", failure == "offline")
        token = "hf_wrong\ntoken" if failure == "broken token" else None
        trainer = make(out, model_dir, hub_model_id=name, hub_token=token, max_steps=1)
        assert len(told_in(caplog)) == 1  # now, not after the training
        trainer.train()
        trainer.save_model()
        assert trainer.push_to_hub() is None
    assert files_of(out) >= AGENT_FILES and files_of(out / "checkpoint-1") >= {"model.safetensors", VALUE_HEAD_FILE}
    name = "YOU/YOUR-AGENT" if failure == "name" else name
    for message in told_in(caplog):
        assert "creating the repository failed" in message and told in message
        assert f"hf upload {name} {out} . --exclude" in message
        assert "hf_wrong" not in message and TOKEN not in message


@pytest.mark.parametrize(
    ("how", "where"), [(500, "/preupload/"), (503, "/lfs/"), (403, "/commit/"), ("hang", "/commit/")]
)
def test_it_fails_on_the_way(server, model_dir, tmp_path, caplog, monkeypatch, how, where):
    """And recovers: the checkpoint's push in the background is lost, the one at the end brings everything."""
    monkeypatch.setattr(hub, "SECONDS_TO_UPLOAD", 0.2)
    trainer = make(tmp_path / "out", model_dir, max_steps=1, hub_strategy="checkpoint")
    server.fail(how, where)
    trainer.train()
    of_model, of_checkpoint = told_in(caplog, 2)
    assert of_model.startswith("Hub: pushing checkpoint-1 failed. ") and f"{tmp_path}/out . --exclude" in of_model
    assert f"{tmp_path}/out/checkpoint-1 last-checkpoint\n" in of_checkpoint
    assert trainer.push_to_hub() is None
    assert "(End of training) failed" in told_in(caplog)[-1] and commits(server) == []
    assert all(str(how) in message or how == "hang" and "Timeout" in message for message in told_in(caplog))
    server.fail(None)
    assert trainer.push_to_hub().oid
    assert server.repositories["someone/agent"].files.keys() >= AGENT_FILES


def test_the_command_makes_up_for_it(model_dir, tmp_path, caplog):
    with nobody_there():
        trainer = make(tmp_path / "out dir", model_dir, hub_model_id="someone/agent", max_steps=1)
        trainer.train()
        trainer.push_to_hub()
    (command,) = {line.strip() for line in told_in(caplog)[-1].splitlines() if "hf upload" in line}
    words = shlex.split(command)
    script = Path(sys.executable).parent / "hf"
    with HubServer() as server:
        done = run_fresh([str(script), *words[1:]], server.url, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        files = server.repositories["someone/agent"].files
    assert files.keys() >= AGENT_FILES and not [name for name in files if "checkpoint" in name]
    assert files["model.safetensors"] == (tmp_path / "out dir" / "model.safetensors").read_bytes()


def test_a_fault_of_ones_own_is_raised(server, model_dir, tmp_path, monkeypatch, caplog):
    trainer = make(tmp_path / "out", model_dir, save_strategy="no")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer.model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.push_to_hub()
    assert not told_in(caplog) and commits(server) == []


def test_a_push_that_is_not_waited_for(server, model_dir, tmp_path, caplog):
    trainer = make(tmp_path / "out", model_dir, save_strategy="no")
    server.fail(500)
    future = trainer.push_to_hub(blocking=False)
    assert future.exception() is not None
    assert "(End of training) failed" in told_in(caplog, 1)[-1]


def test_files_are_left_alone_while_they_are_pushed(server, model_dir, tmp_path):
    """Else the Hub gets half of a card, or a picture whose hash is another's."""
    trainer = make(tmp_path / "out", model_dir, save_strategy="no", hub_always_push=False)
    trainer.train()
    server.fail("hang", "/preupload/")
    job = trainer.push_to_hub(blocking=False)
    written = {name: (tmp_path / "out" / name) for name in ("README.md", "sample_episodes.txt", "learning_curve.png")}
    for path in written.values():
        path.write_text("being read")
    trainer.create_model_card()
    assert {path.read_bytes() for path in written.values()} == {b"being read"}
    server.fail(None)
    server.let_go.set()
    job.exception()
    trainer.create_model_card()
    assert all(path.read_bytes() != b"being read" for path in written.values())


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder(server, model_dir, tmp_path, caplog):
    assert push_folder(model_dir, "folder").oid == server.repositories["someone/folder"].sha
    assert server.repositories["someone/folder"].files.keys() >= {"model.safetensors", "tokenizer.json"}
    server.fail(503)
    assert push_folder(model_dir, "folder") is None
    assert f"hf upload folder {model_dir} . --exclude" in caplog.text


def test_stages_of_a_recipe(server, model_dir, tmp_path, caplog):
    """Each goes to a repository of its own, with the results in its card; where the first fails, the second comes."""
    for name in ("sft", "ppo", "bare"):
        shutil.copytree(model_dir, tmp_path / name)
    for name in ("sft", "ppo"):
        (tmp_path / name / "README.md").write_text("---\nlibrary_name: x\n---\n# Model\n")
    table = {"greedy": {"sft": Interval(0.5, 0.4, 0.6), "ppo": Interval(0.75, 0.7, 0.8)}}
    args = make_config(tmp_path / "out", push_to_hub=True, hub_model_id="someone/agent", hub_token=TOKEN)
    folders = [tmp_path / name for name in ("sft", "ppo", "bare")]
    report_stages(tmp_path / "out", table, "9 questions", folders=folders)
    assert not server.repositories
    server.fail(403, "/someone/agent-sft/")
    report_stages(tmp_path / "out", table, "9 questions", folders=folders, push=args)
    assert server.repositories.keys() == {"someone/agent-sft", "someone/agent-ppo"}
    files = server.repositories["someone/agent-ppo"].files
    assert b"| ppo | 0.75" in files["README.md"] and files.keys() >= {"accuracy.png", "model.safetensors"}
    (message,) = told_in(caplog)
    assert f"hf upload someone/agent-sft {tmp_path}/sft . --exclude" in message


@pytest.mark.parametrize("failure", [503, None])
def test_a_stage_of_trls_own_trainer(server, model_dir, tmp_path, failure):
    """As `dpo.py` has it: no failure of the Hub costs it anything, and the token stays at home."""
    server.fail(failure)
    asked = DPOConfig(
        str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id="someone/agent",
        hub_token=TOKEN,
    )
    folder = tmp_path / "out" / "dpo"
    pairs = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    args = stage_arguments(asked, folder)
    trainer = DPOTrainer(model_dir, args=args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(folder)
    trainer.create_model_card()
    assert torch.load(folder / "training_args.bin", weights_only=False).hub_token is None
    push_stages([folder], asked)
    assert asked.push_to_hub and asked.hub_token == TOKEN
    if failure is None:
        files = server.repositories["someone/agent-dpo"].files
        assert files.keys() >= {"model.safetensors", "training_args.bin", "README.md"}
        assert not [name for name, content in files.items() if TOKEN.encode() in content]


def test_a_token_copies_but_does_not_pickle():
    token = Token(TOKEN)
    assert copy.copy(token) == copy.deepcopy([token])[0] == TOKEN and f"Bearer {token}" == f"Bearer {TOKEN}"
    assert pickle.loads(pickle.dumps({"token": token})) == {"token": None}


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("failure", [None, 503, "hang"])
def test_two_processes(model_dir, tmp_path, failure):
    """The main one pushes, and the other does not wait for what does not come."""
    with HubServer() as server:
        server.fail(failure)
        command = [sys.executable, __file__, model_dir, str(tmp_path / "out")]
        with ThreadPoolExecutor(2) as pool:
            place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            runs = [
                pool.submit(run_fresh, command, server.url, tmp_path, RANK=str(rank), LOCAL_RANK=str(rank), **place)
                for rank in range(2)
            ]
        done = [run.result() for run in runs]
    for process in done:
        assert process.returncode == 0 and "done" in process.stdout, process.stderr[-4000:]
    told = [process.stderr.count("To push it later") for process in done]
    creations = server.requests.count(("POST", "/api/repos/create"))
    if failure is None:
        # What the end would push is all there already, and makes no commit
        ((message, files),) = commits(server)
        assert message == "Training in progress, step 1" and creations == 1 and told == [0, 0]
        assert files.keys() >= AGENT_FILES
    else:
        assert told == [3, 0] and creations == 3  # at the start, at the checkpoint, at the end


def one_of_two(model, folder):
    hub.SECONDS_TO_CREATE = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedTrainer, "script", SCRIPT)
        trainer = make(folder, model, max_steps=1, hub_strategy="every_save")
        trainer.train()
        trainer.push_to_hub()
        trainer.accelerator.wait_for_everyone()
    print("done")


if __name__ == "__main__":
    let_gloo_go_at_exit()
    one_of_two(*sys.argv[1:])
