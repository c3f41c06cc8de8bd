# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Exploration mechanisms: each alone by hand, then in the loop: what the model reads, what is played, what is kept."""

import functools
import json
import random

import pytest
from scripted_rollout import Scripted, bandit, one_by_one, play, seeds, text_of, tokenizer

from trl_agents.actions import ActionParser
from trl_agents.contexts import Briefing, ChatContext, WindowContext
from trl_agents.envs.bandit import Bandit
from trl_agents.envs.tictactoe import TicTacToe
from trl_agents.evaluation import play_model
from trl_agents.exploration import (
    EpsilonGreedy,
    Exploration,
    Mechanism,
    Past,
    SelfCorrection,
    make_exploration,
    name_back,
    vote,
)
from trl_agents.rollout.metrics import coverage
from trl_agents.rollout.play import Episode
from trl_agents.tiny import tiny_model
from trl_agents.trainers.agent_grpo_config import AgentGRPOConfig
from trl_agents.types import InvalidReason, ParsedAction, StopReason


LEGAL = ("blue", "green", "red")
three_arms = functools.partial(Bandit, n_arms=3, horizon=5, distribution="bernoulli", means=[0.5, 0.5, 0.5])


def rng():
    return random.Random(0)


def explore(*names):
    return make_exploration(list(names))


class TestMechanisms:
    def test_try_all_forces_each_action_once_in_order(self):
        mechanism = explore("try_all")
        forced = [mechanism.force(Past(LEGAL, LEGAL[:n], (0.0,) * n), rng()) for n in range(4)]
        assert [pair and pair[0] for pair in forced] == ["blue", "green", "red", None]
        assert "{action} has not been tried yet" in forced[0][1]

    def test_epsilon_greedy_forces_in_its_share_of_turns_and_uniformly(self):
        mechanism, chance = explore("epsilon_greedy=0.25"), rng()
        forced = [mechanism.force(Past(LEGAL), chance) for _ in range(8000)]
        actions = [pair[0] for pair in forced if pair]
        assert len(actions) / 8000 == pytest.approx(0.25, abs=0.02)
        assert {action: actions.count(action) / len(actions) for action in LEGAL} == pytest.approx(
            dict.fromkeys(LEGAL, 1 / 3), abs=0.05
        )

    def test_epsilon_of_the_paper_by_default(self):
        assert explore("epsilon_greedy").mechanisms[0].epsilon == 0.1

    def test_names_are_a_permutation_and_differ_from_turn_to_turn(self):
        mechanism, chance = explore("context_randomization"), rng()
        drawn = [mechanism.relabel(Past(LEGAL), chance) for _ in range(300)]
        assert all(set(names) == set(names.values()) == set(LEGAL) for names in drawn)
        assert len({tuple(names.values()) for names in drawn}) == 6

    def test_summary_counts_and_means(self):
        past = Past(LEGAL, ("red", "blue", "red"), (0.25, 1.0, -0.5))
        assert explore("context_summary").note(past) == (
            "In summary:\nAction=blue Count=1 Mean=1\nAction=green Count=0 Mean=unknown\nAction=red Count=2 Mean=-0.12"
        )

    def test_bonus_for_what_is_untried(self):
        mechanism, past = explore("exploration_bonus=0.5"), Past(LEGAL, ("red",), (1.0,))
        assert [mechanism.bonus(past, action) for action in LEGAL] == [0.5, 0.5, 0.0]

    def test_the_smallest_budget_holds(self):
        exploration = explore("thinking_budget=64", "no_reasoning")
        assert exploration.max_new_tokens == 16 and exploration.env_kwargs == {"reasoning": False}

    @pytest.mark.parametrize(
        ("stated", "number"),
        [("bgg", 1), ("?rb", 1), ("rbbr", 0), ("???", 0), ("?", 0)],
    )
    def test_vote(self, stated, number):
        names = {"b": "blue", "g": "green", "r": "red", "?": None}
        replies = [ParsedAction(names[letter], None if letter != "?" else InvalidReason.NO_MATCH) for letter in stated]
        assert vote(replies) == number

    def test_name_back(self):
        names = {"blue": "red", "red": "blue", "green": "green"}
        assert name_back(ParsedAction("red", None, "RED"), names) == ParsedAction("blue", None, "RED")
        invalid = ParsedAction(None, InvalidReason.ILLEGAL, "pink")
        assert name_back(invalid, names) is invalid


class TestSettings:
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("greedy", "'greedy' is unknown: choose of try_all, epsilon_greedy"),
            ("epsilon_greedy=1.5", "between 0 and 1"),
            ("epsilon_greedy=often", "epsilon_greedy=often"),
            ("epsilon_greedy=nan", "between 0 and 1"),
            ("try_all=3", "takes no value"),
            ("thinking_budget", "needs a value"),
            ("thinking_budget=0", "at least 1"),
            ("thinking_budget=1.5", "whole number"),
            ("thinking_budget=inf", "whole number"),
            ("self_consistency=1", "at least 2"),
            ("self_consistency=nan", "whole number"),
            ("exploration_bonus=-1", "positive"),
            ("self_correction=", "give a text"),
            (5, "exploration=5"),
            ([None], "exploration=None"),
            ({"try_all": 1}, "give the names"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, spec, message):
        with pytest.raises(ValueError, match=message):
            make_exploration(spec)

    def test_two_that_decide_which_reply_counts(self):
        with pytest.raises(ValueError, match="use one of them"):
            explore("self_correction", "self_consistency")

    def test_a_conversation_cannot_be_renamed(self):
        with pytest.raises(ValueError, match="context='window'"):
            play(bandit, one_by_one(), [Episode(0)], exploration=explore("context_randomization"))

    @pytest.mark.parametrize("name", ["context_randomization", "try_all", "exploration_bonus"])
    def test_actions_that_change(self, name):
        with pytest.raises(ValueError, match="stay the same"):
            play(TicTacToe, lambda prompt: "ACTION=4", [Episode(0)], context=WindowContext, exploration=explore(name))

    @pytest.mark.parametrize("name", ["epsilon_greedy", "context_summary", "try_all", "exploration_bonus"])
    def test_actions_that_are_not_listed(self, name):
        class Unlisted(Bandit):
            def reset(self, **kwargs):
                return super().reset(**kwargs)[0], {}

        model = tiny_model(tokenizer(), hidden_size=32, num_hidden_layers=1)
        with pytest.raises(ValueError, match=f"exploration={name} .*this environment lists none.*leave it out"):
            play_model(model, tokenizer(), Unlisted, [3], exploration=name, max_new_tokens=8)

    @pytest.mark.parametrize("name", ["epsilon_greedy=0.0", "try_all"])
    def test_actions_that_are_listed_no_more_cost_the_episode(self, name):
        """It is the environment's fault: the other episodes go on, and no setting has to be left out."""

        class Forgets(Bandit):
            def reset(self, **kwargs):
                self.forgets = kwargs["seed"] == 1
                return super().reset(**kwargs)

            def step(self, action):
                *rest, info = super().step(action)
                return *rest, {} if self.forgets else info

        trajectories = play(Forgets, lambda prompt: "ACTION=red", [Episode(0), Episode(1)], exploration=explore(name))
        assert trajectories[0].stop is StopReason.TERMINATED
        assert trajectories[1].stop is StopReason.ENV_ERROR and "legal_actions'] is gone" in trajectories[1].error

    def test_a_mechanism_of_one_s_own_that_needs_them_to_stay(self):
        class Own(Mechanism):
            needs_same_actions = True

        with pytest.raises(ValueError, match="exploration=Own .*lists none"):
            Exploration([Own()]).check_actions(None, None)

    def test_a_history_that_words_its_actions_otherwise_cannot_be_renamed(self):
        class Talks(Bandit):
            def step(self, action):
                observation, *rest, info = super().step(action)
                return observation, *rest, {**info, "transition": f"You played {action}."}

        with pytest.raises(ValueError, match="no `Action=blue`|no `Action=green`"):
            play(
                functools.partial(Talks, n_arms=2, horizon=3),
                lambda prompt: "ACTION=blue",
                [Episode(0)],
                context=WindowContext,
                exploration=explore("context_randomization"),
            )

    @pytest.mark.parametrize("pattern", [r"(?s)(.+)", r"^\s*(\w+)"])
    def test_what_is_forced_must_be_read_back(self, pattern):
        """A thought hides the action from these patterns; the statement alone does not."""
        (trajectory,) = play(
            three_arms,
            lambda prompt: "blue",
            [Episode(0)],
            parser=ActionParser(pattern),
            exploration=explore("try_all"),
        )
        assert [turn.executed for turn in trajectory.turns[:3]] == list(LEGAL)
        assert all(turn.parsed.is_valid and turn.penalty == 0.0 for turn in trajectory.turns)

    def test_none_is_none(self):
        assert not make_exploration(None) and isinstance(make_exploration([]), Exploration)


class TestInTheLoop:
    def test_try_all_covers_everything_and_asks_the_model_only_then(self):
        backend = Scripted(lambda prompt: "again. ACTION=blue")
        played = play(three_arms, backend, seeds(4), n_slots=2, exploration=explore("try_all"))
        for trajectory in played:
            assert [turn.executed for turn in trajectory.turns] == ["blue", "green", "red", "blue", "blue"]
            assert [turn.forced for turn in trajectory.turns] == [True, True, True, False, False]
            assert coverage(trajectory) == 1.0
        assert len(backend.asked) == 4 * 2

    def test_a_forced_reply_is_read_as_if_the_model_had_written_it(self):
        backend = Scripted(lambda prompt: "ACTION=blue")
        (trajectory,) = play(three_arms, backend, [Episode(0)], exploration=explore("try_all"))
        first = trajectory.turns[0]
        text = "Action blue has not been tried yet, so let us explore it. ACTION=blue"
        assert first.text == text and first.parsed.is_valid
        assert text_of(first.action_ids) == f"{text}<|im_end|>"
        assert f"<|im_start|>assistant\n{text}<|im_end|>\n<|im_start|>user\nStep=0" in backend.asked[0][1]

    def test_without_room_to_think_the_action_alone_is_written(self):
        budget = len(tokenizer().encode("ACTION=blue")) + 1
        (trajectory,) = play(
            three_arms,
            lambda prompt: "ACTION=blue",
            [Episode(0)],
            exploration=explore("try_all", f"thinking_budget={budget}"),
        )
        assert trajectory.turns[0].text == "ACTION=blue"

    def test_a_budget_is_the_model_s_and_not_for_what_is_forced(self):
        (trajectory,) = play(
            three_arms,
            lambda prompt: "ACTION=blue",
            [Episode(0)],
            exploration=explore("try_all", "thinking_budget=1"),
        )
        assert [turn.executed for turn in trajectory.turns[:3]] == list(LEGAL)

    def test_without_room_for_a_second_reply_the_first_counts(self):
        backend = Scripted(lambda prompt: "ACTION=green")
        prompt = ChatContext(tokenizer()).begin(Briefing.of(bandit()), "", {}).prompt_ids
        room = len(prompt) + len(tokenizer().encode("ACTION=green")) + 2
        (trajectory,) = play(
            bandit, backend, [Episode(0)], exploration=explore("self_correction"), max_length=room, max_new_tokens=8
        )
        first = trajectory.turns[0]
        assert first.executed == "green" and first.drafts == () and list(first.input_ids) == prompt
        assert trajectory.stop is StopReason.CONTEXT_FULL and len(backend.asked) == 1

    def test_the_open_step_is_renamed_too(self):
        class Recalls(Bandit):
            def step(self, action):
                observation, *rest, info = super().step(action)
                return f"{observation}\nLast: Action={action}", *rest, info

        backend = Scripted(lambda prompt: "ACTION=blue")
        play(
            functools.partial(Recalls, n_arms=3, horizon=12),
            backend,
            [Episode(0)],
            context=WindowContext,
            exploration=explore("context_randomization"),
        )
        for _, prompt, _ in backend.asked[1:]:
            steps = [line for line in prompt.splitlines() if line.startswith("Step=")]
            (recalled,) = [line for line in prompt.splitlines() if line.startswith("Last:")]
            assert steps[-1].split("Action=")[1].split()[0] == recalled.split("Action=")[1]

    def test_a_budget_reaches_the_backend(self):
        backend = Scripted(lambda prompt: "ACTION=blue")
        play(bandit, backend, [Episode(0)], exploration=explore("thinking_budget=7"), max_new_tokens=64)
        assert {budget for _, _, budget in backend.asked} == {7}

    def test_a_summary_follows_the_history(self):
        backend = Scripted(lambda prompt: "ACTION=green")
        (trajectory,) = play(
            bandit, backend, [Episode(0)], context=WindowContext, exploration=explore("context_summary")
        )
        reward = f"{trajectory.turns[0].reward:.0f}"
        ending = (
            f"Step=0 Action=green Reward={reward}\nIn summary:\nAction=blue Count=0 Mean=unknown\n"
            f"Action=green Count=1 Mean={reward}\nWhat do you predict next?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert backend.asked[1][1].endswith(ending)
        assert "In summary" in trajectory.turns[1].observation

    def test_a_summary_in_a_conversation(self):
        backend = Scripted(lambda prompt: "ACTION=green")
        play(bandit, backend, [Episode(0)], exploration=explore("context_summary"))
        assert backend.asked[2][1].count("In summary:") == 2

    def test_renamed_actions_are_played_as_what_they_are(self):
        backend = Scripted(lambda prompt: "ACTION=blue")
        (trajectory,) = play(
            functools.partial(three_arms, horizon=30),
            backend,
            [Episode(0)],
            context=WindowContext,
            exploration=explore("context_randomization"),
        )
        played = [turn.executed for turn in trajectory.turns]
        assert set(played) == set(LEGAL)  # "blue" each time, and each time another arm
        for number, (_, prompt, _) in enumerate(backend.asked):
            lines = [line for line in prompt.splitlines() if line.startswith("Step=")]
            shown = [line.split("Action=")[1].split()[0] for line in lines]
            names = dict(zip(played[:number], shown, strict=True))
            # One name an arm and one arm a name, at every turn
            assert len(set(names.values())) == len(names)
            assert [names[action] for action in played[:number]] == shown
            assert trajectory.turns[number].observation in prompt  # what was read, for who reads the episode later
            if played[number] in names:
                assert names[played[number]] == "blue"

    def test_numbers_as_names_leave_rewards_alone(self):
        backend = Scripted(lambda prompt: "ACTION=0")
        factory = functools.partial(Bandit, n_arms=3, horizon=12, scenario="number")
        (trajectory,) = play(
            factory, backend, [Episode(0)], context=WindowContext, exploration=explore("context_randomization")
        )
        rewards = [turn.info["transition"].split("Reward=")[1] for turn in trajectory.turns]
        lines = [line for line in backend.asked[-1][1].splitlines() if line.startswith("Step=")]
        assert [line.split("Reward=")[1] for line in lines] == rewards[:-1]
        assert [line.split()[0] for line in lines] == [f"Step={step}" for step in range(11)]

    @pytest.mark.parametrize("context", [ChatContext, WindowContext])
    def test_only_the_second_reply_is_played_and_trained_on(self, context):
        answers = in_turn("first thought ACTION=blue", "second thought ACTION=green")
        backend = Scripted(answers)
        (trajectory,) = play(
            bandit, backend, [Episode(0)], context=context, exploration=explore("self_correction=Sure?")
        )
        assert [turn.executed for turn in trajectory.turns] == ["green"] * 3
        assert all(turn.drafts == ("first thought ACTION=blue",) for turn in trajectory.turns)
        for turn in trajectory.turns:
            read = text_of(turn.input_ids)
            assert read.endswith(
                "<|im_start|>assistant\nfirst thought ACTION=blue<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
                "<|im_start|>assistant\n"
            )
            assert text_of(turn.action_ids) == "second thought ACTION=green<|im_end|>"
        if context is ChatContext:  # what was read and written in order is what the last question was asked with
            ids = [part for turn in trajectory.turns for part in (*turn.input_ids, *turn.action_ids)]
            assert text_of(ids).startswith(backend.asked[-1][1])
        else:  # a later turn does not look back on drafts
            assert "first thought" not in backend.asked[2][1]

    def test_a_first_reply_that_was_cut_off_is_corrected_too(self):
        (trajectory,) = play(
            bandit,
            in_turn("well...", "ACTION=green"),
            [Episode(0)],
            exploration=explore("self_correction"),
        )
        assert trajectory.stop is StopReason.TERMINATED and all(turn.parsed.is_valid for turn in trajectory.turns)

    def test_the_majority_is_played(self):
        backend = Scripted(in_turn("one ACTION=blue", "two ACTION=green", "three ACTION=green"))
        (trajectory,) = play(bandit, backend, [Episode(0)], exploration=explore("self_consistency=3"))
        assert [turn.text for turn in trajectory.turns] == ["two ACTION=green"] * 3
        assert trajectory.turns[0].drafts == ("one ACTION=blue", "three ACTION=green")
        prompts = [prompt for _, prompt, _ in backend.asked]
        assert len(prompts) == 9 and prompts[0] == prompts[1] == prompts[2] and prompts[3] == prompts[5]
        assert "one ACTION=blue" not in prompts[3]

    def test_no_majority_is_an_invalid_reply(self):
        (trajectory,) = play(
            bandit, lambda prompt: "dunno", [Episode(0)], exploration=explore("self_consistency=2"), max_retries=0
        )
        assert all(not turn.parsed.is_valid and turn.penalty == -5.0 for turn in trajectory.turns)

    def test_a_bonus_for_stated_actions_only(self):
        (trajectory,) = play(
            three_arms,
            one_by_one("?", "ACTION=red", "ACTION=red", "ACTION=green", "?"),
            [Episode(0)],
            exploration=explore("exploration_bonus"),
        )
        first = trajectory.turns[0].executed
        expected = [0.0, float(first != "red"), 0.0, float(first != "green"), 0.0]
        assert [turn.bonus for turn in trajectory.turns] == expected

    def test_no_bonus_for_what_a_mechanism_played(self):
        mechanisms = explore("try_all", "exploration_bonus")
        (trajectory,) = play(three_arms, lambda prompt: "ACTION=blue", [Episode(0)], exploration=mechanisms)
        assert [turn.bonus for turn in trajectory.turns] == [0.0] * 5

    def test_mechanisms_work_together(self):
        backend = Scripted(lambda prompt: "ACTION=blue")
        (trajectory,) = play(
            functools.partial(three_arms, horizon=8),
            backend,
            [Episode(0)],
            context=WindowContext,
            exploration=explore("try_all", "context_randomization", "context_summary"),
        )
        assert [turn.executed for turn in trajectory.turns[:3]] == list(LEGAL)
        assert all(turn.parsed.matched in turn.text for turn in trajectory.turns)
        assert "In summary" in backend.asked[0][1]

    def test_the_model_own_luck_does_not_depend_on_who_else_plays(self):
        model = tiny_model(tokenizer(), hidden_size=32, num_hidden_layers=1)
        how = {"env_kwargs": {"n_arms": 3, "horizon": 6}, "exploration": "epsilon_greedy=0.5", "max_new_tokens": 8}
        alone = play_model(model, tokenizer(), Bandit, [3], **how)
        together = play_model(model, tokenizer(), Bandit, range(5), n_slots=3, **how)
        assert [turn.text for turn in alone[0].turns] == [turn.text for turn in together[3].turns]
        assert 0 < sum(turn.forced for trajectory in together for turn in trajectory.turns) < 30


def in_turn(*texts):
    """Answers in turn, over and over."""
    asked = iter(range(10**6))
    return lambda prompt: texts[next(asked) % len(texts)]


def test_a_mechanism_of_one_s_own_has_a_name(tmp_path):
    class Curious(Mechanism):
        def __init__(self, rate=2):
            self.rate = rate

    mechanisms = [Curious(3), EpsilonGreedy(0.2), SelfCorrection(), "exploration_bonus=1"]
    config = AgentGRPOConfig(str(tmp_path), exploration=mechanisms, report_to="none", bf16=False)
    names = ["Curious=3", "epsilon_greedy=0.2", "self_correction", "exploration_bonus=1"]
    assert json.loads(config.to_json_string())["exploration"] == names
    assert make_exploration(mechanisms).names == [*names[:-1], "exploration_bonus"]
