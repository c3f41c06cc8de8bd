# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The loop, with a backend that answers from a script: exact turns, faults that stay where they are, places reused."""

import dataclasses
import functools
import re
import threading
import time

import numpy as np
import pytest
from scripted_rollout import Scripted, Steps, bandit, go, ids_of, one_by_one, play, seeds, text_of, tokenizer

from trl_agents.actions import ActionParser
from trl_agents.contexts import Briefing, ChatContext, WindowContext
from trl_agents.envs.tictactoe import TicTacToe
from trl_agents.rollout.generation import Sampling, SlotBackend
from trl_agents.rollout.play import Episode, Player, Rules
from trl_agents.rollout.progress import Bar
from trl_agents.rollout.workers import EnvPool
from trl_agents.tiny import tiny_model
from trl_agents.types import InvalidReason, ParsedAction, StopReason, Turn


class TestTurns:
    def test_bandit_in_a_conversation(self):
        replies = ["I try blue. ACTION=blue", "Now green.\nACTION=green", "ACTION=green"]
        (trajectory,) = play(bandit, one_by_one(*replies), [Episode(7)])

        env = bandit()
        observation, reset_info = env.reset(seed=7)
        context = ChatContext(tokenizer())
        reader = context.begin(Briefing.of(env), observation, reset_info)
        turns = []
        for reply, action in zip(replies, ["blue", "green", "green"], strict=True):
            action_ids = (*ids_of(reply), tokenizer().eos_token_id)
            before, input_ids = observation, tuple(reader.input_ids)
            observation, reward, terminated, _, info = env.step(action)
            reader.observe(action_ids, action, reward, observation, info)
            turns.append(
                Turn(
                    observation=before,
                    input_ids=input_ids,
                    action_ids=action_ids,
                    text=reply,
                    parsed=ParsedAction(action, None, action),
                    executed=action,
                    reward=reward,
                    penalty=0.0,
                    appends=True,
                    logprobs=None,
                    cut_off=False,
                    info=info,
                )
            )
        assert terminated
        assert trajectory.turns == tuple(turns)
        assert trajectory.stop is StopReason.TERMINATED
        assert (trajectory.seed, trajectory.instructions) == (7, env.instructions)
        assert (trajectory.final_observation, trajectory.reset_info) == (observation, reset_info)
        assert trajectory.error is None and trajectory.env_seconds > 0
        assert (trajectory.return_, trajectory.steps) == (sum(turn.reward for turn in turns), 3)

        ids = [id_ for turn in trajectory.turns for id_ in (*turn.input_ids, *turn.action_ids)]
        assert text_of(ids) == (
            f"<|im_start|>user\n{env.instructions}\nWhat do you predict next?<|im_end|>\n"
            "<|im_start|>assistant\nI try blue. ACTION=blue<|im_end|>\n"
            f"<|im_start|>user\nStep=0 Action=blue Reward={turns[0].reward:.0f}<|im_end|>\n"
            "<|im_start|>assistant\nNow green.\nACTION=green<|im_end|>\n"
            f"<|im_start|>user\nStep=1 Action=green Reward={turns[1].reward:.0f}<|im_end|>\n"
            "<|im_start|>assistant\nACTION=green<|im_end|>"
        )

    def test_tictactoe_in_a_window(self):
        factory = functools.partial(TicTacToe, opponent=lambda board, legal_actions, rng: legal_actions[0])
        (trajectory,) = play(
            factory, one_by_one("ACTION=4", "ACTION=3", "Winning: ACTION=5"), [Episode(0)], context=WindowContext
        )
        assert trajectory.stop is StopReason.TERMINATED
        assert [turn.reward for turn in trajectory.turns] == [0, 0, 1]
        assert [turn.executed for turn in trajectory.turns] == ["4", "3", "5"]
        assert not any(turn.appends for turn in trajectory.turns)
        assert text_of(trajectory.turns[2].input_ids) == (
            f"<|im_start|>user\n{factory().instructions}\nSo far you have tried/seen:\n"
            "Step=0 State=000000000 Action=4 Reward=0\nStep=1 State=200010000 Action=3 Reward=0\n"
            "Legal actions: 2,5,6,7,8\nStep=2 State=220110000\nWhat do you predict next?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert trajectory.final_observation.endswith("Result=win State=220111000")

    def test_a_cut_off_reply_with_an_action_is_played(self):
        (trajectory,) = play(bandit, one_by_one(*["ACTION=blue ..."] * 3), [Episode(0)])
        turn = trajectory.turns[0]
        assert turn.cut_off and turn.parsed.is_valid and turn.penalty == 0.0
        assert tokenizer().eos_token_id not in turn.action_ids

    def test_logprobs_are_kept(self):
        class Knowing(Scripted):
            def reply(self, *asked):
                reply = super().reply(*asked)
                return dataclasses.replace(reply, logprobs=tuple(-0.5 * n for n in range(len(reply.ids))))

        (trajectory,) = play(Steps, Knowing(go), [Episode(2)])
        for turn in trajectory.turns:
            assert turn.logprobs == tuple(-0.5 * n for n in range(len(turn.action_ids)))

    def test_instructions_may_come_with_the_episode(self):
        class Told(Steps):
            def reset(self, *, seed=None, options=None):
                observation, info = super().reset(seed=seed)
                return observation, {**info, "instructions": f"Play {options}."}

        trajectories = play(Told, go, [Episode(1, options={"a": 1}), Episode(1, options=None)])
        assert [trajectory.instructions for trajectory in trajectories] == ["Play {'a': 1}.", "Play None."]
        assert "Play {'a': 1}.\n1 to go" in text_of(trajectories[0].turns[0].input_ids)

    def test_truncation_is_not_termination(self):
        class Limited(Steps):
            def step(self, action):
                observation, reward, terminated, _, info = super().step(action)
                return observation, reward, False, terminated, info

        class Both(Steps):
            def step(self, action):
                observation, reward, terminated, _, info = super().step(action)
                return observation, reward, terminated, terminated, info

        assert play(Limited, go, [Episode(2)])[0].stop is StopReason.TRUNCATED
        assert play(Both, go, [Episode(2)])[0].stop is StopReason.TERMINATED


class TestInvalidActions:
    def test_a_random_legal_action_is_played(self):
        factory = functools.partial(bandit, n_arms=4, means=[0.5] * 4, horizon=40)
        (trajectory,) = play(factory, lambda prompt: "no idea", [Episode(0, (1,))])
        assert {turn.executed for turn in trajectory.turns} == set(factory().labels)
        for turn in trajectory.turns:
            assert turn.parsed == ParsedAction(None, InvalidReason.NO_MATCH)
            assert turn.penalty == -5.0
            assert turn.info["transition"].endswith(f"Action={turn.executed} Reward={turn.reward:.0f}")
        assert trajectory.steps == 40
        assert trajectory.return_ == sum(turn.reward for turn in trajectory.turns)  # without the penalties

        def executed(luck):
            (again,) = play(factory, lambda prompt: "no idea", [Episode(0, luck)])
            return [turn.executed for turn in again.turns]

        assert executed((1,)) == [turn.executed for turn in trajectory.turns]
        assert executed((2,)) != executed((1,))

    def test_reasons(self):
        replies = ["ACTION=mauve", "hm...", "ACTION=blue"]
        (trajectory,) = play(bandit, one_by_one(*replies), [Episode(0)], invalid_action_penalty=-0.5)
        assert [turn.parsed.reason for turn in trajectory.turns] == [
            InvalidReason.ILLEGAL,
            InvalidReason.CUT_OFF,
            None,
        ]
        assert [turn.penalty for turn in trajectory.turns] == [-0.5, -0.5, 0.0]

    def test_retry_asks_again(self):
        replies = ["mauve", "ACTION=mauve", "ACTION=blue", "?", "ACTION=green", "ACTION=green"]
        (trajectory,) = play(bandit, one_by_one(*replies), [Episode(0)], invalid_action="retry")
        question = "That is no legal action. Legal actions: blue, green. Answer in the form ACTION=blue"
        turns = trajectory.turns
        assert trajectory.stop is StopReason.TERMINATED
        assert [turn.text for turn in turns] == replies
        assert [turn.executed for turn in turns] == [None, None, "blue", None, "green", "green"]
        assert [turn.penalty for turn in turns] == [-5.0, -5.0, 0.0, -5.0, 0.0, 0.0]
        assert [turn.reward for turn in turns if turn.executed is None] == [0.0, 0.0, 0.0]
        assert [turn.info for turn in turns if turn.executed is None] == [{}, {}, {}]
        assert [turn.observation for turn in turns[:3]] == ["", question, question]
        assert turns[3].observation == turns[2].info["transition"]
        assert text_of(turns[1].input_ids) == (f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        assert (trajectory.steps, len(turns)) == (3, 6)

    def test_retry_in_a_window(self):
        replies = ["mauve", "ACTION=blue", "ACTION=green", "ACTION=green"]
        (trajectory,) = play(bandit, one_by_one(*replies), [Episode(0)], context=WindowContext, invalid_action="retry")
        texts = [text_of(turn.input_ids) for turn in trajectory.turns]
        assert ["That is no legal action." in text for text in texts] == [False, True, False, False]
        assert "Step=0 Action=blue" in texts[2] and "Step=" not in texts[1].partition("tried/seen")[2]

    def test_retries_run_out(self):
        replies = ["?", "?", "ACTION=blue", "?", "?", "?"]
        (trajectory,) = play(bandit, one_by_one(*replies), [Episode(0)], invalid_action="retry", max_retries=2)
        assert trajectory.stop is StopReason.INVALID_ACTION
        assert [turn.executed for turn in trajectory.turns] == [None, None, "blue", None, None, None]

    def test_no_retries(self):
        (trajectory,) = play(bandit, one_by_one("?"), [Episode(0)], invalid_action="retry", max_retries=0)
        assert trajectory.stop is StopReason.INVALID_ACTION and len(trajectory.turns) == 1

    def test_asking_again_counts_as_a_turn(self):
        replies = ["?", "ACTION=blue", "?"]
        (trajectory,) = play(bandit, one_by_one(*replies), [Episode(0)], invalid_action="retry", max_turns=3)
        assert trajectory.stop is StopReason.MAX_TURNS
        assert [turn.executed for turn in trajectory.turns] == [None, "blue", None]

    def test_end_ends_the_episode(self):
        replies = ["ACTION=blue", "?"]
        (trajectory,) = play(bandit, one_by_one(*replies), [Episode(0)], invalid_action="end")
        assert trajectory.stop is StopReason.INVALID_ACTION
        assert [(turn.executed, turn.penalty) for turn in trajectory.turns] == [("blue", 0.0), (None, -5.0)]
        assert trajectory.steps == 1

    def test_a_question_without_a_form_to_answer_in(self):
        """No pattern produces the first legal action: that is no reason to end the run."""
        parser = ActionParser(r"ACTION=(green)")
        (trajectory,) = play(
            bandit, one_by_one("?", *["ACTION=green"] * 3), [Episode(0)], parser=parser, invalid_action="retry"
        )
        assert trajectory.turns[1].observation == "That is no legal action. Legal actions: blue, green."


class NoActions(Steps):
    """Does not say what is legal from a step on."""

    silent_from = 0

    def __init__(self):
        self.n_answers = -1

    def _info(self):
        self.n_answers += 1
        return {"legal_actions": ["go"]} if self.n_answers < self.silent_from else {}

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], self._info()

    def step(self, action):
        self.action = action
        return *super().step(action)[:4], self._info()


@pytest.mark.parametrize("luck", [(), (0,), (0, 0, 0), (1,), (0, 1)])
def test_what_is_played_in_place_of_an_invalid_reply_is_not_what_the_environment_draws(luck):
    """Evaluation at seed 0 guessed a number right in all episodes: NumPy takes [7, 0] for 7."""

    class Guess(Steps):
        def reset(self, *, seed=None, options=None):
            self.number = str(np.random.default_rng(seed).integers(8))
            return "?", {"legal_actions": list("01234567")}

        def step(self, action):
            return "", float(action == self.number), True, False, {"legal_actions": list("01234567")}

    trajectories = play(Guess, lambda prompt: "I do not know.", [Episode(seed, luck) for seed in range(64)])
    assert all(not turn.parsed.is_valid for trajectory in trajectories for turn in trajectory.turns)
    assert sum(turn.reward for trajectory in trajectories for turn in trajectory.turns) < 24  # 8 by chance


def test_zeros_at_the_end_of_luck_change_nothing():
    """So that one evaluation is another's, whatever asks for it: a trainer's, a command's."""
    unparsed = [play(bandit, lambda prompt: "?", [Episode(5, luck)])[0] for luck in [(0,), (0, 0, 0), (3,), (3, 0, 0)]]
    actions = [[turn.executed for turn in trajectory.turns] for trajectory in unparsed]
    assert actions[0] == actions[1] and actions[2] == actions[3]


class TestWithoutLegalActions:
    def test_any_action_is_passed_on(self):
        (trajectory,) = play(NoActions, one_by_one("ACTION=open the door", "ACTION=look"), [Episode(2)])
        assert [turn.executed for turn in trajectory.turns] == ["open the door", "look"]

    def test_random_has_nothing_to_choose_from(self):
        (trajectory,) = play(NoActions, one_by_one("ACTION=look", "?"), [Episode(3)])
        assert trajectory.stop is StopReason.INVALID_ACTION
        assert [turn.executed for turn in trajectory.turns] == ["look", None]

    def test_an_environment_that_falls_silent_is_at_fault(self):
        class Silent(NoActions):
            silent_from = 1

        (trajectory,) = play(Silent, one_by_one(*["ACTION=go", "?"] * 6), [Episode(3)])  # begun six times
        assert trajectory.stop is StopReason.ENV_ERROR and "lists no 'legal_actions'" in trajectory.error

    def test_retry(self):
        (trajectory,) = play(NoActions, one_by_one("?", "ACTION=go"), [Episode(1)], invalid_action="retry")
        assert [turn.executed for turn in trajectory.turns] == [None, "go"]
        assert trajectory.turns[1].observation == "No action could be read from your answer. State it once more."


class TestLimits:
    def test_max_turns(self):
        trajectories = play(Steps, go, [Episode(2), Episode(3), Episode(9)], max_turns=3)
        assert [trajectory.stop for trajectory in trajectories] == [
            StopReason.TERMINATED,
            StopReason.TERMINATED,  # the last turn that is allowed
            StopReason.MAX_TURNS,
        ]
        assert [len(trajectory.turns) for trajectory in trajectories] == [2, 3, 3]
        assert trajectories[2].final_observation == "6 to go"

    def test_an_episode_without_an_end_is_refused(self, monkeypatch):
        monkeypatch.setattr("trl_agents.rollout.play.ENDLESS", 4)
        with pytest.raises(ValueError, match="seed 5 is still going on after 4 turns.*limit it with max_turns"):
            play(Steps, go, [Episode(5)])
        assert play(Steps, go, [Episode(4)])[0].stop is StopReason.TERMINATED
        assert len(play(Steps, go, [Episode(9)], max_turns=6)[0].turns) == 6

    def test_the_context_is_full(self):
        (whole,) = play(Steps, go, [Episode(5)])
        sizes = [len(turn.input_ids) + len(turn.action_ids) for turn in whole.turns]
        # Room for three turns and for what is read in the fourth, but for no reply to it
        room = sum(sizes[:3]) + len(whole.turns[3].input_ids)
        backend = Scripted(go)
        (full,) = play(Steps, backend, [Episode(5)], max_length=room)
        assert full.stop is StopReason.CONTEXT_FULL
        assert full.turns == whole.turns[:3]
        assert full.final_observation == "2 to go"
        # Each reply may take what is left, and at most its own budget
        assert [budget for _, _, budget in backend.asked] == [
            room - sum(sizes[:n]) - len(whole.turns[n].input_ids) for n in range(3)
        ]
        reply = len(whole.turns[3].action_ids)
        (fits,) = play(Steps, go, [Episode(5)], max_length=room + reply)
        assert fits.turns == whole.turns[:4]

    def test_a_reply_cut_off_by_the_end_of_the_room_is_no_fault(self):
        (whole,) = play(Steps, go, [Episode(5)])
        sizes = [len(turn.input_ids) + len(turn.action_ids) for turn in whole.turns]
        room = sum(sizes[:2]) + len(whole.turns[2].input_ids) + 1  # the third reply has room for one token
        (full,) = play(Steps, go, [Episode(5)], max_length=room)
        assert full.stop is StopReason.CONTEXT_FULL
        assert full.turns == whole.turns[:2] and full.final_observation == "3 to go"
        # Cut off by its own budget it is
        assert play(Steps, go, [Episode(2)], max_new_tokens=1)[0].turns[0].penalty == -5.0
        # And so is a first reply, which has all the room there is
        opening = len(whole.turns[0].input_ids)
        (short,) = play(Steps, go, [Episode(2)], max_length=opening + 1)
        assert [turn.penalty for turn in short.turns] == [-5.0]

    def test_instructions_that_do_not_fit(self):
        said = "instructions alone take .* an episode may have 20. Raise max_episode_length"
        with pytest.raises(ValueError, match=said):
            play(bandit, go, [Episode(0)], max_length=20)

    def test_a_first_question_that_does_not_fit(self):
        (whole,) = play(Steps, go, [Episode(2)])
        (lost,) = play(Steps, go, [Episode(2)], max_length=len(whole.turns[0].input_ids))
        assert lost.stop.is_fault and "raise max_episode_length" in lost.error

    def test_a_window_does_not_fill_up(self):
        (free,) = play(Steps, go, [Episode(9)], context=WindowContext(tokenizer(), window=1))
        room = max(len(turn.input_ids) + len(turn.action_ids) for turn in free.turns)
        (tight,) = play(Steps, go, [Episode(9)], context=WindowContext(tokenizer(), window=1), max_length=room)
        assert tight.turns == free.turns and tight.stop is StopReason.TERMINATED

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ({"invalid_action": "ignore"}, "invalid_action='ignore' is unknown: choose one of random, retry, end"),
            ({"max_turns": 0}, "max_turns=0 leaves no room"),
            ({"max_new_tokens": 0}, "max_new_tokens=0 leaves no room"),
            ({"max_length": -1}, "max_length=-1 leaves no room"),
            ({"max_retries": -1}, "max_retries=-1"),
        ],
    )
    def test_rules_that_make_no_sense(self, rules, message):
        with pytest.raises(ValueError, match=message):
            Rules(**rules)


class TestFinalIds:
    """What a truncated episode would have gone on with."""

    @pytest.mark.parametrize("context", [ChatContext, WindowContext])
    def test_they_are_what_the_next_turn_would_have_read(self, context):
        (whole,) = play(Steps, go, [Episode(5)], context=context)
        (cut,) = play(Steps, go, [Episode(5)], context=context, max_turns=3)
        assert cut.turns == whole.turns[:3]
        assert cut.final_ids == whole.turns[3].input_ids and "2 to go" in text_of(cut.final_ids)

    @pytest.mark.parametrize("context", [ChatContext, WindowContext])
    def test_at_the_environments_time_limit(self, context):
        class Limited(Steps):
            def step(self, action):
                observation, reward, terminated, _, info = super().step(action)
                return observation, reward, False, terminated, info

        (cut,) = play(Limited, go, [Episode(2)], context=context)
        assert cut.stop is StopReason.TRUNCATED and "0 to go" in text_of(cut.final_ids)
        assert text_of(cut.final_ids).endswith("<|im_start|>assistant\n")

    def test_nothing_follows_an_end_or_a_fault(self):
        class Broken(Steps):
            def step(self, action):
                raise RuntimeError("broken")

        assert play(Steps, go, [Episode(2)])[0].final_ids == ()
        assert play(Steps, lambda prompt: "what?", [Episode(2)], invalid_action="end")[0].final_ids == ()
        assert play(Broken, go, [Episode(2)])[0].final_ids == ()

    def test_what_does_not_fit_is_left_out(self):
        (cut,) = play(Steps, go, [Episode(5)], max_turns=2)
        length = sum(len(turn.input_ids) + len(turn.action_ids) for turn in cut.turns) + len(cut.final_ids)
        assert play(Steps, go, [Episode(5)], max_turns=2, max_length=length)[0].final_ids == cut.final_ids
        (full,) = play(Steps, go, [Episode(5)], max_turns=2, max_length=length - 1)
        assert full.turns == cut.turns and full.final_ids == ()

    def test_nor_what_leaves_no_room_for_a_reply(self):
        (whole,) = play(Steps, go, [Episode(5)])
        room = sum(len(turn.input_ids) + len(turn.action_ids) for turn in whole.turns[:3]) + len(
            whole.turns[3].input_ids
        )
        (full,) = play(Steps, go, [Episode(5)], max_length=room)
        assert full.stop is StopReason.CONTEXT_FULL and full.final_ids == ()

    def test_after_asking_again(self):
        (cut,) = play(Steps, lambda prompt: "what?", [Episode(2)], invalid_action="retry", max_turns=1)
        assert cut.stop is StopReason.MAX_TURNS and "That is no legal action." in text_of(cut.final_ids)


class TestPlaces:
    def test_order_and_reuse(self):
        lengths = [5, 1, 1, 4, 2, 1, 3]
        backend = Scripted(go)
        trajectories = play(Steps, backend, [Episode(length) for length in lengths], n_slots=3)
        assert [trajectory.seed for trajectory in trajectories] == lengths
        assert [len(trajectory.turns) for trajectory in trajectories] == lengths
        # Refilled as soon as they are free: 17 turns in 3 places within 6 rounds, and no place waits for another
        assert {slot for slot, _, _ in backend.asked} == {0, 1, 2}
        assert backend.drained

    def test_a_free_place_does_not_wait_for_the_others(self):
        """One episode cannot end before three others have been played in the second place."""
        ended = threading.Semaphore(0)

        class Chain(Steps):
            def step(self, action):
                answer = super().step(action)
                if answer[2]:
                    ended.release()
                elif self.left == 8:
                    assert all(ended.acquire(timeout=20) for _ in range(3))
                return answer

        trajectories = play(Chain, go, [Episode(9), Episode(1), Episode(2), Episode(1)], n_slots=2)
        assert [trajectory.stop for trajectory in trajectories] == [StopReason.TERMINATED] * 4

    def test_more_places_than_episodes(self):
        assert len(play(Steps, go, seeds(3)[1:], n_slots=5)) == 2

    def test_no_episodes(self):
        backend = Scripted(go)
        assert play(Steps, backend, []) == []
        assert backend.drained  # the other processes may have some

    def test_no_place(self):
        with pytest.raises(ValueError, match="n_slots=0"):
            EnvPool(Steps, 0)

    def test_environments_work_side_by_side(self):
        """Each step waits until all eight are in theirs."""
        barrier = threading.Barrier(8, timeout=20)

        class Together(Steps):
            def step(self, action):
                barrier.wait()
                return super().step(action)

        trajectories = play(Together, go, [Episode(3)] * 8, n_slots=8)
        assert [trajectory.stop for trajectory in trajectories] == [StopReason.TERMINATED] * 8

    def test_slow_environments_overlap(self):
        class Slow(Steps):
            def step(self, action):
                time.sleep(0.3)
                return super().step(action)

        started = time.perf_counter()
        play(Slow, go, [Episode(1)] * 8, n_slots=8)
        assert time.perf_counter() - started < 2  # one after the other: 2.4

    def test_a_slow_environment_holds_no_one_up(self):
        """It answers only when the others, which have their turns to play, are through."""
        others = threading.Semaphore(0)

        class Slow(Steps):
            def step(self, action):
                answer = super().step(action)
                if self.left == 99:
                    assert all(others.acquire(timeout=20) for _ in range(2))
                    return *answer[:2], True, *answer[3:]
                if answer[2]:
                    others.release()
                return answer

        trajectories = play(Slow, go, [Episode(100), Episode(4), Episode(5)], n_slots=3)
        assert [trajectory.stop for trajectory in trajectories] == [StopReason.TERMINATED] * 3

    @pytest.mark.parametrize(
        "reset_seconds, step_seconds, lengths, expected",
        [(0.0, 0.0, (3, 5), 0.2), (0.0, 0.25, (3, 5), 0.0), (0.25, 0.0, (1, 1), 0.2)],
        ids=["fast", "slow", "slow to reset"],
    )
    def test_only_fast_environments_are_waited_for(self, reset_seconds, step_seconds, lengths, expected):
        class Pool(EnvPool):
            def collect(self, patience, block):
                self.patience = patience  # above the default, which a busy computer may overstep by itself
                return super().collect(patience, block)

        class Slow(Steps):
            def reset(self, **kwargs):
                time.sleep(reset_seconds)
                return super().reset(**kwargs)

            def step(self, action):
                time.sleep(step_seconds)
                return super().step(action)

        pool = Pool(Slow, 2)
        play(Slow, go, [Episode(length) for length in lengths], pool=pool, patience=0.2)
        pool.close()
        assert pool.patience == expected

    def test_a_group_is_read_together(self):
        """All that start at once are in the backend before its first step, so their prompt can be shared."""

        class First(Scripted):
            def step(self):
                self.first = getattr(self, "first", None) or list(self.pending)
                return super().step()

        backend = First(go)
        pool = EnvPool(Steps, 6)
        player = Player(
            pool, backend, ChatContext(tokenizer()), ActionParser(), Briefing("Play."), Rules(), patience=10.0
        )
        player.play([Episode(1)] * 6)
        pool.close()
        assert backend.first == [0, 1, 2, 3, 4, 5]


class TestReproducibility:
    def play(self, n_slots, episodes, **kwargs):
        model = self.model()
        pool = EnvPool(functools.partial(bandit, horizon=4), n_slots)
        sampling = Sampling((tokenizer().eos_token_id,), temperature=1.0)
        player = Player(
            pool,
            SlotBackend(model, n_slots, sampling),
            ChatContext(tokenizer()),
            ActionParser(),
            Briefing.of(bandit()),
            Rules(max_new_tokens=6, max_length=1024),
        )
        try:
            return player.play(episodes, **kwargs)
        finally:
            pool.close()

    @staticmethod
    @functools.cache
    def model():
        return tiny_model(tokenizer(), hidden_size=32, max_position_embeddings=1024).eval()

    def test_the_same_luck_gives_the_same_episodes(self):
        episodes = [Episode(seed, (0, number)) for seed in range(2) for number in range(3)]
        first, second, third = (
            [dataclasses.replace(trajectory, env_seconds=0.0) for trajectory in self.play(n_slots, episodes)[0]]
            for n_slots in (6, 6, 2)
        )
        assert first == second == third
        assert len({trajectory.turns[0].action_ids for trajectory in first}) > 1  # luck differs within a group
        # The instance does not
        for group in (first[:3], first[3:]):
            assert len({turn.info["expected_reward"] for t in group for turn in t.turns}) == 1

    def test_the_progress_bar(self, capsys):
        self.play(2, seeds(3), progress=True, description="Playing")
        assert re.search(r"Playing: +0%.* 0/3 ", capsys.readouterr().err)
        with Bar(2, True, "Playing") as bar:
            bar.bar.mininterval = 0  # it is drawn ten times a second at most
            bar.turn(ParsedAction("go"))
            assert "turns=1, valid=100%" in capsys.readouterr().err  # before any episode has ended
            bar.turn(ParsedAction(None, InvalidReason.NO_MATCH))
            bar.episode()
            shown = capsys.readouterr().err
            assert "turns=2, valid=50%" in shown and "1/2" in shown

    def test_the_clock(self):
        trajectories, clock = self.play(2, seeds(3))
        assert clock.env == pytest.approx(sum(trajectory.env_seconds for trajectory in trajectories))
        assert 0 < clock.model < clock.wall and 0 < clock.env and 0 <= clock.env_wait < clock.wall
        assert clock.model + clock.env_wait < clock.wall

    def test_no_bar_unless_asked_for(self, capsys):
        self.play(2, seeds(1))
        assert capsys.readouterr().err == ""
