# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Small things to learn: each fails if one part of `AgentPPOTrainer` does not do its work."""

import numpy as np
import pytest
import torch
from by_hand import hash_of, read
from scripted import perturb
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trl_agents import ActionParser, AgentPPOTrainer
from trl_agents.tiny import tiny_model


# -- things to learn ----------------------------------------------------------------------------------------------

WORDS = ["<pad>", "<eos>", "<unk>", "go", "red", "green", "one", "two", "three", "a", "b"]

A, B = WORDS.index("a"), WORDS.index("b")


@pytest.fixture(scope="module")
def words_dir(tmp_path_factory):
    """A model of eleven words: an action is a token."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message['content'] + ' <eos> ' }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=template,
        padding_side="left",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer, hidden_size=32, num_hidden_layers=1).save_pretrained(folder)
    return str(folder)


class Probe:
    """Shows what it is told, and pays by a function of what it showed and what was done; ends after the last."""

    instructions = "go"

    def __init__(self, shown=("one",), pays=lambda shown, action: 0.0):
        self.shown, self.pays = shown, pays

    def reset(self, *, seed=None, options=None):
        self.step_number = 0
        first = self.shown[0]
        self.now = first if isinstance(first, str) else first[seed % len(first)]
        return self.now, {"legal_actions": ["a", "b"]}

    def step(self, action):
        reward = self.pays(self.now, action)
        self.step_number += 1
        over = self.step_number == len(self.shown)
        self.now = "" if over else self.shown[self.step_number]
        return self.now, reward, over, False, {"legal_actions": ["a", "b"]}

    def close(self):
        pass


@pytest.fixture
def learn(make_trainer, words_dir):
    def run(pays=None, shown=("one",), steps=60, **config):
        defaults = {
            "per_device_train_batch_size": 16, "max_completion_length": 1, "learning_rate": 1e-2, "max_steps": steps,
            "whiten_advantages": True, "value_coef": 0.5, "value_clip": None, "invalid_action_penalty": 0.0,
            "reward_normalization": "none", "num_iterations": 2, "value_learning_rate": 3e-2,
        }  # fmt: skip
        kwargs = {"action_parser": ActionParser(r"\b([ab])\b", template="{action}")}
        trainer = make_trainer(
            env=Probe, env_kwargs={"shown": shown, "pays": pays}, model=words_dir, kwargs=kwargs,
            **{"trainer_class": AgentPPOTrainer, **defaults, **config},
        )  # fmt: skip
        trainer.train()
        return trainer

    return run


def probability(trainer, shown, token, so_far=()):
    """Of a token as the first action on what is shown, and V before it."""
    ids = [*so_far, *trainer.processing_class.encode(f"go\n{shown} <eos>")]
    with torch.no_grad():
        states = trainer.causal_lm.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        return trainer.causal_lm.lm_head(states).softmax(-1)[token].item(), trainer.value_head(
            states[None, None]
        ).item()


def pays_a(shown, action):
    return float(action == "a")


def pays_b(shown, action):
    return float(action == "b")


@pytest.mark.parametrize(("pays", "token"), [(pays_a, A), (pays_b, B)])
def test_the_action_decides_the_reward(learn, pays, token):
    trainer = learn(pays)
    p, value = probability(trainer, "one", token)
    assert p > 0.95
    assert value == pytest.approx(1.0, abs=0.1)
    returns = [log["agents/return_mean"] for log in trainer.state.log_history if "agents/return_mean" in log]
    assert np.mean(returns[:3]) < 0.8 < 0.95 < np.mean(returns[-5:])


# Where nothing but values is to be learnt: whitening would blow the noise around them up
VALUES = {"whiten_advantages": False, "learning_rate": 3e-3, "value_coef": 1.0, "steps": 80}


def pays_by_colour(shown, action):
    return {"red": 1.0, "green": -1.0}[shown]


def test_the_observation_decides_the_value(learn):
    trainer = learn(pays_by_colour, shown=(("red", "green"),), **VALUES)
    assert probability(trainer, "red", A)[1] == pytest.approx(1.0, abs=0.06)
    assert probability(trainer, "green", A)[1] == pytest.approx(-1.0, abs=0.06)


def pays_by_both(shown, action):
    return float((shown == "red") == (action == "a"))


def test_observation_and_action_decide(learn):
    # With invalid actions at no cost, the random ones in their place would be a way out at half the pay
    settings = {"learning_rate": 3e-3, "steps": 120, "invalid_action_penalty": -1.0}
    trainer = learn(pays_by_both, shown=(("red", "green"),), per_device_train_batch_size=32, **settings)
    assert probability(trainer, "red", A)[0] > 0.9 and probability(trainer, "green", B)[0] > 0.9


def pays_at_the_end(shown, action):
    return float(shown == "three")


@pytest.mark.parametrize("lambda_", [0.0, 0.95])
def test_a_delayed_reward_is_discounted_per_turn(learn, lambda_):
    trainer = learn(pays_at_the_end, shown=("one", "two", "three"), discount=0.5, gae_lambda=lambda_, **VALUES)
    (played,) = trainer.play([0])
    seen, values = [], []
    for turn in played.turns:
        seen += turn.input_ids
        values.append(read(trainer, seen)[1][-1])
        seen += turn.action_ids
    assert values == pytest.approx([0.25, 0.5, 1.0], abs=0.06)  # three steps, two and one from the reward


def pays_the_same(shown, action):
    return 1.0


def test_a_constant_reward_moves_nothing_but_the_kl(learn):
    # Without a critic that must first find the constant: its value is told, and is right
    settings = {"detach_value_head": True, "steps": 10, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0}

    class Told(AgentPPOTrainer):
        def _make_value_head(self):
            head = super()._make_value_head()
            torch.nn.init.ones_(head.bias)
            return head

    for whiten in (True, False):
        trainer = learn(pays_the_same, trainer_class=Told, whiten_advantages=whiten, **settings)
        start = AutoModelForCausalLM.from_pretrained(trainer.model.name_or_path).state_dict()
        now = hash_of(trainer.model)
        torch.testing.assert_close(now, {name: start[name] for name in now}, rtol=0, atol=0)
        assert trainer.value_head.bias.item() == 1.0


def test_with_a_constant_reward_the_kl_falls(learn):
    class Moved(AgentPPOTrainer):
        def train(self, *args, **kwargs):
            perturb(self.causal_lm.base_model, size=0.1)
            return super().train(*args, **kwargs)

    settings = {"whiten_advantages": False, "learning_rate": 1e-3, "gae_lambda": 1.0, "trainer_class": Moved}
    ends = []
    for beta in (1e-9, 1.0):
        trainer = learn(pays_the_same, beta=beta, steps=40, **settings)
        kl = [log["agents/kl_mean"] for log in trainer.state.log_history if "agents/kl_mean" in log]
        ends.append(np.mean(kl[-5:]))
        assert kl[0] > 0.8
    assert ends[1] < 0.25 and ends[0] > 0.8


def test_a_strong_kl_holds_the_policy_to_its_reference(learn):
    free = learn(pays_a, beta=0.0, steps=30)
    for kl_in in ("reward", "loss"):
        held = learn(pays_a, beta=20.0, kl_in=kl_in, whiten_advantages=False, gae_lambda=1.0, steps=30)
        start = AutoModelForCausalLM.from_pretrained(held.model.name_or_path)
        ids = torch.tensor([held.processing_class.encode("go\none <eos>")])
        with torch.no_grad():
            kls = []
            for trainer in (held, free):
                now, then = (model(ids).logits[0, -1].log_softmax(-1) for model in (trainer.causal_lm, start))
                kls.append((now.exp() * (now - then)).sum().item())
        assert abs(kls[0]) < 0.1 < 1 < kls[1]
