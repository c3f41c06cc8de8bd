# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
ReFT: a language model learns to reason from questions and their answers, by PPO after a short supervised warm-up, and
is compared with models that were only fine-tuned on the same questions.

    accelerate launch recipes/reft.py                           # minutes, on any computer
    accelerate launch recipes/reft.py --style program --output_dir outputs/reft_program

Without --config it runs recipes/configs/reft_tiny.yaml; without --model_name_or_path it makes a small model, which
learns from nothing. A stage that is done is not trained again. recipes/README.md says what to expect.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import concatenate_datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_agents import AgentPPOConfig, AgentPPOTrainer, check_run
from trl_agents.data import prompt_completion
from trl_agents.lora import StageAdapters
from trl_agents.questions import answer_pairs, evaluate_answers, load_model, self_training_rows
from trl_agents.recipe import QuestionArguments, check_stages, machine_settings, stage_arguments, trainer_settings
from trl_agents.report import report_stages
from trl_agents.reward_model import fit_reward_model, score_answers
from trl_agents.rewards import Grading
from trl_agents.script import argument, check_positive, run
from trl_agents.sft import fine_tune
from trl_agents.stages import Stages, train_and_save
from trl_agents.tables import table_of
from trl_agents.tiny import save_tiny_start


# ReFT and its ablations: what they change of the settings
REFT = {
    "reft": {},
    "reft_no_partial": {"partial_reward": 0.0},
    "reft_no_kl": {"beta": 0.0},
    "reft_separate_critic": {"separate_critic": True},
}
METHODS = ("sft", "offline_st", "online_st", *REFT)
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "reft_tiny.yaml"


@dataclass
class ScriptArguments(QuestionArguments):
    """Arguments of the recipe."""

    style: str = argument("words", "Answers in words or as programs.", choices=["words", "program"])
    methods: list[str] = argument(["sft", "reft"], "What to compare.", choices=list(METHODS))
    warmup_epochs: float = argument(2, "Epochs of the supervised warm-up.")
    sft_epochs: float = argument(40, "Epochs of the supervised baseline.")
    sft_learning_rate: float = argument(1e-5, "Learning rate of all supervised stages.")
    sft_batch_size: int = argument(48, "Rows a supervised step, over all processes.")
    sft_on_prompts: bool = argument(False, "Whether supervised stages learn the questions too, as a new model has to.")
    st_samples: int = argument(100, "Self-training: answers sampled per question.")
    st_unique: int = argument(10, "Offline self-training: most right ones kept per question.")
    st_epochs: float = argument(20, "Offline self-training: epochs, from the first model.")
    st_rounds: int = argument(10, "Online self-training: rounds of sampling and training.")
    st_learning_rate: float | None = argument(
        None, "Online self-training: peak of each round's. Default: sft_learning_rate."
    )
    partial_reward: float = argument(0.1, "Reward of a wrong number; 0 switches it off.")
    num_votes: int = argument(0, "Also evaluate the majority vote of so many answers.")
    rerank: bool = argument(False, "Also evaluate a reward model's choice among the answers that vote.")
    rerank_epochs: float = argument(3, "Epochs of the reward model, on answers of the warmed-up model.")


def main(script_args: ScriptArguments, training_args: AgentPPOConfig, model_args: ModelConfig) -> None:
    output_dir = Path(training_args.output_dir)
    if script_args.num_votes < 0:
        raise ValueError(f"num_votes={script_args.num_votes}: give a number of answers, or 0 for no vote.")
    if script_args.rerank and not script_args.num_votes:
        raise ValueError("rerank chooses among sampled answers, and num_votes=0 samples none: give their number.")
    check_stages(training_args, model_args, adapters=True, refuses=["reward_weights", "exploration"])
    check_positive(script_args, "warmup_epochs", "sft_epochs", "sft_learning_rate", "sft_batch_size", "st_samples")
    check_positive(script_args, "st_unique", "st_epochs", "st_rounds", "st_learning_rate", "rerank_epochs")
    adapters = StageAdapters(get_peft_config(model_args), get_quantization_config(model_args), model_args.dtype)
    if adapters.peft and "reft_separate_critic" in script_args.methods:
        raise ValueError("The method reft_separate_critic trains a second trunk in full: leave it, or use_peft, out.")
    train, test = (prompt_completion(script_args.load(split), script_args.style) for split in ("train", "test"))
    answers = {"train": train["answer"], "test": test["answer"]}
    grading = Grading.of(answers, style=script_args.style, partial=script_args.partial_reward)
    if set(script_args.methods) & set(REFT):
        check_run(None, training_args, reward_funcs=grading.reward, train_dataset=train, **adapters.trainer)
    sft_settings = {
        "learning_rate": script_args.sft_learning_rate,
        "batch_size": script_args.sft_batch_size,
        "completion_only_loss": not script_args.sft_on_prompts,
    }
    machine = {**machine_settings(training_args), "adapters": adapters}
    sft = functools.partial(fine_tune, **sft_settings, **machine)
    answering = {"max_new_tokens": training_args.max_completion_length, "progress": not training_args.disable_tqdm}

    def sample(folder, take=self_training_rows, **kwargs):
        return take(*load_model(folder, training_args.device), train, grading, **kwargs, **answering)

    st_rate = script_args.st_learning_rate or script_args.sft_learning_rate

    def offline_st(folder):
        right = sample(warm, n=script_args.st_samples, most=script_args.st_unique, seed=training_args.seed)
        sft(start, concatenate_datasets([train, right]), folder, epochs=script_args.st_epochs)

    def online_st(folder):
        """Half of each round's rows are right answers of the model as it is now, half are the given solutions."""
        model = warm
        for number in range(script_args.st_rounds):
            right = sample(model, n=1, most=1, seed=training_args.seed + number + 1)
            n_given = max(len(right), min(script_args.sft_batch_size, len(train)))  # a weak model gets few right
            given = train.shuffle(seed=training_args.seed + number).select(range(n_given))
            model = sft(model, concatenate_datasets([given, right]), folder, epochs=1, learning_rate=st_rate)

    def reft(folder, partial_reward=script_args.partial_reward, **changes):
        trainer = AgentPPOTrainer(
            str(warm),
            reward_funcs=replace(grading, partial=partial_reward).reward,
            args=stage_arguments(training_args, folder, **adapters.config, **changes),
            train_dataset=train.select_columns(["prompt", "answer"]),
            processing_class=AutoTokenizer.from_pretrained(warm, padding_side="left"),
            **adapters.trainer,
        )
        train_and_save(trainer, folder, start=warm, adapters=adapters, curves={"learning_curve.png": ["reward"]})

    def reranker(folder):
        pairs = sample(
            warm, answer_pairs, n=script_args.st_samples, most=script_args.st_unique, seed=training_args.seed
        )
        fit_reward_model(
            warm,
            pairs,
            folder,
            epochs=script_args.rerank_epochs,
            learning_rate=script_args.sft_learning_rate / 10,
            batch_size=script_args.sft_batch_size,
            **machine,
        )

    stages = Stages(
        output_dir,
        model=model_args.model_name_or_path,
        data=[script_args.dataset, script_args.question_settings, script_args.num_train, script_args.style],
        seed=training_args.seed,
        **adapters.settings,
    )
    start = model_args.model_name_or_path or stages.run(
        "start", lambda folder: save_tiny_start(train, folder, seed=training_args.seed)
    )
    warm_settings = {**sft_settings, "warmup_epochs": script_args.warmup_epochs}
    warm = stages.run(
        "warmup", lambda folder: sft(start, train, folder, epochs=script_args.warmup_epochs), **warm_settings
    )
    budget = {"max_completion_length": training_args.max_completion_length}
    sampling = {"samples": [script_args.st_samples, script_args.st_unique], **budget}
    made = {
        "sft": (
            lambda folder: sft(start, train, folder, epochs=script_args.sft_epochs),
            {**sft_settings, "sft_epochs": script_args.sft_epochs},
        ),
        "offline_st": (offline_st, {**warm_settings, **sampling, "epochs": script_args.st_epochs}),
        "online_st": (online_st, {**warm_settings, **budget, "rounds": script_args.st_rounds, "rate": st_rate}),
    }
    for name, changes in REFT.items():
        ppo_settings = {**trainer_settings(training_args), "partial_reward": script_args.partial_reward, **changes}
        made[name] = functools.partial(reft, **changes), {**warm_settings, **ppo_settings}
    if script_args.rerank:  # now: it fails if no answer is right
        judge = stages.run("reranker", reranker, **warm_settings, **sampling, epochs=script_args.rerank_epochs)
    folders = {
        "warmup": warm,
        **{name: stages.run(name, made[name][0], **made[name][1]) for name in script_args.methods},
    }

    scorer, correct = None, {}
    if script_args.rerank:
        judge = load_model(judge, training_args.device, AutoModelForSequenceClassification)
        scorer = functools.partial(score_answers, *judge)
    for name, folder in folders.items():
        model = load_model(folder, training_args.device)
        voting = {"n_votes": script_args.num_votes, "scorer": scorer}
        correct[name] = evaluate_answers(*model, test, grading, **voting, **answering)
    title = f"{len(test)} test questions"
    report_stages(output_dir, table_of(correct), title, folders=folders.values(), push=training_args)


if __name__ == "__main__":
    run(main, DEFAULT_CONFIG, ScriptArguments, AgentPPOConfig, ModelConfig)
