# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Past selves of the policy as opponents, with real (tiny) models throughout."""

import functools
import itertools
import types
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from scripted import make_config, save_tiny_model

import trl_agents.self_play as self_play
from trl_agents import AgentGRPOTrainer, OpponentPool, make_env
from trl_agents.envs.tictactoe import TicTacToe
from trl_agents.self_play import copy_policy, thin_out
from trl_agents.tiny import tiny_model, tiny_tokenizer
from trl_agents.value_head import ValueHead


GAME = "trl_agents/TicTacToe-v0"
TEXTS = [TicTacToe().instructions, TicTacToe().describe("102010002"), *(f"ACTION={i}" for i in range(9))] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(TEXTS, vocab_size=400)


# -- the pool ---------------------------------------------------------------------------------------------------------


def test_thin_out_by_hand():
    assert thin_out([0, 10, 20], 3) == [0, 10, 20]
    assert thin_out([0, 10, 20, 30], 3) == [0, 20, 30]  # both gaps are 20: the earlier goes
    assert thin_out([0, 20, 30, 40], 3) == [0, 20, 40]  # 0..30 is 30 wide, 20..40 is 20
    assert thin_out([30, 0, 10], 2) == [0, 30] and thin_out([0, 10], 1) == [10]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_pool_stays_spread(size):
    kept = []
    for step in range(0, 2000, 10):
        kept = thin_out([*kept, step], size)
        assert len(kept) == min(size, step // 10 + 1) and kept[-1] == step
        assert size == 1 or kept[0] == 0
        gaps = np.diff(kept)
        assert size < 3 or len(gaps) == 0 or gaps.max() <= 4 * step / len(gaps)
    assert len(set(kept)) == size


@pytest.mark.parametrize("wrong", [{"size": 0}, {"every": 0}, {"latest": 1.5}, {"latest": -0.1}, {"random_moves": 2}])
def test_pool_checks_its_settings(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}={wrong[name]}"):
        OpponentPool(**wrong)


def test_some_moves_are_random():
    """As many as asked; the others are the model's, who is not asked for the random ones."""
    pool = OpponentPool(random_moves=0.3)
    pool.opponent = lambda board, legal_actions, rng: "the model's"
    moves = [pool("000000000", list("012345678"), np.random.default_rng(seed)) for seed in range(600)]
    random_moves = [move for move in moves if move != "the model's"]
    assert 0.24 * 600 < len(random_moves) < 0.36 * 600 and set(random_moves) == set("012345678")
    pool.random_moves = 0.0
    assert pool("000000000", ["0"], np.random.default_rng(0)) == "the model's"


def test_an_unbound_pool_names_the_mend():
    env = make_env(GAME, opponent=OpponentPool(), seat="first")
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match=r"pool\.bind\(trainer\)"):
        env.step("4")
    # All that a trainer's constructor asks for
    env = make_env(GAME, opponent=OpponentPool(), seat="second")
    observation, info = env.reset(seed=0)
    assert info["board"].count("2") == 1
    with pytest.raises(RuntimeError, match=r"pool\.bind\(trainer\)"):
        env.step(info["legal_actions"][0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), TEXTS)


def make_trainer(folder, output_dir, pool, bind=True, peft_config=None, **kwargs):
    defaults = {
        "advantage_estimator": "group",
        "learning_rate": 1e-2,
        "max_completion_length": 4,
        "num_train_seeds": 8,
        "temperature": 0.7,
    }
    trainer = AgentGRPOTrainer(
        folder,
        args=make_config(output_dir, **{**defaults, **kwargs}),
        env=functools.partial(make_env, GAME, opponent=pool, seat="random"),
        peft_config=peft_config,
    )
    if bind:
        pool.bind(trainer)
    return trainer


def logits_of(model):
    """A probe: logits after a fixed prompt."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(20)[None]).logits[0].float().clone()


def same_states(left, right):
    return left.keys() == right.keys() and all(
        left[step].keys() == right[step].keys()
        and all(torch.equal(left[step][name], right[step][name]) for name in left[step])
        for step in left
    )


def test_a_snapshot_is_a_frozen_past_self(folder, tmp_path):
    pool = OpponentPool(every=100, seed=3)
    trainer = make_trainer(folder, tmp_path, pool, max_steps=2)
    before = logits_of(trainer.model)
    assert torch.equal(logits_of(pool.opponent.model), before)
    assert pool.opponent._sampling.temperature == 0.7 and pool.opponent.max_new_tokens == 4
    trainer.train()
    assert pool.current == 0 and list(pool.snapshots) == [0]
    assert not torch.allclose(logits_of(trainer.model), before, atol=1e-2), "the policy has not moved"
    assert torch.equal(logits_of(pool.opponent.model), before)
    logs = [log for log in trainer.state.log_history if "agents/opponent_age_mean" in log]
    assert [log["agents/opponent_age_mean"] for log in logs] == [0.0, 1.0]
    assert all(0.0 <= log["agents/opponent_invalid_rate"] <= 1.0 for log in logs)
    assert not any(trajectory.stop.is_fault for trajectory in trainer.trajectories)


def test_the_drawn_one_plays(folder, tmp_path):
    pool = OpponentPool(size=3, every=1, latest=1.0)
    trainer = make_trainer(folder, tmp_path, pool, max_steps=3)
    trainer.train()
    assert sorted(pool.snapshots) == [0, 2, 3] and pool.current == 2  # drawn when step 3 began
    # Without checkpoints no file outlives its snapshot
    files = {int(path.stem[len("step_") :]): load_file(path) for path in (tmp_path / "opponents").iterdir()}
    assert same_states(files, pool.snapshots)
    pool._draw(3)
    assert pool.current == 3 and torch.equal(logits_of(pool.opponent.model), logits_of(trainer.model))
    pool.latest = 0.0
    drawn = []
    for step in range(40):
        pool._draw(step)
        drawn.append(pool.current)
        for name, parameter in pool.opponent.model.named_parameters():
            assert torch.equal(parameter, pool.snapshots[pool.current][name])
    assert set(drawn) == {0, 2, 3}
    pool._draw(7)
    assert pool.current == drawn[7]  # by the step alone


def noted(pool):
    """Writes down what the pool holds, and who plays, at the begin of each step."""
    notes, begin = {}, pool.on_step_begin

    def note(args, state, control, **kwargs):
        begin(args, state, control, **kwargs)
        notes[state.global_step] = pool.current, dict(pool.snapshots)

    pool.on_step_begin = note
    return notes


def test_a_resumed_run_meets_the_same_pool(folder, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}

    def run(max_steps, resume=None):
        pool = OpponentPool(size=3, every=1, latest=0.3, seed=5)
        notes = noted(pool)
        make_trainer(folder, tmp_path, pool, max_steps=max_steps, **settings).train(resume_from_checkpoint=resume)
        return notes

    checkpoint, files = str(tmp_path / "checkpoint-3"), tmp_path / "opponents"
    whole = run(5)
    # What the checkpoints of the steps 3 and 5 need, and no more
    assert {path.name for path in files.iterdir()} == {f"step_{step}.safetensors" for step in (0, 2, 3, 5)}
    resumed = run(4, checkpoint)
    assert list(resumed) == [3] and sorted(resumed[3][1]) == [0, 2, 3]
    assert resumed[3][0] == whole[3][0] and same_states(resumed[3][1], whole[3][1])
    # One that is gone is missed, and the run goes on
    (files / "step_2.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"held the snapshots of the steps \[0, 2, 3\].* goes on with \[0, 3\]"):
        assert sorted(run(4, checkpoint)[3][1]) == [0, 3]


def test_a_pool_of_another_policy_is_refused(folder, tmp_path):
    pool = OpponentPool()
    make_trainer(folder, tmp_path, pool)
    (tmp_path / "opponents").mkdir()
    save_file({"lora_A": torch.zeros(1)}, tmp_path / "opponents" / "step_0.safetensors")
    with pytest.raises(ValueError, match="holds other parameters than this policy trains, such as lora_A"):
        pool._find(0)


def test_bind_says_what_is_wrong(folder, tmp_path):
    pool = OpponentPool()
    trainer = make_trainer(folder, tmp_path, pool)
    with pytest.raises(ValueError, match="bound to a trainer already"):
        pool.bind(trainer)
    trainer.plays = False
    with pytest.raises(ValueError, match="has no `env` to play in"):
        OpponentPool().bind(trainer)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"context": "window", "window": 0}, 0), ({"context": "window"}, 1), ({"context": "chat"}, 1)],
)
def test_bind_tells_of_positions_the_policy_never_reads(folder, tmp_path, settings, told):
    pool = OpponentPool()
    trainer = make_trainer(folder, tmp_path, pool, bind=False, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pool.bind(trainer)
    assert sum("window=0 both read the same" in str(warning.message) for warning in caught) == told


# -- what is copied ---------------------------------------------------------------------------------------------------


def test_lora_shares_what_is_frozen(folder, tmp_path):
    pool, steps = OpponentPool(every=1, latest=0.0), itertools.count()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(folder, tmp_path, pool, max_steps=2, peft_config=config, gradient_checkpointing=True)
    trainer.train()
    own = dict(trainer.model.named_parameters())
    copied = dict(pool.opponent.model.named_parameters())
    assert own.keys() == copied.keys()
    for name, parameter in own.items():
        assert (copied[name] is parameter) == ("lora_" not in name), name
        assert not copied[name].requires_grad and parameter.requires_grad == ("lora_" in name)
    for weights in pool.snapshots.values():
        assert weights and all("lora_" in name for name in weights)
    while pool.current != 0:
        pool._draw(next(steps))
    # An adapter begins as none: the first past self is the model it was put on
    first, present = logits_of(pool.opponent.model), logits_of(trainer.model)
    with trainer.model.disable_adapter():
        assert torch.equal(first, logits_of(trainer.model)) and not torch.allclose(first, present, atol=1e-3)


def test_no_value_head_in_the_copy(tokenizer):
    model = tiny_model(tokenizer, 32, 1)
    head = ValueHead(32).attach(model)
    copied = copy_policy(model)
    assert not any("value_head" in name for name, _ in [*copied.named_parameters(), *copied.named_modules()])
    assert not any("value_head" in name for name in self_play._trained_parameters(model))
    with head.listen() as heard:
        assert torch.equal(logits_of(copied), logits_of(model)) and len(heard) == 1  # the policy's own
    assert model.value_head is head and copied.state_dict().keys() == {
        name for name in model.state_dict() if "value_head" not in name
    }
    assert copied.lm_head.weight is copied.model.embed_tokens.weight  # tied as before
    assert copied.lm_head.weight is not model.lm_head.weight


def test_a_copy_computes_with_its_own_weights(tokenizer):
    # TRL gives a policy such a `forward`, which holds on to the model it was made for
    model = tiny_model(tokenizer, 32, 1)
    forward = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: forward(*args, **kwargs), model)
    copied, before = copy_policy(model), logits_of(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    assert torch.equal(logits_of(copied), before) and not torch.equal(logits_of(model), before)
