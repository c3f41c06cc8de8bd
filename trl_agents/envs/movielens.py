# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
MovieLens' ratings as a [`Population`], from the files as GroupLens packs them: https://grouplens.org/datasets/movielens.

    ml-100k   u.data            u.item              u.user
    ml-1m     ratings.dat       movies.dat          users.dat
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .population import Population, describe, label_of, state_of


@dataclass(frozen=True)
class Form:
    """How one of the data sets is packed: three tables without a header."""

    ratings: str  # user, movie, stars, time
    movies: str  # movie, title, ...
    users: str  # user, and the columns below
    separators: tuple[str, str, str]
    user_columns: tuple[int, int, int, int]  # where age, gender, occupation and zip code stand
    coded: bool  # whether ages and occupations are codes


FORMS = (
    Form("u.data", "u.item", "u.user", ("\t", "|", "|"), (1, 2, 3, 4), coded=False),
    Form("ratings.dat", "movies.dat", "users.dat", ("::", "::", "::"), (2, 1, 3, 4), coded=True),
)
# ml-1m's codes
AGES = {
    **{"1": "{} under 18", "18": "{} from 18 to 24", "25": "{} from 25 to 34", "35": "{} from 35 to 44"},
    **{"45": "{} from 45 to 49", "50": "{} from 50 to 55", "56": "{} of 56 or more"},
}
OCCUPATIONS = (
    *("other", "educator", "artist", "clerk", "student", "customer service agent", "doctor or nurse", "manager"),
    *("farmer", "homemaker", "school student", "lawyer", "programmer", "retired", "salesperson", "scientist"),
    *("self-employed", "technician or engineer", "tradesperson", "unemployed", "writer"),
)


@lru_cache(maxsize=8)
def load_population(data_dir: str, n_movies: int) -> Population:
    """
    Reads the people of a data set and their ratings of the movies that have most ratings.

    Movies whose labels are the same are one movie (ml-100k lists some twice); of two ratings the later in the file
    counts. Movies with equally many ratings are taken in the order of the movies' file.

    Args:
        data_dir (`str`):
            Folder with the three files of ml-100k or of ml-1m, as unpacked.
        n_movies (`int`):
            How many movies.
    """
    folder = Path(data_dir)
    form = _form_of(folder)
    by_rating, by_movie, by_user = form.separators
    labels = {row[0]: label_of(row[1]) for _, row in _rows(folder / form.movies, by_movie, 2)}
    users = dict(_users(folder / form.users, by_user, form))

    ratings: dict[str, dict[str, int]] = {label: {} for label in labels.values()}  # label -> user -> stars
    for place, row in _rows(folder / form.ratings, by_rating, 3):
        user, movie, stars = row[:3]
        if user not in users:
            raise ValueError(f"{place}: user {user!r} is not in {form.users}. Use files of one and the same data set.")
        if movie not in labels:
            raise ValueError(
                f"{place}: movie {movie!r} is not in {form.movies}. Use files of one and the same data set."
            )
        if stars not in ("1", "2", "3", "4", "5"):
            raise ValueError(f"{place}: {stars!r} is no rating from 1 to 5. Use the file as GroupLens packs it.")
        ratings[labels[movie]][user] = int(stars)

    rated = [label for label, stars in ratings.items() if stars]
    if len(rated) < n_movies:
        raise ValueError(
            f"n_arms={n_movies}, but {folder} has ratings of {len(rated)} movies. Use at most {len(rated)}."
        )
    chosen = sorted(rated, key=lambda label: -len(ratings[label]))[:n_movies]  # equals stay in the file's order
    rows = {user: row for row, user in enumerate(users)}
    matrix = np.zeros((len(users), n_movies))
    for column, label in enumerate(chosen):
        for user, stars in ratings[label].items():
            matrix[rows[user], column] = stars
    return Population(tuple(chosen), tuple(users.values()), matrix)


def _form_of(folder: Path) -> Form:
    for form in FORMS:
        names = (form.ratings, form.movies, form.users)
        found = [name for name in names if (folder / name).is_file()]
        if len(found) == len(names):
            return form
        if found:
            missing = ", ".join(name for name in names if name not in found)
            raise ValueError(f"data_dir={str(folder)!r} has {found[0]}, but not {missing}. Unpack the whole data set.")
    sought = " or ".join(f"{form.ratings}, {form.movies} and {form.users}" for form in FORMS)
    raise ValueError(
        f"data_dir={str(folder)!r} has no MovieLens files ({sought}). Unpack ml-100k.zip or ml-1m.zip from "
        "https://grouplens.org/datasets/movielens and give that folder, or leave data_dir out for made-up people."
    )


def _users(path: Path, separator: str, form: Form) -> Iterator[tuple[str, str]]:
    """(id, the person in words) of each line."""
    for place, row in _rows(path, separator, 5):
        age, gender, occupation, zip_code = (row[column].strip() for column in form.user_columns)
        if gender not in ("M", "F"):
            raise ValueError(f"{place}: {gender!r} is no gender, M or F. Use the file as GroupLens packs it.")
        noun = {"M": "man", "F": "woman"}[gender]
        if not age.isdecimal() or form.coded and age not in AGES:
            raise ValueError(f"{place}: {age!r} is no age. Use the file as GroupLens packs it.")
        if form.coded:
            if not (occupation.isdecimal() and int(occupation) < len(OCCUPATIONS)):
                raise ValueError(f"{place}: {occupation!r} is no occupation from 0 to {len(OCCUPATIONS) - 1}.")
            who, occupation = AGES[age].format(noun), OCCUPATIONS[int(occupation)]
        else:
            who = f"{age}-year-old {noun}"
        yield row[0], describe(who, occupation, state_of(zip_code))


def _rows(path: Path, separator: str, n_fields: int) -> Iterator[tuple[str, list[str]]]:
    """(where it stands, the fields) of each line that is not empty. The data sets are in Latin-1."""
    with open(path, encoding="latin-1") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = line.rstrip("\n").split(separator)
            place = f"{path}, line {number}"
            if len(row) < n_fields or not row[0].strip():
                raise ValueError(
                    f"{place}: {line.strip()[:80]!r} has not {n_fields} fields, separated by {separator!r}. Use the "
                    "file as GroupLens packs it."
                )
            yield place, row
