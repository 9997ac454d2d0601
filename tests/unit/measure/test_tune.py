"""The search of `fewbit tune` over measurers that are made up: targets, racing, going on, the budget."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import yaml

from fewbit.cli.tune import _close
from fewbit.compress import built_in
from fewbit.compress.recipe import parse_recipe
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.measure.journal import Journal
from fewbit.measure.pareto import dominates
from fewbit.measure.tune import (
    FIGURES,
    JOURNALLED,
    Candidate,
    LostError,
    Outcome,
    OutOfTimeError,
    Row,
    Search,
    Window,
    candidates,
    kv_names,
    names,
    read_goal,
    rounds,
)
from fewbit.measure.tune.evidence import Answer, difference, interval, mean_interval, quality, student

TOTAL = 48
QUESTIONS = 600

# --- what is asked for ------------------------------------------------------------------------------------------------


def test_a_goal_as_the_command_line_has_it():
    goal = read_goal("recovery>=0.99, ttft_ms <= 200", "time_per_token")
    assert [str(t) for t in goal.targets] == ["recovery>=0.99", "ttft_ms<=200"]
    assert goal.objective.name == "time_per_token_ms"
    assert [axis.name for axis in goal.axes] == ["time_per_token_ms", "recovery", "ttft_ms"]
    assert goal.missed({"recovery": 0.98, "ttft_ms": 200.0}) == [goal.targets[0]]
    assert goal.targets[0].shortfall(0.9603) == pytest.approx(0.03)
    assert read_goal("ttft_ms<=1").axes[-1].name == "recovery"  # no front without a quality
    assert read_goal("kl<=0.1", None, "tokens_per_s").objective.higher
    assert not goal.asks
    goal = read_goal("score_recovery>=0.99", "bits_per_weight")
    assert goal.asks
    assert [axis.name for axis in goal.axes] == ["bits_per_weight", "score_recovery"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("",), "--target is empty"),
        (("recovery",), "expected NAME>=NUMBER or NAME<=NUMBER"),
        (("recovery>=0.9,",), "expected NAME>=NUMBER"),
        (("recovery>0.9",), "so its target is recovery>=NUMBER"),
        (("recovery<=0.9",), "more of recovery is better"),
        (("ttft_ms>=200",), "less of ttft_ms is better"),
        (("ttft_ms<=fast",), "expected a number above 0, got fast"),
        (("ttft_ms<=nan",), "expected a number above 0"),
        (("ttft_ms<=-1",), "expected a number above 0"),
        (("recovery>=99",), "at most 1, such as 0.99"),
        (("score>=60",), "at most 1, such as 0.99"),
        (("score<=0.6",), "more of score is better"),
        (("recovery>=0.9, recovery>=0.8",), "recovery stands twice"),
        (("latency<=2",), ", ".join(FIGURES)),
        (("ttft<=200",), "did you mean 'ttft_ms'"),
        (("kl<=1", "speed"), ", ".join(FIGURES)),
        (("kl<=1", "tokens_per_s"), "use --maximize tokens_per_s"),
        (("kl<=1", None, "memory"), "use --minimize memory"),
        (("kl<=1", "kl", "top1"), "both given"),
    ],
)
def test_a_wrong_goal_is_one_clear_line(arguments, words):
    with pytest.raises(RecipeError) as error:
        read_goal(*arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# --- what is tried ----------------------------------------------------------------------------------------------------


def test_the_candidates_are_whole_recipes():
    made = candidates(names(), kv_names())
    assert len({c.name for c in made}) == len(made) == len(names()) * len(kv_names())
    for c in made:
        recipe = parse_recipe(c.name, c.text)
        assert (recipe.kv is not None) == c.name.endswith("+kv_fp8")
    assert {c.name for c in made} >= {"int4", "w4a8", "auto_int4_6+kv_fp8"}


def test_a_candidate_says_what_the_command_line_set(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "# Mine.\nrules: [{match: 'layers.*', weight: int8_row}]\ncalib: {samples: 4}\n"
    )
    (one,) = candidates([str(tmp_path / "mine.yaml")], ["int8"], {"length": 64})
    assert one.name == "mine+kv_int8"
    assert one.text.startswith("# Mine.\n")
    assert yaml.safe_load(one.text)["calib"] == {"samples": 4, "length": 64}
    recipe = parse_recipe("again", one.text)
    assert (recipe.calibration.samples, recipe.calibration.length, str(recipe.kv.k)) == (4, 64, "int8")


def test_an_unchanged_recipe_is_its_own_text():
    (one,) = candidates(["int4"], ["none"])
    assert one.text.splitlines()[0].lstrip("# ") == built_in()["int4"]


@pytest.mark.parametrize(
    ("recipes", "kv", "words"),
    [
        (["int5"], ["none"], "--recipes: unknown recipe 'int5'; did you mean"),
        (["int4", "int4"], ["none"], "int4 stands twice"),
        (["int4", ""], ["none"], "one of them is empty"),
        (["int4"], ["fp9"], "--kv fp9: did you mean 'fp8'"),
        (["int4"], ["fp8", "fp8"], "fp8 stands twice"),
    ],
)
def test_wrong_candidates_are_one_clear_line(recipes, kv, words):
    with pytest.raises(RecipeError) as error:
        candidates(recipes, kv)
    assert words in str(error.value)


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("df", "risk", "t"),
    [(1, 0.05, 12.7062), (3, 0.001, 12.9240), (10, 0.05, 2.22814), (30, 0.01, 2.75000), (200, 0.05, 1.97190)],
)
def test_student_as_in_the_tables(df, risk, t):
    assert student(df, risk) == pytest.approx(t, rel=1e-4)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    random_ = np.random.default_rng(0)
    whole = random_.normal(1, 2, 40)
    held = 0
    for _ in range(400):
        low, high = mean_interval(random_.permutation(whole)[:10].tolist(), 40, 0.1)
        held += low <= whole.mean() <= high
    assert 336 <= held <= 384  # 360 expected, standard deviation 6
    assert mean_interval(whole.tolist(), 40, 0.1) == (whole.mean(),) * 2
    for total in (2, 40):
        assert mean_interval([1.0], total, 0.1) == (-math.inf, math.inf)
    assert mean_interval([1.0], 1, 0.1) == (1.0, 1.0)


def test_quality_of_windows():
    seen = [Window(loss=2.2, base=2.0, kl=0.1, top1=0.9), Window(loss=1.8, base=2.0, kl=0.3, top1=0.7)]
    found = quality(seen)
    assert found == pytest.approx({"recovery": 1.0, "perplexity": math.exp(2.0), "kl": 0.2, "top1": 0.8})
    low, high = interval("recovery", seen, 4, 0.05)
    assert low < 1 < high
    assert interval("recovery", seen[:1], 4, 0.05) == (0.0, math.inf)
    assert difference("kl", seen, seen, 4, 0.05) == (0.0, 0.0)


def test_score_of_answers():
    """Two tasks, of three questions and of one, which so weighs three times as much."""
    right = zip((1, 0, 1, 0), (1, 1, 0, 1), (2 / 3, 2 / 3, 2 / 3, 2.0), strict=True)
    seen = [Answer(score, base, weight, 5 / 6) for score, base, weight in right]
    assert quality(seen) == pytest.approx({"score": (2 / 3 + 0) / 2, "score_recovery": (2 / 3) / (2 / 3 + 1)})
    assert interval("score", seen, 4, 0.05) == pytest.approx((1 / 3,) * 2)
    low, high = interval("score_recovery", seen, 40, 0.05)
    assert low < 0.4 < high


@pytest.mark.parametrize("seen", [7, 51, 60, 400, 1010])
def test_a_score_of_some_questions_is_a_mean_whatever_their_weights(seen):
    """Tasks of 1000 and of 10 questions, each asked in proportion: what is seen does not weigh 1 on average."""
    placed = sorted(((i + 0.5) / size, 505 / size) for size in (1000, 10) for i in range(size))
    weights = [weight for _, weight in placed][:seen]
    right, wrong = ([Answer(score, 1.0, weight, 0.8) for weight in weights] for score in (1.0, 0.0))
    assert quality(right) == pytest.approx({"score": 1.0, "score_recovery": 1.0})
    assert quality(wrong) == pytest.approx({"score": 0.0, "score_recovery": 1 - 1 / 0.8})
    low, high = interval("score", right, 1010, 0.05)
    assert low <= 1.0 <= high * (1 + 1e-12)
    assert difference("score", right, wrong, seen, 0.05) == pytest.approx((1.0, 1.0))
    half = [Answer(float(weight > 1), 1.0, weight, 1.0) for weight in weights]  # right in the small task only
    assert quality(half)["score"] == pytest.approx(sum(w for w in weights if w > 1) / sum(weights))


def test_a_difference_of_recoveries_is_as_wide_as_that_of_scores():
    """Both models are held against the same answers of the base."""
    a, b = ([Answer(float(i % size > 0), 1.0, 1.0, 0.5) for i in range(50)] for size in (5, 7))
    score, recovery = (difference(name, a, b, 400, 0.01) for name in ("score", "score_recovery"))
    assert recovery == pytest.approx([2 * end for end in score])


def answered(rights: list[float]) -> list[Answer]:
    return [Answer(right, 1.0, 1.0, 1.0) for right in rights]


def test_where_every_answer_is_the_same_an_interval_keeps_its_width():
    seen = answered([1.0] * 50)
    low, high = interval("score_recovery", seen, 400, 0.001)
    assert low < 0.9  # a model that changes an answer in ten shows no change in fifty with a probability of 0.005
    assert high >= 1
    low, high = difference("score", seen, seen, 400, 0.001)
    assert low == -high < -0.1
    assert difference("score", seen, seen, 50, 0.001) == (0.0, 0.0)


@pytest.mark.parametrize("lost", [1, 4, 20])
def test_intervals_of_rare_flips_hold_as_often_as_they_say(lost):
    random_, whole, held = np.random.default_rng(0), [0.0] * lost + [1.0] * (400 - lost), 0
    for _ in range(400):
        seen = answered(random_.permutation(whole)[:50].tolist())
        low, high = interval("score_recovery", seen, 400, 0.1)
        held += low <= 1 - lost / 400 <= high
    assert held >= 342  # 360 expected at least, standard deviation 6


# --- racing -----------------------------------------------------------------------------------------------------------


class Bench:
    """A measurer of made-up candidates: name -> (bits, milliseconds, loss, noise), and what was asked of it."""

    def __init__(
        self, made: dict[str, tuple[float, float, float, float]], seed: int = 0, limit: int | None = None,
        lost: dict[str, float] | None = None,
    ):  # fmt: skip
        """lost: shares of the questions that candidates lose; the model itself has seven of ten right."""
        self.made, self.limit, self.asked, self.forgotten = made, limit, Counter(), set()
        draw = random.Random(seed)
        base = [draw.gauss(3, 0.3) for _ in range(TOTAL)]
        self.windows = {
            name: [Window(b + draw.gauss(loss, noise), b, loss, 1 - loss) for b in base]
            for name, (_, _, loss, noise) in made.items()
        }
        right = [draw.random() < 0.7 for _ in range(QUESTIONS if lost else 0)]
        self.rights = {None: list(map(float, right))} | {
            name: [float(one and draw.random() >= share) for one in right] for name, share in (lost or {}).items()
        }

    def _count(self, what: str) -> None:
        if self.limit is not None and sum(self.asked.values()) >= self.limit:
            raise OutOfTimeError
        self.asked[what] += 1

    def base(self):
        self._count("base")
        return {"bits_per_weight": 16.0, "memory_gb": 1.0} | self._speed(10.0)

    def make(self, candidate):
        self._count(f"make {candidate.name}")
        if candidate.name.startswith("bad"):
            raise UnsupportedError("layers of 80 do not divide into blocks of 32")
        if candidate.name.startswith("lost"):
            raise LostError("its process ended with status -9")
        facts = {"bits_per_weight": self.made[candidate.name][0], "memory_gb": self.made[candidate.name][0] / 16}
        return {"figures": facts, "recipe": candidate.text}

    def speed(self, candidate):
        self._count(f"speed {candidate.name}")
        return self._speed(self.made[candidate.name][1])

    def quality(self, candidate, start, stop):
        self._count(f"quality {candidate.name}")
        assert candidate.name not in self.forgotten
        return self.windows[candidate.name][start:stop]

    def answers(self, candidate, start, stop):
        name = candidate and candidate.name
        self._count(f"tasks {name}")
        assert name not in self.forgotten
        return self.rights[name][start:stop]

    def forget(self, candidate):
        self.forgotten.add(candidate.name)

    @staticmethod
    def _speed(ms: float) -> dict[str, float]:
        return {"ttft_ms": 10 * ms, "time_per_token_ms": ms, "tokens_per_s": 1000 / ms}


SOME = {  # bits, ms, loss, noise
    "eight": (8.0, 6.0, 0.002, 0.002),
    "four": (4.25, 4.0, 0.06, 0.01),
    "four_better": (4.25, 4.0, 0.03, 0.01),
    "mixed": (6.0, 5.0, 0.007, 0.003),
    "slow": (5.0, 40.0, 0.02, 0.01),
    "silly": (9.0, 7.0, 0.2, 0.02),
}


def search(bench, folder, goal="recovery>=0.99, ttft_ms<=200", minimize="time_per_token", **options):
    tried = [Candidate(name, f"text of {name}") for name in bench.made]
    with Journal(folder / "journal.jsonl", {"goal": goal, "minimize": minimize}, JOURNALLED, "--run") as journal:
        weights = [1.0] * len(bench.rights[None])
        return Search(tried, read_goal(goal, minimize), bench, journal, TOTAL, weights, **options).run()


def test_the_best_that_meets_the_targets_wins_and_the_hopeless_are_dropped(tmp_path):
    bench = Bench(SOME)
    found = search(bench, tmp_path)
    assert (found.best, found.front, found.whole, found.nearest) == ("mixed", ["eight", "mixed"], True, [])
    assert found.row("mixed").recipe == "text of mixed"
    assert found.row("slow").out == "misses ttft_ms<=200 (400)"
    assert "quality slow" not in bench.asked
    assert found.row("four").out.startswith("misses recovery>=0.99")
    assert found.base.figures["recovery"] == 1.0
    assert found.base.figures["ttft_ms"] == 100.0
    windows = {row.name: len(row.windows) for row in found.rows}
    assert windows["eight"] == windows["mixed"] == TOTAL
    assert windows["four"] < TOTAL
    assert windows["silly"] < TOTAL
    assert bench.forgotten == {"four", "four_better", "slow", "silly"}


def test_a_candidate_that_another_beats_is_dropped(tmp_path):
    found = search(Bench(SOME), tmp_path, "recovery>=0.5", "bits_per_weight")
    assert found.row("four").out == "four_better is better"
    assert found.row("silly").out is not None
    assert found.best == "four_better"


@pytest.mark.parametrize("seed", range(10))
def test_as_good_as_measuring_everything(seed, tmp_path):
    """What the race finds lies on the front of all measurements, and is the best there."""
    draw = random.Random(seed)
    made = {
        f"c{i}": (draw.choice([4.25, 5.0, 6.0, 8.0]), draw.uniform(2, 8), draw.uniform(0.0, 0.05), 0.004)
        for i in range(12)
    }
    bench = Bench(made, seed)
    goal = read_goal("recovery>=0.97, bits_per_weight<=7", "time_per_token")
    every = {
        name: {"bits_per_weight": bits, **bench._speed(ms), **quality(bench.windows[name])}
        for name, (bits, ms, _, _) in made.items()
    }
    feasible = {name: goal.costs(figures) for name, figures in every.items() if not goal.missed(figures)}
    found = search(bench, tmp_path, "recovery>=0.97, bits_per_weight<=7")
    assert found.best == min(feasible, key=feasible.__getitem__, default=None)
    if found.best:
        assert not any(dominates(goal.costs(f), feasible[found.best]) for f in every.values())
    whole = search(Bench(made, seed), tmp_path / "whole", "recovery>=0.97, bits_per_weight<=7", exhaustive=True)
    assert whole.best == found.best
    assert set(whole.front) == {
        name for name in every if not any(dominates(goal.costs(o), goal.costs(every[name])) for o in every.values())
    }
    assert all(len(row.windows) == TOTAL for row in whole.rows)


def test_equal_in_the_objective_the_other_figures_decide(tmp_path):
    made = {"worse": (4.0, 5.0, 0.005, 0.0001), "better": (4.0, 5.0, 0.001, 0.0001)}
    assert search(Bench(made), tmp_path, minimize="bits_per_weight", exhaustive=True).best == "better"


def test_a_target_that_nobody_meets(tmp_path):
    found = search(Bench(SOME), tmp_path, "recovery>=0.99, bits_per_weight<=4.5")
    assert found.best is None
    assert found.nearest[0] == "four_better"
    assert found.whole


def test_what_cannot_be_made_is_a_row_and_not_tried_again(tmp_path):
    bench = Bench({"bad": (0, 0, 0, 0), **SOME})
    found = search(bench, tmp_path)
    assert found.row("bad").failed
    assert found.row("bad").out == "layers of 80 do not divide into blocks of 32"
    assert found.best == "mixed"
    again = Bench({"bad": (0, 0, 0, 0), **SOME})
    assert search(again, tmp_path).row("bad").failed
    assert not again.asked


def test_what_died_is_a_row_and_tried_again(tmp_path):
    made = {"lost": (0, 0, 0, 0), **SOME}
    assert search(Bench(made), tmp_path).row("lost").failed
    again = Bench(made)
    assert search(again, tmp_path).row("lost").failed
    assert again.asked == {"make lost": 1}


class FailingLate(Bench):
    """The fastest fails once it has seen some windows; a candidate that comes back is made again."""

    def quality(self, candidate, start, stop):
        if candidate.name == "fails" and start:
            raise UnsupportedError("a loss that is not a number")
        self.forgotten.discard(candidate.name)
        return super().quality(candidate, start, stop)


def test_what_a_failed_candidate_had_beaten_comes_back(tmp_path):
    made = {"good": (4.0, 5.0, 0.02, 0.0001), "fails": (4.0, 4.0, 0.001, 0.0001), "worse": (4.0, 6.0, 0.03, 0.0001)}
    said: list[str] = []
    found = search(FailingLate(made), tmp_path, "recovery>=0.9", tell=said.append)
    assert any("good: out after 6 of 48 windows: fails is better" in line for line in said)
    assert found.row("fails").failed
    assert (found.best, found.row("good").out, len(found.row("good").windows)) == ("good", None, TOTAL)
    assert found.row("worse").out == "good is better"


@pytest.mark.parametrize(
    ("time", "spread", "said"),
    [
        (5.004, 0.0, "next differs from it by 0.1% in time_per_token_ms; one run of each does not say"),
        (
            5.004,
            0.02,
            "next differs from it by 0.1% in time_per_token_ms; tokens/s of one model differed by up to 2.0%",
        ),
        (5.25, 0.02, None),
    ],
)
def test_a_win_within_the_spread_of_the_runs_is_said(time, spread, said):
    def row(name: str, ms: float, **more) -> Row:
        figures = {"time_per_token_ms": ms, "recovery": 1.0, "slowest_tokens_per_s": 100.0}
        return Row(name, figures | {"fastest_tokens_per_s": 100.0 * (1 + spread)}, **more)

    rows = [row("best", 5.0), row("next", time), row("out", 5.0, out="misses it"), row("last", 9.0)]
    outcome = Outcome(rows, row("as it was", 10.0), ["best"], "best", [], True)
    found = _close(read_goal("recovery>=0.9"), outcome)
    assert found is None if said is None else found.startswith(said)
    assert _close(read_goal("recovery>=0.9", "bits_per_weight"), outcome) is None


def test_rounds_double():
    assert rounds(48) == [6, 12, 24, 48]
    assert rounds(100) == [12, 24, 48, 96, 100]
    assert rounds(6) == [6]
    assert rounds(2) == [2]


# --- by the score of tasks --------------------------------------------------------------------------------------------

LOST = {"eight": 0.002, "four": 0.3, "four_better": 0.2, "mixed": 0.01, "slow": 0.0, "silly": 0.5}
BY_SCORE = "score_recovery>=0.95, ttft_ms<=200"


def test_questions_are_raced_as_windows_are(tmp_path):
    bench = Bench(SOME, lost=LOST)
    found = search(bench, tmp_path, BY_SCORE, "bits_per_weight")
    assert (found.best, found.whole) == ("mixed", True)
    assert found.base.figures["score_recovery"] == 1
    assert found.base.figures["score"] == pytest.approx(np.mean(bench.rights[None]))
    for name in ("mixed", "eight"):
        figures = found.row(name).figures
        assert figures["score"] == pytest.approx(np.mean(bench.rights[name]))
        assert figures["score_recovery"] == pytest.approx(figures["score"] / found.base.figures["score"])
    assert found.row("four").out.startswith("misses score_recovery>=0.95 (0.")
    asked = {row.name: len(row.scores) for row in found.rows}
    assert asked["mixed"] == QUESTIONS
    assert asked["slow"] == 0  # out by its speed
    assert max(asked["four"], asked["four_better"], asked["silly"]) < QUESTIONS
    assert bench.asked["tasks None"] == len(rounds(TOTAL))

    unasked = Bench(SOME, lost=LOST)
    search(unasked, tmp_path / "cheap", "score>=0.5, bits_per_weight<=1")
    assert not any(what.startswith("tasks") for what in unasked.asked)  # nobody is left whose answers matter


@pytest.mark.parametrize("seed", range(6))
def test_as_good_as_asking_everything(seed, tmp_path):
    draw = random.Random(seed)
    made = {f"c{i}": (draw.choice([4.25, 5.0, 6.0, 8.0]), draw.uniform(2, 8), 0.01, 0.004) for i in range(8)}
    lost = {name: draw.choice([0.0, 0.01, 0.05, 0.2]) for name in made}
    asked = ("score_recovery>=0.94", "bits_per_weight")
    race = search(Bench(made, seed, lost=lost), tmp_path, *asked)
    whole = search(Bench(made, seed, lost=lost), tmp_path / "whole", *asked, exhaustive=True)
    assert race.best == whole.best
    assert race.best is None or race.row(race.best).figures == whole.row(race.best).figures


def test_every_interruption_of_questions_is_gone_on_from(tmp_path):
    few = {name: SOME[name] for name in ("eight", "four", "mixed")}
    straight = Bench(few, lost=LOST)
    expected = search(straight, tmp_path / "straight", BY_SCORE)
    for stop in range(sum(straight.asked.values())):
        folder, first, second = tmp_path / str(stop), Interrupting(few, limit=stop, lost=LOST), Bench(few, lost=LOST)
        with pytest.raises(KeyboardInterrupt):
            search(first, folder, BY_SCORE)
        assert search(second, folder, BY_SCORE) == expected
        assert first.asked + second.asked == straight.asked
        found = search(Bench(few, limit=stop, lost=LOST), tmp_path / f"late {stop}", BY_SCORE)  # the time is up
        assert not found.whole
        assert found.best in (None, expected.best)


def test_a_model_that_has_nothing_right_is_one_clear_line(tmp_path):
    bench = Bench(SOME, lost=LOST)
    bench.rights[None] = [0.0] * QUESTIONS
    with pytest.raises(UnsupportedError, match="the model as it was has no question right"):
        search(bench, tmp_path, BY_SCORE)


# --- going on ---------------------------------------------------------------------------------------------------------


class Interrupting(Bench):
    """Ctrl-C during some measurement."""

    def _count(self, what: str) -> None:
        if sum(self.asked.values()) == self.limit:
            raise KeyboardInterrupt
        self.asked[what] += 1


def test_every_interruption_is_gone_on_from(tmp_path):
    straight = Bench(SOME)
    expected = search(straight, tmp_path / "straight")
    for stop in range(sum(straight.asked.values())):
        folder, first, second = tmp_path / str(stop), Interrupting(SOME, limit=stop), Bench(SOME)
        with pytest.raises(KeyboardInterrupt):
            search(first, folder)
        assert search(second, folder) == expected
        assert first.asked + second.asked == straight.asked  # nothing was lost and nothing measured twice


def test_the_budget_ends_with_what_is_known(tmp_path):
    total = sum(Bench(SOME).asked.values())
    found = search(Bench(SOME, limit=3), tmp_path)
    assert (found.best, found.whole) == (None, False)
    rest = Bench(SOME)
    found = search(rest, tmp_path)
    assert (found.best, found.whole) == ("mixed", True)
    assert sum(rest.asked.values()) > total


def test_a_budget_that_ends_late_gives_the_best_so_far(tmp_path):
    whole = Bench(SOME)
    search(whole, tmp_path / "whole")
    found = search(Bench(SOME, limit=sum(whole.asked.values()) - 1), tmp_path / "late")
    assert not found.whole
    assert found.best == "mixed"
    assert any(0 < len(row.windows) < TOTAL and row.out is None for row in found.rows)


def test_other_settings_are_one_clear_line(tmp_path):
    search(Bench(SOME), tmp_path)
    with pytest.raises(RecipeError) as error:
        search(Bench(SOME), tmp_path, "recovery>=0.5")
    assert 'holds results with goal "recovery>=0.99, ttft_ms<=200", now it is "recovery>=0.5"' in str(error.value)
    assert "\n" not in str(error.value)


def test_a_journal_line_that_was_cut_short_is_measured_again(tmp_path):
    search(Bench(SOME), tmp_path)
    file = tmp_path / "journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for cut in (lines[-1][:1], lines[-1][:-1]):
        file.write_bytes(b"".join(lines[:-1]) + cut)
        bench = Bench(SOME)
        assert search(bench, tmp_path).best == "mixed"
        assert sum(bench.asked.values()) == 1
        assert [json.loads(line) for line in file.read_text().splitlines()][:-1] == list(map(json.loads, lines[:-1]))


@pytest.mark.parametrize("broken", [b"{}\n", b"not json\n", b"[1]\n"])
def test_a_damaged_journal_is_named(broken, tmp_path):
    search(Bench(SOME), tmp_path)
    file = tmp_path / "journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for at in (0, 2):
        file.write_bytes(b"".join([*lines[:at], broken, *lines[at + 1 :]]))
        with pytest.raises(RecipeError, match=f"line {at + 1}: not a line of a journal"):
            search(Bench(SOME), tmp_path)


def test_a_folder_is_used_by_one_search_at_a_time(tmp_path):
    file = tmp_path / "journal.jsonl"
    with Journal(file, {}, JOURNALLED), pytest.raises(RecipeError, match="another fewbit writes to it"):
        Journal(file, {}, JOURNALLED)


def test_the_risk_is_shared_by_all_comparisons():
    sizes = itertools.product((1, 10), (8, 48))
    for count, windows in sizes:
        tried = [Candidate(str(i), "") for i in range(count)]
        made = Search(tried, read_goal("kl<=1"), None, None, windows)
        assert made.risk * len(rounds(windows)) * (count + 1) == pytest.approx(0.05)


def test_what_a_library_prints_is_not_taken_for_an_answer():
    """A real worker whose measurement prints, itself and through a process; its stdin stays open till it ends."""
    code = """
import subprocess
from fewbit.measure.tune import worker

def talk(request, device, progress):
    print("hello")
    subprocess.run(["echo", "there"], check=True)
    progress("talk", 1, 2)
    return {"figures": {}}

worker.STAGES["talk"] = talk
worker.main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        child.stdin.write(json.dumps({"stage": "talk", "device": "cpu"}) + "\n")
        child.stdin.flush()
        answers, words = child.stdout.read(), child.stderr.read()
    assert list(map(json.loads, answers.splitlines())) == [{"progress": ["talk", 1, 2]}, {"found": {"figures": {}}}]
    assert {"hello", "there"} <= set(words.split())
