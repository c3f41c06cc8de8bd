# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Language models as opponents, asked by many games at a time; real (tiny) models throughout."""

import functools
import threading
import time

import numpy as np
import pytest
from fault_checks import wait_until
from scripted import ScriptedBackend

import trl_agents.model_opponent as model_opponent
from trl_agents import ModelOpponent, make_env
from trl_agents.contexts import Briefing, make_context
from trl_agents.envs.tictactoe import TicTacToe, swap_sides
from trl_agents.rollout.generation import Sampling, SlotBackend
from trl_agents.rollout.workers import EnvPool
from trl_agents.tiny import tiny_model, tiny_tokenizer


GAME = "trl_agents/TicTacToe-v0"
TEXTS = [TicTacToe().instructions, TicTacToe().describe("102010002"), *(f"ACTION={i}" for i in range(9))] * 5
BOARDS = ["000000000", "100000000", "120000000", "121000000", "121200000", "121212000", "012000021", "210000000"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(TEXTS, vocab_size=400)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer, hidden_size=32, num_hidden_layers=1)


@pytest.fixture
def opponent(model, tokenizer):
    return ModelOpponent(model, tokenizer, TicTacToe(), max_new_tokens=8)


def legal(board):
    return [str(i) for i, mark in enumerate(board) if mark == "0"]


def watched(opponent, fail_at=None, seconds=0.0, together=1):
    """Lists the busy slots of each step of the opponent's backend. The first waits until `together` have asked."""
    batches, make = [], opponent._make_backend

    def wrap():
        backend = make()
        step = backend.step

        def count():
            if not batches:
                assert wait_until(lambda: len(opponent._asked) + len(opponent._waiting) >= together)
            batches.append([index for index, slot in enumerate(backend.slots) if slot.active])
            time.sleep(seconds)
            if len(batches) == fail_at:
                raise FloatingPointError("planted")
            return step()

        backend.step = count
        return backend

    opponent._make_backend, opponent._backend = wrap, wrap()
    return batches


def ask_together(opponent, boards, timeout=20.0):
    """One thread a board, all let go at once. Answers (or errors) in the order of the boards."""
    answers, barrier = [None] * len(boards), threading.Barrier(len(boards))

    def ask(number, board):
        barrier.wait()
        try:
            answers[number] = opponent(board, legal(board), np.random.default_rng(number))
        except Exception as error:
            answers[number] = error

    threads = [threading.Thread(target=ask, args=item, daemon=True) for item in enumerate(boards)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    return answers


@pytest.mark.parametrize("context", ["chat", "window"])
def test_reads_what_the_agent_reads(model, tokenizer, context):
    seen = []
    opponent = ModelOpponent(model, tokenizer, GAME, max_new_tokens=2, context=context)
    submit = opponent._backend.submit
    opponent._backend.submit = lambda slot, ids, *rest: (seen.append(ids), submit(slot, ids, *rest))
    env = make_env(GAME, seat="first")
    observation, info = env.reset(seed=0)
    opponent(info["board"], info["legal_actions"], np.random.default_rng(0))
    agent = make_context(context, tokenizer, [tokenizer.eos_token_id]).begin(Briefing.of(env), observation, info)
    assert seen == [agent.prompt_ids]
    # A later position: as the agent would be told it, from the opponent's side, and nothing of the moves before
    board = swap_sides("120000000")
    opponent(board, legal(board), np.random.default_rng(0))
    text = tokenizer.decode(seen[1])
    assert env.describe(board) in text and "State=000000000" not in text.replace(Briefing.of(env).instructions, "")


def test_plays_what_the_model_says(model, tokenizer):
    opponent = ModelOpponent(model, tokenizer, TicTacToe(), max_new_tokens=20)
    opponent._backend = ScriptedBackend(tokenizer, [["ACTION=4"] * 33])
    for seed in range(3):
        assert opponent("000000000", legal("000000000"), np.random.default_rng(seed)) == "4"
    assert (opponent.n_replies, opponent.n_invalid, opponent.invalid_rate) == (3, 0, 0.0)
    # An occupied square is no legal action: any other, by the game's own luck
    board = "000020000"
    moves = {opponent(board, legal(board), np.random.default_rng(seed)) for seed in range(30)}
    assert len(moves) > 3 and "4" not in moves
    assert (opponent.n_replies, opponent.n_invalid) == (33, 30)


def test_moves_depend_on_rng_alone(opponent, model, tokenizer):
    alone = [opponent(board, legal(board), np.random.default_rng(n)) for n, board in enumerate(BOARDS)]
    assert ask_together(opponent, BOARDS) == alone
    small = ModelOpponent(model, tokenizer, GAME, max_new_tokens=8, n_slots=3)
    assert ask_together(small, BOARDS) == alone
    others = [opponent(board, legal(board), np.random.default_rng(n + 99)) for n, board in enumerate(BOARDS)]
    assert others != alone


def test_replies_come_out_of_rng(opponent, model, tokenizer):
    # Random weights state no action, so the moves above are the luck's: here the sampled tokens themselves
    def replies(seeds):
        prompt_ids = opponent._read("000000000")
        questions = [model_opponent._Question(prompt_ids, np.random.default_rng(seed)) for seed in seeds]
        return [opponent._ask(question).ids for question in questions]

    first = replies(range(4))
    assert len(set(first)) == 4 and replies(range(4)) == first
    backend = SlotBackend(model, 1, Sampling((tokenizer.eos_token_id,)))
    backend.submit(0, opponent._read("000000000"), 8, np.random.default_rng(0))
    while backend.busy:
        done = backend.step()
    assert done[0][1].ids == first[0]


def test_questions_share_batches(opponent):
    batches = watched(opponent, together=len(BOARDS))
    ask_together(opponent, BOARDS)
    # 8 questions of up to 8 tokens: one after the other they would take about 60 steps
    assert max(map(len, batches)) >= 7 and len(batches) <= 24
    assert sum(map(len, batches)) > 30


def test_no_batch_is_larger_than_allowed(model, tokenizer):
    opponent = ModelOpponent(model, tokenizer, GAME, max_new_tokens=4, n_slots=3)
    batches = watched(opponent, together=len(BOARDS))
    assert None not in ask_together(opponent, BOARDS)
    assert max(map(len, batches)) == 3


def test_a_single_caller_needs_nobody(opponent):
    batches = watched(opponent)
    started = time.monotonic()
    assert opponent("000000000", legal("000000000"), np.random.default_rng(0)) in legal("000000000")
    assert {len(batch) for batch in batches} == {1} and time.monotonic() - started < 5.0


def test_latecomers_join_and_leaders_hand_over(opponent):
    batches = watched(opponent, seconds=0.01)
    answers = []

    def ask(number):
        time.sleep(0.02 * number)
        for turn in range(3):
            answers.append(opponent(BOARDS[number], legal(BOARDS[number]), np.random.default_rng([number, turn])))

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(answers) == 18 and not opponent._has_leader and not opponent._asked and not opponent._waiting
    assert any(set(before) < set(after) for before, after in zip(batches, batches[1:], strict=False))


def test_errors_reach_everybody_who_waits(model, tokenizer):
    opponent = ModelOpponent(model, tokenizer, GAME, max_new_tokens=8, n_slots=5)  # some are in slots, some queue
    watched(opponent, fail_at=2, together=len(BOARDS))
    answers = ask_together(opponent, BOARDS)
    assert sum(isinstance(answer, RuntimeError) for answer in answers) >= 5
    for error in (answer for answer in answers if isinstance(answer, RuntimeError)):
        assert "FloatingPointError: planted" in str(error) and isinstance(error.__cause__, FloatingPointError)
    # and the next game is played
    opponent.n_replies = 0
    assert not any(isinstance(answer, Exception) for answer in ask_together(opponent, BOARDS))
    assert opponent.n_replies == len(BOARDS)


def test_a_board_that_is_none_fails_alone(opponent):
    with pytest.raises(ValueError, match="not a board"):
        opponent("1200", ["0"], np.random.default_rng(0))
    assert opponent("000000000", legal("000000000"), np.random.default_rng(0))


def play_games(opponent, seeds, n_slots):
    """Random games against `opponent` through an [`EnvPool`]; each game's transitions."""
    pool = EnvPool(functools.partial(make_env, GAME, opponent=opponent, seat="random"), n_slots)
    games, running, seeds = {}, {}, list(seeds)
    try:
        while seeds or running:
            for slot in range(n_slots):
                if slot not in running and seeds:
                    running[slot] = seeds.pop(0)
                    games[running[slot]] = []
                    pool.reset(slot, running[slot])
            for reply in pool.collect(0.02, block=True):
                assert reply.fault is None, reply.error
                seed = running[reply.slot]
                games[seed].append(reply.observation)
                if reply.terminated:
                    del running[reply.slot]
                else:
                    actions = reply.info["legal_actions"]
                    luck = np.random.default_rng([seed, len(games[seed])])
                    pool.step(reply.slot, actions[luck.integers(len(actions))])
    finally:
        pool.close()
    return games


def test_games_in_threads(model, tokenizer):
    opponent = ModelOpponent(model, tokenizer, GAME, max_new_tokens=6)
    batches = watched(opponent)
    games = play_games(opponent, range(12), n_slots=6)
    assert len(games) == 12 and all("Result=" in game[-1] for game in games.values())
    assert max(map(len, batches)) >= 4 and opponent.n_replies > 24
    assert 0.0 < opponent.invalid_rate <= 1.0
    # One thread, one question at a time: the same games
    assert play_games(opponent, range(12), n_slots=1) == games


def test_weights_change_between_games_only(opponent):
    batches = watched(opponent, seconds=0.02)
    asking = threading.Thread(
        target=opponent, args=("000000000", legal("000000000"), np.random.default_rng(0)), daemon=True
    )
    asking.start()
    assert wait_until(lambda: batches)
    with opponent.changing_weights():
        assert not opponent._asked and not opponent._has_leader
    assert opponent._backend.slots[0].n_cached == 0  # nothing of the old weights is left
    asking.join(5)


def test_model_opponent_says_what_is_wrong(model, tokenizer):
    with pytest.raises(ValueError, match=r"Bandit has no method `describe\(board\)`"):
        ModelOpponent(model, tokenizer, "trl_agents/Bandit-v0")
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        ModelOpponent(model, tokenizer, GAME, max_new_tokens=0)
    with pytest.raises(ValueError, match="context='scroll' is unknown"):
        ModelOpponent(model, tokenizer, GAME, context="scroll")
    short = tiny_model(tokenizer, 32, 1, max_position_embeddings=64)
    with pytest.raises(ValueError, match="tokens, as many as"):
        ModelOpponent(short, tokenizer, GAME)("000000000", legal("000000000"), np.random.default_rng(0))
