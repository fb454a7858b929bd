"""A method on a whole model: every layer by hand, block after block; and the command."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import rooflm
from rooflm.lab.checkpoints import load_checkpoint, save_checkpoint
from rooflm.lab.model import Config, Rope, Transformer
from rooflm.lab.quantize import __main__ as command
from rooflm.lab.quantize import binary, codecs, grids, salient, sensitive
from rooflm.lab.quantize.apply import RoundedInput, gather_knowledge, quantize_model
from rooflm.lab.quantize.awq import awq
from rooflm.lab.quantize.billm import billm
from rooflm.lab.quantize.codebook import squeezellm
from rooflm.lab.quantize.gptq import gptq
from rooflm.lab.quantize.int8 import Int8Linear, int8_product
from rooflm.lab.quantize.methods import METHODS, Recipe
from rooflm.lab.quantize.rotation import RotatedLinear, rotate_model
from rooflm.lab.quantize.smoothquant import input_peaks, smooth_model

CONFIG = Config(vocab=50, hidden=32, layers=3, heads=4, kv_heads=2, intermediate=64)
ROWS = torch.randint(0, 50, (6, 20), generator=torch.Generator().manual_seed(3))
LINEARS = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]


def make_model(config=CONFIG, seed=0):
    """Weights large enough that a block's error reaches the next one."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def exact():
    """The same in float64: a code then doesn't hang on the order in which inputs were summed."""
    return make_model().double()


def fisher_by_hand(model, rows):
    """Mean squared gradient of the summed loss, through autograd on a copy."""
    twin = copy.deepcopy(model).requires_grad_(True)
    found = {}
    for row in rows:
        twin.zero_grad()
        logits = twin(row[None, :-1])[0]
        (-logits.log_softmax(-1)[torch.arange(len(row) - 1), row[1:]].sum()).backward()
        for i, block in enumerate(twin.layers):
            for name in LINEARS:
                square = getattr(block, name).weight.grad.square() / len(rows)
                found[i, name] = found.get((i, name), 0) + square
    return found


def block_inputs(block, states, rope):
    """What each linear layer of a block reads: (tokens, d_in), by its name."""
    found, hooks = {}, []
    for name in LINEARS:

        def note(_, given, name=name):
            found.setdefault(name, []).append(given[0].flatten(0, -2))

        hooks.append(getattr(block, name).register_forward_pre_hook(note))
    block(states, rope, None)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def by_hand(model, rows, quantize, sequential=True):
    """Every weight quantized by `quantize(weight, inputs, fisher)`; the model's copy."""
    result, fisher = copy.deepcopy(model), fisher_by_hand(model, rows)
    rope = Rope(CONFIG.head_dim, CONFIG.rope_base)
    states = result.embedding(rows)
    for i, block in enumerate(result.layers):
        inputs, before = block_inputs(block, states, rope), block(states, rope, None)
        for name in LINEARS:
            weight = getattr(block, name).weight
            weight.copy_(quantize(weight.clone(), inputs[name], fisher[i, name]))
        states = block(states, rope, None) if sequential else before
    return result


def gram(x):
    return x.T @ x / len(x)


# What each method's core is called with, said again without the library's plumbing.
CORES = {
    Recipe("round", 3, 8): lambda w, x, f: grids.round_to_nearest(w, 3, 8),
    Recipe("round", 3, symmetric=True, clip="mse"): lambda w, x, f: grids.round_to_nearest(
        w, 3, 0, True, "mse"
    ),
    Recipe("format", number_format="nvfp4"): lambda w, x, f: codecs.to_format(w, "nvfp4"),
    Recipe("gptq", 2, 16): lambda w, x, f: gptq(w, gram(x), 2, 16).weight,
    Recipe("gptq", 3, act_order=True): lambda w, x, f: gptq(w, gram(x), 3, act_order=True).weight,
    Recipe("awq", 3, 16): lambda w, x, f: awq(w, gram(x), x.abs().mean(0), 3, 16).weight,
    Recipe("salient", 3, 16, keep=0.1): lambda w, x, f: (
        salient.keep_salient(w, x.abs().mean(0), 3, 16, 0.1).weight
    ),
    Recipe("owq", 3, keep=0.1): lambda w, x, f: (
        sensitive.keep_columns(w, gram(x), 3, round(0.1 * w.shape[1])).weight
    ),
    Recipe("spqr", 3, 8, keep=0.02): lambda w, x, f: sensitive.spqr(w, gram(x), 3, 8, 0.02).weight,
    Recipe("squeezellm", 2): lambda w, x, f: squeezellm(w, f, 2).weight,
    Recipe("binary", group=16): lambda w, x, f: binary.binarize(w, 16),
    Recipe("ternary"): lambda w, x, f: binary.ternarize(w),
    Recipe("pb-llm", group=16, keep=0.2): lambda w, x, f: (
        binary.pb_llm(w, 0.2, "hessian", gram(x), 16).weight
    ),
    Recipe("billm", group=16): lambda w, x, f: billm(w, gram(x), 16).weight,
}


def assert_same_weights(found, expected, tolerance=1e-6):
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        close = torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        assert close, f"{name} differs by {(a - b).abs().max():.3g}"


def test_all_methods_have_a_core_here():
    assert {recipe.method for recipe in CORES} | {"llm-int8"} == set(METHODS)


@pytest.mark.parametrize("recipe", CORES, ids=lambda recipe: recipe.method)
def test_a_method_is_its_core_applied_layer_by_layer_to_what_the_quantized_blocks_hand_on(
    exact, recipe
):
    expected = by_hand(exact, ROWS, CORES[recipe])
    assert_same_weights(quantize_model(exact, recipe, ROWS).model, expected)


def test_the_second_block_sees_the_first_one_quantized(exact):
    recipe = Recipe("gptq", 2, 16)
    together = by_hand(exact, ROWS, CORES[recipe])
    apart = by_hand(exact, ROWS, CORES[recipe], sequential=False)
    for name in LINEARS:
        first, second = (getattr(m.layers[0], name).weight for m in (together, apart))
        torch.testing.assert_close(first, second)
    assert (together.layers[1].q_proj.weight != apart.layers[1].q_proj.weight).any()
    # With knowledge that was gathered before, it doesn't.
    known = gather_knowledge(exact, ROWS)
    assert_same_weights(quantize_model(exact, recipe, knowledge=known).model, apart)


@pytest.mark.parametrize("recipe", CORES, ids=lambda recipe: recipe.method)
def test_gathered_knowledge_is_enough_for_every_method(exact, recipe):
    found = quantize_model(exact, recipe, knowledge=gather_knowledge(exact, ROWS))
    assert_same_weights(found.model, by_hand(exact, ROWS, CORES[recipe], sequential=False))


def test_the_original_stays_as_it_is(model):
    before = copy.deepcopy(model.state_dict())
    for recipe in (Recipe("gptq", 3, rotate=True, activations=4), Recipe("llm-int8")):
        quantize_model(model, recipe, ROWS)
    assert all(type(getattr(block, x)) is nn.Linear for block in model.layers for x in LINEARS)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[k], tensor) for k, tensor in model.state_dict().items())


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_run_that_goes_on_from_done_ends_at_the_same_weights(model, finished):
    recipe, seen = Recipe("gptq", 2, 8), []
    whole = quantize_model(model, recipe, ROWS, progress=lambda i, s: seen.append((i, dict(s))))
    assert [(i, len(stored)) for i, stored in seen] == [(1, 7), (2, 14), (3, 21)]
    resumed = quantize_model(model, recipe, ROWS, done=seen[finished - 1][1])
    assert_same_weights(resumed.model, whole.model, tolerance=0)
    assert (resumed.bits_per_weight, resumed.errors) == (whole.bits_per_weight, whole.errors)


def test_what_is_done_is_taken_as_it_is(model):
    done = {"layers.1.o_proj": METHODS["binary"].quantize(torch.ones(32, 32), None, Recipe())}
    found = quantize_model(model, Recipe("round", 8), done=done).model
    assert (found.layers[1].o_proj.weight == 1).all()


def test_stored_bits_are_those_of_the_format(model):
    for group, name in ((32, "int3-g32"), (16, "int3-g16")):
        found = quantize_model(model, Recipe("round", 3, group)).bits_per_weight
        assert found == pytest.approx(rooflm.load_format(name).bits)


def test_stored_bits_weigh_each_layer_by_its_size(model):
    # One FP16 scale and a zero point of 4 bits a row: rows of 64 in down_proj, of 32 elsewhere.
    narrow, wide = 2 * 32 * 32 + 2 * 16 * 32 + 2 * 64 * 32, 32 * 64
    expected = 4 + 20 * (narrow / 32 + wide / 64) / (narrow + wide)
    assert quantize_model(model, Recipe("round", 4)).bits_per_weight == pytest.approx(expected)


def test_errors_are_relative_squared_output_errors(model):
    recipe = Recipe("round", 3)
    found, inputs = quantize_model(model, recipe, ROWS), {}
    by_hand(model, ROWS, lambda w, x, f: inputs.setdefault(len(inputs), (w, x)) and w)
    for place, name in enumerate(LINEARS):  # of the first block
        weight, x = inputs[place]
        moved = functional.linear(x, grids.round_to_nearest(weight, 3) - weight)
        expected = moved.square().sum() / functional.linear(x, weight).square().sum()
        assert found.errors[f"layers.0.{name}"] == pytest.approx(expected.item(), rel=1e-4)


def test_inputs_are_rounded_by_token_before_the_layer(model):
    block = quantize_model(model, Recipe("round", 8, activations=4)).model.layers[1]
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    step = x.abs().amax(-1, keepdim=True) / 7
    rounded = (x / step).round().clamp(-8, 7) * step
    expected = functional.linear(rounded, block.q_proj.linear.weight)
    # The scale is stored in FP16: a thousandth of it.
    torch.testing.assert_close(block.q_proj(x), expected, rtol=0, atol=1e-3 * expected.abs().max())


def test_in_a_rotated_model_the_rotated_input_is_rounded(model):
    recipe = Recipe("round", 8, rotate=True, activations=4)
    outer = quantize_model(model, recipe).model.layers[0].down_proj
    assert isinstance(outer, RotatedLinear) and isinstance(outer.linear, RoundedInput)
    assert type(outer.linear.linear) is nn.Linear
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 64:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    rounded = grids.quantize_activations(x @ hadamard / 8, 4)
    torch.testing.assert_close(outer(x), rounded @ outer.weight.T, rtol=1e-4, atol=1e-4)
    turned = rotate_model(model, 0).layers[0].down_proj.weight
    torch.testing.assert_close(outer.weight, grids.round_to_nearest(turned, 8))


def test_a_static_scale_is_that_of_the_largest_input_of_calibration(model):
    recipe = Recipe("round", 8, activations=8, per="static")
    for found in (
        quantize_model(model, recipe, ROWS).model,
        quantize_model(model, recipe, knowledge=gather_knowledge(model, ROWS)).model,
    ):
        rope = Rope(CONFIG.head_dim, CONFIG.rope_base)
        seen = block_inputs(model.layers[0], model.embedding(ROWS), rope)
        layer = found.layers[0].up_proj
        assert layer.scale.item() == pytest.approx(seen["up_proj"].abs().max().item() / 127, 1e-3)
        far = torch.full((1, 32), 1e6)  # saturates, and does not move the scale
        torch.testing.assert_close(layer(far), layer(2 * far))


def test_a_scale_for_the_tensor_is_shared_by_its_tokens(model):
    layer = quantize_model(model, Recipe("round", 8, activations=4, per="tensor")).model
    x = torch.ones(2, 32) * torch.tensor([[1.0], [1e-3]])
    out = layer.layers[0].q_proj(x)
    assert out[0].abs().max() > 0 and (out[1] == 0).all()  # far below the step of the other


def test_smoothing_comes_first_and_keeps_what_the_model_computes(model):
    recipe = Recipe("round", 8, smooth=0.7)
    expected = quantize_model(
        smooth_model(model, input_peaks(model, ROWS), 0.7), Recipe("round", 8)
    )
    assert_same_weights(quantize_model(model, recipe, ROWS).model, expected.model)


def test_llm_int8_rounds_while_running_and_leaves_the_weights(model):
    found = quantize_model(model, Recipe("llm-int8"))
    layer, weight = found.model.layers[2].gate_proj, model.layers[2].gate_proj.weight
    assert isinstance(layer, Int8Linear) and torch.equal(layer.weight, weight)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    x[:, 5] = 20
    torch.testing.assert_close(layer(x), int8_product(x, weight).y)
    assert found.bits_per_weight == pytest.approx(8 + 16 * (0.8 / 32 + 0.2 / 64), abs=0.01)
    inside = quantize_model(model, Recipe("llm-int8", rotate=True)).model.layers[0].down_proj
    assert isinstance(inside, RotatedLinear) and isinstance(inside.linear, Int8Linear)


def test_only_plain_weight_quantization_can_be_stored():
    assert Recipe("awq", 3).keeps_architecture and Recipe("gptq", smooth=0.5).keeps_architecture
    for given in ({"rotate": True}, {"activations": 8}, {"method": "llm-int8"}):
        assert not Recipe(**given).keeps_architecture


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "gtpq"}, "nearest: gptq"),
        ({"bits": 1}, "2 to 8"),
        ({"bits": 3.0}, "2 to 8"),
        ({"activations": 9}, "16 for none"),
        ({"clip": "output"}, "mse"),
        ({"keep": 1.5}, "0 to 1"),
        ({"per": "channel"}, "token"),
        ({"smooth": 2.0}, "0 to 1"),
        ({"smooth": 0.5, "rotate": True}, "one"),
        ({"method": "llm-int8", "activations": 8}, "activations = 16"),
    ],
)
def test_a_recipe_refuses_in_one_line(given, words):
    with pytest.raises(ValueError, match=words) as error:
        Recipe(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe("gptq"), "method gptq needs calibration rows"),
        (Recipe("squeezellm"), "method squeezellm needs calibration rows"),
        (Recipe("round", smooth=0.5), "smooth needs calibration rows"),
        (Recipe("round", activations=8, per="static"), "per static needs calibration rows"),
        (Recipe("round", group=24), "divisor of d_in = 32"),
    ],
)
def test_what_is_missing_is_named_in_one_line(model, recipe, words):
    with pytest.raises(ValueError, match=words) as error:
        quantize_model(model, recipe)
    assert "\n" not in str(error.value)


def test_knowledge_of_the_model_before_its_rotation_is_refused(model):
    known = gather_knowledge(model, ROWS, fisher=False)
    with pytest.raises(ValueError, match="change the model before"):
        quantize_model(model, Recipe("gptq", rotate=True), knowledge=known)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint with the laboratory's vocabulary."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    config = Config(vocab=2048, hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64)
    save_checkpoint(make_model(config), path, "none\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def short_texts():
    """The start of a novel is enough here, and much quicker to encode."""
    whole = command.text.load_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.text, "load_text", lambda name: whole(name)[:20_000])
        yield


def arguments(folder, out, *more):
    sizes = ["--rows", "2", "--window", "16", "--evaluate", "64"]
    return ["--model", str(folder), *sizes, "--out", str(out), *more]


def test_the_command_writes_a_checkpoint_of_the_quantized_weights(folder, tmp_path, capsys):
    given = arguments(folder, tmp_path / "q", "--method", "round", "--bits", "3", "--group", "16")
    assert command.main(given) == 0
    said = capsys.readouterr().out
    assert "block 2/2" in said and "4.188 bits per weight" in said and "after:" in said
    stored, before = load_checkpoint(tmp_path / "q"), load_checkpoint(folder)
    expected = grids.round_to_nearest(before.layers[1].up_proj.weight, 3, 16)
    assert torch.equal(stored.layers[1].up_proj.weight, expected)
    log = (tmp_path / "q" / "log.csv").read_text()
    assert "layers.1.down_proj" in log and "after:" in log


def test_an_interrupted_command_goes_on_where_it_stopped(folder, tmp_path, capsys, monkeypatch):
    given = ("--method", "gptq", "--bits", "3")
    assert command.main(arguments(folder, tmp_path / "whole", *given)) == 0

    written, write = [], command.write_whole

    def interrupted(path, content):
        write(path, content)
        written.append(path.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_whole", interrupted)
    assert command.main(arguments(folder, tmp_path / "parts", *given)) == 130
    assert written == [command.STATE] and "goes on" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    monkeypatch.undo()
    # Other arguments would mix two models.
    other = arguments(folder, tmp_path / "parts", "--method", "gptq", "--bits", "4")
    assert command.main(other) == 2
    assert "of another command" in capsys.readouterr().err
    assert command.main(arguments(folder, tmp_path / "parts", *given)) == 0
    assert "going on: 7 layers are done" in capsys.readouterr().out
    whole, parts = (load_checkpoint(tmp_path / x) for x in ("whole", "parts"))
    assert_same_weights(parts, whole, tolerance=0)
    assert not (tmp_path / "parts" / command.STATE).exists()


@pytest.mark.parametrize("more", [("--rotate",), ("--activations", "8"), ("--method", "llm-int8")])
def test_a_model_that_rounds_or_rotates_while_running_leaves_a_log_only(folder, tmp_path, more):
    given = arguments(folder, tmp_path / "q", "--method", "round", *more)
    assert command.main(given) == 0
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["log.csv"]


def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(name in said and method.about in said for name, method in METHODS.items())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--method", "gtpq"), "nearest: gptq"),
        (("--bits", "9"), "2 to 8"),
        (("--model", "teachers"), "teacher"),
        (("--group", "24"), "divisor"),
        (("--smooth", "0.5", "--rotate"), "allowed: one"),
        (("--per", "channel"), "static"),
    ],
)
def test_the_command_refuses_in_one_line(folder, tmp_path, capsys, more, words):
    assert command.main(arguments(folder, tmp_path / "q", *more)) == 2
    said = capsys.readouterr().err
    assert said.startswith("rooflm.lab.quantize: error: ") and words in said
    assert said.count("\n") == 1


def test_a_state_that_is_no_state_and_an_altered_checkpoint_are_named(folder, tmp_path, capsys):
    out = tmp_path / "q"
    out.mkdir()
    (out / command.STATE).write_bytes(b"not a state")
    assert command.main(arguments(folder, out)) == 2
    assert "not a quantizing state" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(content[:-8] if path.suffix == ".safetensors" else content)
    assert command.main(arguments(broken, tmp_path / "r")) == 2
    assert "altered or cut short" in capsys.readouterr().err
