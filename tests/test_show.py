"""What the book shows: figures, tables, checks and the explorer."""

import base64
import html
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import rooflm
from rooflm import show
from rooflm.roofline.numeric import LARGEST_SIZE
from rooflm.show.checks import compare
from rooflm.show.explorer import WIDGET
from rooflm.show.pass_explorer import EXPLORER_CONTROLS, explore

MODEL, DEVICE = "meta-llama/Llama-2-7b-hf", "nvidia-a6000"


@pytest.fixture(scope="module")
def decode():
    return rooflm.analyze(MODEL, DEVICE, rooflm.ForwardPass.decode(batch=1, context=2048))


@pytest.fixture(scope="module")
def too_large():
    return rooflm.analyze(MODEL, DEVICE, rooflm.ForwardPass.decode(batch=256, context=4096))


def agrees(ours, expected, **kwargs):
    return compare("a number", ours, expected, "a source", **kwargs).agrees


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("expected", "low", "high"),
    [
        # The closed interval of numbers that print so, worked out by hand.
        ("201.6", 201.55, 201.65),
        ("34", 33.5, 34.5),
        ("214", 213.5, 214.5),
        ("0.25", 0.245, 0.255),
        ("1.0", 0.95, 1.05),
        ("-3.0", -3.05, -2.95),
        ("2,048", 2047.5, 2048.5),
        ("1e3", 500, 1500),
        ("1.50e-3", 1.495e-3, 1.505e-3),
        ("1T", 0.5e12, 1.5e12),
        ("155T", 154.5e12, 155.5e12),
        ("69G", 68.5e9, 69.5e9),
        ("16K", 15.5e3, 16.5e3),
        ("155 TFLOP/s", 154.5e12, 155.5e12),
        ("126.7 TOPS", 126.65e12, 126.75e12),
        ("26 GB", 25.5e9, 26.5e9),
        ("48 GiB", 47.5 * 2**30, 48.5 * 2**30),
        ("226.9 ms", 0.22685, 0.22695),
        ("3.5 µs", 3.45e-6, 3.55e-6),
        ("96.8 %", 0.9675, 0.9685),
        ("15 s", 14.5, 15.5),
        ("93 tokens/s", 92.5, 93.5),
        ("2.4×", 2.35, 2.45),
        ("40 KV heads", 39.5, 40.5),
    ],
)
def test_a_printed_number_is_met_by_what_rounds_to_it(expected, low, high):
    width = high - low
    assert agrees(low, expected) and agrees(high, expected)
    assert agrees((low + high) / 2, expected)
    assert not agrees(low - 1e-6 * width, expected)
    assert not agrees(high + 1e-6 * width, expected)


def test_the_edge_of_a_digit_may_be_rounded_either_way():
    assert agrees(34.5, "34") and agrees(34.5, "35")
    assert agrees(34.45, "34.4") and agrees(34.45, "34.5")  # 34.45 has no exact binary form


@pytest.mark.parametrize("text", ["", "fast", "~15", "26-28 GB", "10^12", "1.2.3", "nan", "inf"])
def test_text_that_is_not_one_number_is_refused(text):
    with pytest.raises(ValueError, match="starts with a number"):
        agrees(1.0, text)


def test_a_computed_number_is_met_to_a_billionth():
    assert agrees(0.1 + 0.2, 0.3)
    assert agrees(1e15 * (1 + 0.9e-9), 1e15)
    assert not agrees(1 + 2e-9, 1)
    assert not agrees(1e-30, 0)
    assert agrees(0.0, 0)


def test_nan_and_infinity_never_pass():
    nan, infinity = float("nan"), float("inf")
    for ours in (nan, infinity, -infinity):
        for expected in (nan, infinity, 1.0, "1"):
            assert not agrees(ours, expected)
            assert not agrees(ours, expected, tolerance=1e30, reason="wide")


def test_words_truth_values_and_shapes_must_be_equal():
    assert agrees("memory", "memory") and not agrees("memory", "compute")
    assert agrees(True, True) and not agrees(True, False)
    assert not agrees(True, 1) and not agrees(1, True)
    assert agrees((2, 3), [2, 3]) and not agrees((2, 3), (3, 2))


def test_numbers_of_other_packages_are_numbers():
    np, sympy = pytest.importorskip("numpy"), pytest.importorskip("sympy")
    assert agrees(np.float64(201.6126), "201.6") and agrees(np.int64(214), "214")
    assert agrees(np.float32(0.5), 0.5) and agrees(np.bool_(True), True)
    assert agrees(np.array(3.0), "3") and agrees(sympy.Rational(1, 3), "0.333")
    with pytest.raises(ValueError, match="array of shape"):
        agrees(np.ones(2), "1")


def test_a_tolerance_needs_a_reason():
    assert agrees(1.2, "1.0", tolerance=0.25, reason="read off a plot")
    assert not agrees(1.3, "1.0", tolerance=0.25, reason="read off a plot")
    with pytest.raises(ValueError, match="no reason"):
        agrees(1.2, "1.0", tolerance=0.25)
    with pytest.raises(ValueError, match="together with tolerance"):
        agrees(1.2, "1.2", reason="why not")
    for wrong in (-1, float("nan"), float("inf"), "0.1", True):
        with pytest.raises(ValueError, match="tolerance"):
            agrees(1.2, "1.2", tolerance=wrong, reason="wrong")


def test_a_check_needs_a_source():
    with pytest.raises(ValueError, match="source"):
        show.check("a number", 1, 1, source=" ")


def test_check_prints_both_numbers_the_source_and_the_verdict(capsys):
    show.check("ridge point, A6000 FP16", 201.6126, "201.6", source="survey, Fig. 5")
    show.check("q_proj", 68719476736, "69G", source="survey, Table 1")
    assert capsys.readouterr().out.splitlines() == [
        "✓ ridge point, A6000 FP16: ours 201.613, expected 201.6 (survey, Fig. 5)",
        "✓ q_proj: ours 68.7195G, expected 69G (survey, Table 1)",
    ]


def test_a_failing_check_names_both_numbers_and_stops_the_run(capsys):
    with pytest.raises(AssertionError, match=r"ours 201\.7, expected 201\.6 \(survey\)"):
        show.check("ridge point", 201.7, "201.6", source="survey")
    assert capsys.readouterr().out.startswith("✗ ridge point: ours 201.7")


def test_failing_checks_are_all_shown_before_the_run_stops(capsys):
    with pytest.raises(AssertionError) as failed:
        show.checks([("a", 1, "1", "x"), ("b", 2, "3", "y"), ("c", "memory", "compute", "z")])
    assert "b: ours 2, expected 3" in str(failed.value) and "c: ours memory" in str(failed.value)
    out = capsys.readouterr().out
    assert out.count("✗ differs") == 2 and out.count("✓ agrees") == 1


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (154.8385e12, "FLOP/s", "155 TFLOP/s"),
        (999.6e9, "B", "1 TB"),  # rounds into the next prefix
        (0.018618, "s", "18.6 ms"),
        (0, "B", "0 B"),
        (-2e6, "B", "-2 MB"),
        (1, "B", "1 B"),
        (201.613, "FLOP/B", "201.6 FLOP/B"),
        (2048, "FLOP/B", "2,048 FLOP/B"),
    ],
)
def test_si_picks_the_prefix_after_rounding(value, unit, text):
    assert show.si(value, unit, digits=4 if unit == "FLOP/B" else 3) == text


def test_si_takes_every_size_that_may_enter():
    for power in range(41):
        text = show.si(2**power, "B")
        assert 1 <= float(text.split()[0].replace(",", "")) < 1000
    assert show.si(LARGEST_SIZE, "B") == "1.1 TB"


# ---------------------------------------------------------------- tables and text


def test_a_table_escapes_markup():
    shown = show.table([{"<b>": "<script>alert(1)</script>", "n": 1}], caption='"<i>" & more')
    page = shown._repr_mimebundle_()["text/html"]
    assert "<script>" not in page and "<b>" not in page and "<i>" not in page
    assert "&lt;script&gt;" in page and 'aria-label="&quot;&lt;i&gt;&quot; &amp; more"' in page


def test_no_line_ends_before_a_unit_or_begins_with_plus_minus():
    row = (
        "+0.0252 ± 0.0039",
        "13.8 GB",
        "-0.0019 ± 0.0032, within noise",
        "50 of 100",
        "3 bits g64",
    )
    made = show.table([("a", *row)], columns=list("vwxyzu"))
    joined = "+0.0252&nbsp;± 0.0039", "13.8&nbsp;GB"
    cells = re.findall("<td>([^<]*)</td>", made.html)
    assert cells == [*joined, "-0.0019&nbsp;± 0.0032, within noise", *row[3:]]
    assert all(cell in str(made) for cell in row)  # the text is as it was


def test_a_table_has_caption_and_scoped_headings_and_scrolls_with_the_keyboard():
    page = show.table([(1, 2.5), (3, None)], columns=["a", "b"], caption="two rows").html
    assert "<caption><span>two rows</span></caption>" in page
    assert page.count('scope="col"') == 2 and page.count('scope="row"') == 2
    assert 'tabindex="0" role="region" aria-label="two rows"' in page
    assert '<td class="number">2.5</td>' in page and '<td class="number">—</td>' in page
    assert " id=" not in page  # ids would differ from run to run, or meet


def test_a_table_without_a_caption_is_no_landmark():
    page = show.table([(1, 2.5)], columns=["a", "b"]).html  # another may have the same columns
    assert 'tabindex="0" role="group" aria-label="Table: a, b"' in page


def test_percentages_stand_to_the_right():
    rows = [("a", "0.08%", "8 %"), ("b", "100.00%", "of 9 %"), ("c", None, "1%")]
    assert show.table(rows, ["case", "share", "words"]).right == (False, True, False)


def test_a_table_of_checks_has_a_class_of_its_own(monkeypatch):
    shown = []
    monkeypatch.setattr(sys.modules["rooflm.show.checks"], "_display", shown.append)
    show.checks([("a", 1, "1", "x")])
    assert '<table class="rooflm-table checks">' in shown[0].html


def test_a_table_takes_dicts_tuples_named_rows_and_frames(decode):
    pandas = pytest.importorskip("pandas")
    rows = [{"a": 1, "b": 2.34567}, {"a": None, "b": "x"}]
    by_dict = str(show.table(rows))
    assert by_dict == str(show.table([(1, 2.34567), (None, "x")], columns=["a", "b"]))
    assert by_dict.splitlines()[2].split() == ["1", "2.346"]
    frame = pandas.DataFrame({"a": [1, 2]}, index=pandas.Index(["x", "y"], name="k"))
    assert show.table(frame).columns == ("k", "a")
    assert show.table(pandas.DataFrame({"a": [1.5, None]})).rows == (("1.5",), ("—",))
    assert show.table(decode.operators, columns={"name": "operator"}).columns == ("operator",)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([(1, 2)], None, "columns="),
        ([(1, 2)], ["a"], "2 cells"),
        ([{"a": 1}], ["z"], "no row has 'z'"),
        ([], [], "no columns"),
    ],
)
def test_a_table_names_what_is_wrong_with_its_rows(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        show.table(rows, columns=columns)


def test_operators_are_the_rows_of_the_report(decode):
    shown = show.operators(decode)
    assert [row[0] for row in shown.rows] == [row.name for row in decode.operators]
    q_proj = next(row for row in shown.rows if row[0] == "q_proj")
    assert q_proj[1:4] == ("32", "33.6 MFLOP", "33.6 MB") and q_proj[-1] == "memory"
    with pytest.raises(ValueError, match="unknown column 'colour'"):
        show.operators(decode, columns=["colour"])


def test_a_takeaway_escapes_markup_and_reads_as_text():
    shown = show.takeaway("below <b>202</b> FLOP/B\n memory limits")
    page = shown._repr_mimebundle_()["text/html"]
    assert "<b>" not in page and 'role="note"' in page and "Takeaway" in page
    assert repr(shown) == "Takeaway: below <b>202</b> FLOP/B memory limits"


def test_an_equation_is_printed_as_it_stands():
    sympy = pytest.importorskip("sympy")
    b, n = sympy.symbols("b n")
    product = sympy.Mul(b, b + n, sympy.Pow(b, -1, evaluate=False), evaluate=False)
    bundle = show.equation("I", product)._repr_mimebundle_()
    assert bundle["text/latex"].startswith("$$I = ") and bundle["text/latex"].endswith("$$")
    assert bundle["text/latex"].count("b") == 3  # not cancelled
    assert bundle["text/plain"].startswith("I = ")


# ---------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def figures(decode, too_large):
    memory = {"FP16": decode.memory, "batch 256": too_large.memory}
    return {
        "roofline": show.roofline(DEVICE, {"one": decode, "many": too_large}, ("fp16", "int8")),
        "roofs": show.roofs([DEVICE, "google-tpu-v5e"]),
        "operator_bars": show.operator_bars({"one": decode, "many": too_large}),
        "memory_bars": show.memory_bars(memory, DEVICE),
        "lines": show.lines([1, 2, 4], {"a": [1, 2, 4], "b": [4, None, 1]}, "batch", "time (ms)",
                            "log2", "log", {"ridge": 2}),
        "bars": show.bars(["x", "y"], {"a": [1, 2], "b": [3, None]}, "time (ms)"),
    }  # fmt: skip


FIGURES = ["roofline", "roofs", "operator_bars", "memory_bars", "lines", "bars"]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_a_small_opaque_picture_that_fits_the_page(figures, name):
    data, metadata = figures[name]._repr_mimebundle_()
    png = base64.b64decode(data["image/png"])
    picture = Image.open(io.BytesIO(png))
    assert 600 <= picture.width <= 1000 and picture.height <= 1000
    assert len(png) < 120_000
    assert picture.convert("RGBA").getextrema()[3] == (255, 255)
    assert not {"Software", "Creation Time", "date"} & set(picture.info)
    assert metadata["image/png"]["alt"] == data["text/plain"] == figures[name].alt


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_its_numbers_in_words(figures, name):
    said = {
        "roofline": ["nvidia-a6000", "768 GB/s", "155 TFLOP/s", "ridge 201.6 FLOP/B", "q/k/v/o"],
        "roofs": ["nvidia-a6000", "google-tpu-v5e (BF16)", "819 GB/s", "ridge 240.5 FLOP/B"],
        "operator_bars": ["one: 18.6 ms", "q/k/v/o_proj", "does not fit"],
        "memory_bars": ["weights 13.5 GB", "does not fit", "capacity of nvidia-a6000: 51.5 GB"],
        "lines": ["time (ms) against batch", "a from 1 to 4", "ridge at 2"],
        "bars": ["a: x 1, y 2", "b: x 3, y none"],
    }
    for words in said[name]:
        assert words in figures[name].alt


def test_the_same_figure_has_the_same_bytes(decode, figures):
    first, second = (show.roofline(DEVICE, decode) for _ in range(2))
    assert first == second and first != figures["roofline"]


def test_a_figure_does_not_depend_on_the_settings_of_the_reader():
    import matplotlib

    plain = show.bars(["x"], {"a": [1]}, "time (ms)")
    with matplotlib.rc_context({"figure.dpi": 300, "font.size": 30, "axes.facecolor": "black"}):
        assert show.bars(["x"], {"a": [1]}, "time (ms)") == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_alternative_text_of_ones_own_stands():
    assert show.bars(["x"], {"a": [1]}, "ms", alt="measured here").alt == "measured here"
    assert show.roofs([DEVICE], alt="one roof").alt == "one roof"


def test_a_figure_of_ones_own_needs_words():
    from matplotlib.figure import Figure

    mine = Figure(figsize=(30, 2))
    mine.add_subplot().plot([1, 2])
    with pytest.raises(ValueError, match="alt"):
        show.figure(mine, alt="a plot")
    shown = show.figure(mine, alt="A line that rises from one to two.")
    assert Image.open(io.BytesIO(shown.png)).width <= 1000


def test_figures_leave_pyplot_alone(figures):
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_a_sweep_cannot_be_drawn_as_one_pass():
    np = pytest.importorskip("numpy")
    step = rooflm.ForwardPass.decode(np.array([1, 2]), 2048)
    sweep = rooflm.analyze(MODEL, DEVICE, step)
    for draw in (lambda: show.roofline(DEVICE, sweep), lambda: show.operator_bars(sweep),
                 lambda: show.operators(sweep)):  # fmt: skip
        with pytest.raises(ValueError, match="sweep"):
            draw()


def test_operators_without_arithmetic_have_no_place_on_a_roofline(decode):
    from rooflm.show.points import group

    points = group(decode.operators)
    named = {name for point in points for name in point.names}
    assert named == {row.name for row in decode.operators} - {"embedding"}
    assert sum(point.share for point in points) == pytest.approx(1, abs=1e-4)


def test_small_operators_may_be_left_out_and_the_shares_stay_those_of_the_pass():
    prefill = rooflm.analyze(MODEL, DEVICE, rooflm.ForwardPass.prefill(1, 2048))
    seconds = sum(r.count * r.seconds for r in prefill.operators if r.name == "down_proj")
    whole, heavy = show.roofline(DEVICE, prefill), show.roofline(DEVICE, prefill, least=0.05)
    share = f"gate/up/down_proj at 1,215 FLOP/B, {300 * seconds / prefill.seconds:.0f} % of"
    assert share in whole.alt and share in heavy.alt
    assert "fused_attention at" in whole.alt and "fused_attention at" not in heavy.alt
    assert "not drawn, under 5 % of the time: fused_attention, mlp_act" in heavy.alt
    assert whole.png != heavy.png
    with pytest.raises(ValueError, match="least is 5"):
        show.roofline(DEVICE, prefill, least=5)


def test_bars_and_lines_name_a_series_of_the_wrong_length():
    with pytest.raises(ValueError, match="b has shape"):
        show.bars(["x", "y"], {"b": [1]}, "ms")
    with pytest.raises(ValueError, match="b has shape"):
        show.lines([1, 2], {"b": [1]}, "batch", "ms")
    with pytest.raises(ValueError, match="quantity"):
        show.operator_bars({}, quantity="time")


# ---------------------------------------------------------------- the explorer


@pytest.fixture(scope="module")
def explorer():
    pytest.importorskip("ipywidgets")
    return show.explorer(MODEL, DEVICE)


def widgets_of(explorer):
    row, shown = explorer.widget().children
    return dict(zip((control.name for control in EXPLORER_CONTROLS), row.children, strict=True)), (
        shown
    )


def test_the_explorer_is_a_page_and_a_widget(explorer):
    bundle = explorer._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"] == explorer.widget().model_id
    page = bundle["text/html"]
    assert "default setting" in page and "Run this notebook to move the controls" in page
    assert "<select" not in page and "<input" not in page  # a page has no control that is dead
    assert "18.6 ms" in bundle["text/plain"]


def test_the_page_of_the_explorer_needs_no_widgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    bundle = show.explorer(MODEL, DEVICE)._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}


def test_the_page_of_the_explorer_has_figure_words_and_tables(explorer):
    alt = html.unescape(re.search(r'<img alt="([^"]+)"', explorer.html).group(1))
    assert "nvidia-a6000" in alt and "ridge 201.6" in alt
    png = base64.b64decode(re.search(r"base64,([^\"]+)", explorer.html).group(1))
    assert Image.open(io.BytesIO(png)).format == "PNG"
    assert explorer.html.count("<table") == 2 and "fused_attention" in explorer.html


@pytest.mark.parametrize("control", EXPLORER_CONTROLS, ids=lambda control: control.name)
def test_every_control_changes_what_is_shown(explorer, control):
    made, shown = widgets_of(explorer)
    widget, before = made[control.name], shown.value
    widget.value = control.options[-1] if control.default != control.options[-1] else (
        control.options[0]
    )  # fmt: skip
    after = shown.value
    widget.value = control.default
    assert 'role="alert"' not in after
    picture, words = r"base64,[^\"]+", r"<table.*</table>"
    assert re.search(picture, after).group() != re.search(picture, before).group()
    assert re.search(words, after, re.S).group() != re.search(words, before, re.S).group()
    assert shown.value == before


def test_every_control_has_a_name_and_a_hint(explorer):
    made, _ = widgets_of(explorer)
    for control in EXPLORER_CONTROLS:
        assert made[control.name].description == control.label
        assert control.label in made[control.name].tooltip


def test_a_setting_that_cannot_be_computed_is_one_line(explorer, monkeypatch):
    made, shown = widgets_of(explorer)
    before = shown.value

    def refuse(*_, **__):
        raise ValueError("no published rate for <fp4>")

    monkeypatch.setattr(sys.modules["rooflm.show.pass_explorer"], "analyze", refuse)
    made["batch"].value = 8
    assert shown.value == '<p role="alert">no published rate for &lt;fp4&gt;</p>'
    monkeypatch.undo()
    made["batch"].value = 1
    assert shown.value == before


def test_a_plan_that_does_not_fit_says_so_wherever_it_is_shown():
    settings = {"model": "meta-llama/Llama-2-70b-hf", "batch": 64}
    page = show.explorer(**settings).html
    alt = html.unescape(re.search(r'<img alt="([^"]+)"', page).group(1))
    caption = re.search(r"<figcaption[^>]*>(.*?)</figcaption>", page).group(1)
    status = re.search(r'<p role="status">(.*?)</p>', page).group(1)
    for words in (alt, caption, status):
        assert "does not fit" in words
    assert dict(explore(**settings)[1])["fits"] == "no"


def test_explorer_and_library_agree(decode):
    report, rows = explore()
    assert report == decode
    assert dict(rows)["time of the pass, operator by operator"] == show.si(decode.seconds, "s")


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(ValueError, match="unknown control 'batches'; nearest: batch"):
        show.explorer(batches=2)
    with pytest.raises(ValueError, match="nearest: nvidia-a6000"):
        show.explorer(device="nvidia-a600")
    assert show.explorer(batch=3).start["batch"] == 3


def test_without_its_packages_show_says_which_extra_has_them():
    lib = Path(show.__file__).parents[2]
    line = "import rooflm; rooflm.analyze; import rooflm.show"
    done = subprocess.run(
        [sys.executable, "-S", "-c", line],
        env={"PYTHONPATH": str(lib)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert 'install "rooflm[show]"' in done.stderr.splitlines()[-1]
