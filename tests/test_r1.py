# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""R1: its texts, what counts as right and well-formed, and the recipe as a user runs it."""

import dataclasses
import json
import shutil

import pytest
from datasets import Dataset
from recipe_runs import parse, recipe, run
from safetensors.torch import load_file

from trl_agents import questions, r1
from trl_agents.arithmetic import arithmetic_problems
from trl_agents.r1 import (
    INSTRUCTIONS,
    PHRASES,
    WellFormedGrading,
    evaluate_r1,
    mixed_corpus,
    r1_prompt,
    r1_prompt_completion,
    think_answer,
)
from trl_agents.rewards import Grading, think_answer_format_reward
from trl_agents.tiny import tiny_tokenizer


PROBLEMS = arithmetic_problems(400, max_value=20, operations="+-")


# -- texts ------------------------------------------------------------------------------------------------------------


def test_prompt_and_completion():
    rows = r1_prompt_completion(Dataset.from_list([{"question": " 1 + 2? ", "rationale": "1 + 2 = 3", "answer": "3"}]))
    assert rows[0]["prompt"] == INSTRUCTIONS + "User: 1 + 2?\nAssistant:"
    assert rows[0]["completion"] == " <think>1 + 2 = 3</think> <answer>3</answer>"
    assert rows[0]["answer"] == "3"


@pytest.mark.parametrize("rationale", ["", None, "2 + 2 = 4\n"])
def test_completions_earn_both_rewards(rationale):
    rows = r1_prompt_completion(Dataset.from_list([{"question": "2 + 2?", "rationale": rationale, "answer": "4"}]))
    assert think_answer_format_reward(rows["completion"][:]) == [1.0]
    assert Grading(partial=0.0).reward(rows["completion"][:], answer=["4"]) == [1.0]


def test_corpus_has_every_form_in_its_share():
    corpus = mixed_corpus(PROBLEMS, tagged=0.3, direct=0.2)
    texts = corpus["completion"][:]
    shares = {
        "tagged": sum(think_answer_format_reward(texts)) / 400,
        "direct": sum("=" not in text for text in texts) / 400,
        "plain": sum("=" in text and "<" not in text for text in texts) / 400,
        "half": sum("=" in text and "<answer>" in text and "<think>" not in text for text in texts) / 400,
    }
    for form, expected in {"tagged": 0.3, "direct": 0.2, "plain": 0.25, "half": 0.25}.items():
        assert shares[form] == pytest.approx(expected, abs=0.07), form
    assert sum(shares.values()) == pytest.approx(1.0)  # there is no fifth form
    # Whatever the form, what it states is the answer
    read = Grading().read(texts, corpus["prompt"][:])
    assert all(Grading().is_correct(value, answer) for value, answer in zip(read, corpus["answer"], strict=True))


def test_the_instructions_do_not_tell_the_form():
    corpus = mixed_corpus(PROBLEMS, tagged=0.5, direct=0.0)
    told = [prompt.startswith(INSTRUCTIONS) for prompt in corpus["prompt"]]
    tagged = think_answer_format_reward(corpus["completion"][:])
    assert sum(told) / 400 == pytest.approx(0.5, abs=0.07)
    among_told = [tag for tag, one in zip(tagged, told, strict=True) if one]
    assert sum(among_told) / len(among_told) == pytest.approx(0.5, abs=0.1)
    assert all(prompt.endswith("\nAssistant:") for prompt in corpus["prompt"])


def test_the_same_seed_gives_the_same_corpus():
    first, again, other = (mixed_corpus(PROBLEMS, seed=seed)["completion"][:] for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(("tagged", "direct"), [(0.7, 0.4), (-0.1, 0.2), (0.2, -0.1)])
def test_shares_that_are_none(tagged, direct):
    with pytest.raises(ValueError, match=f"tagged={tagged} and direct={direct}"):
        mixed_corpus(PROBLEMS, tagged, direct)


def test_standing_texts_are_one_token_each():
    corpus = mixed_corpus(PROBLEMS)
    tokenizer = tiny_tokenizer([row["prompt"] + row["completion"] for row in corpus], phrases=PHRASES)
    assert all(len(tokenizer(phrase)["input_ids"]) == 1 for phrase in PHRASES)
    row = next(row for row in corpus if row["prompt"].startswith(INSTRUCTIONS) and "<think>" in row["completion"])
    prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
    assert whole[: len(prompt)] == prompt, "the completion would be another one behind its prompt"
    assert tokenizer.decode(whole) == row["prompt"] + row["completion"]


# -- what is right, and in R1's form ----------------------------------------------------------------------------------

FORMED, PLAIN, WRONG = think_answer("2 + 2 = 4", "4"), " 2 + 2 = 4\n The answer is 4.", think_answer("so", "5")


def test_well_formed_grading():
    texts = [FORMED, PLAIN, WRONG, FORMED + " Indeed.", " <answer>4</answer>"]
    assert Grading().read(texts, [""] * 5) == [4.0, 4.0, 5.0, 4.0, 4.0]
    grading = WellFormedGrading()
    assert grading.read(texts, [""] * 5) == [4.0, None, 5.0, None, None]
    assert [grading.is_correct(value, "4") for value in grading.read(texts, [""] * 5)] == [True] + [False] * 4


def test_well_formed_letters():
    grading = WellFormedGrading(choice=True)
    assert grading.read([think_answer("b is right", "b"), " The answer is b."], ["", ""]) == ["b", None]


def test_rejection_sampling_keeps_what_is_right_and_formed(monkeypatch):
    sampled = [[FORMED, FORMED, PLAIN, WRONG], [PLAIN, WRONG, PLAIN, WRONG]]
    monkeypatch.setattr(questions, "answer_questions", lambda *args, **kwargs: sampled)
    rows = Dataset.from_list([{"prompt": r1_prompt(str(n)), "completion": "", "answer": "4"} for n in range(2)])
    kept = questions.self_training_rows(None, None, rows, WellFormedGrading(), n=4, most=4)
    assert kept.to_list() == [{"prompt": r1_prompt("0"), "completion": FORMED, "answer": "4"}]


def test_evaluation_by_hand(monkeypatch):
    sampled = [[FORMED, FORMED, WRONG, PLAIN], [WRONG, WRONG, PLAIN, " no"], [PLAIN] * 4]
    greedy = [[PLAIN], [WRONG], [" no"]]
    asked = []

    def answer_questions(model, tokenizer, prompts, *, n=1, temperature=0.0, seed=0, **kwargs):
        asked.append((n, temperature, seed, kwargs))
        return greedy if n == 1 else sampled

    monkeypatch.setattr(r1, "answer_questions", answer_questions)
    rows = Dataset.from_dict({"prompt": ["a", "b", "c"], "answer": ["4", "4", "4"]})
    measured = evaluate_r1(None, None, rows, Grading(), n=4, temperature=0.6, seed=3, max_new_tokens=9)
    assert measured == {
        "greedy": [1.0, 0.0, 0.0],
        "pass@1": [0.75, 0.25, 1.0],
        "vote@4": [1.0, 0.0, 1.0],
        "format": [0.75, 0.5, 0.0],
    }
    assert asked == [(1, 0.0, 0, {"max_new_tokens": 9}), (4, 0.6, 3, {"max_new_tokens": 9})]
    with pytest.raises(ValueError, match="n=0"):
        evaluate_r1(None, None, rows, Grading(), n=0)


# -- the recipe -------------------------------------------------------------------------------------------------------

PROBLEM_SETTINGS = '{"n": 24, "max_value": 9, "operations": "+", "skipping": 0.5}'
SMALL = ["--dataset_kwargs", PROBLEM_SETTINGS, "--num_test", 6, "--base_epochs", 2, "--sft_batch_size", 8]
SMALL += ["--max_steps", 2, "--per_device_train_batch_size", 4, "--num_generations", 4, "--max_completion_length", 8]
SMALL += ["--logging_steps", 1, "--cold_rows", 8, "--cold_epochs", 1, "--num_votes", 2, "--disable_tqdm", "true"]
STAGES = ["base", "zero", "cold_start", "rl", "rejection", "rl_2"]


def right_and_formed(dataset, n):
    """What the rejection sampling of a model too small to be right would find, if it were."""
    return [[completion] * n for completion in dataset["completion"]]


@pytest.mark.slow
def test_all_stages_and_again(tmp_path, monkeypatch):
    module = recipe("r1")
    # A model of two epochs gets nothing right: its answers in this one stage are the given ones
    sampler = module.self_training_rows

    def lucky(model, tokenizer, dataset, grading, *, n, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(questions, "answer_questions", lambda *args, **kwargs: right_and_formed(dataset, n))
            return sampler(model, tokenizer, dataset, grading, n=n, **kwargs)

    monkeypatch.setattr(module, "self_training_rows", lucky)
    module.main(*parse(module, module.DEFAULT_CONFIG, "--output_dir", tmp_path, *SMALL))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics) == ["greedy", "pass@1", "vote@2", "format"]
    for values in metrics.values():
        assert list(values) == STAGES
        assert all(0 <= value["low"] <= value["mean"] <= value["high"] <= 1 for value in values.values())
    pictures = [f"{stage}/{what}_curve.png" for stage in ("zero", "rl", "rl_2") for what in ("accuracy", "format")]
    for name in ("accuracy.png", *pictures):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for stage in STAGES:
        assert "6 test questions" in (tmp_path / stage / "README.md").read_text()

    # The script itself finds the stages done, and measures the same
    times = {path: path.stat().st_mtime for path in tmp_path.glob("*/model.safetensors")}
    again = run("r1.py", "--output_dir", tmp_path, *SMALL)
    assert again.returncode == 0, again.stderr[-3000:]
    assert times == {path: path.stat().st_mtime for path in times} and len(times) == len(STAGES)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert "| rl_2 |" in again.stdout

    # A stage refuses other settings, those of an earlier stage among them
    for changed, said in ((["--beta", 0.5], "beta 0.001, now 0.5"), (["--cold_rows", 9], "cold")):
        with pytest.raises(ValueError, match=said):
            module.main(*parse(module, module.DEFAULT_CONFIG, "--output_dir", tmp_path, *SMALL, *changed))


def test_where_no_answer_was_right_the_finished_stages_are_reported(tmp_path, monkeypatch):
    module = recipe("r1")
    monkeypatch.setattr(
        module, "self_training_rows", lambda model, tokenizer, dataset, *args, **kwargs: dataset.select([])
    )
    with pytest.raises(ValueError, match="No answer of [0-9]+ to each .* more updates .*rejection_samples"):
        module.main(*parse(module, module.DEFAULT_CONFIG, "--output_dir", tmp_path, *SMALL, "--methods", "pipeline"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["pass@1"]) == ["base", "cold_start", "rl"]


def some_reward(completions, **kwargs):
    """What even a model that has learnt nothing earns now and then."""
    return [len(completion) % 7 / 7 for completion in completions]


def test_an_interrupted_stage_goes_on(tmp_path, monkeypatch):
    module = recipe("r1")
    monkeypatch.setattr(module, "think_answer_format_reward", some_reward)
    more = [*SMALL, "--methods", "zero", "--max_steps", 4, "--steps_per_generation", 2, "--save_steps", 2]
    more += ["--save_total_limit", 2, "--learning_rate", 0.01]
    module.main(*parse(module, module.DEFAULT_CONFIG, "--output_dir", tmp_path, *more))
    zero = tmp_path / "zero"
    halfway = json.loads((zero / "checkpoint-2" / "trainer_state.json").read_text())
    # As if it had been stopped after the second update
    for name in ("stage.json", "model.safetensors"):
        (zero / name).unlink()
    shutil.rmtree(zero / "checkpoint-4")
    module.main(*parse(module, module.DEFAULT_CONFIG, "--output_dir", tmp_path, *more))
    state = json.loads((zero / "checkpoint-4" / "trainer_state.json").read_text())
    n_before = len(halfway["log_history"])  # with the seconds that each update took, which never come again
    assert n_before >= 2 and state["log_history"][:n_before] == halfway["log_history"], "it began anew"
    assert state["global_step"] == 4 and (zero / "stage.json").exists()
    before, after = (load_file(zero / name / "model.safetensors") for name in ("checkpoint-2", "."))
    assert any((after[name] - before[name]).abs().max() > 1e-3 for name in after), "nothing was learnt"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "gsm9k", "--dataset_kwargs", "{}"], "'gsm9k' is unknown"),
        (["--dataset_kwargs", '{"max_value": 1}'], "max_value"),
        (["--dataset", "questions.json", "--dataset_kwargs", "{}"], "--test_dataset"),
        (["--load_in_4bit", "true"], "add use_peft"),
        (["--base_tagged", "0.9", *SMALL[:2]], "tagged=0.9 and direct=0.2"),
        (["--resume_from_checkpoint", "outputs/checkpoint-2"], "leave resume_from_checkpoint out"),
        (["--reward_weights", "1"], "give two"),
        (["--num_votes", "0"], "num_votes=0"),
        (["--exploration", "try_all"], "exploration=.*leave it out"),
        (["--max_completion_length", "-1"], "max_completion_length=-1: give more than 0"),
        (["--cold_rows", "0"], "cold_rows=0: give more than 0"),
        (["--rejection_most", "0"], "rejection_most=0"),
    ],
)
def test_mistakes_are_told_first(tmp_path, arguments, said):
    module = recipe("r1")
    with pytest.raises(ValueError, match=said):
        module.main(*parse(module, module.DEFAULT_CONFIG, "--output_dir", tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists(), "something was written before the error"


def test_help_names_the_options():
    result = run("r1.py", "--help")
    assert result.returncode == 0, result.stderr
    for field in dataclasses.fields(recipe("r1").ScriptArguments):
        assert f"--{field.name}" in result.stdout


@pytest.mark.slow
@pytest.mark.long
def test_the_tiny_recipe_learns(tmp_path):
    module = recipe("r1")
    module.main(*parse(module, module.DEFAULT_CONFIG, "--output_dir", tmp_path, "--disable_tqdm", "true"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    base, zero, last = (
        {name: values[stage] for name, values in metrics.items()} for stage in ("base", "zero", "rl_2")
    )
    for trained in (zero, last):
        assert trained["pass@1"]["low"] > base["pass@1"]["high"]
        assert trained["format"]["mean"] > 0.95 > base["format"]["high"]
