# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Replies that are over as soon as they have stated their action."""

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scripted_rollout import Scripted, Steps, go, one_by_one, play, tokenizer

from trl_agents import AgentGRPOConfig
from trl_agents.actions import ActionParser
from trl_agents.rollout.generation import Reply
from trl_agents.rollout.play import Episode
from trl_agents.trainers.checks import check_settings


COLOURS = ["green", "red"]


@pytest.mark.parametrize(
    "text, legal_actions, complete",
    [
        ("ACTION=green because", COLOURS, True),
        ("ACTION=green\n", COLOURS, True),
        ("ACTION=green.\n", COLOURS, True),
        ("**ACTION=green** ", COLOURS, True),
        ("ACTION=red, or ", COLOURS, True),
        ("ACTION=10 ", ["1", "10"], True),
        ("ACTION=1 ", ["1", "10"], False),
        ("ACTION=1\n", ["1", "10"], True),
        ("ACTION=green", COLOURS, False),
        ("ACTION=green-", COLOURS, False),
        ("ACTION=green.", COLOURS, False),
        ("ACTION=gre", COLOURS, False),
        ("ACTION=mauve\n", COLOURS, False),
        ("green, says the rule", COLOURS, False),
        ("", COLOURS, False),
        ("ACTION=green ", ["green", "green apple"], False),
        ("ACTION=green app", ["green", "green apple"], False),
        ("ACTION=green\n", ["green", "green apple"], True),
        ("ACTION=a word", None, False),
        ("ACTION=a word\n", None, True),
    ],
)
def test_is_complete(text, legal_actions, complete):
    assert ActionParser().is_complete(text, legal_actions) is complete


def test_a_pattern_that_names_its_end():
    parser = ActionParser(r"<answer>(.*?)</answer>")
    assert parser.is_complete("<answer>green</answer>", COLOURS) and parser.is_complete("<answer>12</answer>")
    assert not parser.is_complete("<answer>green</answer", COLOURS)
    words = ActionParser(r"ACTION=(\w+)")
    assert words.is_complete("ACTION=red.") and not words.is_complete("ACTION=red")


@settings(max_examples=300, deadline=None)
@given(
    action=st.sampled_from(["green", "green apple", "1", "10"]),
    written=st.text(alphabet=" \n.,-*'\"ag0\u0301", max_size=4),
    more=st.text(alphabet=" \n.,-*'\"aple10\u0301", max_size=8),
)
@example(action="green", written=" ", more="apple")
def test_what_follows_a_complete_statement_does_not_change_it(action, written, more):
    legal_actions = ["green", "green apple", "1", "10"]
    parser, text = ActionParser(), f"I say ACTION={action}{written}"
    assume(parser.is_complete(text, legal_actions))
    assert parser.parse(text + more, legal_actions).action == parser.parse(text, legal_actions).action


class Letters(Scripted):
    """Writes token by token, so that replies can be ended anywhere."""

    def submit(self, slot, prompt_ids, max_new_tokens, rng, is_over=None):
        super().submit(slot, prompt_ids, max_new_tokens, rng)
        self.is_over = {**getattr(self, "is_over", {}), slot: is_over}

    def reply(self, slot, prompt_ids, budget):
        whole, is_over = super().reply(slot, prompt_ids, budget), self.is_over[slot]
        for n in range(1, len(whole.ids)):
            if is_over is not None and is_over(list(whole.ids[:n])):
                return Reply(whole.ids[:n], cut_off=False)
        return whole


class TestPlaying:
    def test_a_reply_is_over_with_its_action(self):
        long = "I think so. " * 40
        answers = [f"{long}ACTION=go and then more", "ACTION=stop", f"Hm.\nACTION=go\n{long}ACTION=stop"]
        (episode,) = play(Steps, Letters(one_by_one(*answers)), [Episode(3)], action_stop=True, max_new_tokens=2000)
        first, second, third = episode.turns
        assert answers[0].startswith(first.text) and first.text.startswith(f"{long}ACTION=go")
        assert len(first.text) < len(f"{long}ACTION=go and then")
        assert second.text == "ACTION=stop" and second.action_ids[-1] == tokenizer().eos_token_id
        assert third.text.strip() == "Hm.\nACTION=go"  # the first statement counts
        assert [turn.executed for turn in episode.turns] == ["go", "stop", "go"]
        assert not any(turn.cut_off for turn in episode.turns)
        # What the template puts behind a reply closes the one that was ended, and is read, not learnt
        assert tokenizer().eos_token_id not in first.action_ids
        assert second.input_ids.count(tokenizer().eos_token_id) == 1 + third.input_ids.count(tokenizer().eos_token_id)

    def test_the_whole_reply_has_the_last_word(self):
        """Its end alone states an action, by a pattern that looks at its beginning too."""
        parser = ActionParser(r"(?s)\A(?!NO).*ACTION=(\w+)\b", template="ACTION={action}")
        for start, cut in (("NO. ", False), ("", True)):
            text = f"{start}{'I think so. ' * 40}ACTION=go and then more"
            (episode,) = play(
                Steps, Letters(lambda prompt, text=text: text), [Episode(1)], parser=parser, action_stop=True,
                max_new_tokens=2000,
            )  # fmt: skip
            assert (len(episode.turns[0].text) < len(text)) is cut

    def test_off_by_default(self):
        (episode,) = play(Steps, Letters(lambda prompt: "ACTION=go and ACTION=stop"), [Episode(1)])
        assert episode.turns[0].text == "ACTION=go and ACTION=stop" and episode.turns[0].executed == "stop"

    def test_a_backend_of_whole_replies(self):
        with pytest.raises(ValueError, match="action_stop=True ends replies token by token, which Scripted cannot"):
            play(Steps, go, [Episode(1)], action_stop=True)


def test_no_whole_replies_of_vllm():
    args = AgentGRPOConfig(action_stop=True, use_vllm=True, vllm_mode="colocate", report_to="none", bf16=False)
    with pytest.raises(ValueError, match="action_stop=True ends replies token by token, and vLLM"):
        check_settings(args, None, [], {})
