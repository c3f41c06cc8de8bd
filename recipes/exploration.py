# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Ways to explore, side by side: each mechanism of "LLMs are Greedy Agents" (section 4.4) alone and with RLFT, on a
bandit and a model that is greedy to begin with.

    accelerate launch recipes/exploration.py                              # a small greedy model: on any computer
    accelerate launch recipes/exploration.py --model_name_or_path google/gemma-2-2b-it --max_steps 0   # no training

Without --config it runs recipes/configs/exploration_tiny.yaml; without --model_name_or_path it makes a small model and
warms it up on a greedy player's episodes. A model that is trained is not trained again. recipes/README.md says what to
expect.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_agents import AgentGRPOConfig, AgentGRPOTrainer, check_run
from trl_agents.agents import GreedyAgent
from trl_agents.envs.names import close_to
from trl_agents.episodes import sample_episodes
from trl_agents.evaluation import held_out_seeds, play_agents
from trl_agents.exploration import MECHANISMS
from trl_agents.lora import StageAdapters
from trl_agents.questions import load_model
from trl_agents.recipe import check_stages, stage_arguments, trained_play, trainer_settings, warm_up
from trl_agents.report import report_stages
from trl_agents.script import argument, check_positive, run
from trl_agents.stages import Stages, train_and_save
from trl_agents.tables import summarize


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "exploration_tiny.yaml"
MEASURES = ("coverage", "regret", "return", "invalid_rate")


@dataclass
class ScriptArguments:
    """Arguments of the recipe."""

    env_id: str = argument("trl_agents/Bandit-v0", "Id of the environment, or MODULE:CLASS.")
    mechanisms: list[str] = argument(
        ["none", "try_all", "epsilon_greedy=0.1"],
        "What to compare: none, or as for `exploration`; + joins several, try_all+context_summary.",
    )
    players: list[str] = argument(["random", "ucb"], "Scripted players to compare with.")
    num_eval_episodes: int = argument(64, "Held-out episodes of each evaluation.")
    num_transcripts: int = argument(1000, "Episodes that warm up the small model.")
    transcript_epsilon: float = argument(0.1, "How often the greedy player of these episodes plays at random.")


def main(script_args: ScriptArguments, training_args: AgentGRPOConfig, model_args: ModelConfig) -> None:
    check_stages(training_args, model_args, uses=["dtype", "attn_implementation"], adapters=True)
    adapters = StageAdapters(get_peft_config(model_args), get_quantization_config(model_args), model_args.dtype)
    if training_args.exploration:
        raise ValueError(f"exploration={training_args.exploration}: here `mechanisms` says what to compare.")
    # What would fail after the warm-up is found now
    check_positive(script_args, "num_eval_episodes", "num_transcripts")
    greedy = GreedyAgent(untried=0.0, epsilon=script_args.transcript_epsilon)
    game = {"env_kwargs": training_args.env_kwargs or {}, "max_turns": training_args.max_turns}
    play_agents(script_args.env_id, script_args.players, held_out_seeds(1), **game)
    arguments, known = {}, ("none", *MECHANISMS)
    for name in script_args.mechanisms:
        for each in (one.partition("=")[0] for one in name.split("+")):
            if each not in known:
                raise ValueError(f"{each!r} is unknown: choose of {', '.join(known)}.{close_to(each, known)}")
        folder = Path(training_args.output_dir) / f"rlft_{name}"
        exploration = [] if name == "none" else name.split("+")
        arguments[name] = stage_arguments(training_args, folder, exploration=exploration)
        check_run(script_args.env_id, arguments[name], **adapters.trainer)
    loading = {"dtype": model_args.dtype or "auto", "attn_implementation": model_args.attn_implementation}

    def fine_tune(folder, args):
        args.model_init_kwargs = loading
        trainer = AgentGRPOTrainer(
            str(start),
            env=script_args.env_id,
            args=args,
            processing_class=AutoTokenizer.from_pretrained(start, padding_side="left"),
            **adapters.trainer,
        )
        train_and_save(trainer, folder, start=start, adapters=adapters, curves={"learning_curve.png": ()})

    seeds = held_out_seeds(script_args.num_eval_episodes)

    def play(folder, args):
        model = load_model(folder, training_args.device, **loading)
        how = trained_play(args, script_args.env_id)
        return sample_episodes(*model, script_args.env_id, seeds, **how, progress=not training_args.disable_tqdm)

    stages = Stages(
        training_args.output_dir,
        model=model_args.model_name_or_path,
        env=[script_args.env_id, game["env_kwargs"]],
        seed=training_args.seed,
        **adapters.settings,
    )
    start = model_args.model_name_or_path or warm_up(
        script_args.env_id, training_args, script_args.num_transcripts, agent=greedy
    )

    warmth = [script_args.num_transcripts, script_args.transcript_epsilon]
    before = play_agents(script_args.env_id, script_args.players, seeds, **game)
    after, folders = {}, []
    for name, args in arguments.items():
        before[name] = play(start, args)
        if training_args.max_steps == 0:
            continue
        make = functools.partial(fine_tune, args=args)
        folders.append(stages.run(f"rlft_{name}", make, transcripts=warmth, **trainer_settings(args)))
        after[name] = play(folders[-1], args)
    tables = {"": summarize(before), ", RLFT": summarize(after)}
    passed_over = "return" if "regret" in tables[""] else "regret"  # an environment of one's own tells no regret
    measures = [measure for measure in MEASURES if measure != passed_over]
    known = [(measure, when, table) for measure in measures for when, table in tables.items() if measure in table]
    columns = {f"{measure}{when}": table[measure] for measure, when, table in known}
    title = f"{len(seeds)} held-out episodes"
    looks = {"shares": False, "label": "mechanism"}
    report_stages(training_args.output_dir, columns, title, folders=folders, push=training_args, **looks)


if __name__ == "__main__":
    run(main, DEFAULT_CONFIG, ScriptArguments, AgentGRPOConfig, ModelConfig)
