# Licensed under the Apache License, Version 2.0 (see LICENSE).
import json
import time
import warnings

import pytest
from datasets import Dataset

from trl_agents.arithmetic import arithmetic_problems
from trl_agents.data import (
    ANSWER_TRIGGER,
    from_gsm8k,
    from_math_qa,
    from_reft,
    from_svamp,
    load_questions,
    number_text,
    option_number,
    prompt_completion,
)


GSM8K = {
    "question": "A farm packs 1,200 eggs in crates of 100. How many crates?",
    "answer": "It packs 1200 / 100 = <<1200/100=12>>12 crates.\nSo there are 12.\n#### 12",
}
SVAMP = {
    "ID": "chal-1",
    "Body": "Kim had 9 pears.",
    "Question": "How many are left after 5 are eaten?",
    "Equation": "( 9.0 - 5.0 )",
    "Answer": "4.0",
    "Type": "Subtraction",
    "question_concat": "Kim had 9 pears. How many are left after 5 are eaten?",
}
MATH_QA = {
    "Problem": "a box costs rs . 200 and is sold for twice that . what is the price ?",
    "Rationale": '"200 * 2 = 400 answer : c"',
    "options": "a ) rs . 200 , b ) rs . 1,600 , c ) rs . 400 , d ) 4 : 1 , e ) none of these",
    "correct": "c",
    "annotated_formula": "multiply(200, 2)",
    "linear_formula": "multiply(n0,const_2)|",
    "category": "gain",
}
REFT = {"item_id": "gsm8k_1", "question": "What is 2 and 3?", "answer_cot": "2 + 3 = 5", "answer_value": "5.0"}


def changed(row, **changes):
    return {**row, **changes}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (72, "72"),
        (72.0, "72"),
        ("1,600.50", "1600.5"),
        ("1,00,000", "100000"),
        ("-3", "-3"),
        ("+5.", "5"),
        (".5", "0.5"),
        (0.5, "0.5"),
        ("-0.0", "0"),
        ("007", "7"),
        (192000000.0, "192000000"),
        (1e21, "1" + 21 * "0"),
        ("100", "100"),
        ("1,60", None),
        ("1_0", None),
        ("nan", None),
        (float("inf"), None),
        (True, None),
        ("", None),
        ("5 km", None),
        ("٣", None),
    ],
)
def test_number_text(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("option", "number"),
    [
        ("rs . 400", "400"),
        ("Rs. 1,600", "1600"),
        ("400 rs .", "400"),
        ("$ 30", "30"),
        ("us $ 2.50", "2.5"),
        ("25 %", "25"),
        ("33 1 / 3 %", "33.333333"),
        ("12 km", "12"),
        ("12 km / hr", "12"),
        ("480 sq . cm", "480"),
        ("5 cm2", "5"),
        ("5 m ^ 2", "5"),
        ("3/4", "0.75"),
        ("2 1/2", "2.5"),
        ("- 2 1 / 2", "-2.5"),
        ("- $ 5", "-5"),
        ("−7", "-7"),
        ("0", "0"),
        ("none of these", None),
        ("4 : 5", None),
        ("20 - 25", None),
        ("10 , 200", None),
        ("2 ^ 5", None),
        ("5 √ 2", None),
        ("3 dozen", None),
        ("20 % loss", None),
        ("5 pm", None),
        ("1 hour 2 min", None),
        ("5 m 2 cm", None),
        ("1 / 0", None),
        ("- $ - 5", None),
        ("km", None),
        ("", None),
    ],
)
def test_option_number(option, number):
    assert option_number(option) == number


def test_time_is_bounded():
    """Of a row of units: with two ways to read each space, twelve took hours."""
    start = time.process_time()
    for piece in ("m  ", "m / ", "per m ", "m ^ 2  ", "cm2 . ", "rs .  "):
        assert option_number("5 " + 40 * piece + "x") is None
    for piece in (" ", ", ", ". ", "so ", "answer "):
        row = changed(MATH_QA, Rationale="x" + 6000 * piece + "y")
        assert from_math_qa(row)["rationale"] == row["Rationale"]
    assert time.process_time() - start < 0.5


class TestRows:
    def test_gsm8k(self):
        assert from_gsm8k(GSM8K) == {
            "question": GSM8K["question"],
            "rationale": "It packs 1200 / 100 = 12 crates.\nSo there are 12.",
            "answer": "12",
        }

    @pytest.mark.parametrize(("final", "answer"), [("1,234,000", "1234000"), ("-3", "-3"), ("18.50", "18.5")])
    def test_gsm8k_answers(self, final, answer):
        assert from_gsm8k(changed(GSM8K, answer=f"Thus.\n#### {final}"))["answer"] == answer

    @pytest.mark.parametrize("answer", ["12", "Thus.\n#### twelve", "", None])
    def test_gsm8k_without_answer(self, answer):
        with pytest.raises(ValueError, match="answer"):
            from_gsm8k(changed(GSM8K, answer=answer))

    @pytest.mark.parametrize(
        ("changes", "question", "rationale", "answer"),
        [
            ({}, SVAMP["question_concat"], "9 - 5 = 4", "4"),
            ({"Answer": 4.0}, SVAMP["question_concat"], "9 - 5 = 4", "4"),
            ({"Body": "Kim had 9 pears"}, SVAMP["question_concat"], "9 - 5 = 4", "4"),
            (
                {"Body": "Kim sells pears. If 5 of 9 are sold", "Question": "How many are left?"},
                "Kim sells pears. If 5 of 9 are sold, how many are left?",
                "9 - 5 = 4",
                "4",
            ),
            ({"Body": None, "Question": None}, SVAMP["question_concat"], "9 - 5 = 4", "4"),
            (
                {"Equation": "( ( 1.0 + 2.0 ) / 2.0 )", "Answer": 1.5},
                SVAMP["question_concat"],
                "(1 + 2) / 2 = 1.5",
                "1.5",
            ),
            (
                {"Equation": "( 1.0 + 2.0 ) * ( 3.0 - 1.0 )", "Answer": "6"},
                SVAMP["question_concat"],
                "(1 + 2) * (3 - 1) = 6",
                "6",
            ),
            ({"Equation": None}, SVAMP["question_concat"], "", "4"),
        ],
    )
    def test_svamp(self, changes, question, rationale, answer):
        row = from_svamp(changed(SVAMP, **changes))
        assert row == {"question": question, "rationale": rationale, "answer": answer}

    def test_svamp_without_number(self):
        with pytest.raises(ValueError, match="`Answer` is no number"):
            from_svamp(changed(SVAMP, Answer="four"))

    def test_math_qa(self):
        expected = {"question": f"{MATH_QA['Problem']}\n{MATH_QA['options']}", "answer": "c"}
        assert from_math_qa(MATH_QA) == {**expected, "rationale": "200 * 2 = 400"}
        assert from_math_qa(changed(MATH_QA, correct="C")) == {**expected, "rationale": "200 * 2 = 400"}

    def test_math_qa_numeric(self):
        expected = {"question": MATH_QA["Problem"], "rationale": "200 * 2 = 400", "answer": "400"}
        assert from_math_qa(MATH_QA, numeric=True) == expected
        assert from_math_qa(changed(MATH_QA, correct="b"), numeric=True)["answer"] == "1600"
        assert from_math_qa(changed(MATH_QA, correct="d"), numeric=True) is None
        assert from_math_qa(changed(MATH_QA, correct="e"), numeric=True) is None

    def test_math_qa_options_in_a_list(self):
        row = changed(MATH_QA, options="['a ) 3', 'b ) 1,600', 'c ) 5', 'd ) 7', 'e ) 9']", correct="b")
        assert from_math_qa(row)["question"].endswith("\na ) 3 , b ) 1,600 , c ) 5 , d ) 7 , e ) 9")
        assert from_math_qa(row, numeric=True)["answer"] == "1600"

    def test_math_qa_without_right_option(self):
        with pytest.raises(ValueError, match="not among"):
            from_math_qa(changed(MATH_QA, correct="f"))

    @pytest.mark.parametrize(
        ("end", "kept"),
        [
            (" answer : c", ""),
            (" . hence , the correct answer is option c .", ""),
            (" ans : ( c )", ""),
            ("\nAnswer C", ""),
            (" so the answer is 4 c", " so the answer is 4 c"),
            (" so c", " so c"),
        ],
    )
    def test_math_qa_rationale(self, end, kept):
        assert from_math_qa(changed(MATH_QA, Rationale=f'"x = 4{end}"'))["rationale"] == f"x = 4{kept}"

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, {"rationale": "2 + 3 = 5", "answer": "5"}),
            ({"answer_cot": "2 + 3 = 5.\nTherefore, the answer is <5>."}, {"rationale": "2 + 3 = 5.", "answer": "5"}),
            ({"answer_cot": None, "answer_value": "C"}, {"rationale": "", "answer": "c"}),
            ({"answer_value": "1,600"}, {"rationale": "2 + 3 = 5", "answer": "1600"}),
            (
                {"answer_cot": "def solution():\n    return 5"},
                {"rationale": "", "answer": "5", "program": "def solution():\n    return 5"},
            ),
        ],
    )
    def test_reft(self, changes, expected):
        assert from_reft(changed(REFT, **changes)) == {"question": REFT["question"], **expected}


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


def load_silently(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_questions(*args, **kwargs)


class TestFiles:
    @pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            (GSM8K, from_gsm8k(GSM8K)),
            (SVAMP, from_svamp(SVAMP)),
            (changed(SVAMP, Answer=4.0), from_svamp(SVAMP)),
            (MATH_QA, from_math_qa(MATH_QA)),
            (REFT, from_reft(REFT)),
            ({"question": "Q?", "answer": 72.0}, {"question": "Q?", "rationale": "", "answer": "72"}),
            ({"question": "Q?", "answer": 0.5}, {"question": "Q?", "rationale": "", "answer": "0.5"}),
            ({"question": "Q?", "answer": 7, "extra": 1}, {"question": "Q?", "rationale": "", "answer": "7"}),
            ({"question": "Q?\nÀ", "answer": "NA"}, {"question": "Q?\nÀ", "rationale": "", "answer": "NA"}),
        ],
        ids=["gsm8k", "svamp", "svamp-float", "math_qa", "reft", "float", "half", "int", "text"],
    )
    def test_round_trip(self, tmp_path, suffix, row, expected):
        dataset = load_silently(write(tmp_path / f"rows{suffix}", [row, row]))
        assert dataset.to_list() == [expected, expected]

    @pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
    def test_generated_round_trip(self, tmp_path, suffix):
        problems = arithmetic_problems(5)
        loaded = load_silently(str(write(tmp_path / f"rows{suffix}", problems.to_list())))
        assert loaded.to_list() == problems.remove_columns("n_steps").to_list()

    def test_mixed_answers(self, tmp_path):
        rows = [{"question": "Q", "answer": answer} for answer in (72.0, "1,600", "B", -3)]
        path = write(tmp_path / "rows.json", [*rows, {"question": "P", "answer": 1, "program": "p"}])
        assert load_silently(path)["answer"] == ["72", "1600", "b", "-3", "1"]
        assert load_silently(path)["program"] == ["", "", "", "", "p"]

    def test_numeric(self, tmp_path):
        path = write(tmp_path / "rows.jsonl", [MATH_QA])
        assert load_silently(path, numeric=True)["answer"] == ["400"]
        with pytest.raises(ValueError, match="options of MathQA"):
            load_questions(write(tmp_path / "other.jsonl", [GSM8K]), numeric=True)

    def test_drops_are_counted_once(self, tmp_path):
        rows = [MATH_QA, changed(MATH_QA, correct="e"), changed(MATH_QA, correct="x"), changed(MATH_QA, correct="d")]
        with pytest.warns(UserWarning) as caught:
            dataset = load_questions(write(tmp_path / "rows.json", rows), numeric=True)
        assert len(dataset) == 1 and len(caught) == 1
        message = str(caught[0].message)
        assert "dropped 3 of 4 rows" in message
        assert "2: the right option is no plain number (first: row 1)" in message
        assert "1: `correct` is not among `options` (first: row 2)" in message

    @pytest.mark.parametrize(
        ("name", "text", "match"),
        [
            ("rows.json", '[{"prompt": "Q", "reply": "A"}]', r"\['prompt', 'reply'\].*SVAMP: Answer, Body, Question"),
            ("rows.json", "[]", "rows.json has no row"),
            ("rows.csv", "question,answer\n", "rows.csv has no row"),
            ("rows.jsonl", "", "rows.jsonl has no row"),
            ("rows.parquet", "", "rows.parquet cannot be read"),
            ("rows.csv", b"question,answer\nQ\xe9,5\n", "rows.csv cannot be read: .*utf-8"),
            ("rows.jsonl", f'{{"question": "Q", "answer": {"9" * 5000}}}', "rows.jsonl cannot be read"),
            ("rows.json", '[{"question": "Q", "answer": null}]', "no usable row. 1: `answer` is missing"),
            ("rows.jsonl", '{"question": "Q", "answer"', "neither a list of objects nor an object a line"),
            ("rows.jsonl", "3\n4", "other things than objects"),
            ("rows.csv", "question,answer\n,5\n", "`question` is missing"),
            ("rows.txt", "text", "is unknown: choose one of gsm8k, .*arithmetic"),
        ],
    )
    def test_bad_files(self, tmp_path, name, text, match):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=match):
            load_questions(tmp_path / name)

    def test_odd_ends_of_lines_in_a_text(self, tmp_path):
        row = {"question": "Two\u2028and \x85 three\x0c?", "answer": "5"}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
        assert load_questions(tmp_path / "rows.jsonl")["question"] == [row["question"]]

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_questions(tmp_path / "rows.json")


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        """A Hub of three datasets, the last of them still a loading script; returns what was asked of it."""
        asked = []

        def load_dataset(path, name=None, *, split):
            asked.append((path, name, split))
            if path == "allenai/math_qa":
                raise RuntimeError("Dataset scripts are no longer supported, but found math_qa.py")
            rows = {"openai/gsm8k": GSM8K, "ChilleD/SVAMP": SVAMP, "regisss/math_qa": MATH_QA}
            return Dataset.from_list([rows[path]])

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return asked

    @pytest.mark.parametrize(
        ("name", "expected", "asked"),
        [
            ("gsm8k", from_gsm8k(GSM8K), ("openai/gsm8k", "main", "test")),
            ("svamp", from_svamp(SVAMP), ("ChilleD/SVAMP", None, "test")),
            ("math_qa", from_math_qa(MATH_QA), ("regisss/math_qa", None, "test")),
            ("math_qa_numeric", from_math_qa(MATH_QA, numeric=True), ("regisss/math_qa", None, "test")),
        ],
    )
    def test_loads(self, hub, name, expected, asked):
        assert load_silently(name, "test").to_list() == [expected]
        assert hub[-1] == asked

    def test_other_errors_pass(self, monkeypatch):
        def load_dataset(*args, **kwargs):
            raise RuntimeError("no disk left")

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        with pytest.raises(RuntimeError, match="no disk"):
            load_questions("math_qa")

    @pytest.mark.parametrize(
        ("name", "settings", "match"),
        [
            ("arithmetics", {}, "'arithmetics' is unknown: .*\\(.json, .*\\)\\. Did you mean arithmetic"),
            ("gsm9k", {}, "'gsm9k' is unknown: choose one of gsm8k, svamp, math_qa, math_qa_numeric, arithmetic"),
            ("gsm8k", {"n": 3}, 'n: only "arithmetic"'),
            ("gsm8k", {"numeric": True}, "options of MathQA"),
            ("arithmetic", {"n": 3, "split": "dev"}, "train.*'dev'"),
            ("arithmetic", {"nn": 3}, "nn: no setting of .*announced, distractors.*, skipping"),
        ],
    )
    def test_bad_arguments(self, hub, name, settings, match):
        with pytest.raises(ValueError, match=match):
            load_questions(name, **settings)


def run(program):
    names = {}
    exec(program, names)
    return names["solution"]


class TestPromptCompletion:
    ROW = {"question": " Two and 3? ", "rationale": "2 + 3 = 5", "answer": "5", "program": "", "prompt": "old"}
    PROGRAM = 'def solution():\n    """Two and 3?"""\n    two = 2\n\n    return two + 3\n'

    def test_words(self):
        (row,) = prompt_completion(Dataset.from_list([self.ROW]))
        assert row == {
            **self.ROW,
            "prompt": "Question:\nTwo and 3?\nAnswer reasoning:\n",
            "completion": "2 + 3 = 5\nTherefore, the answer is: 5",
        }
        assert row["completion"].split(ANSWER_TRIGGER) == ["2 + 3 = 5", "5"]

    def test_words_without_rationale(self):
        (row,) = prompt_completion(Dataset.from_list([{"question": "Q", "answer": "5"}]))
        assert row["completion"] == ANSWER_TRIGGER + "5"

    @pytest.mark.parametrize("opening", [PROGRAM, PROGRAM.replace('    """Two and 3?"""\n', "")])
    def test_program(self, opening):
        (row,) = prompt_completion(Dataset.from_list([changed(self.ROW, program=opening)]), style="program")
        assert row["prompt"] == ('Question:\nTwo and 3?\nAnswer reasoning:\ndef solution():\n    """Two and 3?"""\n')
        assert row["completion"] == "    two = 2\n    return two + 3"
        assert row["answer"] == "5"

    def test_generated(self):
        for row in prompt_completion(arithmetic_problems(20), style="program"):
            assert row["prompt"].partition("Answer reasoning:\n")[2] + row["completion"] == row["program"]

    @pytest.mark.parametrize(
        ("question", "docstring"),
        [
            ("One\n\n \nline", "One\nline"),
            ('He said "five"', 'He said "five" '),
            ('A """B""" C', "A '''B''' C"),
            ('""""', "'''\" "),
            ("\\frac{1}{2} \\u and \\", "\\frac{1}{2} \\u and \\"),
            ('\\"', '\\" '),
        ],
    )
    def test_any_question_leaves_a_valid_program(self, question, docstring):
        row = changed(self.ROW, question=question, program=self.PROGRAM)
        (row,) = prompt_completion(Dataset.from_list([row]), style="program")
        program = row["prompt"].partition("Answer reasoning:\n")[2] + row["completion"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Python warns of escapes it does not know
            solution = run(program)
        assert solution() == 5
        assert solution.__doc__ == docstring
        assert "\n\n" not in program

    @pytest.mark.parametrize(
        ("row", "style", "match"),
        [
            ({"question": "Q", "answer": "5"}, "program", r"\['program'\] are missing"),
            ({"answer": "5"}, "words", r"\['question'\] are missing"),
            ({"question": "Q", "answer": "5"}, "code", '`style` must be "words" or "program"'),
            ({"question": "Q", "answer": "5", "program": "return 5"}, "program", "row 0 must be"),
            ({"question": "Q", "answer": "5", "program": 'def solution():\n    """Q"""'}, "program", "row 0 must be"),
        ],
    )
    def test_bad_arguments(self, row, style, match):
        with pytest.raises(ValueError, match=match):
            prompt_completion(Dataset.from_list([row]), style=style)


@pytest.mark.parametrize("options", ["['a ) 1 , 'b ) 2']", "[1, 2]", "["])
def test_options_that_are_no_list_cost_one_row(options):
    with pytest.raises(ValueError, match="`options` is no list of texts"):
        from_math_qa(changed(MATH_QA, options=options))
