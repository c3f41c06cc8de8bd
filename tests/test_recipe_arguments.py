# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What recipes share: arguments from a default file, from another, and from the command line over both."""

import ast
import importlib
import json
import re
import sys
from dataclasses import dataclass, field

import pytest
from recipe_runs import RECIPES, parse, recipe
from trl import ModelConfig, SFTConfig

from trl_agents import script
from trl_agents.envs import make_env
from trl_agents.recipe import (
    QuestionArguments,
    as_settings,
    check_positive,
    check_resumption,
    check_stages,
    machine_settings,
    parse_arguments,
    run,
    trainer_settings,
)


RECIPE_FILES = sorted(RECIPES.glob("*.py"))


@dataclass
class Arguments:
    shots: int = 1
    name: str = "none"


@pytest.fixture
def configs(tmp_path):
    (tmp_path / "default.yaml").write_text("shots: 2\nname: default\n")
    (tmp_path / "other.yaml").write_text("shots: 3\n")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "shots", "name"),
    [
        ("", 2, "default"),
        ("--shots 5", 5, "default"),
        ("--config {}/other.yaml", 3, "none"),
        ("--config={}/other.yaml", 3, "none"),
        ("--name me --config {}/other.yaml", 3, "me"),
    ],
)
def test_the_default_file_counts_unless_another_is_named(configs, monkeypatch, typed, shots, name):
    monkeypatch.setattr("sys.argv", ["recipe.py", *typed.format(configs).split()])
    (parsed,) = parse_arguments(configs / "default.yaml", Arguments)
    assert (parsed.shots, parsed.name) == (shots, name)


def test_an_unknown_line_is_told(configs, monkeypatch):
    (configs / "default.yaml").write_text("shotz: 2\n")
    monkeypatch.setattr("sys.argv", ["recipe.py"])
    with pytest.raises(ValueError, match="shotz"):
        parse_arguments(configs / "default.yaml", Arguments)


@dataclass
class OnCpus:
    use_cpu: bool = False
    model_name_or_path: str | None = None


def says(monkeypatch, capsys, config, typed, *dataclass_types, file="recipe.py"):
    """The one line that a script's mistake ends it with."""
    monkeypatch.setattr("sys.argv", [str(file), *typed])
    with pytest.raises(SystemExit) as ended:
        run(None, config, *dataclass_types)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


MISTYPED = {
    "argument": (["--shotz", "3"], r"the command line has an unknown argument, --shotz. Did you mean --shots\?"),
    "value": (["--shots", "many"], "argument --shots: invalid int value: 'many'"),
    "file": (
        ["--config", "{}/othr.yaml"],
        r"--config .*othr.yaml: there is no such file. Did you mean .*/other.yaml\?",
    ),
    "no file": (["--config"], "--config is not followed by a file"),
    "another recipe's": (
        ["--config", "{}/their_recipe_tiny.yaml"],
        r"the YAML has an unknown argument, --seat. \(their_recipe_tiny.yaml is a file of their_recipe.py, and this "
        r"is recipe.py.\)",
    ),
    "no YAML": (["--config", "{}/broken.yaml"], "--config .*broken.yaml: this is no YAML: .* line 2"),
}


@pytest.mark.parametrize("mistyped", MISTYPED)
def test_what_was_mistyped_is_one_line(configs, monkeypatch, capsys, mistyped):
    typed, said = MISTYPED[mistyped]
    for name in ("recipe", "their", "their_recipe"):
        (configs / f"{name}.py").touch()
    (configs / "their_recipe_tiny.yaml").write_text("seat: first\n")
    (configs / "broken.yaml").write_text("shots: [1\n")
    typed = [argument.format(configs) for argument in typed]
    line = says(monkeypatch, capsys, configs / "default.yaml", typed, Arguments, file=configs / "recipe.py")
    assert re.match(f"recipe.py: error: {said}", line)


def test_help_names_the_file_too(configs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipe.py", "--help"])
    with pytest.raises(SystemExit):
        parse_arguments(configs / "default.yaml", Arguments)
    told = capsys.readouterr().out
    assert told.startswith("usage: recipe.py [--config FILE] [--ARGUMENT VALUE ...]\n") and "--config FILE  " in told


def test_a_model_that_is_nowhere_is_one_line(configs, monkeypatch, capsys):
    (configs / "empty.yaml").write_text("{}")
    typed = ["--model_name_or_path", str(configs / "nowhere")]
    line = says(monkeypatch, capsys, configs / "empty.yaml", typed, OnCpus)
    assert re.match("recipe.py: error: There is no folder .*/nowhere, and it is no Hub id.", line)


@pytest.mark.parametrize(
    ("line", "typed", "used"), [("{}", "", True), ("use_cpu: false", "", False), ("{}", "--use_cpu false", False)]
)
def test_several_processes_without_accelerators_take_cpus(configs, monkeypatch, line, typed, used):
    """Else each of them trains alone, and all into one folder."""
    (configs / "default.yaml").write_text(line)
    monkeypatch.setattr("sys.argv", ["recipe.py", *typed.split()])
    monkeypatch.setattr(script, "check_processes", lambda: None)
    assert parse_arguments(configs / "default.yaml", OnCpus)[0].use_cpu is False
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert parse_arguments(configs / "default.yaml", OnCpus)[0].use_cpu is used


def test_processes_that_train_alone_are_refused(configs, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = says(monkeypatch, capsys, configs / "default.yaml", [], Arguments)
    assert re.match("recipe.py: error: 2 processes were launched.* counts 1: .*--use_cpu true", line)


@dataclass
class Choices:
    style: str | None = field(default="words", metadata={"choices": ["words", "program"]})
    methods: list[str] = field(default_factory=lambda: ["sft"], metadata={"choices": ["sft", "reft"]})
    players: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("style: programs", "'programs' is unknown, choose from words, program"),
        ("methods: [sft, raft]", "'raft' is unknown, choose from sft, reft"),
        ("methods: sft", r"methods='sft': give a list, \[sft\]"),
        ("players: random", r"players='random': give a list, \[random\]"),
    ],
)
def test_a_file_is_held_to_the_choices_too(configs, monkeypatch, line, said):
    monkeypatch.setattr("sys.argv", ["recipe.py"])
    (configs / "default.yaml").write_text(line)
    with pytest.raises(ValueError, match=said):
        parse_arguments(configs / "default.yaml", Choices)
    (configs / "default.yaml").write_text("style: null\nmethods: []\nplayers: [random]")
    (parsed,) = parse_arguments(configs / "default.yaml", Choices)
    assert (parsed.style, parsed.methods, parsed.players) == (None, [], ["random"])


@pytest.mark.parametrize("value", ["{n: 2}", "[2]", '"n"', [2], "3"])
def test_settings_that_are_none(value):
    with pytest.raises(ValueError, match="write"):
        as_settings(value)


@pytest.mark.parametrize("most", [0, -3])
def test_no_questions_to_train_or_test_on(most):
    for name in ("num_train", "num_test"):
        with pytest.raises(ValueError, match=f"{name}={most}: give more than 0"):
            QuestionArguments(dataset_kwargs={"n": 5}, **{name: most}).load("train")
    one = QuestionArguments(dataset_kwargs={"n": 5}, num_train=1, num_test=2)
    assert (len(one.load("train")), len(one.load("test"))) == (1, 2)


def test_settings_are_a_mapping_or_json():
    given = {"n": 2}
    assert as_settings(given) == {"n": 2} and as_settings(given) is not given
    assert as_settings('{"n": 2}') == {"n": 2} and as_settings(None) == as_settings("{}") == {}


def test_what_other_stages_take_from_the_main_trainer(tmp_path):
    args = SFTConfig(str(tmp_path), seed=7, use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False)
    expected = {"seed": 7, "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True}
    assert machine_settings(args) == expected


def test_what_a_result_depends_on(tmp_path):
    """Whatever is not the default, but for what only says where to write and what to show."""
    quiet = {"use_cpu": True, "bf16": False, "report_to": []}
    shown = {"logging_steps": 3, "save_steps": 9, "disable_tqdm": True, "run_name": "x"}
    plain, other = (
        trainer_settings(SFTConfig(str(tmp_path / name), **quiet, **more)) for name, more in (("a", {}), ("b", shown))
    )
    assert plain == other
    changed = trainer_settings(SFTConfig(str(tmp_path), **quiet, gradient_accumulation_steps=4, optim="sgd"))
    assert {name for name in changed if changed[name] != plain.get(name)} == {"gradient_accumulation_steps", "optim"}
    json.dumps(changed)


@pytest.mark.parametrize(
    ("model", "training", "said"),
    [
        ({"use_peft": True}, {}, "leave out use_peft"),
        ({"load_in_4bit": True}, {}, "leave out use_peft"),
        ({"attn_implementation": "sdpa"}, {}, "leave out attn_implementation"),
        ({}, {"resume_from_checkpoint": "x"}, "leave resume_from_checkpoint out"),
    ],
)
def test_what_stages_have_no_use_for(tmp_path, model, training, said):
    with pytest.raises(ValueError, match=said):
        check_stages(SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **training), ModelConfig(**model))
    check_stages(SFTConfig(str(tmp_path), use_cpu=True, bf16=False), ModelConfig())


@pytest.mark.parametrize("path", RECIPE_FILES, ids=[path.stem for path in RECIPE_FILES])
def test_a_recipe_that_reports_its_stages_also_pushes_them(path):
    """`--push_to_hub` was without effect on what exploration.py reports."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    reports = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "report_stages"]
    assert all("push" in {keyword.arg for keyword in call.keywords} for call in reports)


@pytest.mark.parametrize("name", ["reft", "r1", "expert_iteration"])
def test_test_answers_that_cannot_be_read_are_told_first(tmp_path, name):
    """All would be wrong, and no stage says so."""
    for split, answer in (("train", "7"), ("test", "blue")):
        (tmp_path / f"{split}.json").write_text(json.dumps([{"question": "3 + 4?", "answer": answer}]))
    files = ["--dataset", tmp_path / "train.json", "--test_dataset", tmp_path / "test.json"]
    files += ["--dataset_kwargs" if name != "expert_iteration" else "--arithmetic", "{}"]
    config = RECIPES / "configs" / f"{name}_{'questions' if name == 'expert_iteration' else 'tiny'}.yaml"
    module = recipe(name)
    with pytest.raises(ValueError, match="test: 1 of 1 correct answers are no number, 'blue' among them"):
        module.main(*parse(module, config, *files, "--output_dir", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# -- how a script ends ------------------------------------------------------------------------------------------------


@dataclass
class Where:
    output_dir: str = "nowhere"


def ends(monkeypatch, folder, main):
    (folder / "empty.yaml").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["some_recipe.py", "--output_dir", str(folder)])
    run(main, folder / "empty.yaml", Where)


def raises(error):
    def main(where):
        raise error

    return main


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([], "nothing yet to go on from"),
        (["warmup/stage.json"], "keeps warmup: the same command goes on"),
        (
            ["warmup/stage.json", "rl/stage_begun.json", "rl/checkpoint-4/"],
            "keeps warmup, rl/checkpoint-4: the same",
        ),
        (
            ["warmup/stage.json", "checkpoint-4/"],
            "keeps warmup, checkpoint-4: .* with --resume_from_checkpoint true",
        ),
    ],
)
def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys, made, said):
    for name in made:
        path = tmp_path / name / "trainer_state.json" if name.endswith("/") else tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    with pytest.raises(SystemExit) as ended:
        ends(monkeypatch, tmp_path, raises(KeyboardInterrupt()))
    assert ended.value.code == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, line)


def test_a_users_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    for main in (raises(ValueError("n=0:\ngive more")), lambda where: check_positive(where, "n")):
        where = Where
        where.n = 0
        with pytest.raises(SystemExit) as ended:
            ends(monkeypatch, tmp_path, main)
        assert ended.value.code == 2
        assert re.fullmatch(r"some_recipe.py: error: n=0: give more.*\n", capsys.readouterr().err)


def test_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        ends(monkeypatch, tmp_path, raises(ImportError("report_to='wandb' needs wandb")))
    assert capsys.readouterr().err == "some_recipe.py: error: report_to='wandb' needs wandb\n"


@pytest.mark.parametrize(("typed", "told"), [([], True), (["--env_kwargs", "{}"], False), (["--config=x"], False)])
def test_who_names_another_environment_hears_where_its_arguments_come_from(tmp_path, monkeypatch, capsys, typed, told):
    def main(where):
        sys.argv += typed
        make_env(object, n_arms=5)

    with pytest.raises(SystemExit):
        ends(monkeypatch, tmp_path, main)
    line = capsys.readouterr().err
    assert "does not take env_kwargs={'n_arms': 5}" in line
    assert ("They come from" in line and "empty.yaml: `--env_kwargs '{}'` does without." in line) is told


@pytest.mark.parametrize(("asked", "told"), [(None, True), ("false", False), ("true", False), ("auto", False)])
def test_a_checkpoint_that_is_not_gone_on_from_is_told(tmp_path, capsys, asked, told):
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text("{}")
    check_resumption(SFTConfig(str(tmp_path), use_cpu=True, bf16=False, resume_from_checkpoint=asked))
    said = "begins anew, although .* holds checkpoint-8: --resume_from_checkpoint true goes on"
    assert bool(re.search(said, capsys.readouterr().out)) is told
    check_resumption(SFTConfig(str(tmp_path / "new"), use_cpu=True, bf16=False))
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "main",
    [
        lambda where: int("x"),
        raises(KeyError("x")),
        lambda where: json.loads("{"),
        lambda where: importlib.import_module("nowhere.at_all"),
    ],
)
def test_other_exceptions_keep_their_traceback(tmp_path, monkeypatch, main):
    with pytest.raises((KeyError, ValueError, ImportError)):
        ends(monkeypatch, tmp_path, main)
