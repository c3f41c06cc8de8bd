# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What does the frequency-bias protocol cost: every (prompt, action) by itself, and as the diagnosis reads it.

    OMP_NUM_THREADS=1 python tests/benchmarks/diagnose_cost.py

- `naive`: a forward pass for each of 25 histories x 101 repetitions x 10 actions, the whole prompt each time. Passes
  and tokens are counted for all; the time is measured on a sample spread over them and scaled up by tokens.
- `ours`: one whole run, prompts and figures included.

The sample's log-probabilities are compared too: the two must agree to 1e-4. The default model has random weights,
which cost what trained ones do; `--model` takes any other. On a CPU, seconds are computing time of this process, so
that a busy machine changes little; on a GPU they are wall-clock time.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import time

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_agents import make_env
from trl_agents.agents import RandomAgent, play_episode
from trl_agents.diagnostics.frequency_bias import frequency_bias
from trl_agents.diagnostics.histories import random_histories
from trl_agents.diagnostics.players import ModelPlayer, read_all
from trl_agents.diagnostics.scoring import TreeScorer
from trl_agents.evaluation import held_out_seeds
from trl_agents.tiny import tiny_model, tiny_tokenizer


def make_model(args: argparse.Namespace, env: functools.partial) -> tuple:
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), AutoTokenizer.from_pretrained(
            args.model
        )
    made = env()
    texts = [made.instructions, *(str(play_episode(made, RandomAgent(), seed=seed)) for seed in range(20))]
    made.close()
    tokenizer = tiny_tokenizer(texts)
    return tiny_model(tokenizer, args.hidden_size, args.layers).eval(), tokenizer


def sample_pairs(player: ModelPlayer, env: functools.partial, n_repetitions: int, n: int) -> list[tuple]:
    """`n` of all (prompt, reply) pairs, evenly spread, with the log-probability that the diagnosis has for each."""
    pairs, scorer = [], TreeScorer(player.model)
    histories = random_histories(env, held_out_seeds(25))
    for number, history in enumerate(histories[:: max(len(histories) // 5, 1)]):
        replies = [player._continuation(player.parser.format(action)) for action in history.legal_actions]
        prompts = read_all(player.context, player.parser, history.repeated(n_repetitions))[len(history.transitions) :]
        scores = scorer.score(prompts, replies)
        for place in range(number, len(prompts) * len(replies), max(len(prompts) * len(replies) * 5 // n, 1)):
            row, column = divmod(place, len(replies))
            pairs.append((prompts[row], replies[column], scores[row, column]))
    return pairs


@torch.no_grad()
def naive_score(model: torch.nn.Module, prompt: list[int], reply: list[int]) -> float:
    ids = torch.tensor([[*prompt, *reply]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(reply) + 1).logits[0, :-1]
    logprobs = logits.float().log_softmax(-1)
    return sum(logprobs[place, token].item() for place, token in enumerate(reply))


def main(args: argparse.Namespace) -> None:
    env = functools.partial(make_env, "trl_agents/Bandit-v0", n_arms=10)
    model, tokenizer = make_model(args, env)
    player = ModelPlayer(model, tokenizer, "model")
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    started = clock()
    measured, _ = frequency_bias(player, env, held_out_seeds(25), n_repetitions=args.repetitions, progress=True)
    measured["seconds"] = clock() - started

    pairs = sample_pairs(player, env, args.repetitions, args.sample)
    naive_score(model, *pairs[0][:2])
    started = clock()
    scores = [naive_score(model, prompt, reply) for prompt, reply, _ in pairs]
    seconds = clock() - started
    seconds *= measured["naive_tokens"] / sum(len(prompt) + len(reply) for prompt, reply, _ in pairs)

    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {model.device.type}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "naive": {
            "forward_passes": measured["naive_forward_passes"],
            "tokens": measured["naive_tokens"],
            "seconds": seconds,
            "measured_on": len(pairs),
        },
        "ours": {name: measured[name] for name in ("forward_passes", "tokens", "seconds")},
        "largest_difference": float(np.abs(np.array(scores) - [score for *_, score in pairs]).max()),
    }
    print(f"{result['parameters']:,} parameters, {result['machine']}")
    print(f"| | naive | ours | ratio |\n|---|---|---|---|\n{rows(result)}")
    print(f"Largest difference of log-probabilities over {len(pairs)} pairs: {result['largest_difference']:.1e}")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


def rows(result: dict) -> str:
    lines = []
    for name in ("forward_passes", "tokens", "seconds"):
        naive, ours = result["naive"][name], result["ours"][name]
        lines.append(f"| {name.replace('_', ' ')} | {naive:,.0f} | {ours:,.1f} | {naive / ours:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", help="path or Hub id; default: random weights")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--sample", type=int, default=200, help="(prompt, action) pairs that are timed one by one")
    parser.add_argument("--output", help="JSON file for the figures")
    main(parser.parse_args())
