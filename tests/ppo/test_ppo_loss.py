# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What `AgentPPOTrainer` reads and where, its loss and gradients, and the KL: numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
from by_hand import EOS, PROMPT, Spy, answers, credited, hash_of, read, teach
from peft import LoraConfig
from scripted import Pay, ScriptedTrainer, acts, generate, loss_and_gradients, make_config, perturb, ready
from transformers import AutoModelForCausalLM, AutoTokenizer


# -- what is scored, and where it is read -------------------------------------------------------------------------


def test_tokens_and_values_are_read_in_the_state_before_them(make_trainer):
    trainer = make_trainer(env=None)
    perturb(trainer.model, size=0.1)
    completion = [50, 51, 52, EOS]
    batch = answers(completion, [53, EOS])
    logps = trainer.score_batch(batch)
    ids = torch.tensor([PROMPT + completion])
    labels = ids.clone()
    labels[:, : len(PROMPT)] = -100
    loss = AutoModelForCausalLM.from_pretrained(trainer.model.name_or_path)
    loss.load_state_dict(trainer.model.state_dict(), strict=False)
    assert logps[0].sum().item() == pytest.approx(-4 * loss(ids, labels=labels).loss.item(), abs=1e-4)
    by_hand, values = read(trainer, PROMPT + completion)
    assert logps[0].tolist() == pytest.approx(by_hand[2:], abs=1e-5)
    old_values = credited(trainer, [0.0, 0.0], batch)["old_values"]
    assert old_values[0].tolist() == pytest.approx(values[2:-1], abs=1e-5) and np.std(values) > 0.1


@pytest.mark.parametrize("level", ["turn", "token"])
@pytest.mark.parametrize("context", ["chat", "window"])
def test_the_ratio_is_one_before_the_first_update(make_trainer, gpt2_dir, context, level):
    # Rows of different length in a model with dropout and absolute positions, at a temperature
    trainer = make_trainer(
        acts("ab?", "s", "as", "bbb"), env_kwargs={"actions": "abs"}, model=gpt2_dir, temperature=0.7,
        num_iterations=2, beta=0.1, context=context, advantage_level=level, max_episode_length=128, trainer_class=Spy,
    )  # fmt: skip
    perturb(trainer.value_head, size=1.0)
    batch = generate(trainer)
    mask = batch["completion_mask"] * batch["tool_mask"]
    trainer.compute_loss(trainer.model, batch)
    logps = trainer.logps
    assert logps.requires_grad
    ratio = ((logps - batch["old_per_token_logps"]).exp() - 1) * mask
    assert ratio.abs().max() < 1e-5
    moved = (trainer.values - batch["old_values"]) * batch["value_mask"]
    assert moved.abs().max() < 1e-5 and batch["old_values"].std() > 0.1
    assert ((logps - batch["ref_per_token_logps"]) * mask).abs().max() < 1e-5
    metrics = trainer._metrics["train"]
    assert metrics["clip_ratio/region_mean"] == metrics["agents/value_clip_ratio"] == [0.0]
    assert metrics["agents/kl_mean"] == [pytest.approx(0.0, abs=1e-5)]
    # ... which are those of the tokens alone, at that temperature
    rows = [(batch["prompt_ids"][0][batch["prompt_mask"][0].bool()], batch["completion_ids"][0])]
    for prompt, completion in rows:
        length = int(batch["completion_mask"][0].sum())
        by_hand, values = read(trainer, [*prompt.tolist(), *completion[:length].tolist()])
        sampled = mask[0, :length].bool()  # the others carry no loss, and are not scored
        assert logps[0, :length][sampled].tolist() == pytest.approx(
            torch.tensor(by_hand[-length:])[sampled].tolist(), abs=1e-4
        )


def test_padding_on_the_left_moves_nothing(make_trainer, gpt2_dir):
    trainer = make_trainer(env=None, model=gpt2_dir)
    perturb(trainer.value_head, size=1.0)
    completions = [[50, 51, 52, EOS], [53, EOS]]
    scored = []
    for left in (0, 3, 40):
        batch = answers(*completions, prompts=[PROMPT, [60]], left=left)
        values = credited(trainer, [1.0, 0.0], batch)["old_values"]
        scored.append((trainer.score_batch(batch), values))
    mask = batch["completion_mask"]
    for logps, values in scored[1:]:
        torch.testing.assert_close(logps * mask, scored[0][0] * mask, rtol=0, atol=1e-5)
        torch.testing.assert_close(values, scored[0][1], rtol=0, atol=1e-5)
    by_hand, values = read(trainer, [60, 53, EOS])
    assert scored[2][0][1, :2].tolist() == pytest.approx(by_hand, abs=1e-5)
    assert scored[2][1][1, :2].tolist() == pytest.approx(values[:2], abs=1e-5)


@pytest.mark.parametrize("name", ["pad", "what pads"])
def test_padding_changes_neither_loss_nor_gradients(make_trainer, name):
    trainer = make_trainer(env=None, beta=0.1, num_iterations=2)
    perturb(trainer.model)
    completions, rewards = [[50, 51, 52, EOS], [53, EOS]], [1.0, -1.0]

    def losses(**padding):
        batch = answers(*completions, prompts=[PROMPT, [60]], **padding)
        shape = batch["completion_ids"].shape
        batch |= {f"{which}_per_token_logps": torch.full(shape, -5.0) for which in ("old", "ref")}
        return loss_and_gradients(trainer, credited(trainer, rewards, batch))

    loss, gradients = losses()
    # pad == eos, another token, and more of it on both sides
    others = [{"pad": EOS}, {"pad": 99}] if name == "pad" else [{"width": 9}, {"left": 5}, {"width": 9, "pad": EOS}]
    for padding in others:
        other_loss, other_gradients = losses(**padding)
        torch.testing.assert_close(other_loss, loss, rtol=0, atol=1e-5)
        torch.testing.assert_close(other_gradients, gradients, rtol=0, atol=1e-4)
    assert abs(loss) > 0.01 and gradients["value_head.weight"].abs().max() > 1e-3


def test_the_token_that_ends_a_reply_is_trained_and_none_behind_it(make_trainer):
    trainer = make_trainer(env=None, gae_lambda=1.0, value_coef=0.0)
    batch = credited(trainer, [1.0, 2.0], answers([50, 51, EOS], [EOS], width=5))
    assert batch["value_mask"].sum(1).tolist() == [3, 1]
    loss, _ = loss_and_gradients(trainer, batch)
    assert loss.item() == pytest.approx(-(3 * 1 + 1 * 2) / 4)  # ratio 1, the mean over all tokens
    trainer = make_trainer(acts("ab", "b?", "bb", "a"), env_kwargs={"horizon": 2})
    trainer.script[3] = ["ACTION=a", "ACTION=b"]
    batch = generate(trainer)
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert (batch["completion_ids"][mask] == trainer.processing_class.eos_token_id).sum() == 8  # one a turn
    sampled = sum(len(turn.action_ids) for trajectory in trainer.trajectories for turn in trajectory.turns)
    assert mask.sum() == batch["num_items_in_batch"] == sampled


def test_a_tokenizer_that_pads_with_its_end_token(make_trainer, model_dir, tmp_path):
    losses = []
    for pad in ("<|pad|>", "<|im_end|>"):
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        tokenizer.pad_token = pad
        script = acts("ab?", "s", "as", "bbb")
        kwargs = {"processing_class": tokenizer}
        trainer = make_trainer(script, env_kwargs={"actions": "abs"}, kwargs=kwargs, beta=0.1, whiten_advantages=True)
        perturb(trainer.model)
        batch = generate(trainer)
        losses.append(loss_and_gradients(trainer, batch))
        assert (batch["completion_ids"][batch["completion_mask"] == 0] == tokenizer.pad_token_id).all()
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    assert losses[0][0].abs() > 1e-3


# -- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "ratio", "learns"), [(1.0, 1.5, False), (-1.0, 1.5, True), (-1.0, 0.5, False), (1.0, 0.5, True)]
)
def test_the_ratio_is_clipped_on_the_side_it_moves_to(make_trainer, reward, ratio, learns):
    trainer = make_trainer(env=None, num_iterations=2, value_coef=0.0, gae_lambda=1.0)
    batch = answers([50, EOS])
    batch = credited(trainer, [reward], batch | {"old_per_token_logps": trainer.score_batch(batch) - math.log(ratio)})
    _, gradients = loss_and_gradients(trainer, batch)
    assert gradients["model.layers.0.mlp.up_proj.weight"].any() == learns


def value_golden(make_trainer, **config):
    """V_old .5, V .9, R 1 at one token, and no advantage."""
    trainer = make_trainer(env=None, **config)
    teach(trainer, [(PROMPT, 0.9)])
    one = torch.ones(1, 1)
    credit = {"advantages": 0 * one, "old_values": 0.5 * one, "returns": one, "value_mask": one}
    return trainer, answers([EOS]) | credit | {"num_value_steps": torch.tensor(1)}


@pytest.mark.parametrize(
    ("settings", "loss", "gradient"),
    [
        ({"value_coef": 5.0}, 0.225, 0.0),  # ReFT: 5 * 1/2 * .3^2
        ({}, 0.0045, 0.0),  # N+: .1
        ({"value_coef": 5.0, "value_clip": None}, 0.025, -0.5),
        ({"value_coef": 5.0, "value_clip": 0.5}, 0.025, -0.5),
        ({"value_coef": 0.0}, 0.0, 0.0),
    ],
)
def test_golden_value_loss(make_trainer, settings, loss, gradient):
    trainer, batch = value_golden(make_trainer, **settings)
    found, gradients = loss_and_gradients(trainer, batch)
    assert found.item() == pytest.approx(loss, abs=1e-4)
    assert gradients["value_head.bias"].item() == pytest.approx(gradient, abs=1e-3)
    plain = {0.225: 0.045, 0.0045: 0.045, 0.025: 0.005, 0.0: 0.045}[loss]
    assert trainer._metrics["train"]["agents/value_loss"] == [pytest.approx(plain, abs=1e-4)]
    clipped = settings.get("value_clip", 0.2) == 0.2
    assert trainer._metrics["train"]["agents/value_clip_ratio"] == [float(clipped)]


# Advantages 1 and -3 of completions of 2 and 8 tokens, with V 0, lambda 1: value losses .5 and 4.5
AGGREGATED = {
    "dapo": ((-2 + 24) / 10, (1 + 36) / 10),  # the mean over all tokens
    "bnpo": ((-2 + 24) / 10, (1 + 36) / 10),
    "grpo": ((-1 + 3) / 2, (0.5 + 4.5) / 2),  # the mean of each sample's mean
    "dr_grpo": ((-2 + 24) / 24, (1 + 36) / 24),  # over a constant: 2 samples of max_completion_length 12
}


@pytest.mark.parametrize("loss_type", AGGREGATED)
def test_loss_aggregation(make_trainer, loss_type):
    policy, value = AGGREGATED[loss_type]
    completions = [50, EOS], [50, 51, 52, 53, 54, 55, 56, EOS]
    for coef in (0.0, 1.0):
        trainer = make_trainer(env=None, gae_lambda=1.0, loss_type=loss_type, value_coef=coef, value_clip=None)
        batch = credited(trainer, [1.0, -3.0], answers(*completions))
        for training in (True, False):
            trainer.model.train(training)
            loss = trainer.compute_loss(trainer.model, batch)
            assert loss.item() == pytest.approx(policy + coef * value, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_accumulated_gradients_are_those_of_one_batch(make_trainer, loss_type):
    completions = [[50, EOS], [51, 52, 53, EOS], [EOS], [54, 55, 56, 57, EOS]] * 2
    found = []
    for steps, accumulation in ((1, 1), (4, 4), (4, 2)):  # the last: two updates a rollout, which are twice as much
        trainer = make_trainer(
            env=None,
            loss_type=loss_type,
            per_device_train_batch_size=8 // steps,
            steps_per_generation=steps,
            gradient_accumulation_steps=accumulation,
        )
        perturb(trainer.model)
        batch = credited(trainer, [1.0, -1.0, 0.5, 2.0, 0.0, -2.0, 1.0, 0.3], answers(*completions))
        trainer.model.zero_grad()
        for part in range(steps):
            rows = slice(part * 8 // steps, (part + 1) * 8 // steps)
            micro = {name: value if value.ndim == 0 else value[rows] for name, value in batch.items()}
            trainer.compute_loss(trainer.model, micro).backward()
        share = accumulation / steps
        found.append({name: share * value.grad for name, value in trainer.model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=2e-6)
    assert found[0]["value_head.weight"].abs().max() > 1e-3


def test_policy_and_value_gradients_add_up(make_trainer):
    def gradients(**config):
        trainer = make_trainer(acts("ab?", "s", "as", "bbb"), env_kwargs={"actions": "abs"}, **config)
        perturb(trainer.model)
        batch = generate(trainer)
        return loss_and_gradients(trainer, batch)[1], trainer, batch

    policy, trainer, batch = gradients(value_coef=0.0)
    both, _, _ = gradients(value_coef=2.0)
    batch["advantages"] = 0 * batch["advantages"]
    trainer.args.value_coef = 1.0
    _, value = loss_and_gradients(trainer, batch)
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, policy[name] + 2 * value[name], rtol=0, atol=1e-5)
    assert not policy["value_head.weight"].any() and value["model.layers.0.mlp.up_proj.weight"].any()


def test_without_a_value_loss_it_is_the_policys_loss_alone(make_trainer, model_dir, tmp_path):
    script, env_kwargs = acts("ab?", "s", "as", "bbb"), {"actions": "abs"}
    ppo = make_trainer(script, env_kwargs=env_kwargs, value_coef=0.0, beta=0.1, kl_in="loss", num_iterations=2)
    batch = generate(ppo)
    grpo = ScriptedTrainer(
        model_dir, env=Pay, args=make_config(tmp_path / "grpo", env_kwargs=env_kwargs, beta=0.1, num_iterations=2)
    )
    grpo.script = script
    theirs = generate(ready(grpo)) | {"advantages": batch["advantages"]}
    perturb(ppo.model)
    perturb(grpo.model)
    loss, gradients = loss_and_gradients(ppo, batch)
    their_loss, their_gradients = loss_and_gradients(grpo, theirs)
    torch.testing.assert_close(loss, their_loss, rtol=0, atol=1e-6)
    ours = {name: value for name, value in gradients.items() if "value_head" not in name}
    torch.testing.assert_close(ours, their_gradients, rtol=0, atol=1e-6)
    assert loss.abs() > 1e-3 and not gradients["value_head.weight"].any()


def test_kl_is_in_the_reward_or_in_the_loss_never_in_both(make_trainer):
    losses = {}
    for kl_in in ("reward", "loss"):
        for beta in (1e-6, 10.0):
            trainer = make_trainer(env=None, beta=beta, kl_in=kl_in, value_coef=0.0, gae_lambda=1.0, num_iterations=2)
            batch = answers([50, EOS])
            logps = trainer.score_batch(batch)
            batch |= {"old_per_token_logps": logps, "ref_per_token_logps": logps - torch.tensor([[0.2, -0.1]])}
            losses[kl_in, beta] = trainer.compute_loss(trainer.model, credited(trainer, [1.0], batch)).item()
            assert trainer.beta == beta  # put back
    assert losses["reward", 1e-6] == pytest.approx(-1.0, abs=1e-4) == losses["loss", 1e-6]
    # To go: 1 - 10 * .1 = 0 from the first token, 1 + 10 * .1 = 2 from the second
    assert losses["reward", 10.0] == pytest.approx(-1.0, abs=1e-4)
    assert losses["loss", 10.0] == pytest.approx(-1.0 + 10 * (0.018731 + 0.005171) / 2, abs=1e-4)


def test_the_reference_is_where_the_policy_started_and_stays_there(make_trainer):
    trainer = make_trainer(acts("abc", "caa", "bbb", "cba"), beta=0.1, learning_rate=0.1, max_steps=3)
    start = hash_of(trainer.model)
    torch.testing.assert_close(hash_of(trainer.ref_model), start, rtol=0, atol=0)
    trainer.train()
    torch.testing.assert_close(hash_of(trainer.ref_model), start, rtol=0, atol=0)
    kl = [log["agents/kl_mean"] for log in trainer.state.log_history if "agents/kl_mean" in log]
    assert len(kl) == 3 and kl[0] == 0.0 and abs(kl[1]) > 1e-3


def test_an_adapter_turned_off_is_the_reference(make_trainer, model_dir):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    kwargs = {"peft_config": config}
    trainer = make_trainer(acts("abc", "caa", "bbb", "cba"), beta=0.1, learning_rate=0.1, kwargs=kwargs, max_steps=3)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert all("lora_" in name or "value_head" in name for name in changed)
    assert any("lora_" in name for name in changed) and any("value_head" in name for name in changed)
    kl = [log["agents/kl_mean"] for log in trainer.state.log_history if "agents/kl_mean" in log]
    assert kl[0] == pytest.approx(0, abs=1e-5) and abs(kl[1]) > 1e-3
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    batch = generate(ready(trainer))
    first = slice(0, 1)
    ids = torch.cat([batch["prompt_ids"][first], batch["completion_ids"][first]], dim=1)
    with torch.no_grad(), trainer.model.disable_adapter():
        torch.testing.assert_close(trainer.model(ids).logits, base(ids).logits)
    scored = batch["ref_per_token_logps"][0]
    picked = base(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(scored) :, 0]
    sampled = batch["tool_mask"][0].bool()
    torch.testing.assert_close(scored[sampled], picked[sampled], rtol=0, atol=1e-4)


def test_without_kl_there_is_no_reference(make_trainer):
    trainer = make_trainer(acts("abc", "caa", "bbb", "cba"), beta=0.0)
    assert trainer.ref_model is None
    trainer.train()
    assert "ref_per_token_logps" not in generate(ready(trainer))
    assert not any("agents/kl_mean" in log for log in trainer.state.log_history)
    assert trainer.state.global_step == 2


def test_beta_adapts_to_the_kl_of_an_episode(make_trainer):
    config = {"beta": 0.2, "kl_target": 6.0, "kl_horizon": 10_000}
    trainer = make_trainer(env=None, **config)
    batch = answers([50, EOS], [50, EOS])
    logps = {"old_per_token_logps": torch.zeros(2, 2), "ref_per_token_logps": torch.full((2, 2), -6.0)}
    credited(trainer, [0.0, 0.0], batch | logps)  # 12 an episode: the error is cut to .2
    assert trainer.beta == pytest.approx(0.2 * (1 + 0.2 * 2 / 10_000))
    assert trainer._metrics["train"]["agents/kl_coef"] == [0.2]  # what the rewards were made with
    trainer.model.eval()
    before = trainer.beta
    credited(trainer, [0.0, 0.0], batch | logps)
    assert trainer.beta == before  # an evaluation leaves it alone
    assert trainer.memory()["kl_coef"] == before
    other = make_trainer(env=None, **config)
    other.recall(trainer.memory())
    assert other.beta == before
    fixed = make_trainer(env=None, beta=0.2)
    fixed.recall(trainer.memory())
    assert fixed.beta == 0.2
