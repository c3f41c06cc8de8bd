# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Who is recommended movies: the people who are made up, and MovieLens' files."""

import numpy as np
import pytest

from trl_agents import ActionParser, check_env
from trl_agents.agents import RandomAgent, play_episode
from trl_agents.envs import ContextualBandit
from trl_agents.envs.movielens import load_population
from trl_agents.envs.population import TITLES, describe, label_of, make_population, state_of


MOVIES = ("star_wars_(1977)", "contact_(1997)", "fargo_(1996)", "return_of_the_jedi_(1983)", "liar_liar_(1997)")


# -- the people who are made up ---------------------------------------------------------------------------------------


def test_the_population_has_the_shape_it_claims():
    ratings = make_population(20).ratings
    assert ratings.shape == (943, 20) and set(np.unique(ratings)) == {0, 1, 2, 3, 4, 5}
    assert abs((ratings > 0).mean() - 0.55) < 4 * (0.55 * 0.45 / ratings.size) ** 0.5
    assert 3.2 < ratings[ratings > 0].mean() < 4
    # Low rank: of what is not noise. Three tastes stand out from the rest
    stars = np.where(ratings > 0, ratings - ratings[ratings > 0].mean(), 0)
    values = np.linalg.svd(stars, compute_uv=False)
    assert values[2] > 1.15 * values[3] and values[3] < 1.15 * values[4]


def test_more_movies_leave_the_first_as_they_are():
    few, many = make_population(5), make_population(len(TITLES))
    assert few.movies == many.movies[:5] == MOVIES and few.people == many.people
    assert (few.ratings == many.ratings[:, :5]).all()


PEOPLE = (
    "a 24-year-old man, working as an educator and living in New York",
    "a 26-year-old man, retired and living in Wisconsin",
)
RATINGS = [[4, 3, 4, 4, 3], [0, 2, 0, 5, 0], [0, 5, 4, 0, 3], [0, 0, 0, 4, 0]]
TOTAL = 9211


def test_the_population_is_pinned():
    """Other people are another task: the id then needs its next number."""
    population = make_population(5)
    assert population.people[0] == PEOPLE[0] and population.people[942] == PEOPLE[1]
    assert population.ratings[:4].astype(int).tolist() == RATINGS
    assert population.ratings.sum() == TOTAL


def test_nobody_can_change_what_all_share():
    with pytest.raises(ValueError, match="read-only"):
        make_population(5).ratings[0, 0] = 1


@pytest.mark.parametrize(
    ("title", "label"),
    [
        ("Star Wars (1977)", "star_wars_(1977)"),
        ("Godfather: Part II, The (1974)", "the_godfather_part_ii_(1974)"),
        ("Schindler's List (1993)", "schindlers_list_(1993)"),
        ("Misérables, Les (1995)", "miserables_les_(1995)"),
        ("Apartment, The (1960) ", "the_apartment_(1960)"),
        ("2001: A Space Odyssey (1968)", "2001_a_space_odyssey_(1968)"),
        ("unknown", "unknown"),
    ],
)
def test_labels(title, label):
    assert label_of(title) == label


@pytest.mark.parametrize("n_arms", [5, 30])
def test_a_reply_can_name_every_movie(n_arms):
    parser, labels = ActionParser(), list(ContextualBandit(n_arms=n_arms).labels)
    parser.check_legal_actions(labels)
    for label in labels:
        assert parser.parse(f"Star Wars fits. {parser.format(label)}.", labels).action == label


def test_people_in_words():
    assert describe("28-year-old man", "administrator", "California") == (
        "a 28-year-old man, working as an administrator and living in California"
    )
    assert describe("18-year-old woman", "none", "") == (
        "an 18-year-old woman, without an occupation and living outside the United States"
    )


@pytest.mark.parametrize(
    ("zip_code", "state"),
    [("95054", "California"), ("10001", "New York"), ("99835", "Alaska"), ("55414", "Minnesota"), ("05602", "Vermont")]
    + [("20009", "Washington DC"), ("V3N4P", ""), ("", ""), ("00000", ""), ("09098", ""), ("73344", "Texas")],
)
def test_states(zip_code, state):
    assert state_of(zip_code) == state


# -- MovieLens' files -------------------------------------------------------------------------------------------------

SMALL = {
    "u.data": [
        *("1\t50\t5\t881250949", "1\t100\t3\t881250949", "2\t50\t4\t891717742", "2\t181\t1\t878887116"),
        *("3\t50\t2\t880606923", "3\t100\t5\t886397596", "3\t246\t4\t884182806", "4\t246\t3\t886397596"),
        *("4\t268\t2\t886397597", "4\t50\t1\t886397598"),
    ],
    "u.item": [
        "50|Star Wars (1977)|01-Jan-1977||http://us.imdb.com/M/title-exact?Star%20Wars%20(1977)|0|1|1|0",
        "100|Fargo (1996)|14-Feb-1997||http://us.imdb.com/M/title-exact?Fargo%20(1996)|0|0|0|0",
        "181|Return of the Jedi (1983)|14-Mar-1997||http://us.imdb.com/M/title-exact?Return|0|1|1|0",
        "246|Chasing Amy (1997)|01-Jan-1997||http://us.imdb.com/M/title-exact?Chasing+Amy+(1997)|0|0|0|0",
        "268|Chasing Amy (1997)|01-Jan-1997||http://us.imdb.com/M/title-exact?Chasing+Amy+(1997)|0|0|0|0",
        "267|unknown||||1|0|0|0",
    ],
    "u.user": ["1|24|M|technician|85711", "2|53|F|other|94043", "3|23|M|writer|T8H1N", "4|80|F|healthcare|01002"],
}
LARGE = {
    "ratings.dat": ["1::1193::5::978300760", "1::661::3::978302109", "2::1193::4::978298413", "3::661::1::978220179"],
    "movies.dat": [
        "661::James and the Giant Peach (1996)::Animation|Children's|Musical",
        "1193::One Flew Over the Cuckoo's Nest (1975)::Drama",
        "73::Misérables, Les (1995)::Drama|Musical",
    ],
    "users.dat": ["1::F::1::10::48067", "2::M::56::16::70072", "3::M::25::15::55117"],
}


def write(folder, files):
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="latin-1")
    return str(folder)


def test_100k(tmp_path):
    population = load_population(write(tmp_path, SMALL), 3)
    # Most rated first: four, two (fargo) and two (chasing amy, listed twice, rated once under each number by one)
    assert population.movies == ("star_wars_(1977)", "fargo_(1996)", "chasing_amy_(1997)")
    assert population.ratings.tolist() == [[5, 3, 0], [4, 0, 0], [2, 5, 4], [1, 0, 2]]
    assert population.people == (
        "a 24-year-old man, working as a technician and living in Arizona",
        "a 53-year-old woman, with an occupation that is not listed and living in California",
        "a 23-year-old man, working as a writer and living outside the United States",
        "an 80-year-old woman, working in healthcare and living in Massachusetts",
    )


def test_1m(tmp_path):
    population = load_population(write(tmp_path, LARGE), 2)
    assert population.movies == ("james_and_the_giant_peach_(1996)", "one_flew_over_the_cuckoos_nest_(1975)")
    assert population.ratings.tolist() == [[3, 5], [0, 4], [1, 0]]
    assert population.people == (
        "a woman under 18, going to school and living in Michigan",
        "a man of 56 or more, self-employed and living in Louisiana",
        "a man from 25 to 34, working as a scientist and living in Minnesota",
    )


@pytest.mark.parametrize("files", [SMALL, LARGE])
def test_the_environment_plays_the_files(tmp_path, files):
    folder = write(tmp_path, files)
    env = ContextualBandit(data_dir=folder, n_arms=2, users="all")
    expected = load_population(folder, 2)
    rewards = {}
    for seed in range(10):
        for turn in play_episode(env, RandomAgent(), seed=seed).turns:
            person = next(person for person in expected.people if person in turn.observation.splitlines()[-1])
            rewards[expected.people.index(person), env.labels.index(turn.executed)] = turn.reward
    assert rewards == dict(np.ndenumerate(expected.ratings))
    check_env(lambda: ContextualBandit(data_dir=folder, n_arms=2, users="all"))


def changed(files, name, number, line):
    lines = list(files[name])
    lines[number] = line
    return {**files, name: lines}


FAULTS = {
    "too few fields": (changed(SMALL, "u.data", 2, "1 50 5"), r"u.data, line 3: '1 50 5' has not 3 fields"),
    "no rating": (changed(SMALL, "u.data", 1, "1\t50\t6\t0"), r"u.data, line 2: '6' is no rating from 1 to 5"),
    "half a star": (changed(LARGE, "ratings.dat", 0, "1::661::3.5::0"), r"ratings.dat, line 1: '3.5' is no rating"),
    "unknown user": (changed(SMALL, "u.data", 0, "9\t50\t5\t0"), r"line 1: user '9' is not in u.user"),
    "unknown movie": (changed(SMALL, "u.data", 0, "1\t7\t5\t0"), r"line 1: movie '7' is not in u.item"),
    "age": (changed(SMALL, "u.user", 1, "2|old|F|other|94043"), r"u.user, line 2: 'old' is no age"),
    "age code": (changed(LARGE, "users.dat", 0, "1::F::2::10::48067"), r"users.dat, line 1: '2' is no age"),
    "gender": (changed(SMALL, "u.user", 3, "4|28|x|other|94043"), r"u.user, line 4: 'x' is no gender"),
    "occupation": (changed(LARGE, "users.dat", 2, "3::M::25::21::1"), r"users.dat, line 3: '21' is no occupation"),
    "short user": (changed(SMALL, "u.user", 3, "4|28|M"), r"u.user, line 4: .* has not 5 fields"),
    "a file is missing": ({name: SMALL[name] for name in ("u.data", "u.user")}, r"has u.data, but not u.item"),
    "no files": ({}, r"has no MovieLens files \(u.data, u.item and u.user or ratings.dat"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_files_are_told(tmp_path, fault):
    files, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        ContextualBandit(data_dir=write(tmp_path, files), n_arms=2, users="all")


def test_too_few(tmp_path):
    folder = write(tmp_path, SMALL)
    with pytest.raises(ValueError, match="n_arms=5, but .* has ratings of 4 movies"):
        ContextualBandit(data_dir=folder, n_arms=5, users="all")
    with pytest.raises(ValueError, match="n_train_users=100 of 4 people leaves none to evaluate on. Use at most 3"):
        ContextualBandit(data_dir=folder, n_arms=2)
    (tmp_path / "u.user").write_text("\n".join(SMALL["u.user"][:2]))
    (tmp_path / "u.data").write_text("\n".join(line for line in SMALL["u.data"] if line[0] in "12"))
    load_population.cache_clear()
    with pytest.raises(ValueError, match="n_arms=3, but there are 2 people"):
        ContextualBandit(data_dir=folder, n_arms=3, users="all")
    with pytest.raises(ValueError, match="n_arms=31, but the made-up people know 30 movies"):
        ContextualBandit(n_arms=31)
