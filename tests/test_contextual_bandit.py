# Licensed under the Apache License, Version 2.0 (see LICENSE).
import json
import pickle
import re
import warnings

import gymnasium
import numpy as np
import pytest
import recipe_runs
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env as gymnasium_check_env

from trl_agents import check_env
from trl_agents.agents import RandomAgent, play_episode
from trl_agents.contexts import Briefing, ChatContext, WindowContext
from trl_agents.envs import ContextualBandit
from trl_agents.envs.population import make_population
from trl_agents.tiny import tiny_tokenizer


MOVIES = ("star_wars_(1977)", "contact_(1997)", "fargo_(1996)", "return_of_the_jedi_(1983)", "liar_liar_(1997)")


def play(env, actions, seed=0):
    """What `reset` and then `step` gave for each of the actions: observation and info, and rewards."""
    seen, rewards = [env.reset(seed=seed)], []
    for action in actions:
        observation, reward, *_, info = env.step(action)
        seen.append((observation, info))
        rewards.append(reward)
    return seen, rewards


# -- the environment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"n_arms": 12, "rank": 4, "horizon": 3}, {"users": "eval", "scale": False}])
def test_contract(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("trl_agents/ContextualBandit-v0", **kwargs)
        gymnasium_check_env(env)
        check_env(lambda: ContextualBandit(**kwargs))
    assert env.unwrapped is env


def test_texts():
    env = ContextualBandit(horizon=2)
    (first, info), (second, _), (third, _) = play(env, ["fargo_(1996)", "contact_(1997)"])[0]
    person = r"This person is an? .+, .+ and living in .+\. Their taste: \[(-?\d\.\d\d, ){4}-?\d\.\d\d\]"
    assert re.fullmatch(f"Step=0 {person}", first)
    assert re.fullmatch(rf"{re.escape(first)} Action=fargo_\(1996\) Reward=[0-5]\nStep=1 {person}", second)
    assert third == second.splitlines()[1] + f" Action=contact_(1997) Reward={third[-1]}"
    assert info["state"] == first.removeprefix("Step=0 ")


@pytest.mark.parametrize(
    ("digits", "scale", "form"), [(0, True, r"-?\d"), (1, True, r"-?\d\.\d"), (2, False, r"-?0\.\d\d")]
)
def test_the_vector_is_what_the_text_says(digits, scale, form):
    env = ContextualBandit(digits=digits, scale=scale)
    for observation, info in play(env, MOVIES * 5)[0]:
        numbers = observation.split("[")[-1].rstrip("]").split(", ")
        assert all(re.fullmatch(form, number) for number in numbers) and "-" + "0" * 1 not in numbers
        assert [float(number) for number in numbers] == list(info["features"])


def test_two_decimals_of_the_papers_form_leave_little():
    """Why the vector is scaled: how many different values the entries have among all people."""
    levels = [len(np.unique(ContextualBandit(users="all", scale=scale)._vectors)) for scale in (False, True)]
    assert levels[0] < 40 and levels[1] > 400


def test_without_reasoning():
    task, answer = ContextualBandit(reasoning=False).instructions.split("\n\n")
    assert task == ContextualBandit().instructions.split("\n\n")[0] and ", ".join(MOVIES) in task
    assert "ACTION=X" in answer and not re.search("think|SHORT", answer, re.IGNORECASE)
    assert "Think step by step" in ContextualBandit().instructions
    assert "1 time step." in ContextualBandit(horizon=1).instructions


def test_rewards_are_the_ratings():
    env, population = ContextualBandit(n_arms=3, users="all", horizon=200), make_population(3)
    for _ in range(3):
        env.reset()
        for visitor in list(env._visitors):
            _, reward, *_, info = env.step("contact_(1997)")
            stars = population.ratings[visitor]
            assert reward == info["expected_reward"] == stars[1]
            assert info["regret"] == stars.max() - stars[1] and info["optimal"] == (stars[1] == stars.max())


def test_rewards_of_a_lower_rank_are_the_reconstruction():
    env, ratings = ContextualBandit(n_arms=6, rank=2, users="all"), make_population(6).ratings
    values, vectors = np.linalg.eigh(ratings.T @ ratings)  # another way to the same: projection on two directions
    best = vectors[:, -2:]
    np.testing.assert_allclose(env._rewards, ratings @ best @ best.T, atol=1e-6)
    (_, info), *_ = play(env, [])[0]
    assert len(info["features"]) == 2 and "an estimate of this person's rating" in env.instructions
    # Linear in the vector: two coefficients an arm explain it all
    exact = ContextualBandit(n_arms=6, rank=2, users="all", digits=8)
    solution = np.linalg.lstsq(exact._vectors, exact._rewards, rcond=None)[0]
    np.testing.assert_allclose(exact._vectors @ solution, exact._rewards, atol=1e-5)


def test_the_same_people_whatever_is_played():
    env = ContextualBandit(horizon=20)
    states = [[info["state"] for _, info in play(env, [movie] * 19, seed=3)[0]] for movie in MOVIES]
    assert all(other == states[0] for other in states) and len(set(states[0])) > 15
    assert [info["state"] for _, info in play(env, MOVIES[:1] * 19, seed=4)[0]] != states[0]
    shorter = play(ContextualBandit(horizon=5), MOVIES[:4], seed=3)[0]
    assert [info["state"] for _, info in shorter] == states[0][:5]


def test_train_and_eval_share_nobody():
    envs = {users: ContextualBandit(users=users, n_train_users=700) for users in ("train", "eval", "all")}
    pools = {users: set(env._pool.tolist()) for users, env in envs.items()}
    assert len(pools["train"]) == 700 and len(pools["eval"]) == 243 and not pools["train"] & pools["eval"]
    assert pools["train"] | pools["eval"] == pools["all"]
    met = {
        users: {
            turn.observation.splitlines()[-1].split(" ", 1)[1]
            for seed in range(20)
            for turn in play_episode(env, RandomAgent(), seed=seed).turns
        }
        for users, env in envs.items()
    }
    assert len(met["train"]) > 400 and len(met["eval"]) > 200 and not met["train"] & met["eval"]
    # Who is trained on does not depend on how many movies there are
    assert (ContextualBandit(n_arms=9)._pool == ContextualBandit()._pool).all()


def test_best_arm_is_of_those_who_may_come():
    best = {}
    for users in ("train", "eval", "all"):
        for n_arms in range(2, 12):
            env, ratings = (
                ContextualBandit(n_arms=n_arms, users=users, n_train_users=60),
                make_population(n_arms).ratings,
            )
            best[users, n_arms] = env.labels[ratings[env._pool].mean(0).argmax()]
            assert env.best_arm == best[users, n_arms]
    assert any(best["train", n_arms] != best["all", n_arms] for n_arms in range(2, 12))


def test_the_scale_of_the_vector():
    """The columns of U are of length 1: among n people, an entry is then 1 / sqrt(n) on average, in squares."""
    scaled, as_is = (ContextualBandit(users="all", scale=scale, digits=8)._vectors for scale in (True, False))
    np.testing.assert_allclose((as_is**2).sum(0), 1, atol=1e-5)
    np.testing.assert_allclose((scaled**2).mean(0), 1, atol=1e-5)


def test_the_sign_of_the_vectors_is_not_left_to_chance(monkeypatch):
    from trl_agents.envs import contextual_bandit

    expected = ContextualBandit(users="all")._vectors
    svd = np.linalg.svd

    def mirrored(*args, **kwargs):
        left, values, right = svd(*args, **kwargs)
        return -left, values, -right

    monkeypatch.setattr(np.linalg, "svd", mirrored)
    contextual_bandit._decompose.cache_clear()
    np.testing.assert_array_equal(ContextualBandit(users="all")._vectors, expected)
    contextual_bandit._decompose.cache_clear()


def test_end():
    env = ContextualBandit(horizon=2)
    with pytest.raises(ResetNeeded, match="before reset"):
        env.step("contact_(1997)")
    env.reset(seed=0)
    assert env.step("contact_(1997)")[2:4] == (False, False)
    *_, terminated, truncated, info = env.step("contact_(1997)")
    assert (terminated, truncated) == (True, False)
    assert "features" not in info and "state" not in info and info["legal_actions"] == list(MOVIES)
    with pytest.raises(ResetNeeded, match="ended after 2 steps"):
        env.step("contact_(1997)")


@pytest.mark.parametrize("action", ["Contact_(1997)", "contact", "", None, 1])
def test_unknown_action(action):
    env = ContextualBandit()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=re.escape(repr(action)) + ".*: star_wars_"):
        env.step(action)
    assert "Step=0 " in env.step("contact_(1997)")[0]


def test_pickled_mid_episode():
    env = ContextualBandit()
    play(env, MOVIES[:2])
    copy = pickle.loads(pickle.dumps(env))
    assert copy.step(MOVIES[3]) == env.step(MOVIES[3])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_arms": 1}, "n_arms=1. Use an integer of at least 2"),
        ({"horizon": 0}, "horizon=0"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 6}, "rank=6, but 5 movies have 5 dimensions"),
        ({"users": "test"}, "users='test' is unknown. Use one of 'train', 'eval', 'all'"),
        ({"n_train_users": 0}, "n_train_users=0"),
        ({"n_train_users": 943}, "n_train_users=943 of 943 people leaves none to evaluate on. Use at most 942"),
        ({"digits": -1}, "digits=-1"),
        ({"digits": 9}, "digits=9"),
        ({"scale": "yes"}, "scale='yes'"),
        ({"reasoning": "no"}, "reasoning='no'"),
        ({"data_dir": "/nowhere"}, "data_dir='/nowhere' has no MovieLens files"),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ContextualBandit(**kwargs)


# -- as a model reads it ----------------------------------------------------------------------------------------------


def read(context, env, actions):
    """The prompt, as text, before the reply to the last step."""
    (observation, info), *steps = play(env, actions)[0]
    tokenizer = context.tokenizer
    reader = context.begin(Briefing.of(env), observation, info)
    for action, (observed, step_info) in zip(actions, steps, strict=True):
        ids = tuple(tokenizer.encode(f"ACTION={action}")) + (tokenizer.eos_token_id,)
        reader.observe(ids, action, 0.0, observed, step_info)
    return tokenizer.decode(reader.prompt_ids)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(["ACTION=contact_(1997)"] * 10)


def test_a_window_reads_well(tokenizer):
    env = ContextualBandit(n_arms=3)
    text = read(WindowContext(tokenizer, window=2), env, MOVIES[:3])
    steps = play(env, MOVIES[:3])[0]
    kept = [info["transition"] for _, info in steps[2:]]
    history = "\n".join([env.history_header, *kept, f"Step=3 {steps[-1][1]['state']}", env.question])
    assert f"{env.instructions}\n{history}" in text
    assert text.count("This person") == 3


def test_a_conversation_reads_well(tokenizer):
    env = ContextualBandit(n_arms=3)
    text = read(ChatContext(tokenizer), env, MOVIES[:2])
    first, second, third = (observation for observation, _ in play(env, MOVIES[:2])[0])
    assert f"{env.instructions}\n{first}\n{env.question}" in text
    assert text.index(first) < text.index(f"ACTION={MOVIES[0]}") < text.index(second) < text.index(third)
    assert text.count("Reward=") == 2


# -- the recipe -------------------------------------------------------------------------------------------------------

PLAYERS = {"random", "best_fixed", "linucb", "before", "after"}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The recipe with everything small: it writes what the long one does."""
    output_dir = tmp_path_factory.mktemp("recipe")
    small = ["--max_steps", 2, "--num_transcripts", 12, "--num_eval_episodes", 6, "--per_device_train_batch_size", 4]
    small += ["--num_generations", 4, "--output_dir", output_dir, "--disable_tqdm", "true", "--use_cpu"]
    module = recipe_runs.recipe("contextual_bandit")
    module.main(*recipe_runs.parse(module, module.DEFAULT_CONFIG, *small))
    return output_dir


def test_the_recipe_compares_players(short_run):
    metrics = json.loads((short_run / "metrics.json").read_text())
    for measure in ("return", "regret", "coverage", "invalid_rate"):
        assert set(metrics[measure]) == PLAYERS
    assert metrics["coverage"]["best_fixed"]["mean"] == pytest.approx(1 / 3)
    assert metrics["shortened"]["after"]["mean"] == metrics["invalid_rate"]["linucb"]["mean"] == 0
    for name in ("regret.png", "learning_curve.png"):
        assert (short_run / name).read_bytes().startswith(b"\x89PNG")
    card = (short_run / "README.md").read_text()
    assert "trl_agents/ContextualBandit-v0" in card and "| linucb |" in card and "regret.png" in card


def test_the_recipe_evaluates_on_people_it_was_not_trained_on(short_run):
    kwargs = {"n_arms": 3, "horizon": 10, "n_train_users": 800, "digits": 1, "reasoning": False}
    states = {}
    for users in ("train", "eval"):
        env = ContextualBandit(
            **kwargs,
            users=users,
        )
        env.reset(seed=1_000_000_000)
        states[users] = env._state
    for player in ("before", "after"):
        text = (short_run / f"episodes_{player}.txt").read_text()
        assert f"Step=0 {states['eval']}\n" in text and states["train"] not in text
        assert text.count("Episode ") == 6 and text.count("[terminated, return ") == 6


def test_the_recipe_can_reason(tmp_path):
    """The small model's thoughts repeat the vector of the open step."""
    module = recipe_runs.recipe("contextual_bandit")
    observation = "Step=0 ... Their taste: [0.1, 0.2] Action=a Reward=1\nStep=1 ... Their taste: [-1.0, 3.2]"
    assert module.taste(observation, "a") == "Taste [-1.0, 3.2]."


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("--env_kwargs", '{"data_dir": "/nowhere"}', "no MovieLens files"),
        ("--env_kwargs", '{"users": "all"}', "leave `users` out"),
        ("--num_eval_episodes", "-1", "num_eval_episodes=-1"),
        ("--num_transcripts", "0", "num_transcripts=0"),
        ("--resume_from_checkpoint", "true", "holds no whole checkpoint"),
    ],
)
def test_mistakes_are_told_before_the_warm_up(tmp_path, name, value, said):
    module = recipe_runs.recipe("contextual_bandit")
    arguments = ["--use_cpu", "--output_dir", tmp_path / "out", name, value]
    with pytest.raises(ValueError, match=said):
        module.main(*recipe_runs.parse(module, module.DEFAULT_CONFIG, *arguments))
    assert not (tmp_path / "out").exists()
