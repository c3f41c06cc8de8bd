# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
R1: a base model learns to think before it answers, by GRPO with rewards for the answer and for its form alone
(R1-Zero), and by R1's four stages: a cold start on a few solutions, GRPO, fine-tuning of the base model on right
answers of what came out, GRPO again.

    accelerate launch recipes/r1.py                             # minutes, on any computer
    accelerate launch recipes/r1.py --methods zero

Without --config it runs recipes/configs/r1_tiny.yaml; without --model_name_or_path it makes a small base model from a
corpus of solutions in many forms. A stage that is done is not trained again. recipes/README.md says what to expect.
"""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_agents import AgentGRPOConfig, AgentGRPOTrainer, check_run
from trl_agents.lora import StageAdapters
from trl_agents.questions import load_model, self_training_rows
from trl_agents.r1 import PHRASES, WellFormedGrading, evaluate_r1, mixed_corpus, r1_prompt_completion
from trl_agents.recipe import QuestionArguments, check_stages, machine_settings, stage_arguments, trainer_settings
from trl_agents.report import report_stages
from trl_agents.rewards import Grading, think_answer_format_reward
from trl_agents.script import argument, check_positive, run
from trl_agents.sft import fine_tune
from trl_agents.stages import Stages, train_and_save
from trl_agents.tables import table_of
from trl_agents.tiny import tiny_model, tiny_tokenizer


METHODS = ("zero", "pipeline")
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "r1_tiny.yaml"


@dataclass
class ScriptArguments(QuestionArguments):
    """Arguments of the recipe."""

    methods: list[str] = argument(
        list(METHODS),
        "zero: RL from the base model. pipeline: cold start, RL, rejection sampling, RL.",
        choices=list(METHODS),
    )
    base_epochs: float = argument(3, "Epochs of a new model's pre-training.")
    base_learning_rate: float = argument(3e-3, "Learning rate of a new model's pre-training.")
    base_tagged: float = argument(0.3, "Share of its documents in R1's form.")
    base_direct: float = argument(0.2, "Share of its documents without a solution.")
    sft_learning_rate: float = argument(1e-5, "Learning rate of supervised stages.")
    sft_batch_size: int = argument(32, "Rows a supervised step, over all processes.")
    cold_rows: int = argument(1000, "Cold start: number of solutions.")
    cold_epochs: float = argument(2, "Cold start: epochs.")
    rejection_samples: int = argument(4, "Rejection sampling: answers sampled per question.")
    rejection_most: int = argument(2, "Rejection sampling: most right ones kept per question.")
    rejection_epochs: float = argument(2, "Rejection sampling: epochs, from the base model.")
    num_votes: int = argument(4, "Answers sampled per test question.")


class NothingKept(ValueError):
    """Rejection sampling found no answer to learn from."""


def main(script_args: ScriptArguments, training_args: AgentGRPOConfig, model_args: ModelConfig) -> None:
    output_dir = Path(training_args.output_dir)
    settings = script_args.question_settings
    check_stages(training_args, model_args, adapters=True, refuses=["exploration"])
    adapters = StageAdapters(get_peft_config(model_args), get_quantization_config(model_args), model_args.dtype)
    check(script_args, training_args)
    # The given solutions may skip steps, those of a cold start were written with care
    whole = {"skipping": 0.0} if settings.get("skipping") else {}
    given = script_args.load("train")
    train = r1_prompt_completion(script_args.load("train", **whole) if whole else given)
    test = r1_prompt_completion(script_args.load("test"))
    corpus = mixed_corpus(given, script_args.base_tagged, script_args.base_direct, training_args.seed)
    grading = Grading.of({"train": train["answer"], "test": test["answer"]}, partial=0.0)
    rewards = [grading.reward, think_answer_format_reward]  # both weigh 1
    check_run(None, training_args, reward_funcs=rewards, train_dataset=train, **adapters.trainer)
    labels = dict(zip(("accuracy", "format"), rewards, strict=True))
    curves = {f"{name}_curve.png": (f"rewards/{reward.__name__}/mean", name) for name, reward in labels.items()}
    sft_settings = {"learning_rate": script_args.sft_learning_rate, "batch_size": script_args.sft_batch_size}
    fit = functools.partial(fine_tune, batch_size=script_args.sft_batch_size, **machine_settings(training_args))
    sft = functools.partial(fit, adapters=adapters)
    answering = {"max_new_tokens": training_args.max_completion_length, "progress": not training_args.disable_tqdm}

    def pretrain(folder):
        texts = [row["prompt"] + row["completion"] for row in corpus.select(range(min(2000, len(corpus))))]
        tokenizer = tiny_tokenizer(texts, phrases=PHRASES)
        model = tiny_model(tokenizer, seed=training_args.seed)
        pace = {"epochs": script_args.base_epochs, "learning_rate": script_args.base_learning_rate}
        fit(model, corpus, folder, tokenizer=tokenizer, completion_only_loss=False, **pace)

    def cold_start(folder):
        rows = train.shuffle(seed=training_args.seed).select(range(min(script_args.cold_rows, len(train))))
        sft(base, rows, folder, epochs=script_args.cold_epochs, learning_rate=script_args.sft_learning_rate)

    def rejection(start, folder):
        kept = self_training_rows(
            *load_model(start, training_args.device),
            train,
            WellFormedGrading(**asdict(grading)),
            n=script_args.rejection_samples,
            most=script_args.rejection_most,
            seed=training_args.seed,
            **answering,
        )
        if len(kept) == 0:
            raise NothingKept(
                f"No answer of {script_args.rejection_samples} to each training question was right and well-formed: "
                "give the RL before it more updates (max_steps) or a better start (cold_rows, cold_epochs), or sample"
                " more (rejection_samples). The stages before are reported."
            )
        sft(base, kept, folder, epochs=script_args.rejection_epochs, learning_rate=script_args.sft_learning_rate)

    def rl(start, folder):
        trainer = AgentGRPOTrainer(
            str(start),
            reward_funcs=rewards,
            args=stage_arguments(training_args, folder, **adapters.config),
            train_dataset=train.select_columns(["prompt", "answer"]),
            processing_class=AutoTokenizer.from_pretrained(start, padding_side="left"),
            **adapters.trainer,
        )
        train_and_save(trainer, folder, start=start, adapters=adapters, curves=curves)

    stages = Stages(
        output_dir,
        model=model_args.model_name_or_path,
        data=[script_args.dataset, settings, script_args.num_train],
        seed=training_args.seed,
        **adapters.settings,
    )
    pretraining = [script_args.base_tagged, script_args.base_direct, script_args.base_epochs]
    pretraining += [script_args.base_learning_rate, script_args.sft_batch_size]
    # Each stage depends on what those before it depend on
    begun = {} if model_args.model_name_or_path else {"base": pretraining}
    base = model_args.model_name_or_path or stages.run("base", pretrain, **begun)
    rl_settings = trainer_settings(training_args)
    folders, failed = {"base": base}, None
    if "zero" in script_args.methods:
        folders["zero"] = stages.run("zero", functools.partial(rl, base), **begun, **rl_settings)
    if "pipeline" in script_args.methods:
        begun |= {**sft_settings, "cold": [script_args.cold_rows, script_args.cold_epochs]}
        folders["cold_start"] = stages.run("cold_start", cold_start, **begun)
        begun |= rl_settings
        folders["rl"] = stages.run("rl", functools.partial(rl, folders["cold_start"]), **begun)
        kept = [script_args.rejection_samples, script_args.rejection_most, script_args.rejection_epochs]
        begun |= {"kept": kept}
        try:
            folders["rejection"] = stages.run("rejection", functools.partial(rejection, folders["rl"]), **begun)
            folders["rl_2"] = stages.run("rl_2", functools.partial(rl, folders["rejection"]), **begun)
        except NothingKept as error:
            failed = error
    measured = {}
    for name, folder in folders.items():
        model = load_model(folder, training_args.device)
        measured[name] = evaluate_r1(*model, test, grading, n=script_args.num_votes, **answering)
    # A model that was given keeps its card
    cards = [folder for folder in folders.values() if folder != model_args.model_name_or_path]
    title, label = f"{len(test)} test questions", "share of answers"
    report_stages(output_dir, table_of(measured), title, folders=cards, label=label, push=training_args)
    if failed is not None:
        raise failed


def check(script_args: ScriptArguments, training_args: AgentGRPOConfig) -> None:
    """Raises now what would be raised in the middle."""
    check_positive(script_args, "base_epochs", "base_learning_rate", "sft_learning_rate", "sft_batch_size")
    check_positive(script_args, "cold_rows", "cold_epochs")
    check_positive(script_args, *(f"rejection_{what}" for what in ("samples", "most", "epochs")))
    if training_args.reward_weights is not None and len(training_args.reward_weights) != 2:
        raise ValueError(f"reward_weights={training_args.reward_weights}: give two, of the answer and of its form.")
    if script_args.num_votes < 1:
        raise ValueError(f"num_votes={script_args.num_votes}: sample at least one answer to each test question.")


if __name__ == "__main__":
    run(main, DEFAULT_CONFIG, ScriptArguments, AgentGRPOConfig, ModelConfig)
