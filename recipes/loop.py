# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The whole method in one file, without a trainer: a small language model learns to play a bandit.

    python recipes/loop.py            # a few minutes on a CPU, nothing to download; --help lists the settings

Read from the bottom up: `main` is the method, each function above is one of its steps. `AgentGRPOTrainer` does the
same, with the same loss to 1e-6, for any model, environment and number of GPUs.

What differs from "LLMs are Greedy Agents" (https://huggingface.co/papers/2504.16078): the baseline compares episodes of
one bandit instead of all, future rewards are discounted, the reward is not normalised, AdamW, and the small model.
"""

import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from trl import TrlParser

from trl_agents import ActionParser, make_env
from trl_agents.agents import RandomAgent
from trl_agents.contexts import Briefing, ChatContext
from trl_agents.rollout.generation import Sampling, SlotBackend
from trl_agents.tiny import play_transcripts, tiny_model, tiny_tokenizer


@dataclass
class Settings:
    """The settings; `G` in the comments is `num_generations`."""

    n_arms: int = field(default=5, metadata={"help": "Arms of the bandit."})
    horizon: int = field(default=10, metadata={"help": "Steps of an episode."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of cross-entropy on a random player's episodes."})
    num_updates: int = field(default=60, metadata={"help": "Rollouts, each followed by an update."})
    num_prompts: int = field(default=8, metadata={"help": "Different bandits in a rollout."})
    num_generations: int = field(default=8, metadata={"help": "Episodes on each of these bandits (G)."})
    num_minibatches: int = field(default=2, metadata={"help": "Optimizer steps on each rollout."})
    max_completion_length: int = field(default=24, metadata={"help": "Token budget of one reply."})
    invalid_action_penalty: float = field(default=-5.0, metadata={"help": "Reward for a reply without an action."})
    discount: float = field(default=0.8, metadata={"help": "Weight of the next turn's return-to-go."})
    epsilon: float = field(default=0.2, metadata={"help": "How far the ratio may move before it is clipped."})
    beta: float = field(default=0.001, metadata={"help": "Coefficient of the KL to the reference model."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of AdamW."})
    seed: int = field(default=0, metadata={"help": "Seeds everything."})


@dataclass
class Episode:
    """One conversation: all its tokens, the turn that sampled each of them (-1: it was only read), a reward a turn."""

    ids: list[int]
    turn_index: list[int]
    rewards: list[float]
    regret: float = 0.0
    invalid: int = 0


def warm_up(model, tokenizer, messages, steps: int, batch_size: int = 8, learning_rate: float = 4e-3) -> None:
    """Cross-entropy on a random player's conversations: the model learns the form of a reply, and to play at random."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    texts = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in messages]
    for step in tqdm(range(steps), desc="Warm-up"):
        batch = [texts[i % len(texts)] for i in range(step * batch_size, (step + 1) * batch_size)]
        ids = tokenizer(batch, return_tensors="pt", padding=True, padding_side="right").input_ids  # (B, L)
        logits = model(ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def roll_out(model, tokenizer, envs, seeds, settings: Settings, round_: int) -> list[Episode]:
    """Play an episode from each seed, all side by side: environment -> text -> tokens -> action -> environment."""
    parser, context = ActionParser(), ChatContext(tokenizer)
    backend = SlotBackend(model, len(envs), Sampling((tokenizer.eos_token_id,)))  # keeps each conversation's KV cache
    luck = [np.random.default_rng([settings.seed, round_, slot]) for slot in range(len(envs))]
    episodes, readers, infos = [Episode([], [], []) for _ in envs], [], []
    for env, seed in zip(envs, seeds, strict=True):
        observation, info = env.reset(seed=seed)
        readers.append(context.begin(Briefing.of(env), observation, info))
        infos.append(info)
    for turn in range(settings.horizon):
        for slot, reader in enumerate(readers):
            backend.submit(slot, reader.prompt_ids, settings.max_completion_length, luck[slot])
        replies = {}
        while backend.busy:
            replies.update(backend.step())
        for slot, (env, episode, reader) in enumerate(zip(envs, episodes, readers, strict=True)):
            reply = replies[slot]
            # Tokens are kept as they were sampled, never decoded and encoded again
            episode.ids += [*reader.input_ids, *reply.ids]
            episode.turn_index += [-1] * len(reader.input_ids) + [turn] * len(reply.ids)
            legal_actions = infos[slot]["legal_actions"]
            parsed = parser.parse(context.decode(reply.ids), legal_actions)
            action = parsed.action if parsed.is_valid else luck[slot].choice(legal_actions).item()
            observation, reward, _, _, infos[slot] = env.step(action)
            # r_k = r_env + r_valid: the penalty falls on the turn that wrote no action, the reward is the world's
            episode.rewards.append(reward + (0.0 if parsed.is_valid else settings.invalid_action_penalty))
            episode.regret += infos[slot]["regret"]
            episode.invalid += not parsed.is_valid
            reader.observe(reply.ids, action, reward, observation, infos[slot])
    return episodes


def pad(episodes: list[Episode], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `(B, L)` and their turns `(B, L)`, -1 where a token was read, not sampled."""
    ids = pad_sequence([torch.tensor(episode.ids) for episode in episodes], True, pad_id)
    return ids, pad_sequence([torch.tensor(episode.turn_index) for episode in episodes], True, -1)


def turn_advantages(rewards: torch.Tensor, num_generations: int, discount: float) -> torch.Tensor:
    """
    What each turn `(B, K)` was worth, compared with the other episodes of its bandit. Whole groups stand in a row.

        G_k = r_k + discount * G_{k+1}                       the return-to-go: a turn cannot change what came before it
        A_k = (G_k - mean_group G_k) / (std + 1e-4)          the Monte-Carlo baseline, at the same turn; one std a group
    """
    returns = rewards.clone()
    for k in reversed(range(rewards.shape[1] - 1)):
        returns[:, k] += discount * returns[:, k + 1]
    groups = returns.unflatten(0, (-1, num_generations))  # (B / G, G, K)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    return (advantages / (advantages.std(dim=(1, 2), keepdim=True) + 1e-4)).flatten(0, 1)


def spread(turn_values: torch.Tensor, turn_index: torch.Tensor) -> torch.Tensor:
    """Each sampled token `(B, L)` gets its turn's value; what the model only read gets 0."""
    return turn_values.gather(1, turn_index.clamp(min=0)) * (turn_index >= 0)


def log_probs(model, ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """log pi(token_t | tokens before t), `(B, L - 1)`: nothing predicts the first token."""
    logps = model(ids, attention_mask=ids != pad_id).logits[:, :-1].log_softmax(-1)
    return logps.gather(2, ids[:, 1:, None]).squeeze(2)


def policy_loss(logps, old_logps, ref_logps, advantages, mask, epsilon, beta, num_items) -> torch.Tensor:
    """
    PPO's clipped objective with a KL to the reference, over the sampled tokens (TRL's `loss_type="dapo"`):

        rho_t = pi(t) / pi_old(t)
        kl_t  = rho_t * (pi_ref(t) / pi(t) - log(pi_ref(t) / pi(t)) - 1)         the k3 estimator, corrected by rho
        loss  = sum_t mask_t * (-min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) + beta * kl_t) / num_items
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    log_ref_ratio = ref_logps - logps
    kl = ratio * (log_ref_ratio.exp() - log_ref_ratio - 1)
    loss = -torch.min(ratio * advantages, clipped * advantages) + beta * kl
    return (loss * mask).sum() / num_items


def main(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    n_episodes = settings.num_prompts * settings.num_generations

    def bandit():
        return make_env(
            "trl_agents/Bandit-v0", n_arms=settings.n_arms, horizon=settings.horizon, distribution="bernoulli"
        )

    # 1. A model that can write replies. (Any causal LM with a tokenizer does: from here on nothing knows it is tiny.)
    messages = play_transcripts(bandit, RandomAgent(), range(10**6, 10**6 + 8 * settings.warmup_steps))["messages"]
    tokenizer = tiny_tokenizer("\n".join(message["content"] for message in row) for row in messages[:200])
    model = tiny_model(tokenizer, seed=settings.seed)
    warm_up(model, tokenizer, messages, settings.warmup_steps)
    reference = copy.deepcopy(model).requires_grad_(False)

    # 2. Learn by playing
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    envs = [bandit() for _ in range(n_episodes)]
    for update in (bar := tqdm(range(settings.num_updates), desc="RL")):
        # Each bandit is played G times: one seed, different luck of the model
        first = update * settings.num_prompts
        seeds = np.repeat(np.arange(first, first + settings.num_prompts), settings.num_generations).tolist()
        episodes = roll_out(model, tokenizer, envs, seeds, settings, update)

        rewards = torch.tensor([episode.rewards for episode in episodes])  # (B, K)
        turn_values = turn_advantages(rewards, settings.num_generations, settings.discount)
        ids, turn_index = pad(episodes, tokenizer.pad_token_id)  # (B, L)
        turn_index = turn_index[:, 1:]  # of the tokens that are predicted
        advantages, mask = spread(turn_values, turn_index), turn_index >= 0  # (B, L - 1)
        with torch.no_grad():
            old_logps = log_probs(model, ids, tokenizer.pad_token_id)
            ref_logps = log_probs(reference, ids, tokenizer.pad_token_id)

        for part in torch.randperm(n_episodes).chunk(settings.num_minibatches):
            logps = log_probs(model, ids[part], tokenizer.pad_token_id)
            loss = policy_loss(
                *(logps, old_logps[part], ref_logps[part], advantages[part], mask[part]),
                *(settings.epsilon, settings.beta, mask.sum() / settings.num_minibatches),
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return_ = sum(sum(episode.rewards) for episode in episodes) / n_episodes
        regret = sum(episode.regret for episode in episodes) / n_episodes
        invalid = sum(episode.invalid for episode in episodes) / (n_episodes * settings.horizon)
        kl = ((old_logps - ref_logps) * mask).sum() / mask.sum()
        bar.write(f"update {update:3d}  return {return_:6.2f}  regret {regret:5.2f}  invalid {invalid:4.0%}  KL {kl:.3f}")


if __name__ == "__main__":
    main(*TrlParser(Settings).parse_args_and_config())
