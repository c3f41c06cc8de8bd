# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The whole method in one file, without a trainer: a small language model learns to play a bandit.

    python recipes/loop.py            # a few minutes on a CPU, nothing to download; --help lists the settings

`main` is the method: warm up, then again and again play, compare, learn. Each function above it is one step of that.
`AgentGRPOTrainer` does the same, with the same loss to 1e-6, for any model, environment and number of GPUs.

What differs from "LLMs are Greedy Agents" (https://huggingface.co/papers/2504.16078): the baseline compares episodes
of one bandit and not of all, later rewards are discounted, rewards are not normalised, and the model is tiny.
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
from trl_agents.tiny import tiny_model, tiny_tokenizer
from trl_agents.transcripts import play_transcripts


@dataclass
class Settings:
    n_arms: int = field(default=5, metadata={"help": "Arms of the bandit."})
    horizon: int = field(default=20, metadata={"help": "Steps of an episode (K)."})
    warmup_steps: int = field(default=200, metadata={"help": "Steps of warm-up on a random player's episodes."})
    num_updates: int = field(default=50, metadata={"help": "Rollouts, each followed by its optimizer steps."})
    num_prompts: int = field(default=4, metadata={"help": "Bandits in a rollout."})
    num_generations: int = field(default=8, metadata={"help": "Episodes on each bandit (G)."})
    num_minibatches: int = field(default=2, metadata={"help": "Optimizer steps on a rollout."})
    max_completion_length: int = field(default=24, metadata={"help": "Token budget of one reply."})
    invalid_action_penalty: float = field(default=-5.0, metadata={"help": "Added for a reply without an action."})
    discount: float = field(default=0.3, metadata={"help": "Weight of the next turn's return-to-go."})
    epsilon: float = field(default=0.2, metadata={"help": "How far the ratio may move before it is clipped."})
    beta: float = field(default=0.001, metadata={"help": "Coefficient of the KL to the reference model."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of AdamW, which falls to 0."})
    seed: int = field(default=0, metadata={"help": "Seeds everything."})


@dataclass
class Episode:
    """One conversation: its tokens, the turn that sampled each of them (-1: it was only read), a reward a turn."""

    ids: list[int] = field(default_factory=list)
    turn_index: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    regret: float = 0.0


def warm_up(model, tokenizer, conversations, steps: int, batch_size: int = 4, learning_rate: float = 3e-3) -> None:
    """Cross-entropy on a random player's conversations: the form of a reply, and to read what the last one gave."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    texts = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in conversations]
    for step in (bar := tqdm(range(steps), desc="Warm-up")):
        batch = texts[step * batch_size : (step + 1) * batch_size]
        ids = tokenizer(batch, return_tensors="pt", padding=True, padding_side="right").input_ids  # (B, L)
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits, ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def roll_out(model, tokenizer, envs, seeds, settings: Settings, round_: int) -> list[Episode]:
    """Play an episode from each seed, all side by side: environment -> text -> tokens -> action -> environment."""
    parser, context = ActionParser(), ChatContext(tokenizer)
    backend = SlotBackend(model, len(envs), Sampling((tokenizer.eos_token_id,)))  # keeps each conversation's KV cache
    luck = [np.random.default_rng([settings.seed, round_, slot]) for slot in range(len(envs))]
    episodes, readers = [Episode() for _ in envs], []
    for env, seed in zip(envs, seeds, strict=True):
        observation, info = env.reset(seed=seed)
        readers.append(context.begin(Briefing.of(env), observation, info))
    for turn in range(settings.horizon):
        for slot, reader in enumerate(readers):
            backend.submit(slot, reader.prompt_ids, settings.max_completion_length, luck[slot])
        replies = {}
        while backend.busy:  # each step samples one token in every conversation that waits for one
            replies.update(backend.step())
        for slot, (env, episode, reader) in enumerate(zip(envs, episodes, readers, strict=True)):
            reply = replies[slot]
            # Tokens are kept as they were sampled, never decoded and encoded again
            episode.ids += [*reader.input_ids, *reply.ids]
            episode.turn_index += [-1] * len(reader.input_ids) + [turn] * len(reply.ids)
            action = parser.parse(context.decode(reply.ids), env.labels, cut_off=reply.cut_off).action
            penalty = settings.invalid_action_penalty if action is None else 0.0
            if action is None:
                action = env.labels[luck[slot].integers(len(env.labels))]
            observation, reward, _, _, info = env.step(action)
            episode.rewards.append(reward + penalty)  # r_k = r_env + r_valid, on the turn that earned it
            episode.regret += info["regret"]
            reader.observe(reply.ids, action, reward, observation, info)
    return episodes


def turn_advantages(rewards: torch.Tensor, num_generations: int, discount: float) -> torch.Tensor:
    """
    How much better each turn `(B, K)` was than the same turn of the other episodes of its bandit:

        G_k = r_k + discount * G_{k+1}                 the return-to-go: a turn does not answer for what came before it
        A_k = (G_k - mean_g G_k) / (std + 1e-4)        mean over the G episodes of the group g, std over all turns
    """
    returns = rewards.clone()
    for k in reversed(range(rewards.shape[1] - 1)):
        returns[:, k] += discount * returns[:, k + 1]
    groups = returns.unflatten(0, (-1, num_generations))  # (B / G, G, K)
    advantages = (groups - groups.mean(dim=1, keepdim=True)).flatten(0, 1)
    return advantages / (advantages.std() + 1e-4)


def to_batch(
    episodes: list[Episode], settings: Settings, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids `(B, L)`; of the tokens that follow the first: which were sampled `(B, L-1)`, their advantages."""
    ids = pad_sequence([torch.tensor(episode.ids) for episode in episodes], True, pad_id)
    turn_index = pad_sequence([torch.tensor(episode.turn_index) for episode in episodes], True, -1)[:, 1:]
    rewards = torch.tensor([episode.rewards for episode in episodes])  # (B, K)
    advantages = turn_advantages(rewards, settings.num_generations, settings.discount)
    # Each token that the model sampled gets its turn's advantage. What it only read carries no loss.
    return ids, turn_index >= 0, advantages.gather(1, turn_index.clamp(min=0))


def log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    """log pi(token_t | the tokens before it), `(B, L-1)`: nothing predicts the first. Padding comes last, unseen."""
    logps = model(ids).logits[:, :-1].log_softmax(-1)
    return logps.gather(2, ids[:, 1:, None]).squeeze(2)


def policy_loss(logps, old_logps, ref_logps, advantages, mask, epsilon, beta, num_items) -> torch.Tensor:
    """
    PPO's clipped objective with a KL to the reference, a mean over sampled tokens (TRL's `loss_type="dapo"`):

        rho_t  = pi(t) / pi_old(t)
        kl_t   = rho_t * (pi_ref(t) / pi(t) - log(pi_ref(t) / pi(t)) - 1)     the k3 estimator, corrected for pi_old
        loss_t = -min(rho_t * A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) * A_t) + beta * kl_t
        loss   = sum_t mask_t * loss_t / num_items
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    log_ref_ratio = ref_logps - logps
    kl = ratio * (log_ref_ratio.exp() - log_ref_ratio - 1)
    loss = -torch.min(ratio * advantages, clipped * advantages) + beta * kl
    return (loss * mask).sum() / num_items


def main(settings: Settings) -> list[float]:
    torch.manual_seed(settings.seed)

    def bandit():
        kwargs = {"n_arms": settings.n_arms, "horizon": settings.horizon, "distribution": "bernoulli"}
        return make_env("trl_agents/Bandit-v0", **kwargs)

    # A model that can write replies. Any causal language model will do: from here on, nothing knows that it is tiny.
    seeds = range(10**6, 10**6 + 4 * settings.warmup_steps)
    conversations = play_transcripts(bandit, RandomAgent(repeat=0.5), seeds)["messages"]
    tokenizer = tiny_tokenizer("\n".join(message["content"] for message in row) for row in conversations[:200])
    model = tiny_model(tokenizer, seed=settings.seed)
    warm_up(model, tokenizer, conversations, settings.warmup_steps)
    reference = copy.deepcopy(model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, settings.num_updates)
    n_episodes, pad_id = settings.num_prompts * settings.num_generations, tokenizer.pad_token_id
    envs = [bandit() for _ in range(n_episodes)]
    regrets = []
    for update in (bar := tqdm(range(settings.num_updates), desc="Learning")):
        # Play. A group is G episodes on one bandit: the same seed, other luck of the model.
        bandits = update * settings.num_prompts + np.arange(settings.num_prompts)
        seeds = bandits.repeat(settings.num_generations).tolist()
        episodes = roll_out(model, tokenizer, envs, seeds, settings, update)

        # Compare.
        ids, mask, advantages = to_batch(episodes, settings, pad_id)
        with torch.no_grad():
            old_logps, ref_logps = log_probs(model, ids), log_probs(reference, ids)

        # Learn. From the second minibatch on the policy is no longer the one that played: hence ratio and clipping.
        num_items = mask.sum() / settings.num_minibatches
        for part in torch.randperm(n_episodes).chunk(settings.num_minibatches):
            batch = [tensor[part] for tensor in (old_logps, ref_logps, advantages, mask)]
            logps = log_probs(model, ids[part])
            loss = policy_loss(logps, *batch, settings.epsilon, settings.beta, num_items)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()

        regrets.append(np.mean([episode.regret for episode in episodes]).item())
        return_ = np.mean([sum(episode.rewards) for episode in episodes])
        kl = ((old_logps - ref_logps) * mask).sum() / mask.sum()
        # Regret depends on the bandits drawn more than on the player: the mean of the last ten updates tells more
        mean = np.mean(regrets[-10:])
        bar.write(f"{update + 1:3d}  return {return_:6.2f}  regret {regrets[-1]:5.2f} (ten: {mean:.2f})  KL {kl:5.3f}")
    by_chance = settings.horizon * (settings.n_arms / (settings.n_arms + 1) - 1 / 2)
    print(f"Regret of the last ten updates: {mean:.2f}. A player by chance: {by_chance:.2f}.")
    return regrets


if __name__ == "__main__":
    main(*TrlParser(Settings).parse_args_and_config())
