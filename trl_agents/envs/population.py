# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Who is recommended movies, and how they rated them: what [`ContextualBandit`] draws from. Here it is made up."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True, eq=False)
class Population:
    """
    People and their ratings of a few movies.

    Args:
        movies (`tuple[str, ...]`):
            The movies' labels.
        people (`tuple[str, ...]`):
            Each person in words, to follow "This person is ...".
        ratings (`numpy.ndarray` of shape `(n_people, n_movies)`):
            1 to 5 stars; 0 where there is no rating.
    """

    movies: tuple[str, ...]
    people: tuple[str, ...]
    ratings: np.ndarray

    def __post_init__(self):
        self.ratings.setflags(write=False)  # shared by all environments of a process


# Real titles in MovieLens' form, for labels like the paper's. Only what these people think of them is made up.
TITLES = (
    *("Star Wars (1977)", "Contact (1997)", "Fargo (1996)", "Return of the Jedi (1983)", "Liar Liar (1997)"),
    *("English Patient, The (1996)", "Scream (1996)", "Toy Story (1995)", "Air Force One (1997)", "Titanic (1997)"),
    *("Raiders of the Lost Ark (1981)", "Godfather, The (1972)", "Pulp Fiction (1994)", "Twelve Monkeys (1995)"),
    *("Silence of the Lambs, The (1991)", "Jerry Maguire (1996)", "Chasing Amy (1997)", "Rock, The (1996)"),
    *("Empire Strikes Back, The (1980)", "Back to the Future (1985)", "Fugitive, The (1993)", "Braveheart (1995)"),
    *("Mission: Impossible (1996)", "Princess Bride, The (1987)", "Forrest Gump (1994)", "Alien (1979)"),
    *("Blade Runner (1982)", "Men in Black (1997)", "Apollo 13 (1995)", "Groundhog Day (1993)"),
)
OCCUPATIONS = (
    *("administrator", "artist", "doctor", "educator", "engineer", "entertainment", "executive", "healthcare"),
    *("homemaker", "lawyer", "librarian", "marketing", "none", "other", "programmer", "retired", "salesman"),
    *("scientist", "student", "technician", "writer"),
)
# Where "working as a ..." would not do
PHRASES = {
    "none": "without an occupation",
    "unemployed": "without work",
    "other": "with an occupation that is not listed",
    "retired": "retired",
    "student": "studying",
    "school student": "going to school",
    "self-employed": "self-employed",
    **{field: f"working in {field}" for field in ("entertainment", "healthcare", "marketing")},
}
# The first of the three-digit prefixes of US zip codes in each run of prefixes; "" is none of the states.
PREFIXES = (
    "000 ,010 Massachusetts,028 Rhode Island,030 New Hampshire,039 Maine,050 Vermont,055 Massachusetts,056 Vermont,"
    "060 Connecticut,070 New Jersey,090 ,100 New York,150 Pennsylvania,197 Delaware,200 Washington DC,201 Virginia,"
    "202 Washington DC,206 Maryland,220 Virginia,247 West Virginia,270 North Carolina,290 South Carolina,300 Georgia,"
    "320 Florida,340 ,341 Florida,350 Alabama,370 Tennessee,386 Mississippi,398 Georgia,400 Kentucky,430 Ohio,"
    "460 Indiana,480 Michigan,500 Iowa,530 Wisconsin,550 Minnesota,569 ,570 South Dakota,580 North Dakota,590 Montana,"
    "600 Illinois,630 Missouri,660 Kansas,680 Nebraska,700 Louisiana,716 Arkansas,730 Oklahoma,733 Texas,734 Oklahoma,"
    "750 Texas,800 Colorado,820 Wyoming,832 Idaho,840 Utah,850 Arizona,870 New Mexico,885 Texas,889 Nevada,"
    "900 California,962 ,967 Hawaii,969 ,970 Oregon,980 Washington,995 Alaska"
)
_STARTS, _STATES = zip(*(entry.split(" ", 1) for entry in PREFIXES.split(",")), strict=True)

N_PEOPLE = 943  # as in MovieLens-100k
_SEED = 0
_N_TASTES = 3  # what people differ in
_SHARE_RATED = 0.55


@cache
def make_population(n_movies: int) -> Population:
    """
    People who do not exist, the same in every call, in the shape of MovieLens-100k.

        rating[i, a] = clip(round(3.6 + 0.1 popular[a] + 0.8 taste[i] @ appeal[a] + 0.8 noise[i, a]), 1, 5)

    with three tastes, all standard normal but `appeal`, whose variance is 1/3; 55% of the ratings are kept, chosen by
    chance. What is said of a person in words (age, gender, occupation, state) tells nothing of their taste.

    Args:
        n_movies (`int`):
            The first of [`TITLES`]; fewer movies have the ratings that they have among more.
    """
    if n_movies > len(TITLES):
        raise ValueError(
            f"n_arms={n_movies}, but the made-up people know {len(TITLES)} movies. Use at most {len(TITLES)}, or "
            "MovieLens' files (`data_dir`)."
        )
    rng = np.random.default_rng(_SEED)
    taste = rng.standard_normal((N_PEOPLE, _N_TASTES))
    appeal = rng.standard_normal((len(TITLES), _N_TASTES)) / _N_TASTES**0.5
    popular, noise = rng.standard_normal(len(TITLES)), rng.standard_normal((N_PEOPLE, len(TITLES)))
    stars = np.clip(np.round(3.6 + 0.1 * popular + 0.8 * taste @ appeal.T + 0.8 * noise), 1, 5)
    ratings = stars * (rng.random(stars.shape) < _SHARE_RATED)

    ages = np.clip(rng.normal(34, 12, N_PEOPLE).round(), 7, 73).astype(int)
    genders = np.where(rng.random(N_PEOPLE) < 0.71, "man", "woman")
    occupations = rng.choice(OCCUPATIONS, N_PEOPLE)
    states = rng.choice(sorted(set(_STATES) - {""}), N_PEOPLE)
    people = zip(ages, genders, occupations, states, strict=True)
    described = tuple(describe(f"{age}-year-old {gender}", job, state) for age, gender, job, state in people)
    return Population(tuple(map(label_of, TITLES[:n_movies])), described, ratings[:, :n_movies].copy())


def describe(who: str, occupation: str, state: str) -> str:
    """A person in words: "a 28-year-old man, working as an administrator and living in California"."""
    if occupation in PHRASES:
        job = PHRASES[occupation]
    else:
        job = f"working as {_article(occupation)} {occupation}"
    return f"{_article(who)} {who}, {job} and living {f'in {state}' if state else 'outside the United States'}"


def state_of(zip_code: str) -> str:
    """The state that a US zip code lies in, empty for other places and what is no zip code."""
    prefix = zip_code.strip()[:3]
    if not re.fullmatch(r"[0-9]{3}", prefix):
        return ""
    return _STATES[bisect_right(_STARTS, prefix) - 1]


def label_of(title: str) -> str:
    """A title as the paper writes it: `star_wars_(1977)`; "Rock, The (1996)" becomes `the_rock_(1996)`."""
    name, year = re.fullmatch(r"(.*?)\s*(\(\d{4}\))?\s*", title.strip(), re.DOTALL).groups()
    name = re.sub(r"^(.*), (The|A|An)\b", r"\2 \1", name)
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", plain.lower().replace("'", ""))
    return "_".join([*words, *([year] if year else [])])


def _article(noun: str) -> str:
    # "an 18-year-old"
    return "an" if re.match(r"[aeiou]|8|11|18", noun.lower()) else "a"
