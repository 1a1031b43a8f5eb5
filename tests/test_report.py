"""The report command: what it prints, where it writes, how it refuses."""

import pytest

from mole_jax import report
from tests.reporting.run_directories import write_run


def test_the_command_writes_into_the_first_run_and_prints_the_path(
  tmp_path, capsys
):
  first = write_run(tmp_path / "first", num_samples=1)
  second = write_run(tmp_path / "second", "lora", num_experts=1)
  assert report.main([str(first), str(second)]) == 0
  out = capsys.readouterr().out
  path = first / "report" / "index.html"
  assert path.is_file()
  assert out.splitlines()[-1] == str(path)
  for word in ("mole3", "lora", "general", "document", "biomedical"):
    assert word in out


def test_out_says_where_to_write(tmp_path):
  run = write_run(tmp_path / "run", is_evaluated=False)
  out = tmp_path / "elsewhere"
  assert report.main([str(run), f"--out={out}"]) == 0
  assert (out / "index.html").is_file()
  assert not (run / "report").exists()


def test_a_wrong_directory_is_one_line_and_exit_code_2(tmp_path, capsys):
  assert report.main([str(tmp_path / "nowhere")]) == 2
  error = capsys.readouterr().err
  assert len(error.splitlines()) == 1
  assert error.startswith("ValueError: run ")
  assert "Traceback" not in error


@pytest.mark.parametrize("argv", [[], ["--wrong", "x"]])
def test_wrong_usage_is_exit_code_2(argv):
  with pytest.raises(SystemExit) as exit_:
    report.main(argv)
  assert exit_.value.code == 2
