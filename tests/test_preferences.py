# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Preferences with a known utility: it by hand, the pairs' statistics, other data, evaluation, the picture."""

import json
import math
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_agents.plots import plot_overoptimization
from trl_agents.preference_eval import evaluate_replies, kl_per_reply
from trl_agents.preferences import (
    BEST_UTILITY,
    FEATURES,
    PreferenceArguments,
    recommendation_demonstrations,
    recommendation_pairs,
    true_utility,
    utility_reward,
)
from trl_agents.tiny import tiny_model, tiny_tokenizer


PROMPT = "Recommend the castle in Rome. It has a lake, a cafe and a tower.\n"


@pytest.mark.parametrize(
    ("reply", "utility"),
    [
        ("", 0),
        ("Visit the castle.", 0),
        ("It has a lake.", 1),
        ("It has a lake, a cafe and a tower.", 3),
        ("It has a pond.", -1),  # which it has not
        ("It has a lake and a pond.", 0),
        ("It has a lake and a lake.", 0.5),
        ("Lovely!", 1),
        ("Lovely! Magical!", 1.5),
        ("Lovely! Magical! Splendid!", 1),
        ("Lovely! Lovely!", 1),  # 1.5, and -0.5 for saying it again
        ("Lovely! " * 10, 1.5 - 8 * 0.5 - 9 * 0.5),
        ("Enjoy!", 0.5),
        ("Enjoy! Enjoy!", 0),
        ("ENJOY the LAKE", 1.5),
        ("lakes and lake_house", 1),  # other words than "lake", but for the one between underscores
        ("very " * 24, 0),
        ("very " * 34, -1),
        ("Visit the castle. It has a tower, a lake and a cafe. Lovely! Magical! Enjoy!", BEST_UTILITY),
    ],
)
def test_utility_by_hand(reply, utility):
    assert true_utility(PROMPT, reply) == pytest.approx(utility)


@given(st.text(), st.text())
def test_any_text_has_a_utility(prompt, reply):
    value = true_utility(prompt, reply)
    assert math.isfinite(value) and value <= len(FEATURES) + 2


@given(st.lists(st.sampled_from(["a", "lake", "pond", "tower", "cafe", "Lovely", "Magical", "Enjoy"]), max_size=40))
def test_no_reply_is_better_than_the_best(words):
    assert true_utility(PROMPT, " ".join(words)) <= BEST_UTILITY


def test_the_reward_function_has_trls_form():
    assert utility_reward(prompts=[PROMPT] * 2, completions=["Lovely!", "a pond"], step=3) == [1, -1]


# -- the generator ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    return recommendation_pairs(4000, seed=3, split="train")


def test_pairs_are_those_of_their_seed(pairs):
    again = recommendation_pairs(100, seed=3, split="train")
    assert again.to_list() == pairs.select(range(100)).to_list()
    assert again.to_list() != recommendation_pairs(100, seed=-3, split="train").to_list()


def test_pairs_are_well_formed(pairs):
    assert pairs.column_names == ["prompt", "chosen", "rejected"]
    assert len(set(pairs["prompt"])) == len(pairs)
    for row in pairs:
        assert row["chosen"] != row["rejected"]
        assert row["prompt"].startswith("Recommend the ") and row["prompt"].endswith(".\n")
        for reply in (row["chosen"], row["rejected"]):
            assert reply.startswith("Visit the ") and 3 <= len(reply.split()) <= 20


def test_train_and_test_share_no_prompt(pairs):
    test = recommendation_pairs(500, split="test")
    demonstrations = recommendation_demonstrations(2000, split="train")
    assert not set(test["prompt"]) & (set(pairs["prompt"]) | set(demonstrations["prompt"]))


def test_labels_are_noisy_as_bradley_terry_says(pairs):
    """By size of the difference, the share of pairs whose better reply is the chosen one."""
    differences = [true_utility(p, c) - true_utility(p, r) for p, c, r in zip(*pairs.to_dict().values(), strict=True)]
    for size in (0.5, 1.0, 1.5, 2.0):
        seen = [difference > 0 for difference in differences if abs(difference) == pytest.approx(size)]
        expected = 1 / (1 + math.exp(-size))
        margin = 4 * math.sqrt(expected * (1 - expected) / len(seen))
        assert len(seen) > 100 and sum(seen) / len(seen) == pytest.approx(expected, abs=margin)


def test_without_noise_the_better_reply_is_chosen():
    for row in recommendation_pairs(300, noise=0.0):
        assert true_utility(row["prompt"], row["chosen"]) >= true_utility(row["prompt"], row["rejected"])


def test_a_tiny_noise_does_not_overflow():
    for row in recommendation_pairs(50, noise=1e-6):
        assert true_utility(row["prompt"], row["chosen"]) >= true_utility(row["prompt"], row["rejected"])


def test_more_is_better_in_the_data_and_too_much_is_rare(pairs):
    """What the reward model is led by, and where it is left alone."""
    replies = [(row["prompt"], row[name]) for row in pairs for name in ("chosen", "rejected")]
    by_praise = {}
    for prompt, reply in replies:
        by_praise.setdefault(reply.count("!") - reply.count("Enjoy!"), []).append(true_utility(prompt, reply))
    means = {n: sum(values) / len(values) for n, values in by_praise.items()}
    assert set(means) == {0, 1, 2, 3}
    assert means[0] < means[1] < means[2] and means[3] < means[2]
    assert len(by_praise[3]) < 0.06 * len(replies)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n": 0}, "n=0"),
        ({"n": 10**9}, "n=1000000000 is more than"),
        ({"n": 3, "split": "dev"}, "got 'dev'"),
        ({"n": 3, "noise": -1.0}, "noise=-1.0"),
        ({"n": 3, "noise": math.nan}, "noise=nan"),
    ],
)
def test_mistakes_are_told(arguments, said):
    with pytest.raises(ValueError, match=said):
        recommendation_pairs(**arguments)


def test_the_text_needs_no_torch():
    code = "import sys, trl_agents.preferences; sys.exit(any(m in sys.modules for m in ('torch', 'trl', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# -- other data -------------------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_local_files(tmp_path):
    rows = [{"prompt": f"Q{n}", "chosen": "yes", "rejected": "no", "score": n} for n in range(5)]
    train, test = write(tmp_path / "train.jsonl", rows), write(tmp_path / "test.json", [{"prompt": "T"}])
    arguments = PreferenceArguments(dataset=train, test_dataset=test, num_train=3)
    demonstrations, pairs, prompts = arguments.load()
    assert not arguments.has_utility
    assert pairs.to_list() == [{"prompt": f"Q{n}", "chosen": "yes", "rejected": "no"} for n in range(3)]
    assert demonstrations[4] == {"prompt": "Q4", "completion": "yes"}
    assert prompts.to_list() == [{"prompt": "T"}]
    given = write(tmp_path / "sft.jsonl", [{"prompt": "A", "completion": "B"}])
    demonstrations, _, _ = PreferenceArguments(dataset=train, test_dataset=test, sft_dataset=given).load()
    assert demonstrations.to_list() == [{"prompt": "A", "completion": "B"}]


def test_the_generated_data():
    arguments = PreferenceArguments(dataset_kwargs='{"n": 20, "noise": 0.5}', num_test=7)
    demonstrations, pairs, test = arguments.load(seed=2)
    assert arguments.has_utility and (len(demonstrations), len(pairs), len(test)) == (20, 20, 7)
    assert pairs.to_list() == recommendation_pairs(20, 2, split="train", noise=0.5).to_list()
    assert test["prompt"][:] == recommendation_pairs(7, split="test")["prompt"][:]
    assert arguments.load(seed=3)[2].to_list() == test.to_list()


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        ([{"prompt": "Q", "chosen": "yes"}], {"test_dataset": "self"}, "'rejected'"),
        ([{"prompt": "Q", "chosen": "a", "rejected": "b"}], {}, "--test_dataset"),
        ([{"prompt": [{"role": "user", "content": "Q"}], "chosen": "a", "rejected": "b"}], {}, "plain text"),
        (
            [{"prompt": "Q", "chosen": "a", "rejected": "b"}, {"prompt": "Q", "chosen": None, "rejected": "b"}],
            {"test_dataset": "self"},
            "Row 1 of .* has NoneType for 'chosen'",
        ),
        ([{"prompt": "Q", "chosen": "a", "rejected": "b"}], {"test_dataset": "none.json"}, "no file 'none.json'"),
        ([{"prompt": "Q", "chosen": "a", "rejected": "b"}], {"dataset_kwargs": {"n": 3}}, "'n': 3"),
    ],
    ids=["a column", "no test file", "conversations", "a missing reply", "no such file", "settings of the generator"],
)
def test_files_that_do_not_fit(tmp_path, rows, arguments, said):
    path = write(tmp_path / "rows.jsonl", rows)
    if said == "plain text" or arguments.get("test_dataset") == "self":
        arguments = {**arguments, "test_dataset": path}
    with pytest.raises(ValueError, match=said):
        PreferenceArguments(dataset=path, **arguments).load()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b""),
        ("rows.csv", b""),
        ("rows.csv", b"prompt,chosen,rejected\n"),
        ("rows.json", b"{"),
        ("rows.parquet", b"\0"),
        ("rows.csv", b"prompt,chosen,rejected\nQ\xe9,a,b\n"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}' (cannot be read|has no row)"):
        PreferenceArguments(dataset=str(path), test_dataset=str(path)).load()


def test_unknown_settings_of_the_generator():
    with pytest.raises(ValueError, match="nois is unknown"):
        PreferenceArguments(dataset_kwargs={"nois": 1.0}).load()


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    rows = recommendation_demonstrations(50)
    tokenizer = tiny_tokenizer([row["prompt"] + row["completion"] for row in rows])
    return *(tiny_model(tokenizer, hidden_size=32, num_hidden_layers=1, seed=seed) for seed in (0, 1)), tokenizer


def test_kl_of_a_model_from_itself_is_zero(models):
    model, _, tokenizer = models
    assert kl_per_reply(model, model, tokenizer, [PROMPT] * 2, ["Lovely!", "It has a lake."]) == [0, 0]


@torch.no_grad()
def test_kl_is_the_sum_over_the_replys_states(models):
    """Against one forward pass of each reply alone; batches, padding and order change nothing."""
    policy, reference, tokenizer = models
    replies = ["Lovely! Enjoy!", "", "Visit the castle. It has a lake.", "a tower"]
    prompts = [PROMPT, "Recommend.\n", PROMPT * 2, "Go"]
    measured = kl_per_reply(policy, reference, tokenizer, prompts, replies, batch_size=3)
    for prompt, reply, value in zip(prompts, replies, measured, strict=True):
        before, after = tokenizer(prompt)["input_ids"], [*tokenizer(reply)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([before + after])
        logps, others = (model(ids).logits[0].double().log_softmax(-1) for model in (policy, reference))
        states = range(len(before) - 1, len(before) + len(after) - 1)
        expected = sum((logps[t].exp() * (logps[t] - others[t])).sum().item() for t in states)
        assert value == pytest.approx(expected, rel=1e-4) and value > 0
    # A budget of one token had room for the first alone
    (short,) = kl_per_reply(policy, reference, tokenizer, ["Go"], ["a tower"], max_new_tokens=1)
    assert 0 < short < measured[3]


def test_evaluation_measures_every_reply(models, tmp_path):
    policy, reference, tokenizer = models
    prompts = recommendation_pairs(25, split="test")["prompt"][:]
    seen = []

    def length(prompts, completions, **kwargs):
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    measured = evaluate_replies(
        policy,
        tokenizer,
        prompts,
        {"length": length, "true utility": utility_reward},
        reference=reference,
        max_new_tokens=5,
        samples=tmp_path / "replies.txt",
    )
    assert list(measured) == ["length", "true utility", "kl", "words"]
    assert all(len(values) == 25 for values in measured.values())
    assert measured["length"] == [len(text) for text in seen]
    assert measured["true utility"] == utility_reward(prompts, seen)
    assert min(measured["kl"]) > 0
    assert len(set(seen)) > 1, "sampled, not greedy"
    text = (tmp_path / "replies.txt").read_text()
    assert text.count("\n> ") == 20 and prompts[0].strip() in text and f"kl {measured['kl'][0]:.2f}" in text


def test_the_picture(tmp_path):
    rng = random.Random(0)
    kl = [-0.01, *(n**1.5 for n in range(30))]
    curve = {"step": list(range(31)), "kl": kl, "proxy reward": [n + rng.random() for n in range(31)]}
    curve["true utility"] = [5 - (n - 12) ** 2 / 40 for n in range(31)]
    start = {"proxy reward": 0.5, "true utility": 1.4}
    plot_overoptimization({"ppo": {**curve}, "ppo_no_kl": curve}, start, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    nothing = {"step": [], "kl": [], "proxy reward": []}
    plot_overoptimization(
        {"ppo": nothing}, {"proxy reward": 0.0}, tmp_path / "b.png"
    )  # a run too short to log anything
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
