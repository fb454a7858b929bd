"""The command: its answers, and one line for everything it cannot answer."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rooflm
from rooflm import ForwardPass, Precision
from rooflm.roofline import cli

LLAMA, A6000 = "meta-llama/Llama-2-7b-hf", "nvidia-a6000"
LIB = Path(rooflm.__file__).parents[1]


def run(capsys, *words):
    status = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *words):
    status, out, err = run(capsys, *words)
    assert status == 2
    assert out == ""
    assert err.startswith("rooflm: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    assert len(err) < 700
    return err


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("accounting", ["exact", "survey"])
def test_analyze_json_is_the_report(capsys, phase, accounting):
    words = f"--phase {phase} --batch 3 --context 700 --weights int4 --kv-cache int8"
    words += f" --attention unfused --accounting {accounting} --json"
    status, out, err = run(capsys, "analyze", LLAMA, A6000, *words.split())
    assert (status, err) == (0, "")
    answer = json.loads(out)
    p = Precision("int4", kv_cache="int8")
    step = getattr(ForwardPass, phase)(3, 700)
    report = rooflm.analyze(LLAMA, A6000, step, p, "unfused", accounting)
    assert answer["operators"] == [row._asdict() for row in report.operators]
    for name in ("seconds", "lower_bound", "flops", "bytes"):
        assert answer[name] == getattr(report, name)
    assert set(answer["memory"]) == {
        "weights", "kv_cache", "activations", "total", "capacity", "fits",
    }  # fmt: skip
    assert answer["memory"]["total"] == report.memory.total
    assert answer["memory"]["fits"] is True


def test_the_bare_checkout_needs_nothing_installed():
    # -S keeps site-packages away: the standard library alone answers.
    words = f"analyze {LLAMA} {A6000} --phase prefill --batch 1 --context 2048"
    words += " --attention unfused --accounting survey --json"
    done = subprocess.run(
        [sys.executable, "-S", "-m", "rooflm", *words.split()],
        env={"PYTHONPATH": str(LIB), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    answer = {row["name"]: row for row in json.loads(done.stdout)["operators"]}
    for fact in rooflm.survey_table1():
        if fact["stage"] == "prefill":
            name = {"norm": "attn_norm", "add": "attn_add"}.get(fact["layer"], fact["layer"])
            row = answer[name]
            for ours, theirs in (
                ("flops", "ops"),
                ("bytes", "bytes"),
                ("intensity", "intensity"),
                ("attainable", "performance"),
            ):
                assert row[ours] == pytest.approx(float(fact[theirs]), rel=1e-4)
            assert row["bound"] == fact["bound"]


def test_a_plan_that_does_not_fit_says_so_beside_every_speed(capsys):
    big = "meta-llama/Llama-2-70b-hf"
    assert "DOES NOT FIT" in run(capsys, "analyze", big, A6000)[1]
    assert "fits: no" in run(capsys, "generate", big, A6000)[1]
    assert run(capsys, "memory", big, A6000)[1].splitlines()[-1].split() == ["fits", "no"]
    assert run(capsys, "sweep", big, A6000, "--csv")[1].splitlines()[1].endswith(",no")
    assert json.loads(run(capsys, "generate", big, A6000, "--json")[1])["memory"]["fits"] is False


def test_sweep_csv_has_a_row_for_each_batch_and_context(capsys):
    words = "--batch 1,2,8:12:2 --context 100:102 --csv"
    status, out, _ = run(capsys, "sweep", LLAMA, A6000, *words.split())
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0
    assert [(int(r["batch"]), int(r["context"])) for r in rows] == [
        (b, c) for b in (1, 2, 8, 10, 12) for c in (100, 101, 102)
    ]
    for r in rows:
        one = rooflm.analyze(LLAMA, A6000, ForwardPass.decode(int(r["batch"]), int(r["context"])))
        assert float(r["seconds"]) == one.seconds


def test_generate_with_one_token_has_no_tpot(capsys):
    words = ("generate", LLAMA, A6000, "--output-tokens", 1)
    assert "none, one token" in run(capsys, *words)[1]
    assert json.loads(run(capsys, *words, "--json")[1])["tpot"] is None


def test_models_and_hardware_list_every_name(capsys):
    models = run(capsys, "models")[1]
    hardware = run(capsys, "hardware")[1]
    assert all(name in models for name in rooflm.model_names())
    assert all(name in hardware for name in rooflm.hardware_names())
    assert {m["name"] for m in json.loads(run(capsys, "models", "--json")[1])} == set(
        rooflm.model_names()
    )
    assert len(json.loads(run(capsys, "hardware", "--json")[1])) == len(rooflm.hardware_names())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "COMMAND"),
        (["analyzer"], "analyzer"),
        (["analyze"], "MODEL"),
        (["analyze", "meta-llama/Llama-2-7b", A6000], "nearest: meta-llama/Llama-2-7b-hf"),
        (["analyze", LLAMA, "nvidia-a6001"], "nearest: nvidia-a6000"),
        (["analyze", LLAMA, A6000, "--batch", "0"], "batch is 0"),
        (["analyze", LLAMA, A6000, "--batch", "-3"], "batch is -3"),
        (["analyze", LLAMA, A6000, "--batch", "1.5"], "batch is '1.5'"),
        (["analyze", LLAMA, A6000, "--batch", "1e3"], "batch is '1e3'"),
        (["analyze", LLAMA, A6000, "--context", "9" * 5000], "context is '999"),
        (["analyze", LLAMA, A6000, "--context", str(2**40 + 1)], "2^40"),
        (["analyze", LLAMA, A6000, "--weights", "int5"], "unknown number format 'int5'"),
        (["analyze", LLAMA, A6000, "--phase", "both"], "both"),
        (["analyze", LLAMA, A6000, "--colour"], "--colour"),
        (["analyze", LLAMA, "google-tpu-v5e", "--weights", "fp32"], "no published rate for fp32"),
        (["sweep", LLAMA, A6000, "--batch", "5:1"], "batch is '5:1'"),
        (["sweep", LLAMA, A6000, "--batch", "1:1099511627776"], "at most"),
        (["sweep", LLAMA, A6000, "--batch", "1:2000", "--context", "1:2000"], "rows"),
        (["analyze", LLAMA, A6000, "--batch=--"], "batch is '--'"),
        (["analyze", LLAMA, A6000, "--phase=--"], "phase is '--'"),
        (["analyze", LLAMA, A6000, "--batch", "1_000"], "batch is '1_000'"),
        (["analyze", LLAMA, A6000, "--batch", "٣"], "batch is"),
        (["sweep", LLAMA, A6000, "--batch", "1", "8", "64"], "1,8,64"),
        (["analyze", "/", A6000], "/"),
        (["analyze", "/dev/zero", A6000], "/dev/zero"),
        (["analyze", "a\nb", A6000], "a"),
        (["analyze", "", A6000], "model"),
    ],
)
def test_bad_input_ends_in_one_line_that_names_it(capsys, words, named):
    assert named in refused(capsys, *words)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"llama"',
        b"{}",
        b'{"model_type": "llama"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}",
        b'{"model_type": "llama", "hidden_size": NaN}',
        b'{"model_type": "llama", "hidden_size": -1}',
        b"\xff\xfe\x00{}",
        b"\x00" * 100,
        b"PK\x03\x04",
    ],
    ids=lambda content: str(content[:24]),
)
def test_a_file_that_is_no_config_is_refused(capsys, tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    refused(capsys, "analyze", path, A6000)


def test_ten_megabytes_of_noise_are_refused(capsys, tmp_path):
    path = tmp_path / "noise.json"
    path.write_bytes(bytes(range(256)) * 40_000)
    refused(capsys, "analyze", path, A6000)
    refused(capsys, "analyze", tmp_path, A6000)
    refused(capsys, "analyze", tmp_path / "absent.json", A6000)


words = st.one_of(
    st.sampled_from(
        ["analyze", "memory", "sweep", "generate", LLAMA, A6000, "--batch", "--context", "--json",
         "--weights", "int4", "1", "0", "-1", "--phase", "decode", "--csv", "1,2", "1:3"]
    ),
    st.text(max_size=12),
)  # fmt: skip


@settings(max_examples=300)
@given(st.lists(words, max_size=8))
def test_any_words_end_in_an_answer_or_one_line(arguments):
    if {"-h", "--help"} & set(arguments) or any(w.startswith("--h") for w in arguments):
        return
    out, err = io.StringIO(), io.StringIO()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
        assert out.getvalue().startswith("usage:")
    finally:
        sys.stdout, sys.stderr = before
    if status == 0:
        assert err.getvalue() == ""
    else:
        assert status == 2
        assert err.getvalue().count("\n") == 1


def test_the_table_adds_up_and_says_what_it_is_of(capsys):
    out = run(capsys, "analyze", LLAMA, A6000, "--batch", 2)[1]
    assert out.startswith(f"{LLAMA} on {A6000}, decode, batch 2, context 2048; weights fp16")
    report = rooflm.analyze(LLAMA, A6000, ForwardPass.decode(2, 2048))
    q_proj = next(row for row in report.operators if row.name == "q_proj")
    line = next(line for line in out.splitlines() if line.startswith("q_proj"))
    assert f"{32 * q_proj.seconds * 1e3:.4g} ms" in line
    assert "48 GiB (51.54 GB)" in out


def test_a_state_has_a_format_of_its_own(capsys):
    def cache(*more):
        out = run(capsys, "memory", "mamba2-2.7b", A6000, "--json", *more)[1]
        return json.loads(out)["kv_cache"]

    conv = 64 * 3 * (5120 + 256) * 2
    assert cache() - conv == 64 * 80 * 64 * 128 * 4
    assert cache("--state", "bf16") - conv == 64 * 80 * 64 * 128 * 2


def run_process(redirect, **environment):
    line = f'"{sys.executable}" -m rooflm analyze {LLAMA} {A6000} {redirect}'
    env = os.environ | {"PYTHONPATH": str(LIB)} | environment
    return subprocess.run(line, shell=True, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
def test_an_output_that_takes_nothing_ends_in_one_line(redirect):
    done = run_process(redirect)
    assert done.returncode == 2
    assert done.stderr.startswith("rooflm: ") and done.stderr.count("\n") == 1


def test_a_terminal_without_greek_letters_is_answered_too():
    done = run_process("", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1.024 us" in done.stdout


def test_a_reader_that_stops_early_gets_no_traceback():
    line = f'"{sys.executable}" -m rooflm sweep {LLAMA} {A6000} --batch 1:3000 --csv | head -n 1'
    done = subprocess.run(
        line,
        shell=True,
        env=os.environ | {"PYTHONPATH": str(LIB)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("batch,context")
    assert done.stderr == ""
