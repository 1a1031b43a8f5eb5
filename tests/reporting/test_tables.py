"""Accuracy tables: means over seeds, what counts as best, nulls."""

import math
import statistics

import pytest

from mole_jax.reporting import runs, tables
from tests.reporting.run_directories import write_run


def read(tmp_path, *settings):
  places = [
    write_run(tmp_path / str(number), name, seed)
    for number, (name, seed) in enumerate(settings)
  ]
  return runs.read_runs(places)


def test_mean_and_spread_over_runs_of_one_name(tmp_path):
  made = read(tmp_path, ("a", 0), ("b", 3), ("a", 1), ("a", 2))
  table = tables.domain_table(made)
  labels = [label for label, _ in table.rows]
  assert labels == [
    *("a, seed 0", "a, seed 1", "a, seed 2", "a, mean of 3", "b")
  ]
  ours = [
    run.evaluation["domains"]["general"]["accuracy"]
    for run in made
    if run.name == "a"
  ]
  mean = table.rows[3][1][0]
  assert mean.accuracy == pytest.approx(statistics.mean(ours))
  assert mean.spread == pytest.approx(statistics.stdev(ours))
  assert table.columns == ("general", "document", "biomedical", "average")


def make_table(*scores, stands=None):
  cells = [(tables.Cell(score, 0.2, 0.3),) for score in scores]
  rows = tuple((f"run {i}", cell) for i, cell in enumerate(cells))
  stands = stands or (True,) * len(rows)
  is_mean = (False,) * len(rows)
  return tables.Table("t", ("c",), rows, is_mean, stands)


def test_best_is_the_highest_and_ties_share_it():
  assert make_table(0.4, 0.6, 0.5).best(0) == {1}
  assert make_table(0.6, 0.6, 0.5).best(0) == {0, 1}
  assert make_table(0.6, math.nan).best(0) == set()
  assert make_table(0.6).best(0) == set()


def test_a_lucky_seed_is_not_best_where_means_are_compared():
  table = make_table(0.9, 0.5, 0.7, 0.8, stands=(False, False, True, True))
  assert table.best(0) == {3}


def test_the_best_is_marked_by_a_sign_and_not_only_by_colour():
  text = tables.html_table(make_table(0.4, 0.6))
  assert text.count("★") == 1
  assert "60.0</b> ★" in text


def test_an_accuracy_that_beats_no_baseline_is_marked():
  assert tables.Cell(0.5, 0.4, 0.3).is_above_both
  assert not tables.Cell(0.5, 0.5, 0.3).is_above_both
  assert not tables.Cell(0.5, 0.4, 0.6).is_above_both
  assert tables.Cell(0.5, 0.4, math.nan).is_above_both
  assert "not above both" in tables.html_table(make_table(0.25))


def test_each_question_type_of_each_domain_has_a_column(tmp_path):
  made = read(tmp_path, ("a", 0), ("b", 1))
  general, *_ = every = tables.type_tables(made)
  assert [table.title for table in every] == [
    *("general", "document", "biomedical")
  ]
  assert general.columns == ("side", "count", "shown", "category", "larger")
  # The run directory has null for it.
  assert math.isnan(general.rows[0][1][4].accuracy)
  assert "–" in tables.html_table(general)


def test_a_type_that_one_run_lacks_is_a_dash(tmp_path):
  made = read(tmp_path, ("a", 0), ("b", 1))
  del made[1].evaluation["domains"]["document"]["types"]["side"]
  document = tables.type_tables(made)[1]
  assert not math.isnan(document.rows[0][1][0].accuracy)
  assert math.isnan(document.rows[1][1][0].accuracy)
