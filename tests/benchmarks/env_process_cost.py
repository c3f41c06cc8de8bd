# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What `env_processes=True` costs: a step's way to the environment and back, in a thread and in a process of its own.

    OMP_NUM_THREADS=1 python tests/benchmarks/env_process_cost.py

The environment answers at once, so nothing but the way is measured. Threads and processes take turns, so that a busy
machine is busy for both; figures are medians over the rounds of steps. `start` is the first `reset`: the environment
made, and for a process its Python started.
"""

import argparse
import json
import statistics
import time

from trl_agents.rollout.workers import EnvPool


class Instant:
    """Answers at once."""

    def reset(self, *, seed=None, options=None):
        return "Begin.", {"legal_actions": ["go", "stop"]}

    def step(self, action):
        return "Go on." * 20, 1.0, False, False, {"legal_actions": ["go", "stop"]}

    def close(self):
        pass


def play(pool, ask):
    """Seconds until all places have answered."""
    started, missing = time.perf_counter(), len(pool.workers)
    for slot in range(missing):
        ask(slot)
    while missing:
        replies = pool.collect(0.0, block=True)
        assert not any(reply.fault for reply in replies), replies
        missing -= len(replies)
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--side_by_side", type=int, nargs="+", default=[1, 8], help="environments at a time")
    parser.add_argument("--steps", type=int, default=200, help="steps of each environment in a round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    args = parser.parse_args()
    for number in args.side_by_side:
        pools = {kind: EnvPool(Instant, number, processes=kind == "process") for kind in ("thread", "process")}
        start = {kind: play(pool, lambda slot, pool=pool: pool.reset(slot, 0)) for kind, pool in pools.items()}
        seconds = {kind: [] for kind in pools}
        for _ in range(args.repeats):
            for kind, pool in pools.items():
                rounds = [play(pool, lambda slot, pool=pool: pool.step(slot, "go")) for _ in range(args.steps)]
                seconds[kind].append(sum(rounds) / args.steps / number)
        for pool in pools.values():
            pool.close()
        step = {kind: statistics.median(values) for kind, values in seconds.items()}
        row = {f"{kind}_us": round(1e6 * value, 1) for kind, value in step.items()}
        row |= {"ratio": round(step["process"] / step["thread"], 2), "start_seconds": round(start["process"], 2)}
        print(json.dumps({"side_by_side": number, **row}), flush=True)


if __name__ == "__main__":
    main()
