# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""TextArena, GEM and reasoning-gym. What is not installed is skipped; what a missing suite says is tested always."""

import functools
import multiprocessing
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from adapted import check_100_episodes, play, train_two_steps
from datasets import Dataset
from scripted import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_agents import ModelOpponent
from trl_agents.actions import ActionParser
from trl_agents.agents import RandomAgent, play_episode
from trl_agents.envs import make_env
from trl_agents.envs.adapters import luck
from trl_agents.envs.adapters.luck import own_luck


@pytest.fixture
def textarena():
    return pytest.importorskip("textarena", reason="TextArena is not installed: pip install textarena")


@pytest.fixture
def gem():
    return pytest.importorskip("gem", reason="GEM is not installed: pip install gem-llm")


@pytest.fixture
def reasoning_gym():
    return pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install reasoning-gym")


# -- TextArena --------------------------------------------------------------------------------------------------------

GAMES = {"Nim-v0": "0 1", "TicTacToe-v0": "4", "GuessTheNumber-v0": "3"}


@pytest.mark.parametrize("game", [*GAMES, "KuhnPoker-v0", "2048-v0-ultra-easy"])
def test_100_games(textarena, game):
    episodes = check_100_episodes(functools.partial(make_env, f"textarena:{game}"))
    final = {episode[-1][1] for episode in episodes.values() if episode[-1][2]}
    assert final >= {1.0, -1.0} if game in ("Nim-v0", "TicTacToe-v0", "KuhnPoker-v0") else max(final) == 1.0
    assert all(step[1] == 0 for episode in episodes.values() for step in episode[:-1])


@pytest.mark.parametrize("game", GAMES)
def test_games_train(textarena, game, tmp_path):
    train_two_steps(f"textarena:{game}", tmp_path, GAMES[game], max_turns=1)


def nim(**kwargs):
    return make_env("textarena:Nim-v0", **kwargs)


def test_nim_by_hand(textarena):
    taken = []

    def opponent(observation, legal_actions, rng):
        taken.append((observation, legal_actions))
        return legal_actions[-1]

    env = nim(opponent=opponent, piles=[1, 2])
    observation, info = env.reset(seed=0)
    assert (
        "Player 0" in env.instructions and "ACTION=" in env.instructions and env.instructions == info["instructions"]
    )
    assert observation == "Current Pile:\n  pile 0: 1\n  pile 1: 2"
    assert info["legal_actions"] == ["0 1", "1 1", "1 2"]
    observation, reward, terminated, truncated, info = env.step("0 1")
    assert taken[0][1] == ["1 1", "1 2"] and "Player 0 removes 1 from pile 0." in taken[0][0]
    assert "Welcome" not in taken[0][0]  # the rules are not among what it observes
    assert (reward, terminated, truncated, info["legal_actions"], info["outcome"]) == (-1.0, True, False, [], "loss")
    assert "Player 1 took the last object(s)!" in observation
    with pytest.raises(ValueError, match="No game is on"):
        env.step("0 1")
    env = nim(opponent=lambda observation, legal_actions, rng: "1 1", piles=[1, 2])
    env.reset(seed=0)
    env.step("1 1")
    _, reward, _, _, info = env.step("0 1")
    assert (reward, info["outcome"]) == (1.0, "win")


def test_an_agent_of_textarena_as_opponent(textarena):
    class Player(textarena.Agent):
        def __init__(self):
            self.read = []

        def __call__(self, observation):
            self.read.append(observation)
            return "I take [0 1]"

    player = Player()
    env = nim(opponent=player, seat=1)
    observation, _ = env.reset(seed=0)
    assert "Player 1" in env.instructions and "Player 0 removes 1 from pile 0." in observation
    assert "Welcome to Nim, Player 0!" in player.read[-1]


def test_a_model_as_opponent(textarena, tmp_path):
    folder = save_tiny_model(tmp_path, ["ACTION=0 1"], max_position_embeddings=8192)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    opponent = ModelOpponent(model, tokenizer, functools.partial(nim, seat=1), max_new_tokens=8)
    assert "Player 1" in opponent.env.instructions
    episodes = play(functools.partial(nim, opponent=opponent), range(8), 4)
    assert {episode[-1][1] for episode in episodes.values()} <= {1.0, -1.0} and opponent.n_replies >= 8


def test_seats(textarena):
    env = nim(seat="random")
    seats = {env.reset(seed=seed)[1]["player"] for seed in range(20)}
    assert seats == {0, 1}
    assert "Player 1" in nim(seat=1).instructions


def test_the_opponent_does_not_hold_the_luck(textarena):
    """An opponent may take its time: games side by side must not wait for each other."""
    both = threading.Barrier(2, timeout=20)

    def opponent(observation, legal_actions, rng):
        both.wait()
        return legal_actions[0]

    made = [nim(opponent=opponent) for _ in range(2)]
    threads = [threading.Thread(target=lambda env=env: (env.reset(seed=0), env.step("0 1"))) for env in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads) and not both.broken


def test_free_text_goes_to_the_game(textarena):
    env = make_env("textarena:Mastermind-v0")
    assert "legal_actions" not in env.reset(seed=0)[1]
    assert "peg" in env.step("1 2 3 4")[0]
    assert "invalid move" in env.step("no code")[0]
    env = make_env("textarena:Mastermind-v0", legal_actions=lambda game: ["1 2 3 4"])
    assert env.reset(seed=0)[1]["legal_actions"] == ["1 2 3 4"]


def test_raw_games(textarena):
    """They lack what puts moves into brackets; the moves are listed without."""
    env = make_env("textarena:Nim-v0-raw", piles=[1, 2], opponent=lambda observation, legal_actions, rng: "1 1")
    env.reset(seed=0)
    assert "Player 0 removes 1 from pile 1." in env.step("1 1")[0]
    assert env.step("0 1")[1] == 1.0


@pytest.mark.parametrize("game", ["ThreeCardMonte-v0", "Countdown-v0"])
def test_an_invalid_move_s_reward_and_reason_in_each_other_s_place(textarena, game):
    env = make_env(f"textarena:{game}")
    env.reset(seed=0)
    env.step("nonsense")
    observation, reward, terminated, _, info = env.step("nonsense")
    assert terminated and 0 <= reward < 1 and info["rewards"] == {0: reward} and "Use `[" in observation


@pytest.mark.parametrize("game", ["QuantumTicTacToe-v0", "MarketEntryGame-v0"])
def test_nobody_plays_alone_what_is_for_several(textarena, game):
    """TextArena starts them with one player, and fails or waits for ever later on."""
    env = make_env(f"textarena:{game}", opponent=lambda observation: "0,1")
    assert env.num_players == 2
    env.reset(seed=0)
    assert env.step("3,4")[2] is False


def test_over_before_the_first_move(textarena):
    env = nim(opponent=lambda observation, legal_actions, rng: "nonsense", seat=1)
    with pytest.raises(RuntimeError, match="over before the agent's first move: .*No valid move format"):
        env.reset(seed=0)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("Nimm-v0", {}, "TextArena has no environment 'Nimm-v0'. Did you mean 'Nim-v0'"),
        ("Nim-v0", {"opponent": "perfect"}, "opponent='perfect' is unknown"),
        ("Nim-v0", {"seat": 2}, "seat=2: Nim-v0 has the players 0 to 1"),
        ("Nim-v0", {"pile": [1]}, "does not take env_kwargs"),
        ("QuantumTicTacToe-v0", {"num_players": 3, "opponent": len}, "num_players=3: .* is a game of 2"),
        ("Nim-v0", {"num_players": 5}, "num_players=5: Nim-v0 says: The number of players has to be 2"),
        ("Nim-v0", {"legal_actions": ["0 1"]}, r"legal_actions=\['0 1'\]: give a function"),
        ("Chopsticks-v0", {}, "there is no random opponent. Pass opponent="),
    ],
)
def test_mistakes_in_games(textarena, name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_env(f"textarena:{name}", **kwargs)


# -- GEM --------------------------------------------------------------------------------------------------------------

GEM = {"game:GuessTheNumber-v0-easy": "3", "game:Game2048-v0-easy": "left", "game:Minesweeper-v0-easy": "reveal 0 0"}


@pytest.mark.parametrize("name", GEM)
def test_100_episodes_of_gem(gem, name):
    kwargs = {"max_turns": 8} if "2048" in name else {}
    episodes = check_100_episodes(functools.partial(make_env, f"gem:{name}", **kwargs))
    assert all(episode[-1][2:4] == (True, False) for episode in episodes.values())  # a limit told is no truncation
    assert len({sum(step[1] for step in episode) for episode in episodes.values()}) > 1


@pytest.mark.parametrize("name", GEM)
def test_gem_trains(gem, name, tmp_path):
    train_two_steps(f"gem:{name}", tmp_path, GEM[name])


def test_guess_the_number(gem):
    env = make_env("gem:game:GuessTheNumber-v0-easy")
    _, info = env.reset(seed=5)
    assert info["legal_actions"] == [str(number) for number in range(1, 11)] and "\\boxed" in env.instructions
    number = env.env.game_number
    observation, reward, terminated, truncated, info = env.step(str(number % 10 + 1))
    assert (reward, terminated, truncated) == (0.0, False, False) and "Enter your next guess." in observation
    observation, reward, terminated, truncated, info = env.step(f"\\boxed{{{number}}}")  # boxed by the model itself
    assert (reward, terminated, truncated, info["legal_actions"]) == (1.0, True, False, [])


def test_questions_of_gem(gem):
    factory = functools.partial(make_env, "gem:rg:chain_sum", size=20)
    check_100_episodes(factory, answers=["1", "200"])
    env = factory()
    question, info = env.reset(seed=1)
    assert "legal_actions" not in info
    observation, reward, terminated, truncated, _ = env.step(env.env.data["answer"])
    assert (observation, reward, terminated, truncated) == ("", 1.0, True, False)
    env.reset(seed=1)
    assert env.step(f"\\boxed{{{env.env.data['answer']}}}")[1] == 1.0  # boxed by the model itself


def test_mathematics_of_gem(gem):
    """Graded in a process of GEM's own, asked from the threads of a rollout."""
    pytest.importorskip("pylatexenc", reason="GEM's mathematics needs pylatexenc")
    rows = [{"problem": f"What is {a} / {b}?", "answer": f"\\frac{{{a}}}{{{b}}}"} for a, b in ((1, 3), (2, 5))]
    factory = functools.partial(make_env, "gem:math:Math12K", dataset=Dataset.from_list(rows))
    episodes = play(factory, range(30), 2, answers=["1/3", "\\frac{2}{5}"])
    rewards = [episode[-1][1] for episode in episodes.values()]
    assert set(rewards) == {0.0, 1.0}
    assert multiprocessing.active_children() == []


def test_gem_s_data_does_not_change_with_age(gem):
    env = make_env("gem:rg:chain_sum", size=3)  # GEM makes new questions after `size` episodes
    first = env.reset(seed=1)[0]
    for seed in range(2, 12):
        env.reset(seed=seed)
    assert env.reset(seed=1)[0] == first


def test_mistakes_in_gem(gem):
    with pytest.raises(ValueError, match="GEM has no environment .*Did you mean .*'game:GuessTheNumber-v0-easy'"):
        make_env("gem:game:GuessTheNumber-v0")
    with pytest.raises(ValueError, match="legal_actions=..1... give a function"):
        make_env("gem:game:GuessTheNumber-v0-easy", legal_actions=["1"])


def test_importing_gem_leaves_logging_alone(gem):
    code = (
        "import logging; from trl_agents.envs import make_env; make_env('gem:game:GuessTheNumber-v0-easy'); "
        "print(logging.getLogger().level, logging.getLogger().handlers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["30", "[]"]


# -- reasoning-gym ----------------------------------------------------------------------------------------------------

QUESTIONS = ["countdown", "chain_sum", "leg_counting"]


@pytest.mark.parametrize("name", QUESTIONS)
def test_100_questions(reasoning_gym, name):
    factory = functools.partial(make_env, f"reasoning_gym:{name}")
    episodes = check_100_episodes(factory, answers=["1", "ab", "2 + 3", "", "((", "9" * 400])
    assert all(len(episode) == 2 and episode[1][2:4] == (True, False) for episode in episodes.values())


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_train(reasoning_gym, name, tmp_path):
    train_two_steps(f"reasoning_gym:{name}", tmp_path, "12")


@pytest.mark.parametrize("name", [*QUESTIONS, "number_sorting", "word_ladder", "letter_counting"])
def test_the_right_answer_is_right(reasoning_gym, name):
    """Also where a parser takes brackets and quotes off the answer."""
    env = make_env(f"reasoning_gym:{name}")
    for seed in range(5):
        answer = env.reset(seed=seed)[1]["answer"]
        action = ActionParser().parse(f"So. ACTION={answer}").action
        assert env.step(action)[1] == 1.0, (answer, action)


@pytest.mark.parametrize(
    ("expected", "answer", "reward"),
    [
        ("-5", "5", 0.0),
        ("-5", "-5", 1.0),
        ("[1, 2]", "1, 2", 1.0),
        ("[1, 2]", "2, 1", 0.0),
        ("['a', 'b']", "a', 'b", 1.0),
        ("Is it so?", "Is it so", 1.0),
        ("0.5", "5", 0.0),
    ],
)
def test_what_a_parser_takes_off_and_no_more(reasoning_gym, expected, answer, reward):
    env = make_env("reasoning_gym:chain_sum")
    env.reset(seed=0)
    env._entry = {**env._entry, "answer": expected}
    assert env.step(answer)[1] == reward


def test_partial_scores(reasoning_gym):
    def score(answer, **kwargs):
        env = make_env("reasoning_gym:countdown", **kwargs)
        env.reset(seed=1)
        return env.step(answer)[1]

    assert 0 < score("1 + 1") < 1 and score("1 + 1", partial_scores=False) == 0
    right = make_env("reasoning_gym:countdown").reset(seed=1)[1]["answer"]
    assert score(right, partial_scores=False) == score(right) == 1


def test_datasets_that_draw_from_the_global_generator(reasoning_gym):
    env = make_env("reasoning_gym:pool_matrix")
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    env.reset(seed=1)
    assert np.random.random() == expected


def test_settings_of_a_dataset(reasoning_gym):
    small = make_env("reasoning_gym:chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    assert len(small.reset(seed=0)[1]["answer"]) <= 2


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("count_down", {}, "has no environment 'count_down'. Did you mean 'countdown'"),
        ("countdown", {"min_numbers": 9, "max_numbers": 2}, "does not take {'min_numbers': 9"),
        ("countdown", {"numbers": 9}, "does not take env_kwargs="),
    ],
)
def test_mistakes_in_questions(reasoning_gym, name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_env(f"reasoning_gym:{name}", **kwargs)


# -- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("textarena:Nim-v0", "textarena"),
        ("gem:game:Sokoban-v0-easy", "gem-llm"),
        ("reasoning_gym:countdown", "reasoning-gym"),
        ("openenv:http://localhost:1", "openenv"),
    ],
)
def test_a_suite_that_is_not_installed(name, package, monkeypatch):
    module = name.partition(":")[0]
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"pip install {package}`.*trl-agents\[envs\]"):
        make_env(name)


def test_suites_are_imported_when_used():
    code = (
        "import sys, trl_agents; from trl_agents.envs import adapters, make_env; make_env('gymnasium:FrozenLake-v1'); "
        "print([m for m in ('textarena', 'gem', 'reasoning_gym', 'openenv', 'torch', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"


def test_own_luck():
    def draw(*key):
        with own_luck(*key):
            return random.random(), np.random.random()

    random.seed(3), np.random.seed(3)
    expected = random.random(), np.random.random()
    random.seed(3), np.random.seed(3)
    assert draw(1, 2) == draw(1, 2) != draw(1, 3)
    with pytest.raises(KeyError), own_luck(4):
        random.random()
        raise KeyError
    assert (random.random(), np.random.random()) == expected


def test_own_luck_waits_for_many_that_draw_slowly(monkeypatch):
    monkeypatch.setattr(luck, "PATIENCE", 0.4)
    together, drawn = threading.Barrier(8, timeout=20), []

    def draw():
        together.wait()
        with own_luck(0):
            time.sleep(0.1)
            drawn.append(random.random())

    threads = [threading.Thread(target=draw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(drawn) == 8 and len(set(drawn)) == 1


def test_own_luck_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(luck, "PATIENCE", 0.05)
    held, done = threading.Event(), threading.Event()

    def hang():
        with own_luck(0):
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hang)
    thread.start()
    held.wait(20)
    try:
        with pytest.raises(TimeoutError, match="another environment"), own_luck(1):
            pass
    finally:
        done.set()
        thread.join()


def test_random_agents_play(textarena):
    trajectory = play_episode(nim(), RandomAgent(), seed=1)
    assert trajectory.stop.value == "terminated" and "Welcome to Nim" in trajectory.instructions
    assert play(nim, [7], 1) == play(nim, [7], 1)
