# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Games of two players: tables by opponent and seat, boards as text, and the thought that only restates the board."""

import functools
import json
from dataclasses import asdict

import pytest

from trl_agents import make_env
from trl_agents.agents import MinimaxAgent, RandomAgent, play_episode
from trl_agents.evaluation import play_agents, play_opponents
from trl_agents.plots import draw_game, plot_outcomes, plot_returns
from trl_agents.tables import interval, markdown_games, summarize_games
from trl_agents.transcripts import board_rationale, play_transcripts
from trl_agents.types import InvalidReason, ParsedAction, StopReason, Trajectory, Turn


GAME = "trl_agents/TicTacToe-v0"
OPPONENTS = ("random", "noisy", "optimal")


def game(seat: str, outcome: str | None, stop: StopReason = StopReason.TERMINATED) -> Trajectory:
    """A game of one move."""
    reward = {"win": 1.0, "draw": 0.0, "loss": -1.0, None: 0.0}[outcome]
    info = {"outcome": outcome} if outcome else {}
    turn = Turn("State=000000000", (), (), "ACTION=4", ParsedAction("4"), "4", reward=reward, info=info)
    return Trajectory(0, (turn,), stop, reset_info={"seat": seat})


def test_table_of_games_by_hand():
    games = [game("first", "win"), game("first", "win"), game("first", "loss"), game("first", "draw")]
    games += [game("second", "loss"), game("second", None, StopReason.CONTEXT_FULL)]
    games += [game("second", "win", StopReason.ENV_ERROR)]  # a fault: it weighs nothing
    table = summarize_games({"me": {"random": games}})
    assert (
        set(table) == {"me"} and set(table["me"]) == {"random"} and list(table["me"]["random"]) == ["first", "second"]
    )
    first, second = table["me"]["random"].values()
    assert (first.mean, first.win, first.draw, first.loss) == (0.25, 0.5, 0.25, 0.25)
    assert (first.low, first.high) == (interval([1, 1, -1, 0]).low, interval([1, 1, -1, 0]).high)
    # Not played to its end: neither won, drawn nor lost
    assert (second.mean, second.win, second.draw, second.loss) == (-0.5, 0.0, 0.0, 0.5)
    assert set(asdict(first)) == {"mean", "low", "high", "win", "draw", "loss"}
    json.dumps(table, default=asdict)


def test_rows_of_the_table():
    table = summarize_games(
        {"before": {"noisy": [game("second", "loss")]}, "after": {"noisy": [game("second", "win")]}}
    )
    text = markdown_games(table)
    assert text.splitlines()[0] == "| opponent, our seat | before | after |"
    assert text.splitlines()[2] == "| noisy, second | -1.00 [-1.00, -1.00] | 1.00 [1.00, 1.00] |"


@pytest.mark.parametrize(
    ("seat", "settings"), [("random", ["random"]), ("first", ["first", "second"]), (None, ["first", "second"])]
)
def test_both_seats_against_each_opponent(seat, settings):
    seen = []

    def play(env):
        made = env()
        seen.append((made.opponent, made.seat, made.show_legal_actions))
        return play_agents(env, {"me": RandomAgent()}, range(20))["me"]

    env_kwargs = {"show_legal_actions": False, "opponent": "noisy"} | ({"seat": seat} if seat else {})
    played = play_opponents(play, GAME, ["random", "optimal"], env_kwargs=env_kwargs)
    assert seen == [(opponent, setting, False) for opponent in ("random", "optimal") for setting in settings]
    for games in played.values():
        assert len(games) == 20 * len(settings)
        assert {one.reset_info["seat"] for one in games} == {"first", "second"}


def test_the_optimal_players_row():
    play = lambda env: play_agents(env, {"me": MinimaxAgent()}, range(150))["me"]  # noqa: E731
    table = summarize_games({"optimal": play_opponents(play, GAME, OPPONENTS, env_kwargs={"seat": "random"})})
    scores = table["optimal"]
    assert all(score.loss == 0 for row in scores.values() for score in row.values())
    assert all(score.draw == 1 for score in scores["optimal"].values())
    assert scores["random"]["first"].mean > 0.9 > scores["noisy"]["first"].mean > 0.5
    assert scores["random"]["second"].low < 0.78 < scores["random"]["second"].high + 0.1


def test_a_game_as_boards_side_by_side():
    env = make_env(GAME, opponent=lambda board, legal, rng: legal[0])
    trajectory = play_episode(env, MinimaxAgent(fastest=True), seed=0)
    text = draw_game(trajectory)
    lines = text.splitlines()
    n_boards = len(trajectory.turns) + 1
    assert lines[1].split() == lines[3].split() == ["-" * 10] * n_boards
    assert all(len(line) <= 14 * n_boards for line in lines[:5])
    rows = [row.ljust(14 * n_boards) for row in lines[:5:2]]
    last = [row[14 * (n_boards - 1) :][:9] for row in rows]
    cells = "".join(row[column] for row in last for column in (0, 4, 8))
    assert cells == trajectory.turns[-1].info["board"].translate(str.maketrans("012", " xo"))
    assert [line[:2] for line in lines[5:-1]] == [f"{number}." for number in range(1, n_boards)]
    assert lines[-1] == "[win, moving first]"


def test_a_drawn_game_shows_what_was_invalid():
    infos = [{"board": "100000002"}, {"board": "110000022", "outcome": "loss"}]
    parsed = [ParsedAction("0"), ParsedAction(None, InvalidReason.ILLEGAL, "8")]
    texts = ["ACTION=0", "ACTION=8"]
    turns = [Turn("", (), (), *values[:2], "1", info=values[2]) for values in zip(texts, parsed, infos, strict=True)]
    start = {"board": "000000000", "seat": "first"}
    text = draw_game(Trajectory(0, tuple(turns), StopReason.TERMINATED, reset_info=start))
    assert "2. ACTION=8\n   (invalid, illegal; 1 was played)\n[loss, moving first]" in text


def test_pictures(tmp_path):
    agents = {"random": RandomAgent(), "optimal": MinimaxAgent()}
    played = {
        name: play_opponents(
            functools.partial(lambda env, agent: play_agents(env, {"me": agent}, range(8))["me"], agent=agent),
            GAME,
            OPPONENTS,
            env_kwargs={"seat": "random"},
        )
        for name, agent in agents.items()
    }
    table = summarize_games(played)
    del table["random"]["noisy"]["second"]  # a seat that was never drawn leaves its place empty
    for plot in (plot_returns, plot_outcomes):
        path = tmp_path / f"{plot.__name__}.png"
        plot(table, path, "a title")
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.parametrize("board", ["digits", "grid"])
@pytest.mark.parametrize("context", ["chat", "window"])
def test_the_thought_restates_the_board(board, context):
    """Exactly the board that the move is on, and nothing of the move."""
    env = functools.partial(make_env, GAME, board=board, seat="random")
    rows = play_transcripts(env, RandomAgent(), range(10), rationale=board_rationale, context=context)["messages"]
    n_replies = 0
    for row in rows:
        for asked, replied in zip(row, row[1:], strict=False):
            if replied["role"] != "assistant":
                continue
            states = [line.split("State=")[1] for line in asked["content"].splitlines() if "State=" in line]
            assert replied["content"].startswith(f"Board {states[-1].split()[0]}. ACTION=")
            n_replies += 1
    assert n_replies > 25
    observation = "Step=0 State=000000000 Action=4 Reward=0\nLegal actions: 1,2,3\nStep=1 State=200010000"
    assert board_rationale(observation, "1") == board_rationale(observation, "2") == "Board 200010000."


def test_without_a_thought_the_action_alone():
    rows = play_transcripts(GAME, RandomAgent(), range(3), rationale=None)["messages"]
    assert all(
        message["content"].startswith("ACTION=") for row in rows for message in row if message["role"] == "assistant"
    )
