# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""No episode is learnt from and reported."""

import itertools

import pytest

from trl_agents.seeds import LAST, expert_seeds, held_out_seeds, transcript_seeds, validation_seeds


@pytest.mark.parametrize("seed", [0, 1, 42, 149_999, 123_456_789, 2**32 - 1])
def test_ranges_never_meet(seed):
    training = range(512 * 10**5)
    ranges = [training, transcript_seeds(1000, seed), expert_seeds(1000, seed), validation_seeds(256)]
    ranges.append(held_out_seeds(512))
    for before, after in itertools.pairwise(ranges):
        assert before.stop <= after.start
    assert ranges[-1].stop <= LAST


def test_another_seed_has_other_episodes():
    assert expert_seeds(3, seed=2) == range(600_000_006, 600_000_009)
    assert transcript_seeds(1000, seed=1) == range(500_001_000, 500_002_000)
    for seeds in (expert_seeds, transcript_seeds):
        assert not set(seeds(1000, 0)) & set(seeds(1000, 1))


def test_more_than_there_are():
    with pytest.raises(ValueError, match="150000001 episodes are more than there are seeds for: 150000000 at most"):
        expert_seeds(150_000_001)
    assert len(expert_seeds(150_000_000, 7)) == 150_000_000 and len(held_out_seeds(0)) == 0
