# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Reward models learn from pairs, and are read where they were trained to be read."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from trl_agents.data import prompt_completion
from trl_agents.reward_model import fit_reward_model, get_model_reward, score_answers
from trl_agents.tiny import save_tiny_start


PROMPTS = [f"Ana has {n} pens." for n in range(2, 10)]
PAIRS = Dataset.from_list(
    [{"prompt": prompt, "chosen": " Thank you, Ana.", "rejected": " No pens, Ana."} for prompt in PROMPTS]
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    rows = [{"question": text, "rationale": "Thank you, No.", "answer": "2"} for text in PROMPTS]
    return save_tiny_start(prompt_completion(Dataset.from_list(rows)), tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def tokenizer(start):
    return AutoTokenizer.from_pretrained(start, padding_side="left")


@pytest.fixture(scope="module")
def fitted(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    fit_reward_model(start, PAIRS, folder, epochs=8, learning_rate=1e-3, batch_size=8, use_cpu=True, disable_tqdm=True)
    return folder


def test_it_learns_what_was_chosen(fitted):
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(fitted),
        AutoTokenizer.from_pretrained(fitted),
    )
    prompt = "Ana has 7 pens."
    ((good, bad),) = score_answers(model, tokenizer, [prompt], [[" Thank you, Ana.", " No pens, Ana."]])
    assert good > bad + 1
    assert (fitted / "README.md").exists()


def test_the_reward_function_reads_the_last_token_as_in_training(fitted):
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(fitted),
        AutoTokenizer.from_pretrained(fitted),
    )
    reward = get_model_reward(model, tokenizer, batch_size=3)
    texts = [" Thank you, Ana.", " No", "", " No pens, Ana. No pens, Ana."]
    scores = reward(prompts=PROMPTS[:4], completions=texts, answer=[None] * 4)
    for prompt, text, score in zip(PROMPTS[:4], texts, scores, strict=True):
        # TRL's RewardTrainer appends the end-of-sequence token to the text and reads there
        ids = tokenizer(prompt + text + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            assert score == pytest.approx(model(ids).logits.item(), abs=1e-4)
    assert reward.__name__ == "model_reward"  # the name of its metric
    assert reward(prompts=[], completions=[]) == []


def test_the_same_seed_makes_the_same_model(start, tmp_path):
    settings = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    scores = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        fit_reward_model(start, PAIRS, tmp_path / folder, seed=seed, **settings)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        scores.append(score_answers(model, AutoTokenizer.from_pretrained(start), PROMPTS[:1], [[" No"]]))
    assert scores[0] == scores[1] != scores[2]


def test_without_pairs(start, tmp_path):
    with pytest.raises(ValueError, match="no pair to learn"):
        fit_reward_model(start, PAIRS.select([]), tmp_path, epochs=1, learning_rate=1e-3, batch_size=8)


@pytest.mark.parametrize("n_labels", [1, 2])
def test_scores_do_not_depend_on_the_batch(tokenizer, n_labels):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, num_labels=n_labels, pad_token_id=0, n_positions=64
    )
    classifier = GPT2ForSequenceClassification(config)
    prompts, answers = (
        ["Ana has 2 pens.", "Ana"],
        [
            [" 2", " 3 pens and 4 pens"],
            [],
        ],
    )
    answers[1] = [" has"]
    together = score_answers(classifier, tokenizer, prompts, answers)
    alone = score_answers(classifier, tokenizer, prompts, answers, batch_size=1)
    assert [len(own) for own in together] == [2, 1]
    assert torch.allclose(torch.tensor(sum(together, [])), torch.tensor(sum(alone, [])), atol=1e-5)
    classifier.config.num_labels = 3
    with pytest.raises(ValueError, match="this one has 3"):
        score_answers(classifier, tokenizer, prompts, answers)
