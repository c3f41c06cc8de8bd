# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A language model learns from an expert's episodes: behaviour cloning (the action alone), thought cloning (the values it
was chosen by come first), and then, if asked for, RL fine-tuning of the clone; in the setting of "LLMs are Greedy
Agents".

    accelerate launch recipes/expert_sft.py                                          # minutes, on any computer
    accelerate launch recipes/expert_sft.py --rlft_steps 0 --forms behaviour --output_dir outputs/behaviour
    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/expert_sft.py \
        --config recipes/configs/expert_sft_paper.yaml --model_name_or_path google/gemma-2-2b-it

Without --config it runs recipes/configs/expert_sft_tiny.yaml; without --model_name_or_path it makes a small model that
knows nothing. A stage that is done is not trained again. recipes/README.md says what to expect.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from datasets import concatenate_datasets
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer

from trl_agents import ActionParser, AgentGRPOConfig, AgentGRPOTrainer, check_run, make_env
from trl_agents.agents import make_agent
from trl_agents.data import as_settings
from trl_agents.diagnostics.greediness import suffix_failure
from trl_agents.episodes import sample_episodes
from trl_agents.evaluation import held_out_seeds, play_agents
from trl_agents.expert_data import FORMS, agreement, expert_dataset
from trl_agents.experts import Expert, make_expert
from trl_agents.plots import plot_regret
from trl_agents.questions import load_model
from trl_agents.recipe import check_stages, stage_arguments, trained_play, trainer_settings
from trl_agents.report import report_stages
from trl_agents.script import argument, check_positive, run
from trl_agents.seeds import expert_seeds
from trl_agents.stages import Stages, stage_config, train_and_save
from trl_agents.tables import summarize
from trl_agents.tiny import save_tiny_start


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "expert_sft_tiny.yaml"


@dataclass
class ScriptArguments:
    """Arguments of the recipe. How the model plays and how the RL fine-tuning goes is said by AgentGRPOConfig's."""

    env_id: str = argument("trl_agents/Bandit-v0", "Id of the environment, or MODULE:CLASS.")
    action_pattern: str | None = argument(None, "Regular expression that finds the action. Default: ACTION=X.")
    expert: str = argument(
        "ucb", "Who is cloned: ucb, linucb, minimax, or for the behaviour alone any scripted player."
    )
    expert_kwargs: dict | str | None = argument(None, "Its settings, as JSON.")
    forms: list[str] = argument(list(FORMS), "What is cloned.", choices=list(FORMS))
    num_episodes: int = argument(4000, "The expert's episodes to learn from.")
    num_thought_episodes: int | None = argument(None, "The same of thought cloning. Default: num_episodes.")
    behaviour_tokens: int = argument(
        16, "Token budget of a reply without a thought; max_completion_length is of others."
    )
    sft_epochs: float = argument(1.0, "Times through the expert's episodes.")
    sft_learning_rate: float = argument(1e-5, "Peak of the learning rate.")
    sft_batch_size: int = argument(32, "Rows a step, over all processes: episodes in a chat, turns in a window.")
    sft_kwargs: dict | str | None = argument(None, "Other arguments of SFTConfig, as JSON.")
    rlft_steps: int = argument(0, "Updates of RL fine-tuning that follow. 0: none.")
    rlft_forms: list[str] = argument(list(FORMS), "The clones it is done with.", choices=list(FORMS))
    players: list[str] = argument(["random"], "Scripted players to compare with.")
    num_eval_episodes: int = argument(256, "Held-out episodes.")
    phrases: list[str] = argument([], "Texts that are one token each of a model made on the spot.")


def main(script_args: ScriptArguments, training_args: AgentGRPOConfig, model_args: ModelConfig) -> None:
    args, seed, output_dir = script_args, training_args.seed, Path(training_args.output_dir)
    parser = ActionParser(args.action_pattern)
    expert = make_expert(args.expert, **as_settings(args.expert_kwargs))
    reading = {"context": training_args.context, "window": training_args.window}
    given = {name: getattr(training_args, name) for name in ("chat_template_kwargs", "max_turns")}
    given = {name: value for name, value in given.items() if value is not None}
    sft_kwargs = {name: getattr(training_args, name) for name in ("bf16", "gradient_checkpointing", "use_cpu")}
    sft_kwargs |= {"disable_tqdm": training_args.disable_tqdm, **as_settings(args.sft_kwargs)}
    pace = {"epochs": args.sft_epochs, "learning_rate": args.sft_learning_rate, "batch_size": args.sft_batch_size}
    n_episodes = {"thought": args.num_thought_episodes or args.num_episodes, "behaviour": args.num_episodes}
    budget = {"thought": training_args.max_completion_length, "behaviour": args.behaviour_tokens}
    check_positive(args, "num_episodes", "num_thought_episodes", "num_eval_episodes")
    if args.rlft_steps and not set(args.rlft_forms) <= set(args.forms):
        raise ValueError(f"rlft_forms={args.rlft_forms} starts from clones that forms={args.forms} does not make.")
    check_stages(training_args, model_args, uses=["dtype", "attn_implementation"])
    loading = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    env_kwargs = {form: dict(training_args.env_kwargs or {}) for form in FORMS}
    if hasattr(make_env(args.env_id, **env_kwargs["behaviour"]), "reasoning"):
        for form, kwargs in env_kwargs.items():  # the instructions ask for what the replies will be
            kwargs.setdefault("reasoning", form == "thought")
    for player in args.players:
        make_agent(player)
    tell = functools.partial(expert_dataset, args.env_id, expert, parser=parser, **given)

    def arguments(form, folder=output_dir, **own):
        own |= {"env_kwargs": env_kwargs[form], "max_completion_length": budget[form]}
        return stage_arguments(training_args, folder, **own)

    for form in args.forms:  # what would fail after minutes of training is found now
        tell(form, seeds=expert_seeds(1), env_kwargs=env_kwargs[form], **reading)
        check_run(args.env_id, arguments(form), parser)

    def start(folder):
        """The same whichever forms are asked for, so that another can be cloned later."""
        forms = FORMS if isinstance(expert, Expert) else ("behaviour",)
        envs = [functools.partial(make_env, args.env_id, **env_kwargs[form]) for form in forms]
        read = {"seeds": expert_seeds(100, seed), "context": "window"}
        rows = [tell(form, env_kwargs=env_kwargs[form], **read) for form in forms]
        save_tiny_start(concatenate_datasets(rows), folder, seed, envs=envs, phrases=args.phrases)

    def clone(folder, form):
        tokenizer = AutoTokenizer.from_pretrained(first, padding_side="left")
        with PartialState().main_process_first():  # one process makes the rows, the others read them
            rows = tell(
                form,
                seeds=expert_seeds(n_episodes[form], seed),
                env_kwargs=env_kwargs[form],
                tokenizer=tokenizer,
                cache_dir=str(folder / "rows"),
                progress=not training_args.disable_tqdm,
                **reading,
            )
        config = stage_config(SFTConfig, folder, len(rows), seed=seed, **pace, **sft_kwargs)
        model = load_model(first, dtype="float32", **loading)[0]
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        train_and_save(trainer, folder)

    def fine_tune(folder, form):
        source = {"dtype": model_args.dtype, **loading, **(training_args.model_init_kwargs or {})}
        trainer = AgentGRPOTrainer(
            str(folders[form]),
            args=arguments(form, folder, max_steps=args.rlft_steps, model_init_kwargs=source),
            env=args.env_id,
            action_parser=parser,
            processing_class=AutoTokenizer.from_pretrained(folders[form], padding_side="left"),
        )
        train_and_save(trainer, folder, curves={"learning_curve.png": ()})

    data = [args.env_id, training_args.env_kwargs, args.expert, as_settings(args.expert_kwargs), {**reading, **given}]
    stages = Stages(output_dir, model=model_args.model_name_or_path, data=data, seed=seed)
    first = model_args.model_name_or_path or stages.run("start", start, phrases=args.phrases)
    cloning = {"sft": {**pace, **sft_kwargs}, "pattern": args.action_pattern}
    folders, form_of = {"start": first}, {"start": args.forms[0]}
    for form in args.forms:
        make = functools.partial(clone, form=form)
        folders[form] = stages.run(form, make, **cloning, episodes=n_episodes[form])
        form_of[form] = form
    for form in args.rlft_forms if args.rlft_steps else ():
        make, name = functools.partial(fine_tune, form=form), f"{form}_rlft"
        rl = {**trainer_settings(training_args), "steps": args.rlft_steps, "tokens": budget[form]}
        folders[name] = stages.run(name, make, **cloning, rl=rl, episodes=n_episodes[form])
        form_of[name] = form

    # The same held-out episodes for everybody
    seeds = held_out_seeds(args.num_eval_episodes)
    made = make_env(args.env_id, **env_kwargs[args.forms[0]])
    players = {**{name: make_agent(name, made) for name in args.players}, f"{args.expert} (expert)": expert}
    game = {"env_kwargs": env_kwargs[args.forms[0]], "max_turns": training_args.max_turns}
    played = play_agents(args.env_id, players, seeds, **game)
    for name, folder in folders.items():
        how = trained_play(arguments(form_of[name]), args.env_id, parser)
        model = load_model(folder, training_args.device, dtype=model_args.dtype or "auto", **loading)
        played[name] = sample_episodes(*model, args.env_id, seeds, **how)
    more = {"suffix_failure": suffix_failure, "agreement": functools.partial(agreement, expert=expert)}
    table = summarize(played, more)
    if PartialState().is_main_process:
        if "regret" in table:
            plot_regret(played, output_dir / "regret.png", f"{len(seeds)} held-out episodes")
        for name in folders:
            (output_dir / f"episodes_{name}.txt").write_text("\n\n".join(map(str, played[name][:8])))
    title = f"{len(seeds)} held-out episodes"
    cards = [folder for folder in folders.values() if folder != model_args.model_name_or_path]
    report_stages(output_dir, table, title, folders=cards, label="mean", shares=False, push=training_args)


if __name__ == "__main__":
    run(main, DEFAULT_CONFIG, ScriptArguments, AgentGRPOConfig, ModelConfig)
