"""Commands of the laboratory: one line for what is wrong, an exit status, and a map's frame."""

import pytest

from rooflm.lab import maps
from rooflm.lab.bench import checkpoint_digest
from rooflm.lab.command import OneLineParser, attempt
from rooflm.lab.map_command import MapCommand

MAP = maps.MapFile(
    ("measurements", "numbers.csv"),
    "python -m numbers",
    ("width",),
    {**maps.HEAD, "width": int, **maps.TAIL},
)


def test_a_command_ends_with_one_line_and_a_status(capsys):
    def wrong():
        raise ValueError("width is 0; allowed: 1 or more")

    def stopped():
        raise KeyboardInterrupt

    assert attempt("python -m numbers", lambda: None) == 0
    assert attempt("python -m numbers", wrong) == 2
    assert capsys.readouterr().err == "numbers: error: width is 0; allowed: 1 or more\n"
    assert attempt("python -m numbers", stopped) == 130
    assert "goes on" in capsys.readouterr().err
    assert attempt("python -m numbers", stopped, lambda: "begins anew") == 130
    assert capsys.readouterr().err == "interrupted; the same command begins anew\n"


def test_a_parsers_error_is_one_line(capsys):
    parser = OneLineParser(prog="python -m numbers")
    parser.add_argument("--width", type=int)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--width", "wide"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("numbers: error: ") and "wide" in said and said.count("\n") == 1


def fill(path, name, digest, tokens):
    """A row by hand, as an earlier run wrote it."""
    MAP.fill(path, name, digest, tokens, [1], lambda x: {"width": x}, lambda x: {}, str)


@pytest.fixture
def asked(tmp_path):
    """A command whose work is to keep what it was asked for."""
    jobs = []
    tokens = {"teacher": 1000, "student": 700}
    command = MapCommand(MAP, "Count.", tokens, 200, ("round", "gptq"), jobs.append)

    def ask(*given, out="map.csv"):
        jobs.clear()
        try:
            status = command.main([*given, "--out", str(tmp_path / out)])
        except SystemExit as stop:
            status = stop.code
        return status, list(jobs)

    return ask


def test_a_map_command_measures_its_models_each_on_its_own_tokens(asked, capsys):
    status, jobs = asked()
    assert status == 0
    assert [(j.model, j.tokens, j.digest) for j in jobs] == [
        ("teacher", 1000, checkpoint_digest("teacher")),
        ("student", 700, checkpoint_digest("student")),
    ]
    assert "the map is in" in capsys.readouterr().out
    assert [(j.model, j.tokens) for j in asked("--model", "student", "--tokens", "400")[1]] == [
        ("student", 400)
    ]


def test_another_model_is_measured_on_as_many_tokens_as_the_first(asked):
    assert [j.tokens for j in asked("--model", "student-alone")[1]] == [1000]


def test_a_method_narrows_what_is_wanted(asked):
    (job,) = asked("--model", "teacher", "--method", "gptq")[1]
    assert job.wants("gptq") and not job.wants("round")
    (job,) = asked("--model", "teacher")[1]
    assert job.wants("gptq") and job.wants("round")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--tokens", "399"), "--tokens is 399; allowed: 400 or more"),
        (("--tokens", "0"), "--tokens is 0; allowed: 400 or more"),
        (("--method", "grow"), "'round', 'gptq'"),
        (("--model", "professor"), "unknown checkpoint 'professor'; allowed: "),
    ],
)
def test_a_map_command_refuses_in_one_line(asked, capsys, given, words):
    status, jobs = asked(*given)
    said = capsys.readouterr().err
    assert status == 2 and not jobs
    assert words in said and said.count("\n") == 1


def test_rows_of_another_length_are_refused_before_the_work_unless_fresh(asked, tmp_path, capsys):
    fill(tmp_path / "map.csv", "teacher", checkpoint_digest("teacher"), 600)
    status, jobs = asked("--model", "teacher")
    assert status == 2 and not jobs
    assert "measured on 600 tokens, not 1000" in capsys.readouterr().err
    assert asked("--model", "teacher", "--tokens", "750")[0] == 0  # three whole blocks
    assert asked("--model", "teacher", "--fresh")[0] == 0
