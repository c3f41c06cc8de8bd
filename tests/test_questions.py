# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Models answer questions: in order, side by side or alone, the same each time; votes, scores, self-training rows."""

import json
import warnings
from collections import deque

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_agents import questions
from trl_agents.data import prompt_completion
from trl_agents.questions import (
    answer_pairs,
    answer_questions,
    evaluate_answers,
    majority_vote,
    self_training_rows,
)
from trl_agents.rewards import Grading
from trl_agents.rollout.answers import answer_prompts
from trl_agents.rollout.generation import Reply
from trl_agents.sft import fine_tune
from trl_agents.tiny import save_tiny_start, tiny_model, tiny_tokenizer


ROWS = prompt_completion(
    Dataset.from_list(
        [
            {"question": f"Ana has {n} pens. How many?", "rationale": f"Ana has {n} pens.", "answer": str(n)}
            for n in range(2, 10)
        ]
    )
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_tiny_start(ROWS, tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def model(start):
    return AutoModelForCausalLM.from_pretrained(start)


@pytest.fixture(scope="module")
def tokenizer(start):
    return AutoTokenizer.from_pretrained(start, padding_side="left")


class Echo:
    """Answers a prompt of n tokens after n steps, with its first token."""

    def __init__(self):
        self.pending = {}
        self.most = 0

    @property
    def busy(self):
        return bool(self.pending)

    def submit(self, slot, prompt_ids, max_new_tokens, rng):
        assert slot not in self.pending
        self.pending[slot] = [prompt_ids, len(prompt_ids), int(rng.integers(10**6))]
        self.most = max(self.most, len(self.pending))

    def step(self):
        done = []
        for slot, state in list(self.pending.items()):
            state[1] -= 1
            if state[1] == 0:
                ids, _, drawn = self.pending.pop(slot)
                done.append((slot, Reply((ids[0], drawn), cut_off=False)))
        return done

    def drain(self):
        self.drained = True


@pytest.mark.parametrize("n_slots", [1, 3, 20])
def test_replies_keep_their_order(n_slots):
    """Whatever finishes first, and the luck of each does not depend on its neighbours."""
    backend = Echo()
    prompts = [[number] * length for number, length in enumerate([5, 1, 3, 1, 2, 8, 1])]
    replies = answer_prompts(backend, prompts, 4, n_slots=n_slots, luck=[(7, number) for number in range(7)])
    assert [reply.ids[0] for reply in replies] == list(range(7))
    assert backend.most == min(n_slots, 7) and backend.drained
    alone = answer_prompts(Echo(), prompts[5:6], 4, n_slots=1, luck=[(7, 5)])
    assert alone[0] == replies[5]


def test_greedy_answers_are_generates_own(model, tokenizer):
    prompts = ROWS["prompt"][:]
    answers = answer_questions(model, tokenizer, prompts, max_new_tokens=9, n_slots=3)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(output, skip_special_tokens=True)


def test_sampled_answers_depend_on_seed_and_number_alone(model, tokenizer):
    prompts = ROWS["prompt"][:4]
    ask = {"n": 3, "temperature": 1.0, "max_new_tokens": 6}
    many = answer_questions(model, tokenizer, prompts, seed=1, n_slots=12, **ask)
    assert many == answer_questions(model, tokenizer, prompts, seed=1, n_slots=2, **ask)
    assert many != answer_questions(model, tokenizer, prompts, seed=2, **ask)
    assert [len(own) for own in many] == [3] * 4 and len(set(many[0])) > 1
    first, again = answer_questions(model, tokenizer, [prompts[0]] * 2, **ask)
    assert first != again  # a question that stands twice is answered anew


def test_conversations_are_rendered(model, tokenizer):
    asked = [[{"role": "user", "content": "Ana has 4 pens."}]]
    rendered = tokenizer.apply_chat_template(asked[0], add_generation_prompt=True, tokenize=False)
    kwargs = {"max_new_tokens": 5}
    assert answer_questions(model, tokenizer, asked, **kwargs) == answer_questions(
        model, tokenizer, [rendered], **kwargs
    )


def test_no_room_for_an_answer(tokenizer):
    short = tiny_model(tokenizer, 32, 1, max_position_embeddings=20)
    with pytest.raises(ValueError, match=r"max_new_tokens=15 is longer than the model's 20 positions"):
        answer_questions(short, tokenizer, ROWS["prompt"][:1], max_new_tokens=15)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [([3.0, 4.0, 4.0], 4.0), ([None, None, 5.0], 5.0), ([2.0, 1.0, 1.0, 2.0], 2.0), ([None], None), ([], None)],
)
def test_majority_vote(answers, winner):
    assert majority_vote(answers) == winner


@pytest.fixture
def scripted(monkeypatch):
    """Answers that are written down: one list a call, in the order of the prompts."""
    calls = deque()
    monkeypatch.setattr(questions, "answer_questions", lambda *args, **kwargs: calls.popleft())
    return calls


def test_evaluation_reads_answers_and_votes(scripted):
    said = "So.\nTherefore, the answer is: {}".format
    scripted.append([[said(2)], [said(9)], ["no idea"], *[[said(0)]] * 5])
    scripted.append([[said(1), said(2), said("2.0")], [said(9), said(8), said(3)], [said(4)] * 3, *[["none"] * 3] * 5])
    correct = evaluate_answers(None, None, ROWS, Grading(), n_votes=3)
    assert correct == {"greedy": [True] + [False] * 7, "vote@3": [True, False, True] + [False] * 5}


def test_self_training_keeps_what_is_right_once(scripted):
    said = "So.\nTherefore, the answer is: {}".format
    own = [[said(2), said(2), "Well." + said(2), said(3)], [said(9)] * 4, *[[""] * 4] * 6]
    scripted += [own, own, [[""]] * 8]
    rows = self_training_rows(None, None, ROWS, Grading(), n=4, most=5)
    assert rows["completion"][:] == [said(2), "Well." + said(2)]
    assert rows["question"][:] == [ROWS[0]["question"]] * 2 and rows.features == ROWS.features
    assert len(self_training_rows(None, None, ROWS, Grading(), n=4, most=1)) == 1
    assert len(self_training_rows(None, None, ROWS, Grading(), n=1, most=1)) == 0


@pytest.mark.parametrize("n_items", [0, 1, 3, 7])
def test_shares_come_back_in_order(monkeypatch, n_items):
    """Three processes, one after the other: each computes its own items once, and all get all."""
    items, computed, parts = list(range(n_items)), [], []

    def compute(own):
        computed.extend(own)
        return [10 * item for item in own]

    def process(number, gathered):
        state = type("State", (), {"process_index": number, "num_processes": 3})
        monkeypatch.setattr(questions, "PartialState", lambda: state)
        monkeypatch.setattr(questions, "gather_object", gathered)
        return questions._shared_out(compute, items)

    for number in range(3):
        process(number, lambda part: parts.extend(part) or PADDING)
    assert sorted(computed) == items
    for number in range(3):
        assert process(number, lambda part: parts) == [10 * item for item in items]


PADDING = [[None] * 9] * 3  # what nobody looks at


class TestChoosing:
    """A model whose answers are written down: right for questions of even numbers, else half right."""

    ANSWER = "\nTherefore, the answer is: {}".format

    @pytest.fixture
    def sampled(self, monkeypatch):
        def answer_questions(model, tokenizer, prompts, n=1, **kwargs):
            golds = [int(prompt.split(" has ")[1].split()[0]) for prompt in prompts]
            return [[self.ANSWER(gold + (gold % 2) * (draw % 2)) for draw in range(n)] for gold in golds]

        monkeypatch.setattr(questions, "answer_questions", answer_questions)

    def test_pairs_hold_each_answer_once(self, sampled):
        pairs = answer_pairs(None, None, ROWS, Grading(), n=6, most=5)
        assert pairs.column_names == ["prompt", "chosen", "rejected"]
        odd = [row for row in ROWS if int(row["answer"]) % 2]
        assert pairs["prompt"][:] == [row["prompt"] for row in odd]
        assert pairs["chosen"][:] == [self.ANSWER(row["answer"]) for row in odd]
        assert pairs["rejected"][:] == [self.ANSWER(int(row["answer"]) + 1) for row in odd]

    def test_no_pairs_of_a_perfect_model(self, sampled):
        even = ROWS.filter(lambda row: int(row["answer"]) % 2 == 0)
        pairs = answer_pairs(None, None, even, Grading(), n=2, most=2)
        assert len(pairs) == 0 and pairs.column_names == ["prompt", "chosen", "rejected"]

    def test_the_scorer_chooses(self, sampled):
        def scorer(prompts, answers):
            """Likes the larger number: wrong for odd questions."""
            return [[float(text.split(": ")[1]) for text in own] for own in answers]

        found = evaluate_answers(None, None, ROWS, Grading(), n_votes=3, scorer=scorer)
        even = [int(answer) % 2 == 0 for answer in ROWS["answer"]]
        assert list(found) == ["greedy", "vote@3", "rerank@3"]
        assert all(found["greedy"]) and all(found["vote@3"]) and found["rerank@3"] == even

    def test_a_scorer_without_answers(self):
        with pytest.raises(ValueError, match="n_votes=0 samples none"):
            evaluate_answers(None, None, ROWS, Grading(), scorer=lambda *_: [])


class TestGrading:
    def test_correct_answers_that_cannot_be_read(self):
        with pytest.warns(UserWarning, match="2 of 3 correct answers are no number, 'Paris' among them"):
            Grading().check_answers(["5", "Paris", "inf"])
        with pytest.raises(ValueError, match="1 of 1 correct answers are no letter, '42'"):
            Grading(choice=True).check_answers(["42"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Grading().check_answers(["5", "1,234", "3/4"])
            Grading(choice=True).check_answers(["c", "(C)"])

    def test_answers_decide_how_they_are_graded(self):
        assert Grading.of({"train": ["a", "C"], "test": ["b"]}, partial=0.0) == Grading(choice=True, partial=0.0)
        assert Grading.of({"train": ["a", "12"]}, style="program") == Grading("program")
        with pytest.raises(ValueError, match="test: 1 of 1 correct answers are no number, 'b'"):
            Grading.of({"train": ["5"], "test": ["b"]})

    ANSWER = "So.\nTherefore, the answer is: {}".format

    @pytest.mark.parametrize(
        ("grading", "text", "read", "gold", "right"),
        [
            (Grading(), ANSWER("1,234"), 1234.0, "1234", True),
            (Grading(), ANSWER(3), 3.0, "4", False),
            (Grading(), "nothing", None, "4", False),
            (Grading(choice=True), ANSWER("(C)"), "c", "c", True),
            (Grading(choice=True), ANSWER("b"), "b", "c", False),
            (Grading(choice=True), ANSWER("b"), "b", "(B) 12", True),
            (Grading(choice=True), ANSWER("b"), "b", "", False),
        ],
    )
    def test_reads_and_judges(self, grading, text, read, gold, right):
        assert grading.read([text], ["?"]) == [read]
        assert grading.is_correct(read, gold) is right
        assert (grading.reward([text], answer=[gold]) == [1.0]) is right

    def test_programs(self):
        prompt = 'Question:\nQ\nAnswer reasoning:\ndef solution():\n    """Q"""\n'
        texts = ["    pens = 4 // 2\n    return pens", "    return 1 / 0", "    return 'c'"]
        assert Grading("program").read(texts, [prompt] * 3) == [2.0, None, None]
        assert Grading("program", choice=True).read(texts, [prompt] * 3)[2] == "c"
        rewards = Grading("program").reward(texts, prompts=[prompt] * 3, answer=["2", "2", "2"])
        assert rewards == [1.0, 0.0, 0.0]

    def test_unknown_style(self):
        with pytest.raises(ValueError, match="style='prose'"):
            Grading("prose")


class TestFineTune:
    def test_learns_what_it_is_given(self, start, tmp_path):
        """From nothing to the given answers, and the saved model is the one that was trained."""
        folder = fine_tune(
            start, ROWS, tmp_path, epochs=60, learning_rate=1e-2, batch_size=8, use_cpu=True, disable_tqdm=True
        )
        trained, its_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        correct = evaluate_answers(trained, its_tokenizer, ROWS, Grading(), max_new_tokens=24)
        assert sum(correct["greedy"]) == 8
        assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 2

    def test_nothing_to_learn_from(self, start, tmp_path):
        with pytest.raises(ValueError, match="no row to fine-tune on"):
            fine_tune(start, ROWS.select([]), tmp_path, epochs=1, learning_rate=1e-3, batch_size=2)


def test_a_start_is_the_same_every_time(tmp_path):
    first, again, other = (
        AutoModelForCausalLM.from_pretrained(save_tiny_start(ROWS, tmp_path / str(number), seed=seed))
        for number, seed in enumerate([3, 3, 4])
    )
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert tiny_tokenizer(ROWS["prompt"][:]).eos_token == "<|im_end|>"
