"""Checkpoints and the files under them: whole and as they were, or refused by name."""

import json
import os
import pickle
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import rooflm
from rooflm.lab import checkpoints, stored
from rooflm.lab.checkpoints import checkpoint_names, load_checkpoint, save_checkpoint
from rooflm.lab.model import Config, Transformer
from rooflm.lab.stored import SUMS, read_checked, sha256, write_checked, write_whole

CONFIG = Config(vocab=20, hidden=8, layers=1, heads=2, kv_heads=1, intermediate=12, window=16)


def make_model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Transformer(CONFIG)


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(make_model(), tmp_path / "tiny", "step\n1\n")
    return tmp_path / "tiny"


@pytest.fixture
def data(folder, monkeypatch):
    """A data folder whose only checkpoint is `tiny`."""
    (folder.parent / "checkpoints").mkdir()
    folder.rename(folder.parent / "checkpoints" / "tiny")
    for module in (checkpoints, stored):
        monkeypatch.setattr(module, "data_path", lambda *parts: folder.parent.joinpath(*parts))
    return folder.parent / "checkpoints" / "tiny"


def refusal(read):
    with pytest.raises(ValueError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    return message


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(folder, name, content):
    """Replace a file and its checksum, as someone would who makes a checkpoint by hand."""
    write_checked(folder, {name: content})


def put_tensors(folder, tensors):
    put(folder, "model.safetensors", save(tensors))


# ---- round trip


def test_a_checkpoint_gives_back_the_weights_in_fp16(folder):
    found = load_checkpoint(folder)
    assert found.config == CONFIG
    expected = make_model().state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, weight in found.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, expected[name].half().float())
    stored_tensors = load((folder / "model.safetensors").read_bytes())
    assert {t.dtype for t in stored_tensors.values()} == {torch.float16}
    assert (folder / "log.csv").read_text() == "step\n1\n"


def test_a_second_round_trip_changes_nothing(folder, tmp_path):
    save_checkpoint(load_checkpoint(folder), tmp_path / "again", "step\n1\n")
    assert content_of(tmp_path / "again") == content_of(folder)


def test_dequantized_weights_can_be_kept_in_fp32(tmp_path):
    save_checkpoint(make_model(), tmp_path, "", torch.float32)
    expected = make_model().state_dict()
    for name, weight in load_checkpoint(tmp_path).state_dict().items():
        assert torch.equal(weight, expected[name])


def test_a_loaded_model_is_ready_to_be_used_and_not_to_be_trained(folder):
    model = load_checkpoint(folder)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 20)


def test_loading_draws_no_random_number(folder):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_checkpoint(folder)
    assert torch.equal(torch.rand(2), expected)


def test_the_config_is_one_that_the_roofline_reads(folder):
    model = rooflm.load_model(str(folder / "config.json"))
    assert model.parameters == sum(p.numel() for p in make_model().parameters())


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="there is no sha256sum here")
def test_the_checksums_are_in_the_format_of_sha256sum(folder):
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder)
    assert done.returncode == 0


def test_checkpoints_of_the_data_folder_have_names(data):
    assert checkpoint_names() == ["tiny"]
    assert load_checkpoint("tiny").config == CONFIG
    message = refusal(lambda: load_checkpoint("tinny"))
    assert message == "unknown checkpoint 'tinny'; nearest: tiny"


# ---- what is not a checkpoint


def test_a_truncated_checkpoint_is_named_and_refused(data):
    path = data / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(lambda: load_checkpoint("tiny"))
    assert message.startswith("data/checkpoints/tiny/model.safetensors is altered or cut short")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_altered_bit_is_named_and_refused(data, name):
    content = bytearray((data / name).read_bytes())
    content[-3] ^= 1
    (data / name).write_bytes(content)
    assert f"tiny/{name} is altered" in refusal(lambda: load_checkpoint("tiny"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", SUMS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    message = refusal(lambda: load_checkpoint(folder))
    assert message.startswith("cannot read") and f"{name}: No such file" in message


def test_an_unlisted_file_is_named(folder):
    sums = folder / SUMS
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if "config.json" not in line))
    message = refusal(lambda: load_checkpoint(folder))
    assert "config.json is not listed in SHA256SUMS; listed: log.csv, model.safetensors" in message


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert "cannot read" in refusal(lambda: load_checkpoint(tmp_path / "nowhere"))


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_is_refused_unread_even_with_its_checksum(kind, folder, tmp_path):
    if kind == "pickle":
        content = pickle.dumps({"embedding.weight": Bomb(tmp_path / "exploded")})
    else:
        torch.save({"embedding.weight": Bomb(tmp_path / "exploded")}, tmp_path / "x.pt")
        content = (tmp_path / "x.pt").read_bytes()
    put(folder, "model.safetensors", content)
    assert "the tensors of checkpoint tiny don't fit" in refusal(lambda: load_checkpoint(folder))
    assert not (tmp_path / "exploded").exists()


def test_renamed_missing_and_misshapen_tensors_are_refused(folder):
    tensors = load((folder / "model.safetensors").read_bytes())
    name = "layers.0.q_proj.weight"
    renamed = {k.replace("q_proj", "query"): v for k, v in tensors.items()}
    missing = {k: v for k, v in tensors.items() if k != name}
    misshapen = {**tensors, name: torch.zeros(8, 9).half()}
    for damaged in (renamed, missing, misshapen, {}):
        put_tensors(folder, damaged)
        message = refusal(lambda: load_checkpoint(folder))
        assert message.startswith("the tensors of checkpoint tiny don't fit")
        assert len(message) < 400
        assert name in message or not damaged


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json of checkpoint tiny is not JSON"),
        (b"\xff\xfe\xfd", "config.json of checkpoint tiny is not JSON"),
        (b"[1, 2]", "config.json of checkpoint tiny is not a JSON object"),
        (b'{"vocab_size": 20}', "the config lacks"),
        (json.dumps({**CONFIG.to_dict(), "hidden_size": -8}).encode(), "hidden is -8"),
        (json.dumps({**CONFIG.to_dict(), "model_type": "gpt2"}).encode(), "model_type is 'gpt2'"),
    ],
)
def test_a_config_that_is_none_is_refused(folder, content, message):
    put(folder, "config.json", content)
    assert message in refusal(lambda: load_checkpoint(folder))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_that_fp16_cannot_hold_leave_the_old_checkpoint(folder, bad):
    before, model = content_of(folder), make_model()
    model.layers[0].q_proj.weight.data[0, 0] = bad
    message = refusal(lambda: save_checkpoint(model, folder, "new"))
    assert "layers.0.q_proj.weight" in message
    assert content_of(folder) == before


def test_a_head_of_its_own_is_refused_as_unknown(folder):
    model = make_model()
    model.head = nn.Linear(8, 20, bias=False)
    save_checkpoint(model, folder, "")
    assert "head.weight" in refusal(lambda: load_checkpoint(folder))


# ---- writing


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_an_interrupt_while_writing_leaves_the_old_checkpoint_whole(folder, written, monkeypatch):
    before, sync, calls = content_of(folder), os.fsync, []

    def interrupted(handle):
        if len(calls) == written:
            raise KeyboardInterrupt
        calls.append(handle)
        sync(handle)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(make_model(seed=1), folder, "new")
    assert content_of(folder) == before  # and no temporary file is left
    load_checkpoint(folder)


@pytest.mark.parametrize("renamed", [1, 2, 3])
def test_an_interrupt_between_two_renames_is_never_read_as_a_checkpoint(
    folder, renamed, monkeypatch
):
    replace, calls = os.replace, []

    def interrupted(source, target):
        if len(calls) == renamed:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(make_model(seed=1), folder, "new")
    assert not list(folder.glob(".*"))
    if renamed == 1:  # config.json, which is the same in both
        load_checkpoint(folder)
    else:
        assert "altered or cut short" in refusal(lambda: load_checkpoint(folder))


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new and longer")
    assert content_of(tmp_path) == {"file": b"old"}


def test_files_written_later_join_those_listed(tmp_path):
    write_checked(tmp_path / "deep" / "er", {"b": b"1"})
    write_checked(tmp_path / "deep" / "er", {"a": b"2", "b": b"3"})
    found = tmp_path / "deep" / "er"
    assert (found / SUMS).read_text() == f"{sha256(b'2')}  a\n{sha256(b'3')}  b\n"
    assert read_checked(found / "a") == b"2" and read_checked(found / "b") == b"3"


def test_the_checksum_is_sha256():
    # FIPS 180-2, appendix B.1
    assert sha256(b"abc").startswith("ba7816bf8f01cfea414140de5dae2223")
