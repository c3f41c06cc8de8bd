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
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from trl_agents.episodes import read_episodes, training_rows, write_episodes
from trl_agents.expert_iteration import IterationArguments
from trl_agents.lora import StageAdapters
from trl_agents.questions import load_model
from trl_agents.recipe import check_stages, stage_arguments, trainer_settings
from trl_agents.rollout.generation import end_of_reply_ids
from trl_agents.script import argument, check_positive, run
from trl_agents.sft import fine_tune
from trl_agents.stages import Stages, train_and_save


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "expert_iteration_tiny.yaml"


@dataclass
class ScriptArguments(IterationArguments):
    """Arguments of the recipe. How each round fine-tunes is said by those of SFTConfig."""

    warmup_epochs: float = argument(0.0, "With questions: epochs on their given solutions, before everything.")
    warmup_learning_rate: float = argument(1e-5, "Learning rate of that.")
    warmup_batch_size: int = argument(32, "Rows a step of that, over all processes.")
    warmup_on_prompts: bool = argument(False, "Whether it learns the questions too, as a new model has to.")


def main(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    args, output_dir = script_args, Path(training_args.output_dir)
    args.check()
    check_positive(args, "warmup_batch_size")
    check_stages(training_args, model_args, uses=["dtype"], adapters=True)
    adapters = StageAdapters(get_peft_config(model_args), get_quantization_config(model_args), model_args.dtype)
    given = read_episodes(args.episodes) if args.episodes else []
    task = args.make_task(training_args, model_args.dtype)

    def warm_up(folder):
        machine = {name: getattr(training_args, name) for name in ("bf16", "use_cpu", "disable_tqdm", "seed")}
        fine_tune(first, task.train, folder, **supervised, **machine, adapters=adapters)

    def learn(folder, last, episodes):
        """Fine-tune the model `last` on what it (or another) wrote in the `episodes`, and on nothing else of them."""
        model, tokenizer = load_model(last, training_args.device, dtype="float32")
        rows = training_rows(episodes, tokenizer, eos_token_ids=end_of_reply_ids(model, tokenizer), **task.reading)
        if len(rows) == 0:
            raise ValueError(
                f"Nothing is good enough for {str(folder)!r}: lower min_reward, or sample more. (What was played can "
                f"be kept: copy its episodes.jsonl and pass it as `episodes` before you delete the folder.)"
            )
        own_args = stage_arguments(training_args, folder, **adapters.config)
        model = str(last) if adapters.peft else model
        trainer = SFTTrainer(model, own_args, train_dataset=rows, processing_class=tokenizer, **adapters.trainer)
        train_and_save(trainer, folder, start=last, adapters=adapters)

    def play_and_learn(folder, number, last, replayed):
        if not (folder / "episodes.jsonl").exists():  # an interrupted round has played already
            sampled = task.sample(last, number)
            if PartialState().is_main_process:
                write_episodes(folder / "episodes.jsonl", sampled)
        PartialState().wait_for_everyone()
        learn(folder, first if args.start_from == "first" else last, [*replayed, *best(folder, number)])

    def best(folder, number):
        return args.best(read_episodes(folder / "episodes.jsonl"), number)

    start_from = model_args.model_name_or_path
    stages = Stages(output_dir, model=start_from, data=task.settings, seed=training_args.seed, **adapters.settings)
    first = start_from or stages.run("start", task.start, transcripts=args.num_transcripts)
    supervised = None
    if args.dataset and args.warmup_epochs:
        supervised = {"epochs": args.warmup_epochs, "learning_rate": args.warmup_learning_rate}
        supervised |= {"batch_size": args.warmup_batch_size, "completion_only_loss": not args.warmup_on_prompts}
        first = stages.run("warmup", warm_up, **supervised)
    learning = {**trainer_settings(training_args), **args.keeping, "supervised": supervised}
    learning |= {"min_reward": args.min_reward, "episodes": args.episodes}
    folders, replayed = {"start": first}, []
    if given:
        replayed = args.best(given)
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
        task.measure(name, folder)
    task.report(
        [folder for folder in folders.values() if folder != start_from]
    )  # a model that was given keeps its card


if __name__ == "__main__":
    run(main, DEFAULT_CONFIG, ScriptArguments, SFTConfig, ModelConfig)
