"""The training benchmark: its search, its records, its comparisons, and whole runs of it."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import recipes, report
from training.candidates import CANDIDATES, recipe_of
from training.comparison import Row, deviations_ahead, profile, rows_of, target_of
from training.experiment import TRIALS, Experiment
from training.loop import Program
from training.optimizers import CONTESTANTS, Contestant
from training.published import PUBLISHED
from training.recipes import RECIPES
from training.records import VERSION, Key, Records
from training.search import best_rate, next_rate
from training.steppers import first_order, with_hessian_diag
from training.tasks import TASKS
from training.tasks.task import Task, Variables, mean_loss, warmup_cosine

import curvax

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "training"

# --- The search for a rate ---


def searched(loss, start, trials=TRIALS):
    losses = {}
    for _ in range(trials):
        rate = next_rate(losses, start)
        assert rate not in losses
        losses[rate] = loss(rate)
    return losses


@pytest.mark.parametrize("best", [0.3, 1.0, 2.5, 0.02, 40.0])
def test_the_search_finds_the_best_rate_to_a_factor_of_two(best):
    losses = searched(lambda rate: math.log(rate / best) ** 2, start=1.0)
    assert 0.5 < best_rate(losses) / best < 2


def test_the_search_leaves_the_rates_that_diverge():
    losses = searched(lambda rate: -rate if rate < 0.02 else math.nan, start=1.0)
    assert best_rate(losses) < 0.02


def test_all_trials_may_diverge():
    losses = searched(lambda _: math.inf, start=1.0)
    assert best_rate(losses) == min(losses)


def test_the_search_narrows_the_wider_side_first():
    losses = {0.25: 3.0, 1.0: 1.0, 4.0: 2.0, 2.0: 1.5}
    assert next_rate(losses, 1.0) == 0.5


# --- Records ---

KEY = Key("task", "cpu", "Adam", "adam(rate)", 0.1, 0, is_trial=False)


def test_records_of_several_machines_add_up(tmp_path):
    Records(tmp_path, "one").add(KEY, {"x": 1})
    Records(tmp_path, "two").add(KEY._replace(seed=1), {"x": 2})
    assert len(Records(tmp_path, "three").lines) == 2


def test_a_line_that_was_cut_off_is_left_out_and_the_next_one_is_whole(tmp_path):
    records = Records(tmp_path, "one")
    records.add(KEY, {"x": 1})
    with records.path.open("a") as file:
        file.write('{"version": 1, "task": "ta')
    with pytest.warns(UserWarning, match="1 incomplete lines are left out"):
        Records(tmp_path, "one").add(KEY._replace(seed=1), {"x": 2})
    with pytest.warns(UserWarning, match="1 incomplete"):
        assert len(Records(tmp_path, "one").lines) == 2


def test_runs_of_another_version_are_left_out_and_kept_in_the_file(tmp_path):
    records = Records(tmp_path, "one")
    line = {"version": VERSION + 1, **KEY._asdict()}
    records.path.write_text(json.dumps(line) + "\n")
    with pytest.warns(UserWarning, match="1 runs of other versions"):
        assert not Records(tmp_path, "one").lines
    assert json.loads(records.path.read_text()) == line


# --- Comparisons ---


def row(test, curves, milliseconds=1.0):
    return Row(0.1, False, test, curves, [10, 20, 30], milliseconds, {}, {})


def test_deviations_are_pooled():
    one, other = row([1.0, 3.0], []), row([5.0, 9.0], [])
    assert deviations_ahead(one, other) == pytest.approx(5 / math.sqrt((2 + 8) / 2))
    assert deviations_ahead(other, one) == -deviations_ahead(one, other)


def test_a_run_that_diverged_is_infinitely_behind():
    assert deviations_ahead(row([1.0, math.inf], []), row([1.0, 2.0], [])) == -math.inf


def test_steps_to_the_target_are_a_median_and_infinite_where_it_is_missed():
    found = row([1.0] * 3, [[3.0, 2.0, 1.0], [3.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    assert found.steps_to(2.0) == 20
    assert found.steps_to(0.5) == math.inf


def test_the_target_is_set_by_the_best_of_adams_family():
    rows = {
        "Adam": row([1.0] * 3, [[4.0, 2.0], [4.0, 1.0], [4.0, 3.0]]),
        "AdamW": row([math.inf], [[1.0]]),
        "other": row([1.0], [[0.1]]),
    }
    assert target_of(rows) == 2.0
    assert target_of({"other": row([1.0], [[0.1]])}) is None


def test_the_best_of_adams_family_reaches_the_target_with_an_even_number_of_seeds_too():
    adam = row([1.0] * 4, [[4.0, value] for value in (1.0, 2.0, 3.0, 4.0)])
    assert adam.steps_to(target_of({"Adam": adam})) == 20


def test_profiles_count_the_tasks_within_a_factor_of_the_best():
    costs = {"a": {"x": 1.0, "y": 4.0}, "b": {"x": 3.0, "y": math.inf}}
    assert profile(costs, [1, 2, 4]) == {"a": [1, 1, 1], "b": [0, 0, 0.5]}


# --- Runs ---


def regression(scannable=True):
    """Sixteen examples of a linear map, in batches of four."""
    inputs = jax.random.normal(jax.random.key(0), (16, 3))
    data = inputs, inputs @ jnp.array([[1.0], [-2.0], [0.5]])

    def apply(params, inputs, statistics, noise_key):
        del noise_key
        return inputs @ params, {"steps": statistics.get("steps", 0) + 1}

    def evaluate(variables, split):
        del split
        outputs = data[0] @ variables.params
        return {"loss": float(mean_loss(curvax.squared_error, outputs, data[1]))}

    return Task(
        name="regression",
        words="",
        metric="loss",
        data=data,
        num_examples=16,
        batch_size=4,
        steps=40,
        evaluations=4,
        init=lambda _: Variables(jnp.zeros((3, 1)), {"steps": jnp.int32(0)}),
        apply=apply,
        loss=curvax.squared_error,
        sample=lambda data, indices, _: jax.tree.map(lambda leaf: leaf[indices], data),
        evaluate=evaluate,
        schedule=warmup_cosine,
        scannable=scannable,
    )


SGD = Contestant("sgd(rate)", 0.2, lambda task, rate: first_order(task, optax.sgd(rate)))


def interval_2(task, rate):
    return with_hessian_diag(task, curvax.adahessian(rate, update_interval=2), interval=2)


@pytest.mark.parametrize("make", [SGD.make, interval_2])
def test_a_scan_and_a_loop_on_the_host_take_the_same_steps(make):
    contestant = Contestant("", 0.2, make)
    one, other = (
        Program(regression(scannable), contestant).run(0.2, 0, is_trial=False)
        for scannable in (True, False)
    )
    assert one.steps == other.steps == [10, 20, 30, 40]
    np.testing.assert_allclose(one.train_losses, other.train_losses, rtol=1e-4)
    np.testing.assert_allclose(one.validation["loss"], other.validation["loss"], rtol=1e-4)
    assert one.test["loss"] < 0.1 * one.validation["loss"][0]


def test_a_trial_does_not_look_at_test_data():
    def evaluate(variables, split):
        del variables
        assert split == "validation"
        return {"loss": 1.0}

    task = regression()._replace(evaluate=evaluate)
    assert Program(task, SGD).run(0.1, 0, is_trial=True).test == {}


def test_a_run_that_diverges_says_when_and_stops():
    run = Program(regression(), SGD).run(1e20, 0, is_trial=False)
    assert run.diverged == 10
    assert run.test == {}


def experiment(folder, contestant=SGD):
    return Experiment(regression(), "cpu", "SGD", contestant, Records(folder, "one"), {"name": "x"})


def test_an_experiment_that_was_stopped_goes_on(tmp_path):
    runs = []

    def stop_after_four(words):
        runs.append(words)
        if len(runs) > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment(tmp_path).run(2, stop_after_four)
    experiment(tmp_path).run(2, runs.append)
    assert len(set(runs)) == len(runs) - 1 == TRIALS + 2  # one was begun twice
    (found,) = rows_of(Records(tmp_path, "one"), "regression", "cpu", {"SGD": SGD}).values()
    assert len(found.trials) == TRIALS
    assert len(found.test) == 2


def test_changed_settings_are_another_run(tmp_path):
    experiment(tmp_path).run(2, lambda _: None)
    runs, changed = [], SGD._replace(words="sgd(rate), other")
    experiment(tmp_path, changed).run(1, runs.append)
    assert len(runs) == TRIALS + 1
    rows = rows_of(Records(tmp_path, "one"), "regression", "cpu", {"SGD": changed})
    assert len(rows["SGD"].test) == 1


@pytest.mark.parametrize("name", [n for n in [*CONTESTANTS, *CANDIDATES] if "Somax" not in n])
def test_every_contestant_and_every_idea_takes_steps(name):
    contestant = {**CONTESTANTS, **CANDIDATES}[name]
    run = Program(regression(), contestant).run(1e-3, 0, is_trial=False)
    assert run.diverged is None
    assert run.validation["loss"][-1] < run.validation["loss"][0]


def test_ideas_and_contestants_have_names_of_their_own():
    assert not CONTESTANTS.keys() & CANDIDATES.keys()


def test_every_idea_is_compared_with_a_contestant():
    assert set(map(recipe_of, CANDIDATES)) <= CONTESTANTS.keys()


def test_the_tables_are_those_of_the_recorded_runs(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "training")
    written = report.write(Records(tmp_path / "training", "one"), tmp_path, tmp_path)
    for path in written:
        assert path.read_text() == (RESULTS / path.name).read_text()
    readme = (RESULTS.parents[2] / "README.md").read_text()
    assert report.summary(Records(RESULTS, "one")) in readme


def test_runs_at_published_settings_have_a_table_of_their_own(tmp_path):
    contestant = PUBLISHED["SGD"]._replace(start=1e-3)
    task = regression()._replace(name="cifar-resnet")
    records = Records(tmp_path, "one")
    for seed in range(2):
        Experiment(task, "accelerator", "SGD", contestant, records, {"name": "x"}).run_published(
            seed
        )
    path, *_ = report.write(records, tmp_path, tmp_path)
    text = path.read_text()
    assert "| SGD | **" in text[text.index("At published settings") :]


def test_recipes_are_checked_on_tasks_that_did_not_find_them():
    for recipe in RECIPES:
        assert recipe.contestant in CONTESTANTS
        assert recipe.checked
        assert not set(recipe.found) & set(recipe.checked)
        assert {*recipe.found, *recipe.checked} <= TASKS.keys()


def test_the_table_of_recipes_has_the_trials_at_the_first_and_the_best_rate():
    recipe = RECIPES[0]
    trials = {CONTESTANTS[recipe.contestant].start: 3.0, 0.1: 2.0}
    base = {CONTESTANTS["NAdamW"].start: 4.0, 0.1: 2.5}
    rows = {
        recipe.contestant: row([1.0, 3.0], [])._replace(trials=trials),
        "NAdamW": row([5.0, 9.0], [])._replace(trials=base),
    }
    *_, line = recipes.table({recipe.checked[0]: rows})
    assert line.endswith(f"| {recipe.checked[0]} | no | 3 | 2 | 4 | 2.5 | +2.2 |")


def test_the_report_names_every_contestant(tmp_path, monkeypatch):
    monkeypatch.setitem(report.TASKS, "regression", None)
    for name in ("Adam", "SGD"):
        contestant = CONTESTANTS[name]._replace(only=None)
        experiment(tmp_path, contestant)._replace(name=name).run(2, lambda _: None)
    path, *_ = report.write(Records(tmp_path, "one"), tmp_path, tmp_path)
    text = path.read_text()
    assert "| Adam |" in text
    assert "| SGD |" in text
    assert (tmp_path / "training_cpu_profiles.png").exists()
