# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What expert iteration iterates on: an environment that is played, or questions that are answered. Either makes a first
model, samples with any model, and measures and reports what the models can do.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .data import as_settings, load_questions, prompt_completion
from .envs.make import make_env
from .episodes import LoggedEpisode, best_episodes, log_answers, log_episodes, sample_episodes
from .evaluation import held_out_seeds, play_agents
from .plots import plot_players
from .questions import answer_questions, evaluate_answers, load_model
from .report import add_to_cards, announce_files, push_stages, report_stages
from .rewards import Grading
from .script import argument, check_positive
from .tables import interval, markdown_table, plain_table, summarize
from .tiny import make_tiny_model, save_tiny_start


@dataclass
class IterationArguments:
    """What is sampled, and what of it is kept. How a round fine-tunes is said by the arguments of SFTConfig."""

    env_id: str | None = argument(None, "Id of the environment that is played, or MODULE:CLASS.")
    env_kwargs: dict | str | None = argument(None, "Its settings, as JSON.")
    context: str = argument("chat", "What is read each turn.", choices=["chat", "window"])
    window: int | None = argument(None, "With a window, the number of transitions kept. Default: all.")
    max_turns: int | None = argument(None, "Most turns of an episode, where its environment does not end it.")
    env_timeout: float = argument(120.0, "Seconds an environment may take for a step or reset.")
    num_seeds: int = argument(128, "Starts that are played in a round, new ones in each.")
    num_transcripts: int = argument(1000, "Episodes of the random player that warm up the small model.")
    players: list[str] = argument(["random"], "Scripted ones, to compare with.")
    dataset: str | None = argument(None, "Instead of an environment: questions, as in reft.py, or a local file.")
    arithmetic: dict | str | None = argument(None, "Settings of the arithmetic problems, as JSON.")
    test_dataset: str | None = argument(None, "Local file of test questions.")
    style: str = argument("words", "Answers in words or as programs.", choices=["words", "program"])
    num_eval: int = argument(256, "Held-out episodes or test questions.")
    max_new_tokens: int = argument(256, "Token budget of a reply.")
    temperature: float = argument(1.0, "At which all is sampled, but answers to test questions: these are greedy.")
    episodes: str | None = argument(None, "File of episodes to learn from before all rounds.")
    rounds: int = argument(3, "Rounds of playing and learning.")
    start_from: str = argument("last", "A round trains the last model, or the first anew.", choices=["first", "last"])
    replay: bool = argument(False, "Whether a round learns from the file and the rounds before it, too.")
    num_samples: int = argument(8, "Episodes of each start, answers to each question.")
    keep_share: float = argument(1.0, "Keep this share of the episodes, the best.")
    by_group: bool = argument(False, "Whether the share is of each start's episodes, not of all.")
    min_reward: float | None = argument(None, "Keep no episode below.")
    raise_reward: float = argument(0.0, "Added to min_reward after each round (ReST's rising thresholds).")
    keep_most: int | None = argument(None, "Keep at most so many episodes of one start or question.")
    keep_invalid: bool = argument(True, "Whether to keep episodes with invalid turns.")

    def check(self) -> None:
        """Raises `ValueError` for what cannot work, before anything is done."""
        if (self.env_id is None) == (self.dataset is None):
            raise ValueError(f"env_id={self.env_id!r} and dataset={self.dataset!r}: one of the two must be null.")
        if self.raise_reward and self.min_reward is None:
            raise ValueError(f"raise_reward={self.raise_reward} raises min_reward, which is not given: give it.")
        if self.window is not None and self.context != "window":
            raise ValueError(
                f'window={self.window} has no effect with context={self.context!r}: use context="window".'
            )
        if self.num_samples < 1 or self.rounds < (0 if self.episodes else 1):
            said = f"num_samples={self.num_samples}, rounds={self.rounds}, episodes={self.episodes!r}"
            raise ValueError(
                f"{said} leaves nothing to learn: sample at least once, in a round or more, or give a file."
            )
        check_positive(self, "num_eval", "num_seeds", "num_transcripts", "max_new_tokens", "max_turns", "env_timeout")
        if self.temperature < 0 or (self.window or 0) < 0:
            raise ValueError(f"temperature={self.temperature}, window={self.window}: neither may be negative.")
        self.best([])  # refuses its settings now, not after a round of playing

    @property
    def keeping(self) -> dict[str, Any]:
        """What of the episodes is kept, beside their least reward; arguments of [`best_episodes`]."""
        keeping = {"share": self.keep_share, "by_group": self.by_group, "most": self.keep_most}
        return {**keeping, "allow_invalid": self.keep_invalid}

    def best(self, episodes: Sequence[LoggedEpisode], number: int = 0) -> list[LoggedEpisode]:
        """Of the episodes of round `number` (0: of the file) those to learn from."""
        least = self.min_reward
        if least is not None and number > 1:
            least += (number - 1) * self.raise_reward
        return best_episodes(episodes, min_reward=least, **self.keeping)

    def make_task(self, training_args: Any, dtype: str | None = None) -> PlayTask | AnswerTask:
        """
        The environment or the questions.

        Args:
            training_args ([`~trl.SFTConfig`]):
                The recipe's: on which machine, by which seed.
            dtype (`str`, *optional*):
                In which models are loaded to sample. Defaults to that of their files.
        """
        return (PlayTask if self.env_id else AnswerTask)(self, training_args, dtype or "auto")


class PlayTask:
    """
    An environment to play, with what models and scripted players did on its held-out episodes.

    Args:
        args ([`IterationArguments`]):
            What is sampled.
        training_args ([`~trl.SFTConfig`]):
            The recipe's.
        dtype (`str`):
            In which models are loaded.
    """

    def __init__(self, args: IterationArguments, training_args: Any, dtype: str):
        self.args, self.training_args, self.dtype = args, training_args, dtype
        self.env_kwargs = as_settings(args.env_kwargs)
        self.reading = {"context": args.context, "window": args.window}
        self.limit = {} if args.max_turns is None else {"max_turns": args.max_turns}
        self.seeds = held_out_seeds(args.num_eval)
        self.played = play_agents(args.env_id, args.players, self.seeds, env_kwargs=self.env_kwargs, **self.limit)

    @property
    def settings(self) -> list[Any]:
        """What every stage's result depends on, for its stamp."""
        return [self.args.env_id, self.env_kwargs, {**self.reading, **self.limit}]

    def start(self, folder: Path) -> str:
        """A small model that has read the random player's episodes."""
        return make_tiny_model(
            functools.partial(make_env, self.args.env_id, **self.env_kwargs),
            folder,
            n_transcripts=self.args.num_transcripts,
            seed=self.training_args.seed,
            use_cpu=self.training_args.use_cpu,
            disable_tqdm=self.training_args.disable_tqdm,
            max_completion_length=self.args.max_new_tokens,
            **self.reading,
            **self.limit,
        )

    def sample(self, folder: Path, number: int) -> list[LoggedEpisode]:
        """What the model in `folder` plays in round `number`."""
        args = self.args
        starts = range((number - 1) * args.num_seeds, number * args.num_seeds)
        seed = self.training_args.seed + number
        episodes = self._play(folder, seeds=starts, n=args.num_samples, seed=seed)
        return log_episodes(episodes, args.env_id, self.env_kwargs)

    def measure(self, name: str, folder: Path) -> None:
        """Let the model in `folder` play the held-out episodes, for the report."""
        self.played[name] = self._play(folder, seeds=self.seeds)

    def report(self, cards: Sequence[str | Path]) -> None:
        """Table, `metrics.json` and picture of all that was measured, also in the model cards of `cards`."""
        table, output_dir = summarize(self.played), Path(self.training_args.output_dir)
        if not PartialState().is_main_process:
            return
        (output_dir / "metrics.json").write_text(json.dumps(plain_table(table), indent=2))
        title = f"{len(self.seeds)} held-out episodes"
        picture = plot_players(self.played, table, output_dir, title)
        add_to_cards(cards, f"{title}, mean [95% interval]:\n\n{markdown_table(table)}", picture)
        print(markdown_table(table))
        announce_files(output_dir)
        if self.training_args.push_to_hub:
            push_stages(cards, self.training_args)

    def _play(self, folder: Path, **kwargs: Any) -> list[Any]:
        model = load_model(folder, device=self.training_args.device, dtype=self.dtype)
        names = ("max_new_tokens", "temperature", "max_turns", "env_timeout")
        how = {**{name: getattr(self.args, name) for name in names}, **self.reading}
        return sample_episodes(*model, self.args.env_id, env_kwargs=self.env_kwargs, **how, **kwargs)


class AnswerTask:
    """
    Questions to answer, and the share of the test questions that models answered right.

    Args:
        args ([`IterationArguments`]):
            What is sampled.
        training_args ([`~trl.SFTConfig`]):
            The recipe's.
        dtype (`str`):
            In which models are loaded.
    """

    reading: Mapping[str, Any] = {}

    def __init__(self, args: IterationArguments, training_args: Any, dtype: str):
        self.args, self.training_args, self.dtype = args, training_args, dtype
        if Path(args.dataset).suffix and args.test_dataset is None:
            raise ValueError(f"dataset={args.dataset!r} is one file: name another to test on, --test_dataset.")
        self.arithmetic = as_settings(args.arithmetic)
        self.train, test = (
            prompt_completion(load_questions(name, split, **self.arithmetic), args.style)
            for name, split in ((args.dataset, "train"), (args.test_dataset or args.dataset, "test"))
        )
        self.test = test.select(range(min(args.num_eval, len(test))))
        answers = {"train": self.train["answer"], "test": self.test["answer"]}
        self.grading = Grading.of(answers, style=args.style, partial=0.0)
        self.accuracy: dict[str, Any] = {}

    @property
    def settings(self) -> list[Any]:
        """What every stage's result depends on, for its stamp."""
        return [self.args.dataset, self.arithmetic, self.args.style]

    def start(self, folder: Path) -> str:
        """A small model that knows nothing."""
        return save_tiny_start(self.train, folder, seed=self.training_args.seed)

    def sample(self, folder: Path, number: int) -> list[LoggedEpisode]:
        """What the model in `folder` answers in round `number`, with its rewards."""
        args, prompts = self.args, self.train["prompt"][:]
        sampling = {"n": args.num_samples, "seed": self.training_args.seed + number, "temperature": args.temperature}
        answers = answer_questions(*self._load(folder), prompts, max_new_tokens=args.max_new_tokens, **sampling)
        asked = {
            name: [value for value in self.train[name] for _ in range(args.num_samples)]
            for name in self.train.features
        }
        asked["completions"] = [text for own in answers for text in own]
        return log_answers(prompts, answers, self.grading.reward(prompts=asked["prompt"], **asked))

    def measure(self, name: str, folder: Path) -> None:
        """Let the model in `folder` answer the test questions, for the report."""
        right = evaluate_answers(*self._load(folder), self.test, self.grading, max_new_tokens=self.args.max_new_tokens)
        self.accuracy[name] = interval(right["greedy"])

    def report(self, cards: Sequence[str | Path]) -> None:
        """Table, `metrics.json` and picture of all that was measured, also in the model cards of `cards`."""
        title, output_dir = f"{len(self.test)} test questions", self.training_args.output_dir
        report_stages(output_dir, {"greedy": self.accuracy}, title, folders=cards, push=self.training_args)

    def _load(self, folder: Path) -> tuple[Any, Any]:
        return load_model(folder, device=self.training_args.device, dtype=self.dtype)
