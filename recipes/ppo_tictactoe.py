# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A language model learns to play tic-tac-toe: PPO with a value head, in the setting of "LLMs are Greedy Agents".

    accelerate launch recipes/ppo_tictactoe.py                                        # minutes, on any computer
    accelerate launch recipes/ppo_tictactoe.py --config recipes/configs/ppo_tictactoe_self_play.yaml

Without --config it runs recipes/configs/ppo_tictactoe_tiny.yaml; without --model_name_or_path it makes a small model
and warms it up on a random player's games. recipes/README.md says what to expect.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_agents import ActionParser, AgentPPOConfig, AgentPPOTrainer, OpponentPool, check_run, make_env
from trl_agents.agents import RandomAgent
from trl_agents.envs.tictactoe import TicTacToe
from trl_agents.evaluation import held_out_seeds, play_agents, play_opponents
from trl_agents.recipe import announce_training, check_resumption, load_as, warm_up
from trl_agents.report import report_games
from trl_agents.script import argument, check_positive, run
from trl_agents.stages import announce
from trl_agents.tables import summarize
from trl_agents.transcripts import board_rationale


OPPONENTS = ("random", "noisy", "optimal")
RATIONALES = {"board": board_rationale, "none": None}
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "ppo_tictactoe_tiny.yaml"


@dataclass
class ScriptArguments:
    """Arguments of the recipe."""

    env_id: str = argument("trl_agents/TicTacToe-v0", "Id of the game.")
    action_pattern: str | None = argument(
        None, "Regular expression with one group that finds the action. Default: ACTION=X."
    )
    num_eval_episodes: int = argument(400, "Held-out games against each opponent, before and after training.")
    num_transcripts: int = argument(8000, "Games of the random player that warm up the small model.")
    rationale: str = argument("board", "What the random player writes before its moves.", choices=list(RATIONALES))
    self_play: bool = argument(False, "Train against earlier versions of the policy itself.")
    pool_size: int = argument(8, "With self_play, how many earlier versions are kept.")
    pool_every: int = argument(10, "With self_play, updates between two of them.")
    pool_latest: float = argument(0.5, "With self_play, how often the latest is met.")
    pool_random: float = argument(0.0, "With self_play, share of its moves made at random.")


def main(script_args: ScriptArguments, training_args: AgentPPOConfig, model_args: ModelConfig) -> None:
    output_dir = Path(training_args.output_dir)
    env_id, env_kwargs = script_args.env_id, training_args.env_kwargs or {}
    parser = ActionParser(script_args.action_pattern)

    # Find out now what would be refused after the warm-up, and whether the folder can be written
    adapters, quantization = get_peft_config(model_args), get_quantization_config(model_args)
    check_positive(script_args, "num_eval_episodes", "num_transcripts")
    check_run(env_id, training_args, parser, peft_config=adapters, quantization_config=quantization)
    game = make_env(env_id, **env_kwargs)
    game = getattr(game, "unwrapped", game)
    if not isinstance(game, TicTacToe):
        raise ValueError(f"env_id={env_id!r} is not tic-tac-toe, which is played here: use trl_agents/TicTacToe-v0.")
    if script_args.self_play and "opponent" in env_kwargs:
        raise ValueError(f"opponent={game.opponent!r} has no effect with self_play: leave it out of env_kwargs.")
    check_resumption(training_args)
    output_dir.mkdir(parents=True, exist_ok=True)
    model = model_args.model_name_or_path or warm_up(
        env_id,
        training_args,
        script_args.num_transcripts,
        agent=RandomAgent(),
        rationale=RATIONALES[script_args.rationale],
        batch_size=16 if training_args.context == "chat" else 64,
        parser=parser,
    )
    source = load_as(training_args, model_args)
    pool = None
    if script_args.self_play:
        pool = OpponentPool(
            size=script_args.pool_size,
            every=script_args.pool_every,
            latest=script_args.pool_latest,
            random_moves=script_args.pool_random,
            seed=training_args.seed,
        )
    trainer = AgentPPOTrainer(
        model,
        args=training_args,
        env=functools.partial(make_env, env_id, opponent=pool) if pool else env_id,
        action_parser=parser,
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left", **source),
        quantization_config=quantization,
        peft_config=adapters,
    )
    if pool:
        pool.bind(trainer)
        trainer.env_name = env_id  # for the model card

    # The same held-out games for everybody, against every opponent in both seats
    seeds = held_out_seeds(script_args.num_eval_episodes)
    meet_all = functools.partial(play_opponents, env=env_id, opponents=OPPONENTS, env_kwargs=env_kwargs)
    script = functools.partial(play_agents, seeds=seeds, max_turns=training_args.max_turns)
    played = {"random": meet_all(lambda env: script(env, ["random"])["random"])}
    announce(f"Playing {len(seeds)} games against each opponent before training")
    played["before"] = meet_all(lambda env: trainer.play(seeds, env=env))
    announce_training(training_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)  # first of all: nothing below may cost the training
    announce(f"Playing {len(seeds)} games against each opponent after training")
    played["after"] = meet_all(lambda env: trainer.play(seeds, env=env))
    played["optimal"] = meet_all(lambda env: script(env, ["minimax"])["minimax"])
    trainer.close_environments()

    references = None
    if not pool:  # scripted players against the opponents of training
        references = summarize(script(env_id, ("random", "minimax"), env_kwargs=env_kwargs))["return"]
    report_games(trainer, played, f"{len(seeds)} held-out games an opponent", references=references)
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    run(main, DEFAULT_CONFIG, ScriptArguments, AgentPPOConfig, ModelConfig)
