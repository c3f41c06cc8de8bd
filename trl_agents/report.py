# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What recipes end with: a table, pictures, `metrics.json`, episodes to read, results in the model cards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .hub import push_folder, stage_repository
from .plots import (
    draw_game,
    plot_accuracy,
    plot_learning_curve,
    plot_measures,
    plot_outcomes,
    plot_players,
    plot_returns,
)
from .stages import announce
from .tables import Interval, markdown_games, markdown_table, plain_table, summarize, summarize_games
from .types import Trajectory


RESULTS = "\n## Results\n"


def report_stages(
    output_dir: str | Path,
    table: Mapping[str, Mapping[str, Interval]],
    title: str,
    *,
    folders: Iterable[str | Path] = (),
    label: str = "accuracy",
    shares: bool = True,
    more: Mapping[str, Any] | None = None,
    push: Any = None,
) -> None:
    """
    Write `metrics.json` and a picture, print the table, and add it and the picture to the stages' model cards. The
    main process does, for all.

    Args:
        output_dir (`str` or `Path`):
            Where they are written.
        table (`Mapping[str, Mapping[str, Interval]]`):
            Measure -> stage -> [`Interval`].
        title (`str`):
            What was measured, for the picture and the cards: "500 test questions".
        folders (`Iterable[str | Path]`, *optional*):
            Of the stages' models. Those without a card (`README.md`) are passed over.
        label (`str`, *optional*, defaults to `"accuracy"`):
            Name of the picture's axis.
        shares (`bool`, *optional*, defaults to `True`):
            Whether all measures are shares, drawn side by side in `accuracy.png`; else `measures.png` has a panel for
            each.
        more (`Mapping[str, Any]`, *optional*):
            What else `metrics.json` shall hold, beside the table.
        push ([`~transformers.TrainingArguments`], *optional*):
            The recipe's. If their `push_to_hub` is set, each folder with a card is pushed, to a repository of its own
            (`stage_repository`).
    """
    if not PartialState().is_main_process:
        return
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "metrics.json").write_text(json.dumps({**plain_table(table), **(more or {})}, indent=2))
    picture = output_dir / ("accuracy.png" if shares else "measures.png")
    (plot_accuracy if shares else plot_measures)(table, picture, title, label)
    text, folders = markdown_table(table, "model"), list(folders)
    add_to_cards(folders, f"{title}, mean [95% interval]:\n\n{text}", picture)
    print(text)
    announce_files(output_dir)
    if push is not None and push.push_to_hub:
        push_stages(folders, push)


def announce_files(output_dir: str | Path) -> None:
    """Tell where everything is: what recipes end with."""
    names = sorted(path.name + "/" * path.is_dir() for path in Path(output_dir).glob("[!._]*"))
    announce(f"Written to {output_dir}: {', '.join(names)}")


def push_stages(folders: Iterable[str | Path], args: Any) -> None:
    """Push the folders that have a card, each to a repository of its own; call it on the main process."""
    for folder in map(Path, folders):
        if (folder / "README.md").exists():
            push_folder(
                folder,
                stage_repository(args, folder),
                token=args.hub_token,
                private=args.hub_private_repo,
                revision=args.hub_revision,
            )


def report_players(
    trainer: Any,
    played: Mapping[str, Sequence[Trajectory]],
    title: str,
    *,
    models: Sequence[str] = ("before", "after"),
    n_episodes: int = 8,
) -> None:
    """
    Write what players did on the same episodes, and the model card with it, to the trainer's folder; print the table.
    Every process calls this, the main one writes.

    Args:
        trainer ([`AgentGRPOTrainer`]):
            Whose training it was; its card tells the results.
        played (`Mapping[str, Sequence[Trajectory]]`):
            Episodes of each player.
        title (`str`):
            What was played, for the picture.
        models (`Sequence[str]`, *optional*, defaults to `("before", "after")`):
            Which of the players are models: their episodes are written down to read, and the learning curve has the
            others for bounds.
        n_episodes (`int`, *optional*, defaults to `8`):
            How many episodes of a model are written down.
    """
    output_dir = Path(trainer.args.output_dir)
    table = summarize(played)
    n_played = max(map(len, played.values()))
    trainer.card_results = f"{n_played} held-out episodes, mean [95% interval]:\n\n{markdown_table(table)}\n\n"
    measure = "regret" if "regret" in table else "return"  # an environment of one's own tells no regret
    picture = "![Regret by step](regret.png)" if measure == "regret" else "![Returns](returns.png)"
    trainer.card_results += f"{picture}\n\n![Learning curve](learning_curve.png)"
    if trainer.is_world_process_zero():
        (output_dir / "metrics.json").write_text(json.dumps(plain_table(table), indent=2))
        plot_players(played, table, output_dir, title)
        references = {player: value for player, value in table.get(measure, {}).items() if player not in models}
        plot_learning_curve(trainer.state.log_history, output_dir / "learning_curve.png", references=references)
        for player in models:
            episodes = enumerate(played[player][:n_episodes])
            text = "\n\n".join(f"Episode {number}\n{episode}" for number, episode in episodes)
            (output_dir / f"episodes_{player}.txt").write_text(text)
        print(markdown_table(table))
    trainer.create_model_card()
    announce_files(output_dir)


def report_games(
    trainer: Any,
    played: Mapping[str, Mapping[str, Sequence[Trajectory]]],
    title: str,
    *,
    models: Sequence[str] = ("before", "after"),
    references: Mapping[str, Interval] | None = None,
    n_games: int = 4,
) -> None:
    """
    Write what players did in the same games of tic-tac-toe against several opponents, and the model card with it, to
    the trainer's folder; print the table. Every process calls this, the main one writes.

    Args:
        trainer ([`AgentGRPOTrainer`]):
            Whose training it was; its card tells the results.
        played (`Mapping[str, Mapping[str, Sequence[Trajectory]]]`):
            Player -> opponent -> games.
        title (`str`):
            What was played, for the card: "400 held-out games an opponent".
        models (`Sequence[str]`, *optional*, defaults to `("before", "after")`):
            Which of the players are models: some of their games are written down, and their invalid replies counted.
        references (`Mapping[str, Interval]`, *optional*):
            Mean returns to draw beside the learning curve.
        n_games (`int`, *optional*, defaults to `4`):
            How many games of a model against each opponent are written down.
    """
    output_dir = Path(trainer.args.output_dir)
    returns = summarize_games(played)
    invalid_rate = summarize({player: sum(games.values(), []) for player, games in played.items()})["invalid_rate"]
    results = markdown_games(returns)
    trainer.card_results = f"Returns in {title}, mean [95% interval]:\n\n{results}\n\n"
    trainer.card_results += "![Returns](returns.png)\n\n![Outcomes](outcomes.png)\n\n![Learning](learning_curve.png)"
    if trainer.is_world_process_zero():
        metrics = {"returns": returns, "invalid_rate": invalid_rate}
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2, default=asdict))
        plot_returns(returns, output_dir / "returns.png")
        plot_outcomes(returns, output_dir / "outcomes.png")
        curve = {"metric": "agents/return_mean", "label": "return per episode", "references": references}
        plot_learning_curve(trainer.state.log_history, output_dir / "learning_curve.png", **curve)
        for player in models:
            samples = [(name, one) for name, games in played[player].items() for one in games[:n_games]]
            drawn = "\n\n".join(f"Against {name}\n{draw_game(one)}" for name, one in samples)
            (output_dir / f"games_{player}.txt").write_text(drawn)
        invalid = ", ".join(f"{invalid_rate[player]} {player}" for player in models)
        print(results, f"Invalid replies: {invalid}.", sep="\n\n")
    trainer.create_model_card()
    announce_files(output_dir)


def add_to_cards(folders: Iterable[str | Path], results: str, picture: Path) -> None:
    """Make `results`, Markdown, and `picture` the last section of the folders' model cards, if they have one."""
    for folder in map(Path, folders):
        if (folder / "README.md").exists():
            shutil.copyfile(picture, folder / picture.name)  # a card is read where its folder is pushed to
            add_results(folder, f"{results}\n\n![Results]({picture.name})")


def add_results(folder: str | Path, results: str) -> None:
    """Make `results`, Markdown, the last section of the model card in `folder`, in place of an earlier one."""
    card = Path(folder) / "README.md"
    if card.exists():
        text = card.read_text(encoding="utf-8").split(RESULTS)[0].rstrip("\n")
        card.write_text(f"{text}\n{RESULTS}\n{results}\n", encoding="utf-8")
