"""The formula against every number that was published with it."""

import pytest

from wavlab_jax.evaluation.superb_score import LOG_MEL, PUBLISHED, Scores, SuperbError, published_points, superb_points

CASES = [
    pytest.param(row, pool, duration, id=f"{pool} {duration} {row.model}")
    for pool, sets in PUBLISHED.items()
    for duration, rows in sets.items()
    for row in rows
]


@pytest.mark.parametrize(("row", "pool", "duration"), CASES)
def test_published_points(row, pool, duration):
    """To 0.1; to 0.23 on the hour of 2023, whose pool lacks four rows."""
    points = published_points(row.scores, pool=pool, duration=duration)
    assert points == pytest.approx(row.points, abs=0.23 if (pool, duration) == ("2023", "1h") else 0.1)


def test_fourteen_numbers_of_2024():
    assert sum(len(rows) for rows in PUBLISHED["2024"].values()) == 14


def test_ends_of_the_scale():
    best = Scores(30, 20, 30, 90, 90, 20, 30)
    log_mel = LOG_MEL["10min"]
    assert superb_points(log_mel, log_mel=log_mel, best=best) == 0
    assert superb_points(best, log_mel=log_mel, best=best) == pytest.approx(1000)
    with pytest.raises(SuperbError, match="identification is 11.1"):
        superb_points(log_mel, log_mel=log_mel, best=best._replace(identification=11.1))
    with pytest.raises(SuperbError, match="joint_normal is missing"):
        superb_points(best._replace(joint_normal=None), log_mel=log_mel, best=best)
