# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A scripted player through the real trainer: what the tests of trainers share."""

import torch

from trl_agents import AgentGRPOConfig, AgentGRPOTrainer
from trl_agents.rollout.generation import Reply
from trl_agents.tiny import tiny_model, tiny_tokenizer


TEXTS = [
    "Choose.\nSo far you have tried/seen:\nStep=0 State=paid 0 Action=a Reward=1\npaid 3\nwhat? noise",
    *(f"ACTION={action}" for action in "abcsx"),
]


class Pay:
    """Pays what its actions are worth, for `horizon` steps. `s` stops the episode, `x` breaks the environment."""

    PRICES = {"a": 0.0, "b": 1.0, "c": 3.0, "s": 2.0}

    instructions = "Choose."

    def __init__(self, horizon=3, actions="abc"):
        self.horizon = horizon
        self.info = {"legal_actions": list(actions)} if actions else {}

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return "", dict(self.info)

    def step(self, action):
        if action == "x":
            raise RuntimeError("the environment broke")
        self.steps += 1
        reward = self.PRICES[action]
        return f"paid {reward:.0f}", reward, self.steps == self.horizon or action == "s", False, dict(self.info)

    def close(self):
        pass


class Endless(Pay):
    """Goes on for ever."""

    def __init__(self):
        super().__init__(horizon=None)


class Words(Pay):
    """Any text is an action, and pays 1."""

    def __init__(self):
        super().__init__(actions=None)

    def step(self, action):
        self.steps += 1
        return f"You said {action}.", 1.0, self.steps == self.horizon, False, {}


class ScriptedBackend:
    """Slot i answers with the texts of `script[i]`, one a turn."""

    def __init__(self, tokenizer, script):
        self.tokenizer = tokenizer
        self.texts = [iter(texts) for texts in script]
        self.replies = []

    @property
    def busy(self):
        return bool(self.replies)

    def submit(self, slot, prompt_ids, max_new_tokens, rng):
        ids = [*self.tokenizer.encode(next(self.texts[slot])), self.tokenizer.eos_token_id]
        kept = tuple(ids[:max_new_tokens])
        self.replies.append((slot, Reply(kept, cut_off=len(kept) < len(ids))))

    def step(self):
        replies, self.replies = self.replies, []
        return replies

    def drain(self):
        pass


class ScriptedTrainer(AgentGRPOTrainer):
    """The real trainer, whose model's replies are written down: a list of texts for each episode of a rollout."""

    script = None

    def _make_backend(self, model, n_slots, *args):
        if self.script is None:
            return super()._make_backend(model, n_slots, *args)
        return ScriptedBackend(self.text_tokenizer, self.script)


def acts(*words):
    """`acts("abc", "caa")`: the replies of two episodes, a letter a turn; `?` is a reply without an action."""
    return [["what?" if letter == "?" else f"ACTION={letter}" for letter in word] for word in words]


def save_tiny_model(folder, texts=TEXTS, hidden_size=32, num_hidden_layers=1, **kwargs):
    """Saves a model as small as can be and its tokenizer; returns the folder."""
    tokenizer = tiny_tokenizer(texts, vocab_size=300)
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer, hidden_size, num_hidden_layers, **kwargs).save_pretrained(folder)
    return str(folder)


def make_config(output_dir, config_class=AgentGRPOConfig, **kwargs):
    """A configuration for seconds on a CPU. Rewards and advantages stay as they are, so that numbers can be worked."""
    if issubclass(config_class, AgentGRPOConfig):
        kwargs = {"reward_normalization": "none", **kwargs}
    defaults = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 12,
        "scale_rewards": "none",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
    }
    return config_class(output_dir=str(output_dir), **{**defaults, **kwargs})


def ready(trainer):
    """As it is within `train`: what calls outside of it need."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


def generate(trainer):
    """The next generation batch, scored, in the order of its episodes (TRL shuffles it afterwards)."""
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def perturb(model, size=0.02, seed=1):
    """Moves the policy, the same way each time, so that ratios are not 1 and the KL is not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def loss_and_gradients(trainer, batch):
    """TRL's loss of a batch, and its gradients by parameter name."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients
