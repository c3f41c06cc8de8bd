# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Rewards for the form, what holds of every reward, and what answers made to be paid would get."""

import pickle
import random
import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_agents.rewards.accuracy import accuracy_reward, get_accuracy_reward
from trl_agents.rewards.choice import choice_reward, get_choice_reward
from trl_agents.rewards.completions import completion_texts
from trl_agents.rewards.format import (
    get_tag_count_reward,
    get_think_answer_format_reward,
    get_trigger_format_reward,
    tag_count_reward,
    think_answer_format_reward,
    trigger_format_reward,
)
from trl_agents.rewards.numeric import get_numeric_reward, numeric_reward
from trl_agents.rewards.programs import program_reward


TRIGGER = "Therefore, the answer is: "

THINK = "<think>\n2 + 2\n</think>\n<answer>\n4\n</answer>"


class TestFormat:
    @pytest.mark.parametrize(
        ("text", "reward", "prefilled"),
        [
            (THINK, 1, 0),
            (f"\n {THINK}\n", 1, 0),
            ("<think>a</think><answer>4</answer>", 1, 0),
            ("a</think><answer>4</answer>", 0, 1),
            (THINK + "\nmore", 0, 0),  # open-r1's expression lets this pass
            (THINK + " more", 0, 0),
            ("more " + THINK, 0, 0),
            ("<think>a</think> so <answer>4</answer>", 0, 0),
            ("<think>a</think><answer> </answer>", 0, 0),
            ("<think> </think><answer>4</answer>", 0, 0),
            ("<answer>4</answer><think>a</think>", 0, 0),
            ("<think>a<answer>4</think></answer>", 0, 0),
            (THINK + THINK, 0, 0),
            ("<think>a<think>b</think><answer>4</answer>", 0, 0),
            ("<THINK>a</THINK><ANSWER>4</ANSWER>", 0, 0),
            ("<think>a</think><answer>4", 0, 0),
            ("", 0, 0),
        ],
    )
    def test_think_answer(self, text, reward, prefilled):
        assert think_answer_format_reward([text]) == [reward]
        assert get_think_answer_format_reward(prefilled=True)([text]) == [prefilled]

    @pytest.mark.parametrize(
        ("text", "reward", "prefilled"),
        [
            (THINK, 1, 0.75),
            (THINK + THINK, 0, 0),
            ("", 0, 0.25),
            ("a</think><answer>4</answer>", 0.75, 1),
            ("<answer></answer></answer>", 0.25, 0.5),
            ("</answer><think>", 0.5, 0.25),
        ],
    )
    def test_tag_count(self, text, reward, prefilled):
        assert tag_count_reward([text]) == [reward]
        assert get_tag_count_reward(prefilled=True)([text]) == [prefilled]

    @pytest.mark.parametrize(
        ("text", "reward"),
        [
            (f"2 + 2\n{TRIGGER}4", 1),
            (f"{TRIGGER}\n4\n", 1),
            (TRIGGER + "four apples.", 1),
            (TRIGGER, 0),
            (TRIGGER + "...", 0),
            (TRIGGER + "4\nIndeed", 0),
            (TRIGGER + "3\n" + TRIGGER + "4", 0),
            ("therefore, the answer is: 4", 0),
            ("4", 0),
        ],
    )
    def test_trigger(self, text, reward):
        assert trigger_format_reward([text]) == [reward]

    def test_other_trigger(self):
        reward = get_trigger_format_reward("#### ")
        assert reward(["so\n#### 4", TRIGGER + "4"]) == [1, 0]
        assert reward.__name__ == "trigger_format_reward_trigger"
        with pytest.raises(ValueError, match="`trigger` is a text"):
            get_trigger_format_reward("")


# -- every reward -----------------------------------------------------------------------------------------------------

number_accuracy = get_accuracy_reward(verify="number")
SCORES = [  # reward, the scores it may give
    (numeric_reward, {0, 0.1, 1}),
    (get_numeric_reward(partial=0.25, last_number=True), {0, 0.25, 1}),
    (choice_reward, {0, 1}),
    (number_accuracy, {0, 1}),
    (think_answer_format_reward, {0, 1}),
    (get_think_answer_format_reward(prefilled=True), {0, 1}),
    (tag_count_reward, {0, 0.25, 0.5, 0.75, 1}),
    (trigger_format_reward, {0, 1}),
]
REWARDS = [reward for reward, _ in SCORES]
WITH_ANSWER = REWARDS[:4]
of_reward = pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.__name__)
TEXTS = [
    "10",
    THINK,
    TRIGGER + "10",
    TRIGGER + "11",
    "The answer is (c)",
    "",
    "c",
    "no idea",
    "a</think><answer>10</answer>",
]
GOLDS = ["10", "4", "10", "10", "c", "7", "C", "none", "10"]

PIECES = ["1", "23", ",", ".", "-", "/", "e", "$", "%", " ", "\n", "{", "}", "(", "\\frac", "\\boxed{", "#### ", "c)"]
PIECES += ["<think>", "</think>", "<answer>", "</answer>", TRIGGER, "or", "×", "²", "１", "\ud800", "\x00", "\\text{"]
hostile = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
texts = st.text() | hostile
golds = st.text() | hostile | st.integers() | st.floats() | st.decimals() | st.none() | st.sampled_from(["10", "c"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, golds), max_size=4))
def test_any_text(rows):
    completions, answer = [text for text, _ in rows], [gold for _, gold in rows]
    for reward, scores in SCORES:
        rewards = reward(completions, answer=answer)
        assert len(rewards) == len(rows)
        allowed = scores | ({None} if reward in WITH_ANSWER else set())
        assert set(rewards) <= allowed, reward.__name__
        assert all(type(score) in (float, type(None)) for score in rewards)


REPEATED = [
    *PIECES,
    "1,",
    "1 ",
    "1/",
    "1,111",
    "the ",
    "the answer is ",
    "option ",
    "\\frac{",
    "C, ",
    "a",
    "\\,",
    "{}",
]


@pytest.mark.parametrize("piece", REPEATED)
def test_time_is_bounded(piece):
    long = (piece * 20_000)[:20_000]
    for text in (long, TRIGGER + long, "\\boxed{" + long, "1 " + long + "}"):
        for reward in REWARDS:
            start = time.process_time()
            assert len(reward([text], answer=["10"])) == 1
            assert time.process_time() - start < 0.5, reward.__name__


@of_reward
def test_conversational_equals_plain(reward):
    plain = reward(TEXTS, answer=GOLDS)
    assert len(set(plain)) > 1
    assert reward([[{"role": "assistant", "content": text}] for text in TEXTS], answer=GOLDS) == plain
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in TEXTS]
    assert reward(parts, answer=GOLDS) == plain
    tools = [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "99"}]
    assert reward([[*tools, {"role": "assistant", "content": text}] for text in TEXTS], answer=GOLDS) == plain


def test_completion_texts():
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, "b", {"type": "text", "text": None}]
    odd = [None, [], [{}], [{"content": None}], [{"content": parts}], {"content": "c"}, ["d"]]
    assert completion_texts(odd) == ["", "", "", "", "ab", "c", "d"]


@of_reward
def test_order(reward):
    rows = list(zip(TEXTS, GOLDS, reward(TEXTS, answer=GOLDS), strict=True))
    random.Random(0).shuffle(rows)
    completions, answer, expected = map(list, zip(*rows, strict=True))
    assert reward(completions, answer=answer) == expected


@of_reward
def test_what_trl_needs(reward):
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.__name__ == reward.__name__ and re.fullmatch(r"[\w.-]+", copy.__name__)
    columns = {"prompts": TEXTS, "completion_ids": [[1]] * len(TEXTS), "trainer_state": None, "log_metric": print}
    logged = {}
    rewards = reward(completions=TEXTS, answer=GOLDS, log_extra=logged.__setitem__, other=GOLDS, **columns)
    assert rewards == copy(TEXTS, answer=GOLDS)
    assert [len(column) for column in logged.values()] == [len(TEXTS)] * (reward in WITH_ANSWER)
    assert reward([], answer=[]) == []


@of_reward
def test_wrong_use(reward):
    for completions in ("10", [10], None):
        with pytest.raises(ValueError, match="ompletion"):
            reward(completions, answer=["10"])
    if reward in WITH_ANSWER:
        with pytest.raises(ValueError, match="2 completions and 3 answers"):
            reward(["10"] * 2, answer=["10"] * 3)
        with pytest.raises(ValueError, match="rename_column"):
            reward(["10"])
        with pytest.raises(ValueError, match=r"pass \['10'\]"):
            reward(["10"], answer="10")


def test_names():
    assert get_numeric_reward().__name__ == numeric_reward.__name__ == "numeric_reward"
    names = {
        get_numeric_reward(partial=0).__name__: "numeric_reward_partial_0",
        get_numeric_reward(tolerance=1e-6, require_trigger=True).__name__: (
            "numeric_reward_tolerance_1e-06_require_trigger"
        ),
        get_choice_reward(trigger="Answer:").__name__: "choice_reward_trigger_answer",
        get_tag_count_reward(prefilled=True).__name__: "tag_count_reward_prefilled",
        number_accuracy.__name__: "accuracy_reward_verify_number",
    }
    assert list(names) == list(names.values())


class TestRewardHacks:
    def test_one_letter_scores_chance(self):
        rng = random.Random(0)
        answer = [rng.choice("abcde") for _ in range(1000)]
        for letter in "abcde":
            rewards = choice_reward([TRIGGER + letter] * 1000, answer=answer)
            assert sum(rewards) == answer.count(letter)

    @pytest.mark.parametrize("text", [" ".join("abcde"), "a, b, c, d, e", "(a) or (b) or (c)", "because", "42"])
    def test_hedging_scores_nothing(self, text):
        assert choice_reward([TRIGGER + text] * 5, answer=list("abcde")) == [0] * 5

    def test_any_number_stays_below_a_correct_one(self):
        answer = list(range(1, 101))
        assert max(numeric_reward([TRIGGER + "0"] * 100, answer=answer)) == 0.1
        many = TRIGGER + " ".join(map(str, answer))
        assert set(numeric_reward([many] * 100, answer=answer)) == {0}


def test_lazy_names():
    from trl_agents import rewards

    assert rewards.numeric_reward is numeric_reward
    assert {"ProgramRunner", "program_reward", "get_program_reward"} <= set(dir(rewards))
    with pytest.raises(AttributeError):
        rewards.no_such_name  # noqa: B018


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO", "AgentGRPO"])
def test_in_trl_s_own_trainer(algorithm, tmp_path):
    """And TRL's soft length penalty in ours."""
    import trl
    from datasets import Dataset
    from trl.rewards import get_soft_overlong_punishment

    import trl_agents
    from trl_agents.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer([THINK, TRIGGER + "10", "What is 2 + 2?"])
    rewards = [
        numeric_reward,
        get_numeric_reward(partial=0.0),
        choice_reward,
        think_answer_format_reward,
        tag_count_reward,
        trigger_format_reward,
        accuracy_reward,
        program_reward,
        get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4),
    ]
    library = trl_agents if algorithm.startswith("Agent") else trl
    args = getattr(library, f"{algorithm}Config")(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        logging_steps=1,
        log_completions=True,  # the columns that rewards log must fit the table
        save_strategy="no",
        beta=0.0,  # a reference model would be loaded by the name that this model lacks
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = getattr(library, f"{algorithm}Trainer")(
        tiny_model(tokenizer, hidden_size=32),
        reward_funcs=list(rewards),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["What is 2 + 2?"] * 4, "answer": ["4", "c", "1,234", "10"]}),
        processing_class=tokenizer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # math_verify may be missing here
        trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    means = {reward.__name__: logged[f"rewards/{reward.__name__}/mean"] for reward in rewards}
    penalty = means.pop("soft_overlong_punishment_reward")
    assert -1 <= penalty <= 0 and all(mean is None or 0 <= mean <= 1 for mean in means.values())  # None: no gold
