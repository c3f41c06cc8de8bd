# Licensed under the Apache License, Version 2.0 (see LICENSE).
import importlib.util
import pickle

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded

from trl_agents.envs import tictactoe
from trl_agents.envs.check import check_env
from trl_agents.envs.tictactoe import (
    TicTacToe,
    minimax_values,
    noisy_opponent,
    optimal_actions,
    optimal_opponent,
    render_board,
    swap_sides,
)


# Mean returns over 4000 games, known from elsewhere: player -> opponent -> (moving first, moving second).
REFERENCE = {
    "random": {"random": (0.29, -0.31), "noisy": (-0.19, -0.67), "optimal": (-0.78, -0.965)},
    "optimal": {"random": (0.97, 0.76), "noisy": (0.73, 0.45), "optimal": (0.0, 0.0)},
}
CASES = [
    (player, opponent, seat, expected)
    for player, row in REFERENCE.items()
    for opponent, pair in row.items()
    for seat, expected in zip(("first", "second"), pair, strict=True)
]


def play_random(board, legal_actions, rng):
    return legal_actions[rng.integers(len(legal_actions))]


def play_optimal(board, legal_actions, rng):
    return play_random(board, optimal_actions(board, legal_actions), rng)


def play_first(board, legal_actions, rng):
    return legal_actions[0]


def play_last(board, legal_actions, rng):
    return legal_actions[-1]


def play(env, player, seed, rng=None):
    """One game: what was observed, the infos, the actions and the return."""
    observation, info = env.reset(seed=seed)
    texts, infos, actions, total, terminated = [observation], [info], [], 0.0, False
    while not terminated:
        actions.append(player(info["board"], info["legal_actions"], rng))
        observation, reward, terminated, truncated, info = env.step(actions[-1])
        assert truncated is False
        assert terminated or reward == 0
        total += reward
        texts.append(observation)
        infos.append(info)
    return texts, infos, actions, total


def winner_by_hand(board):
    lines = ("012", "345", "678", "036", "147", "258", "048", "246")
    return next((m for m in "12" if any(all(board[int(i)] == m for i in line) for line in lines)), None)


def after_move(board, action):
    """The board that the other player then sees."""
    return swap_sides(board[: int(action)] + "1" + board[int(action) + 1 :])


@pytest.fixture(scope="module")
def reachable_boards():
    """Every board that legal play reaches, as the player to move sees it. The rules are written out once more here."""
    seen, waiting = {"000000000"}, ["000000000"]
    while waiting:
        board = waiting.pop()
        if winner_by_hand(board) is None:
            after = {after_move(board, square) for square in range(9) if board[square] == "0"}
            waiting += after - seen
            seen |= after
    return seen


# Returns


@pytest.mark.parametrize(("player", "opponent", "seat", "expected"), CASES)
def test_returns_match_the_reference(player, opponent, seat, expected):
    env = TicTacToe(opponent=opponent, seat=seat)
    rng = np.random.default_rng(0)
    player = {"random": play_random, "optimal": play_optimal}[player]
    returns = np.array([play(env, player, seed, rng)[3] for seed in range(1200)])
    assert abs(returns.mean() - expected) <= 4 * returns.std() / np.sqrt(len(returns)) + 0.01


def test_noisy_is_optimal_half_of_the_time():
    # One of six squares keeps the game, so it is played with probability 1/2 + 1/2 * 1/6.
    legal_actions = list("235678")
    moves = [noisy_opponent("220010000", legal_actions, np.random.default_rng(seed)) for seed in range(2000)]
    assert set(moves) == set(legal_actions)
    assert abs(moves.count("2") / 2000 - 7 / 12) < 4 * np.sqrt(7 / 12 * 5 / 12 / 2000)


def test_optimal_opponent_varies_among_equals():
    env = TicTacToe(opponent="optimal", seat="second")
    openings = [env.reset(seed=seed)[1]["board"] for seed in range(200)]
    assert len(set(openings)) == 9  # every opening draws
    # 2 wins now and 6 wins later: equal in the value of the game, which is what the reference players go by.
    moves = {optimal_opponent("110000022", list("23456"), np.random.default_rng(seed)) for seed in range(20)}
    assert moves == {"2", "6"}


# Perfect play


def test_reachable_boards_and_their_moves(reachable_boards):
    assert len(reachable_boards) == 5478
    seen = set()
    for board in reachable_boards:
        values = minimax_values(board)
        seen |= set(values.values())
        if winner_by_hand(board) or "0" not in board:
            assert values == {} and optimal_actions(board) == []
        else:
            assert list(values) == [str(square) for square in range(9) if board[square] == "0"]
    assert seen == {-8, -6, -4, 0, 5, 7, 9}  # wins in 1, 3, 5 moves, losses in 2, 4, 6


def test_values_follow_from_the_boards_one_move_later(reachable_boards):
    def value(board):
        return -10 if winner_by_hand(board) else max(minimax_values(board).values(), default=0)

    for board in reachable_boards:
        for action, given in minimax_values(board).items():
            later = -value(after_move(board, action))
            assert given == later - np.sign(later)


def test_perfect_play_draws():
    assert minimax_values("000000000") == dict.fromkeys("012345678", 0)
    for seat in ("first", "second"):
        env = TicTacToe(opponent="optimal", seat=seat)
        rng = np.random.default_rng(1)
        assert {play(env, play_optimal, seed, rng)[1][-1]["outcome"] for seed in range(100)} == {"draw"}


@pytest.mark.parametrize(
    ("board", "best", "fastest"),
    [
        ("200000000", "4", "4"),  # a corner is answered in the centre
        ("000020000", "0268", "0268"),  # the centre in a corner
        ("200010002", "1357", "1357"),  # opposite corners: a corner would lose to a fork
        ("220010000", "2", "2"),  # block
        ("110220000", "2", "2"),  # win, do not block
        ("110000022", "26", "2"),  # 2 wins now; 6 blocks, threatens 2 and 3, and wins later
        ("112200000", "4", "4"),  # threatens 7 and 8
        ("100000002", "26", "26"),  # a third corner forks
    ],
)
def test_known_positions(board, best, fastest):
    assert "".join(optimal_actions(board)) == best
    assert "".join(optimal_actions(board, fastest=True)) == fastest


def test_optimal_actions_speak_the_names_of_the_grid():
    _, info = TicTacToe(board="grid").reset(seed=0)
    assert minimax_values(info["board"], info["legal_actions"])["c3"] == 0
    assert optimal_actions("220010000", ["a3", "b1", "b3", "c1", "c2", "c3"]) == ["a3"]


def test_import_solves_nothing():
    spec = importlib.util.spec_from_file_location("trl_agents.envs.another_tictactoe", tictactoe.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert another._solve.cache_info().currsize == 0
    another.minimax_values("000000000")
    assert another._solve.cache_info().currsize > 1000


# Text


def scripted(*moves):
    """An opponent that plays `moves` in order."""

    def opponent(board, legal_actions, rng):
        return moves[board.count("1")]

    return opponent


def test_text_of_digits():
    env = TicTacToe(opponent=scripted("0", "1", "5"))
    observation, info = env.reset(seed=0)
    assert observation == "Legal actions: 0,1,2,3,4,5,6,7,8\nStep=0 State=000000000"
    assert info == {"legal_actions": list("012345678"), "state": "000000000", "board": "000000000", "seat": "first"}

    observation, reward, terminated, truncated, info = env.step("4")
    assert observation == (
        "Step=0 State=000000000 Action=4 Reward=0\nLegal actions: 1,2,3,5,6,7,8\nStep=1 State=200010000"
    )
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info == {
        "legal_actions": list("1235678"),
        "state": "200010000",
        "board": "200010000",
        "seat": "first",
        "transition": "Step=0 State=000000000 Action=4 Reward=0",
    }

    env.step("2")
    observation, reward, terminated, truncated, info = env.step("6")
    assert observation == "Step=2 State=221010000 Action=6 Reward=1\nResult=win State=221010100"
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert (info["outcome"], info["legal_actions"], info["board"]) == ("win", [], "221010100")


def test_text_of_a_loss_and_of_a_draw_from_the_second_seat():
    env = TicTacToe(opponent=scripted("0", "1", "2"), seat="second", show_legal_actions=False)
    assert env.reset()[0] == "Step=0 State=200000000"
    env.step("3")
    observation, reward, terminated, _, info = env.step("4")
    assert observation == "Step=1 State=220100000 Action=4 Reward=-1\nResult=loss State=222110000"
    assert (reward, terminated, info["outcome"], info["seat"]) == (-1.0, True, "loss", "second")

    env = TicTacToe(opponent=scripted("4", "1", "6", "5", "8"), seat="second")
    env.reset()
    for action in "072":
        assert env.step(action)[1:3] == (0.0, False)
    observation, reward, terminated, _, info = env.step("3")
    assert observation == "Step=3 State=121022210 Action=3 Reward=0\nResult=draw State=121122212"
    assert (reward, terminated, info["outcome"]) == (0.0, True, "draw")


def test_text_of_the_grid():
    env = TicTacToe(opponent=scripted("a1", "b1"), board="grid")
    env.reset()
    observation, _, _, _, info = env.step("c3")
    drawn = "o |   |  \n----------\n  |   |  \n----------\n  |   | x"
    assert observation == (
        "Step=0 State=.../.../... Action=c3 Reward=0\n"
        f"Legal actions: a2,a3,b1,b2,b3,c1,c2\nStep=1 State=o../.../..x\n{drawn}"
    )
    assert (info["state"], info["board"]) == ("o../.../..x", "200000001")
    assert render_board(info["state"]) == render_board(info["board"]) == drawn


@pytest.mark.parametrize("board", ["digits", "grid"])
def test_a_transition_is_the_first_line_and_joins_two_open_steps(board):
    texts, infos, _, _ = play(TicTacToe(board=board), play_first, seed=3)
    for text, info, before in zip(texts[1:], infos[1:], infos, strict=False):
        assert text.split("\n")[0] == info["transition"]
        assert f"State={before['state']} " in info["transition"]


def test_instructions_say_what_the_player_must_know():
    env = TicTacToe()
    assert env.question == "What do you predict next?"
    assert env.history_header == "So far you have tried/seen:"
    text = env.instructions
    assert "You play as 1." in text and "012\n345\n678" in text and "102010002" in text and "102\n010\n002" in text
    assert "ACTION=X" in text and "IMPORTANT" in text and "You move first." in text and "legal actions" in text

    text = TicTacToe(seat="second", show_legal_actions=False, reasoning=False).instructions
    assert "Your opponent moves first." in text and "only your final answer" in text and "ACTION=X" in text
    assert "IMPORTANT" not in text and "step by step" not in text and "legal actions" not in text

    text = TicTacToe(board="grid").instructions
    assert "You play as x" in text and render_board("102010002") in text and "a1 to c3" in text


# Seeds and seats


@pytest.mark.parametrize("opponent", ["random", "noisy", "optimal"])
def test_same_seed_same_game(opponent):
    games = [play(TicTacToe(opponent=opponent, seat="random"), play_last, seed) for seed in range(20)]
    env = TicTacToe(opponent=opponent, seat="random")
    assert [play(env, play_last, seed) for seed in range(20)] == games
    assert len({tuple(texts) for texts, *_ in games}) > 5  # and other seeds, other games


def test_reset_without_a_seed_goes_on():
    env = TicTacToe(seat="second")
    env.reset(seed=0)
    boards = [env.reset()[1]["board"] for _ in range(30)]
    env.reset(seed=0)
    assert [env.reset()[1]["board"] for _ in range(30)] == boards
    assert len(set(boards)) > 3


def test_players_on_one_seed_meet_the_same_luck():
    def luck(player, seat, draws):
        drawn = []

        def opponent(board, legal_actions, rng):
            drawn.append(rng.random(draws)[0])
            return legal_actions[0]

        play(TicTacToe(opponent=opponent, seat=seat), player, seed=5)
        return drawn

    games = [luck(play_last, "first", 1), luck(play_last, "first", 9), luck(play_last, "second", 1)]
    games.append(luck(lambda board, legal_actions, rng: legal_actions[len(legal_actions) // 2], "first", 2))
    shared = min(map(len, games))
    assert shared >= 2
    assert all(game[:shared] == games[0][:shared] for game in games)
    assert len(set(games[0])) == len(games[0])  # a move's luck is not the last one's


def test_random_seat_is_fair_and_keeps_the_perspective():
    env = TicTacToe(seat="random")
    seats = []
    for seed in range(600):
        _, info = env.reset(seed=seed)
        seats.append(info["seat"])
        assert info["board"].count("1") == 0
        assert info["board"].count("2") == (info["seat"] == "second")
        assert len(info["legal_actions"]) == 9 - (info["seat"] == "second")
    assert 250 < seats.count("first") < 350


# Other opponents


@pytest.mark.parametrize("board", ["digits", "grid"])
def test_two_players_see_the_same_game_from_either_side(board):
    seen = []

    def watched(position, legal_actions, rng):
        seen.append((position, legal_actions))
        return play_first(position, legal_actions, rng)

    env = TicTacToe(opponent=play_last, seat="first", board=board)
    texts, infos, _, total = play(env, play_first, seed=0)
    _, _, _, mirrored = play(TicTacToe(opponent=watched, seat="second", board=board), play_last, seed=0)
    assert mirrored == -total != 0
    assert seen == [(info["board"], info["legal_actions"]) for info in infos[:-1]]
    # What the agent read is what `describe` writes for the opponent.
    opened = [texts[0], *(text.partition("\n")[2] for text in texts[1:-1])]
    assert [env.describe(position) for position, _ in seen] == opened


def test_an_opponent_cannot_change_the_list_it_is_given():
    def opponent(board, legal_actions, rng):
        return legal_actions.pop(0)

    env = TicTacToe(opponent=opponent)
    env.reset()
    assert env.step("8")[4]["board"] == "200000001"


@pytest.mark.parametrize("answer", ["4", "9", "ACTION=0", 0, None])
def test_illegal_answer_of_an_opponent_names_it(answer):
    def blunderer(board, legal_actions, rng):
        return answer

    env = TicTacToe(opponent=blunderer)
    env.reset()
    with pytest.raises(ValueError, match=r"blunderer.*answered.*'000020000'.*0, 1, 2, 3, 5"):
        env.step("4")
    with pytest.raises(ResetNeeded):
        env.step("0")


def test_an_opponent_that_fails_in_reset_leaves_no_old_game():
    answers = iter(["0", "nonsense"])
    env = TicTacToe(opponent=lambda board, legal_actions, rng: next(answers), seat="second")
    env.reset()
    with pytest.raises(ValueError, match="nonsense"):
        env.reset()
    with pytest.raises(ResetNeeded):
        env.step("1")


# Misuse


def test_illegal_actions_leave_the_game_as_it_was():
    env = TicTacToe(opponent=scripted("0", "1"))
    env.reset()
    env.step("4")
    for action in ("4", "0", "9", "", "a1", "ACTION=3", 3, None):
        with pytest.raises(ValueError, match="legal actions are: 1, 2, 3, 5, 6, 7, 8\\."):
            env.step(action)
    assert env.step("2")[4]["board"] == "221010000"


def test_a_step_needs_a_game():
    env = TicTacToe()
    with pytest.raises(ResetNeeded):
        env.step("0")
    play(env, play_first, seed=0)
    with pytest.raises(ResetNeeded):
        env.step("0")
    env.reset()
    env.close()
    with pytest.raises(ResetNeeded):
        env.step("0")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"opponent": "mcts"}, "'mcts'.*'optimal'"),
        ({"opponent": ["random", "clever"]}, r"'random', 'clever'.*callable"),
        ({"seat": "third"}, "'third'.*'second'"),
        ({"seat": None}, "None.*'first'"),
        ({"board": "ascii"}, "'ascii'.*'grid'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TicTacToe(**kwargs)


@pytest.mark.parametrize("board", ["", "00000000", "0000000003", "xo.......", None])
def test_bad_boards(board):
    for function in (minimax_values, optimal_actions, TicTacToe().describe):
        with pytest.raises(ValueError, match="is not a board"):
            function(board)
    if board != "xo.......":  # the short form of the grid is drawn
        with pytest.raises(ValueError, match="is not a board"):
            render_board(board)


def test_values_of_the_wrong_side_or_the_wrong_names():
    with pytest.raises(ValueError, match="not the move of 1"):
        minimax_values("100000000")
    with pytest.raises(ValueError, match="8 empty squares"):
        minimax_values("200000000", list("012345678"))


# Gymnasium, contexts and workers


@pytest.mark.parametrize("opponent", ["random", "noisy", "optimal"])
@pytest.mark.parametrize("board", ["digits", "grid"])
def test_keeps_the_contract(opponent, board):
    for seat in ("first", "second", "random"):
        check_env(TicTacToe(opponent=opponent, seat=seat, board=board))


@pytest.mark.parametrize("board", ["digits", "grid"])
@pytest.mark.parametrize("seat", ["first", "second"])
def test_under_gymnasium_make(board, seat):
    spec = EnvSpec(id="TicTacToeUnderTest-v0", entry_point=TicTacToe)
    # Gymnasium's checker, which our own ids leave out, holds the texts against the spaces.
    env = gymnasium.make(spec, opponent="noisy", board=board, seat=seat)
    for seed in range(5):
        texts, _, actions, _ = play(env, play_last, seed)
        assert all(env.observation_space.contains(text) for text in texts)
        assert all(env.action_space.contains(action) for action in actions)
    assert env.unwrapped.instructions
    env.close()


def test_pickled_in_the_middle_of_a_game():
    env = TicTacToe(opponent="noisy")
    env.reset(seed=1)
    action = env.step("4")[4]["legal_actions"][0]
    copy = pickle.loads(pickle.dumps(env))
    assert copy.step(action) == env.step(action)


def test_the_seed_draws_the_opponent_of_a_game():
    met = []

    def named(name):
        def play(board, legal_actions, rng):
            met.append(name)
            return legal_actions[0]

        return play

    env = TicTacToe(opponent=[named("a"), named("b")], seat="second")
    for seed in [*range(40), *range(40)]:
        env.reset(seed=seed)
    assert met[:40] == met[40:] and set(met) == {"a", "b"}
