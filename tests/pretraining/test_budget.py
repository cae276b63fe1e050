"""Evaluations take at most a tenth of the training time."""

from types import SimpleNamespace

import pytest

from dmjd.pretraining import budget
from dmjd.pretraining.budget import SHARE, EvaluationBudget


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.mark.parametrize("cost", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("once", [0.0, 6.0])
def test_all_evaluations_stay_within_their_share(clock, cost, once):
    limit, trained, made = EvaluationBudget(limited=True), 0.0, 0
    for _ in range(10):
        trained += 12.0
        if limit.allows(trained, estimate=once + cost):
            with limit.measured():
                if not made:
                    with limit.once():
                        clock.seconds += once
                clock.seconds += cost
            made += 1
            assert limit.last == cost
        assert limit.spent <= SHARE * trained + 1e-9
    assert once or made == min(10, int(SHARE * trained / cost))


def test_without_a_limit_the_time_is_measured_only(clock):
    limit = EvaluationBudget(limited=False)

    def interrupted() -> None:
        with limit.measured():
            clock.seconds += 100.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert limit.allows(1.0, 1000.0)
    assert limit.spent == limit.last == 100.0
