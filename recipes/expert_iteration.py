# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Expert iteration: play or answer, keep the best by reward, fine-tune on it, repeat (ReST, ReST-EM, STaR); and learning
from a file of episodes that others played.

    accelerate launch recipes/expert_iteration.py                                   # a bandit: minutes, any computer
    accelerate launch recipes/expert_iteration.py --config recipes/configs/expert_iteration_questions.yaml
    accelerate launch recipes/expert_iteration.py --episodes logged.jsonl --rounds 0 --output_dir outputs/offline

Without --config it runs recipes/configs/expert_iteration_tiny.yaml; without --model_name_or_path it makes a small
model. A round that is done is not repeated. recipes/README.md says what to expect.
"""

import functools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from trl_agents import episodes as logs
from trl_agents import make_env
from trl_agents.checkpoints import last_checkpoint
from trl_agents.data import load_questions, prompt_completion
from trl_agents.evaluation import held_out_seeds, interval, markdown_table, play_agents, summarize
from trl_agents.lora import StageAdapters
from trl_agents.plots import plot_accuracy, plot_regret
from trl_agents.questions import answer_questions, evaluate_answers, load_model
from trl_agents.recipe import (
    as_settings,
    check_positive,
    check_stages,
    parse_arguments,
    stage_arguments,
    trainer_settings,
)
from trl_agents.report import add_to_cards, push_stages, report_stages
from trl_agents.rewards import Grading
from trl_agents.sft import fine_tune
from trl_agents.stages import Stages
from trl_agents.tiny import make_tiny_model, save_tiny_start


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "expert_iteration_tiny.yaml"


def told(default, text, **more):
    return field(default=default, metadata={"help": text, **more})


@dataclass
class ScriptArguments:
    """Arguments of the recipe. How each round fine-tunes is said by those of SFTConfig."""

    env_id: str | None = told(None, "Id of the environment that is played.")
    env_kwargs: dict | str | None = told(None, "Its settings, as JSON.")
    context: str = told("chat", "What is read each turn.", choices=["chat", "window"])
    window: int | None = told(None, "With a window, the number of transitions kept. Default: all.")
    num_seeds: int = told(128, "Starts that are played in a round, new ones in each.")
    num_transcripts: int = told(1000, "Episodes of the random player that warm up the small model.")
    players: list[str] = field(
        default_factory=lambda: ["random"], metadata={"help": "Scripted ones, to compare with."}
    )
    dataset: str | None = told(None, "Instead of an environment: questions, as in reft.py, or a local file.")
    arithmetic: dict | str | None = told(None, "Settings of the arithmetic problems, as JSON.")
    test_dataset: str | None = told(None, "Local file of test questions.")
    style: str = told("words", "Answers in words or as programs.", choices=["words", "program"])
    warmup_epochs: float = told(0.0, "Epochs on the given solutions, before everything.")
    warmup_learning_rate: float = told(1e-5, "Learning rate of that.")
    warmup_batch_size: int = told(32, "Rows a step of that, over all processes.")
    warmup_on_prompts: bool = told(False, "Whether it learns the questions too, as a new model has to.")
    num_eval: int = told(256, "Held-out episodes or test questions.")
    max_new_tokens: int = told(256, "Token budget of a reply.")
    temperature: float = told(1.0, "At which all is sampled, but answers to test questions: these are greedy.")
    episodes: str | None = told(None, "File of episodes to learn from before all rounds.")
    rounds: int = told(3, "Rounds of playing and learning.")
    start_from: str = told("last", "A round trains the last model, or the first anew.", choices=["first", "last"])
    replay: bool = told(False, "Whether a round learns from the file and the rounds before it, too.")
    num_samples: int = told(8, "Episodes of each start, answers to each question.")
    keep_share: float = told(1.0, "Keep this share of the episodes, the best.")
    by_group: bool = told(False, "Whether the share is of each start's episodes, not of all.")
    min_reward: float | None = told(None, "Keep no episode below.")
    raise_reward: float = told(0.0, "Added to min_reward after each round (ReST's rising thresholds).")
    keep_most: int | None = told(None, "Keep at most so many episodes of one start or question.")
    keep_invalid: bool = told(True, "Whether to keep episodes with invalid turns.")


def main(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    args, seed, output_dir = script_args, training_args.seed, Path(training_args.output_dir)
    if (args.env_id is None) == (args.dataset is None):
        raise ValueError(f"env_id={args.env_id!r} and dataset={args.dataset!r}: one of the two must be null.")
    check_stages(training_args, model_args, uses=["dtype"], adapters=True)
    adapters = StageAdapters(get_peft_config(model_args), get_quantization_config(model_args), model_args.dtype)
    if args.raise_reward and args.min_reward is None:
        raise ValueError(f"raise_reward={args.raise_reward} raises min_reward, which is not given: give it.")
    if args.window is not None and args.context != "window":
        raise ValueError(f'window={args.window} has no effect with context={args.context!r}: use context="window".')
    if args.num_samples < 1 or args.rounds < (0 if args.episodes else 1):
        said = f"num_samples={args.num_samples}, rounds={args.rounds}, episodes={args.episodes!r}"
        raise ValueError(f"{said} leaves nothing to learn: sample at least once, in a round or more, or give a file.")
    check_positive(args, "num_eval", "num_seeds", "num_transcripts", "warmup_batch_size", "max_new_tokens")
    keeping = {"share": args.keep_share, "by_group": args.by_group, "most": args.keep_most}
    keeping["allow_invalid"] = args.keep_invalid
    if args.temperature < 0 or (args.window or 0) < 0:
        raise ValueError(f"temperature={args.temperature}, window={args.window}: neither may be negative.")
    given = logs.read_episodes(args.episodes) if args.episodes else []
    logs.best_episodes(given, **keeping)  # refuses its settings now, not after a round of playing
    settings = as_settings(args.env_kwargs if args.env_id else args.arithmetic)
    reading = {"context": args.context, "window": args.window} if args.env_id else {}
    played, accuracy = {}, {}
    if args.env_id:
        seeds = held_out_seeds(args.num_eval)
        played = play_agents(args.env_id, args.players, seeds, env_kwargs=settings)
    else:
        if Path(args.dataset).suffix and args.test_dataset is None:
            raise ValueError(f"dataset={args.dataset!r} is one file: name another to test on, --test_dataset.")
        train = prompt_completion(load_questions(args.dataset, "train", **settings), args.style)
        test = prompt_completion(load_questions(args.test_dataset or args.dataset, "test", **settings), args.style)
        test = test.select(range(min(args.num_eval, len(test))))
        letters = all(len(answer) == 1 and answer.isalpha() for answer in train["answer"])
        grading = Grading(args.style, choice=letters, partial=0.0)
        grading.check_answers(train["answer"])
        grading.check_answers(test["answer"], "test")

    load = functools.partial(load_model, device=training_args.device)
    dtype = model_args.dtype or "auto"

    def play(folder, **kwargs):
        kwargs = {**kwargs, **reading, "env_kwargs": settings, "max_new_tokens": args.max_new_tokens}
        return logs.sample_episodes(*load(folder, dtype=dtype), args.env_id, temperature=args.temperature, **kwargs)

    def sample(folder, number):
        sampling = {"n": args.num_samples, "seed": seed + number}
        if args.env_id:
            starts = range((number - 1) * args.num_seeds, number * args.num_seeds)
            return logs.log_episodes(play(folder, seeds=starts, **sampling), args.env_id, settings)
        sampling |= {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
        answers = answer_questions(*load(folder, dtype=dtype), train["prompt"][:], **sampling)
        asked = {name: [value for value in train[name] for _ in range(args.num_samples)] for name in train.features}
        asked["completions"] = [text for own in answers for text in own]
        return logs.log_answers(train["prompt"][:], answers, grading.reward(prompts=asked["prompt"], **asked))

    def evaluate(name, folder):
        if args.env_id:
            played[name] = play(folder, seeds=seeds)
        else:
            answering = {"max_new_tokens": args.max_new_tokens}
            right = evaluate_answers(*load(folder, dtype=dtype), test, grading, **answering)["greedy"]
            accuracy.setdefault("greedy", {})[name] = interval(right)

    def start(folder):
        if args.dataset:
            return save_tiny_start(train, folder, seed=seed)
        env = functools.partial(make_env, args.env_id, **settings)
        machine = {"use_cpu": training_args.use_cpu, "disable_tqdm": training_args.disable_tqdm}
        return make_tiny_model(env, folder, n_transcripts=args.num_transcripts, seed=seed, **reading, **machine)

    def learn(folder, last, episodes):
        model, tokenizer = load(last, dtype="float32")
        eos = model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        rows = logs.training_rows(episodes, tokenizer, eos_token_ids=eos, **reading)
        if len(rows) == 0:
            raise ValueError(
                f"Nothing is good enough for {str(folder)!r}: lower min_reward, or sample more. (What was played can "
                f"be kept: copy its episodes.jsonl and pass it as `episodes` before you delete the folder.)"
            )
        own_args = stage_arguments(training_args, folder, **adapters.config)
        model = str(last) if adapters.peft else model
        trainer = SFTTrainer(model, own_args, train_dataset=rows, processing_class=tokenizer, **adapters.trainer)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        trainer.save_model(str(folder))
        trainer.create_model_card()
        adapters.merge(last, folder)
        trainer.accelerator.wait_for_everyone()

    def play_and_learn(folder, number, last, replayed):
        if not (folder / "episodes.jsonl").exists():  # an interrupted round has played already
            sampled = sample(last, number)
            if PartialState().is_main_process:
                logs.write_episodes(folder / "episodes.jsonl", sampled)
        PartialState().wait_for_everyone()
        learn(folder, first if args.start_from == "first" else last, [*replayed, *best(folder, number)])

    def best(folder, number):
        threshold = None if args.min_reward is None else args.min_reward + (number - 1) * args.raise_reward
        return logs.best_episodes(logs.read_episodes(folder / "episodes.jsonl"), min_reward=threshold, **keeping)

    data = [args.env_id or args.dataset, settings, reading, args.style]
    stages = Stages(output_dir, model=model_args.model_name_or_path, data=data, seed=seed, **adapters.settings)
    first = model_args.model_name_or_path or stages.run("start", start, transcripts=args.num_transcripts)
    supervised = None
    if args.dataset and args.warmup_epochs:
        supervised = {"epochs": args.warmup_epochs, "learning_rate": args.warmup_learning_rate}
        supervised |= {"batch_size": args.warmup_batch_size, "completion_only_loss": not args.warmup_on_prompts}
        machine = {name: getattr(training_args, name) for name in ("bf16", "use_cpu", "disable_tqdm")}
        machine["adapters"] = adapters
        warm_up = functools.partial(fine_tune, first, train, seed=seed, **supervised, **machine)
        first = stages.run("warmup", warm_up, **supervised)
    learning = {**trainer_settings(training_args), **keeping, "supervised": supervised}
    learning |= {"min_reward": args.min_reward, "episodes": args.episodes}
    folders, replayed = {"start": first}, []
    if given:
        replayed = logs.best_episodes(given, min_reward=args.min_reward, **keeping)
        make = functools.partial(learn, last=first, episodes=replayed)
        folders["offline"] = stages.run("offline", make, **learning)
    names = ("num_seeds", "num_samples", "temperature", "max_new_tokens", "start_from", "replay", "raise_reward")
    learning |= {name: getattr(args, name) for name in names}
    for number in range(1, args.rounds + 1):
        last = list(folders.values())[-1]
        make = functools.partial(play_and_learn, number=number, last=last, replayed=replayed if args.replay else [])
        folder = folders[f"round_{number}"] = stages.run(f"round_{number}", make, **learning)
        replayed = [*replayed, *best(folder, number)]
    for name, folder in folders.items():
        evaluate(name, folder)

    # A model that was given keeps its card
    cards = [folder for folder in folders.values() if folder != model_args.model_name_or_path]
    if args.dataset:
        title = f"{len(test)} test questions"
        return report_stages(output_dir, accuracy, title, folders=cards, push=training_args)
    table = summarize(played)
    picture = output_dir / ("regret.png" if "regret" in table else "returns.png")
    if PartialState().is_main_process:
        metrics = {measure: {player: asdict(value) for player, value in row.items()} for measure, row in table.items()}
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
        title = f"{len(seeds)} held-out episodes"
        if "regret" in table:
            plot_regret(played, picture, title)
        else:
            paid = {name: interval([episode.return_ > 0 for episode in own]) for name, own in played.items()}
            plot_accuracy({"return above 0": paid}, picture, title, "share of episodes")
        add_to_cards(cards, f"{title}, mean [95% interval]:\n\n{markdown_table(table)}", picture)
        print(markdown_table(table))
        if training_args.push_to_hub:
            push_stages(cards, training_args)


if __name__ == "__main__":
    main(*parse_arguments(DEFAULT_CONFIG, ScriptArguments, SFTConfig, ModelConfig))
