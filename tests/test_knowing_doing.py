# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The gap between knowing and doing: values out of any text, judgements by hand, writers whose matrix is known."""

import functools
import math
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_agents import make_env
from trl_agents.agents import UCBAgent, play_episode
from trl_agents.diagnostics.histories import NotMeasurable, Transition, shown_reward
from trl_agents.diagnostics.knowing_doing import WithUCBTask, judge, judge_episode, knowing_doing, summarize_judgements
from trl_agents.diagnostics.players import AgentPlayer, ModelPlayer, TextPlayer
from trl_agents.diagnostics.ucb_values import parse_ucb_values
from trl_agents.tiny import tiny_model, tiny_tokenizer
from trl_agents.types import ParsedAction, StopReason, Trajectory, Turn


INF, NAN = math.inf, math.nan
COLOURS = ["blue", "green", "red"]


def bandit(**kwargs):
    return functools.partial(make_env, "trl_agents/Bandit-v0", **{"n_arms": 5, "horizon": 15, **kwargs})


# -- the block --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("blue: 1.59\ngreen: inf\nred: -0.5", {"blue": 1.59, "green": INF, "red": -0.5}),
        ("blue: 1.59, green: Infinity, red: ∞", {"blue": 1.59, "green": INF, "red": INF}),
        ("blue: -inf; green = nan; red -> +2e-3", {"blue": -INF, "green": NAN, "red": 0.002}),
        ('{"blue": 1.5, "green": 2, "red": null}', {"blue": 1.5, "green": 2.0}),
        ("- **Blue**: 1.5\n* `GREEN`: .5\n1. red: 3.", {"blue": 1.5, "green": 0.5, "red": 3.0}),
        ("| blue | 1.5 |\n| green | inf |", {"blue": 1.5, "green": INF}),
        ("UCB(blue) = 1.5\nUCB_green = 2.5\nUCB for red: 0", {"blue": 1.5, "green": 2.5, "red": 0.0}),
        ("blue: 0.49 + 1.10 = 1.59\ngreen: 0.79 + sqrt(2 ln 11 / 7) ≈ 1.62", {"blue": 1.59, "green": 1.62}),
        ("blue: mean = 0.49, bonus = 1.10, UCB = 1.59", {"blue": 1.59}),
        ("blue: 1.59 (mean = 0.49, bonus = 1.10)", {"blue": 1.59}),
        ("blue: 0.49 + 1.10\ngreen: sqrt(2 ln 11 / 7)\nred: never tried", None),  # nothing comes out
        ("blue: 1\nblue: 2", {"blue": 2.0}),
        ("bluegreen: 1\nsky-blue: 2, blue-ish: 3", None),
        ("blue: $1.5$, green: \\infty, red: ~2", {"blue": 1.5, "green": INF, "red": 2.0}),
        ("blue: 1,234.5 green: 3", {"blue": 1234.5, "green": 3.0}),
        ("blue:\ngreen:", None),
        ("", None),
    ],
)
def test_forms_of_a_block(block, expected):
    values = parse_ucb_values(f"First I think.\n<ucb_values>\n{block}\n</ucb_values>\nACTION=blue", COLOURS)
    assert (values is None) == (expected is None)
    if expected is not None:
        assert values == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("0: 1.5, 1: 2.5, 10: inf", {"0": 1.5, "1": 2.5, "10": INF}),
        ("0: 1.5,1: 2.5", {"0": 1.5, "1": 2.5}),
        ("arm 1 = 0.2 + sqrt(2 * ln(10) / 3) = 1.44", {"1": 1.44}),
        ("UCB(3) = 0.5 + sqrt(2 ln 10 / 1) = 2.65\n- 10 = 4", {"3": 2.65, "10": 4.0}),
        ("**0**: 1\n**3**: 2", {"0": 1.0, "3": 2.0}),
    ],
)
def test_arms_that_are_numbers(block, expected):
    assert parse_ucb_values(f"<ucb_values>{block}</ucb_values>", ["0", "1", "3", "10"]) == expected


def test_names_of_several_words_and_names_in_names():
    names = ["mint", "mint green", "Café noir"]
    text = "<UCB_Values>mint  green: 1\nmint: 2\ncafé noir = 3</UCB_Values >"
    assert parse_ucb_values(text, names) == {"mint green": 1.0, "mint": 2.0, "Café noir": 3.0}


def test_which_block_counts():
    def block(value):
        return f"<ucb_values>blue: {value}</ucb_values>"

    assert parse_ucb_values(f"{block(1)} no, rather {block(2)}", COLOURS) == {"blue": 2.0}
    assert parse_ucb_values(f"{block(1)} and <ucb_values>blue: 3", COLOURS) == {"blue": 1.0}  # cut off
    assert parse_ucb_values("<ucb_values>blue: 3", COLOURS) is None
    assert parse_ucb_values("blue: 3</ucb_values>", COLOURS) is None
    assert parse_ucb_values("blue: 3", COLOURS) is None


PIECES = [*"<>/=:|.,-+*()[]{}'\"`~ \n\t0159eE∞≈", "blue", "inf", "nan", "ucb_values", "<ucb_values>", "</ucb_values>"]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
@settings(max_examples=300, deadline=None)
def test_no_text_raises(text):
    for told in (text, f"<ucb_values>{text}</ucb_values>"):
        values = parse_ucb_values(told, ["blue", "1", "a b", "x.*(", "-"])
        assert values is None or all(isinstance(value, float) for value in values.values())


@pytest.mark.parametrize(
    "body",
    ["blue " * 200_000, "blue:" * 200_000, "1" * 1_000_000, "<ucb_values>" * 80_000, "blue: " + "(" * 500_000]
    + [
        "blue" + " \"'`*_~)]}" * 100_000,
        "</ucb_values>" * 80_000,
        "1,111" * 200_000,
        "0: 1 = " * 150_000,
        " " * 10**6,
    ],
)
def test_any_text_is_read_in_bounded_time(body):
    names = [f"arm number {n}" for n in range(100)] + ["blue", "0", "1"]
    started = time.process_time()
    parse_ucb_values(f"<ucb_values>{body}</ucb_values>", names)
    assert time.process_time() - started < 2


# -- judgements by hand -----------------------------------------------------------------------------------------------


def block(**values):
    return "<ucb_values>" + "\n".join(f"{name}: {value}" for name, value in values.items()) + "</ucb_values>"


def test_figure_22():
    """11 steps on two of five arms: it writes inf for the untried and says and plays green. Knows, and is greedy."""
    actions, rewards = ["blue"] * 4 + ["green"] * 7, [0.49] * 4 + [0.79] * 7
    legal = ["blue", "green", "red", "yellow", "orange"]
    text = block(blue=1.17, green=1.47, red="infinity", yellow="infinity", orange="infinity")
    judged = judge(text, "green", actions, rewards, legal)
    assert judged.correct and judged.doing == "greedy"
    # sqrt(2 ln 11 / n): .49 + 1.095 = 1.585 against .79 + .828 = 1.618, so blue is neither
    assert judge(text, "blue", actions, rewards, legal).doing == "other"
    assert judge(text, "yellow", actions, rewards, legal).doing == "optimal"
    assert not judge(block(green=5), "red", actions, rewards, legal).correct


def test_once_all_is_tried_only_the_leader_counts():
    # t = 6: blue 0.5 + sqrt(2 ln 6 / 2) = 1.839, green 0.9 + sqrt(2 ln 6 / 4) = 1.847
    actions, rewards = ["blue"] * 2 + ["green"] * 4, [0.5] * 2 + [0.9] * 4
    for text, correct in [
        (block(blue=1.8, green=1.9), True),
        (block(blue=1.9, green=1.8), False),
        (block(blue=1.8, green=1.8), True),  # equals: any counts
        (block(blue="nan", green=0), True),  # nan is no value
        (block(blue="nan", green="nan"), False),
        ("green leads", False),
    ]:
        assert judge(text, "green", actions, rewards, ["blue", "green"]).correct is correct, text
    assert judge("", "green", actions, rewards, ["blue", "green"]).doing == "optimal"  # greedy too: optimal
    assert judge("", "blue", actions, rewards, ["blue", "green"]).doing == "other"
    assert judge("", None, actions, rewards, ["blue", "green"]).doing == "other"
    assert judge("", None, actions, rewards, ["blue", "green"]).valid is False


def test_the_bonus_is_the_one_asked_for():
    # t = 10: sqrt(2 ln 10 / n) makes blue 2.15 and green 1.72, sqrt(1 / n) 1.00 and 1.33
    actions, rewards, legal = ["blue"] + ["green"] * 9, [0.0] + [1.0] * 9, ["blue", "green"]
    assert judge(block(blue=2, green=1), "blue", actions, rewards, legal).correct
    assert not judge(block(blue=2, green=1), "blue", actions, rewards, legal, bonus="sqrt_n").correct


def test_before_the_first_step_any_action_is_optimal():
    judged = judge(block(blue="inf", green="inf"), "green", [], [], ["blue", "green"])
    assert judged.correct and judged.doing == "optimal"


def test_rewards_are_those_that_were_shown():
    line = "Step=0 Action=blue Reward=0.12"
    assert shown_reward(0, "", Transition("blue", 0.1249, line, {"transition": line})) == 0.12
    assert shown_reward(0, "", Transition("blue", 0.1251, "", {})) == 0.13  # as a window would word it
    odd = "it pays well"
    assert shown_reward(0, "", Transition("blue", 0.1249, odd, {"transition": odd})) == 0.1249


def test_a_window_forgets():
    """Of four steps the last two are read: blue is untried again, and so optimal."""

    def turn(action, text=""):
        return Turn("", (), (), text, ParsedAction(action), action, float(action == "green"))

    turns = (*map(turn, ["blue", "blue", "green", "green"]), turn("blue", block(blue="inf", green=2)))
    episode = Trajectory(0, turns, StopReason.TERMINATED, reset_info={"legal_actions": ["blue", "green"]})
    last = judge_episode(episode, window=2)[-1]
    assert last.correct and last.doing == "optimal"
    last = judge_episode(episode, window=None)[-1]
    assert not last.correct and last.doing == "other"
    assert [one.doing for one in judge_episode(episode, window=0)] == ["optimal"] * 5


def test_shares_add_up():
    good = judge(block(blue="inf", green="inf"), "green", [], [], ["blue", "green"])
    bad = judge("", None, [], [], ["blue", "green"])
    result = summarize_judgements([[good, good, good, bad], [good, bad]])
    assert result["joint"]["correct"] == {"optimal": pytest.approx(400 / 6), "greedy": 0.0, "other": 0.0}
    assert result["joint"]["wrong"]["other"] == pytest.approx(200 / 6)
    assert result["conditional"]["correct"]["optimal"] == 100 == result["conditional"]["wrong"]["other"]
    assert (result["n_steps"], result["missing_block"], result["invalid"]) == (6, 2, 2)
    assert result["correct"]["mean"] == pytest.approx((75 + 50) / 2)  # a mean over episodes
    only = summarize_judgements([[good]])
    assert only["conditional"]["wrong"] == {"optimal": None, "greedy": None, "other": None}
    with pytest.raises(NotMeasurable):
        summarize_judgements([])


# -- writers through the rollout --------------------------------------------------------------------------------------


def ucb_writer(prompt, choose=max):
    """Reads its text as a model does, works the values out, writes them down, and chooses."""
    names = re.search(r"labelled ([\w, ]+)\.", prompt)[1].split(", ")
    seen = [(name, float(reward)) for name, reward in re.findall(r"Action=(\w+) Reward=(-?[\d.]+)", prompt)]
    values = {}
    for name in names:
        own = [reward for played, reward in seen if played == name]
        values[name] = sum(own) / len(own) + math.sqrt(2 * math.log(len(seen)) / len(own)) if own else math.inf
    lines = "\n".join(f"{name}: {value:.6f}" for name, value in values.items())
    return f"UCB adds a bonus.\n<ucb_values>\n{lines}\n</ucb_values>\nACTION={choose(values, key=values.get)}"


def greedy_writer(prompt):
    """Knows as well, and plays the highest of those it tried."""

    def tried(values, key):
        seen = {name: value for name, value in values.items() if math.isfinite(value)}
        return max(seen or values, key=key)

    return ucb_writer(prompt, tried)


@pytest.mark.parametrize("context", ["window", "chat"])
@pytest.mark.parametrize("kwargs", [{}, {"distribution": "bernoulli"}, {"scenario": "number", "noise": "high"}])
def test_ucb_writer_knows_and_does(context, kwargs):
    player = TextPlayer(ucb_writer, "ucb writer", context=context)
    result, played = knowing_doing(player, bandit(**kwargs), range(8))
    assert result["joint"]["correct"] == {"optimal": 100.0, "greedy": 0.0, "other": 0.0}
    assert result["conditional"]["correct"]["optimal"] == 100.0
    assert result["n_steps"] == 8 * 15 and result["missing_block"] == result["invalid"] == 0
    assert all("<ucb_values>" in trajectory.instructions for trajectory in played)


def test_greedy_writer_knows_and_is_greedy():
    result, played = knowing_doing(TextPlayer(greedy_writer, "greedy writer"), bandit(), range(8))
    # The first step of an episode has nothing tried: any action is optimal there
    assert result["joint"]["correct"]["optimal"] == pytest.approx(100 / 15)
    assert result["joint"]["correct"]["greedy"] == pytest.approx(100 * 14 / 15)
    assert result["joint"]["wrong"] == {"optimal": 0.0, "greedy": 0.0, "other": 0.0}
    assert all(len({turn.executed for turn in trajectory.turns}) == 1 for trajectory in played)


def test_a_writer_that_knows_nothing_and_plays_well():
    def silent(prompt):
        return re.sub(r"<ucb_values>.*</ucb_values>", "", ucb_writer(prompt), flags=re.DOTALL)

    result, _ = knowing_doing(TextPlayer(silent, "silent"), bandit(), range(3))
    assert result["joint"]["wrong"]["optimal"] == 100.0 and result["missing_block"] == result["n_steps"]


def test_nonsense_gives_sensible_figures():
    rng = np.random.default_rng(0)
    noise = [
        "",
        "<ucb_values></ucb_values>",
        "ACTION=",
        "ACTION=violet",
        "<ucb_values>blue: x</ucb_values>",
        "\0\ud800",
    ]
    result, _ = knowing_doing(TextPlayer(lambda prompt: noise[rng.integers(len(noise))], "n"), bandit(), range(3))
    assert result["joint"]["wrong"]["other"] == 100.0 and result["correct"]["mean"] == 0.0
    assert result["invalid"] == result["missing_block"] == result["n_steps"] == 45


def test_the_task_is_added_to_instructions_of_either_kind():
    env = WithUCBTask(bandit()(), "TASK")
    assert env.instructions.endswith("\n\nTASK") and env.question == "What do you predict next?"
    assert "instructions" not in env.reset(seed=0)[1]

    class Own:
        instructions = "General."

        def reset(self, **kwargs):
            return "", {"instructions": "Special."}

    assert WithUCBTask(Own(), "TASK").reset(seed=0)[1]["instructions"] == "Special.\n\nTASK"


def test_a_model_through_the_same_path():
    tokenizer = tiny_tokenizer(["ACTION=blue <ucb_values>"], vocab_size=270)
    player = ModelPlayer(tiny_model(tokenizer, 32, 1), tokenizer, "me")
    result, played = knowing_doing(player, bandit(horizon=3), range(2), max_new_tokens=8)
    assert result["n_steps"] == 6 and sum(sum(row.values()) for row in result["joint"].values()) == pytest.approx(100)
    assert all(len(turn.action_ids) <= 8 for trajectory in played for turn in trajectory.turns)


def test_where_it_means_nothing():
    with pytest.raises(NotMeasurable, match="scripted"):
        knowing_doing(AgentPlayer(UCBAgent(), "ucb"), bandit(), range(2))
    with pytest.raises(NotMeasurable, match="change"):
        knowing_doing(TextPlayer(ucb_writer, "u"), functools.partial(make_env, "trl_agents/TicTacToe-v0"), range(2))


def test_the_scripted_expert_agrees():
    """The player of `agents.py` on the same bandits plays what the judge calls optimal, but for rewards' rounding."""
    env = bandit()()
    judged = [one for seed in range(8) for one in judge_episode(play_episode(env, UCBAgent(), seed=seed))]
    env.close()
    assert np.mean([one.doing == "optimal" for one in judged]) > 0.97
    assert not any(one.correct for one in judged)  # it writes nothing
