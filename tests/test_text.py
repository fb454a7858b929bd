"""The corpus and the tokenizer: what is trained on, what is not, and that nothing is lost."""

import importlib.util
import shutil
import struct
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rooflm.lab import stored, text, train
from rooflm.lab.text import AUSTEN, HELD_OUT, OTHER_AUTHOR, OTHERS, TEXTS, decode, encode
from rooflm.roofline.datafiles import data_path


@pytest.fixture(scope="module")
def held_out():
    return text.load_text(HELD_OUT)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of a few of the texts and of the tokenizer, to be damaged."""
    for folder, names in (
        ("corpus", ("cranford.txt", "SHA256SUMS")),
        ("tokenizer", ("tokenizer.json", "SHA256SUMS")),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copy(data_path(folder, name), tmp_path / folder / name)
    for module in (text, stored):
        monkeypatch.setattr(module, "data_path", lambda *parts: tmp_path.joinpath(*parts))
    text.load_tokenizer.cache_clear()
    yield tmp_path
    text.load_tokenizer.cache_clear()


@pytest.fixture(scope="module")
def make_corpus():
    path = data_path("corpus", "make_corpus.py")
    spec = importlib.util.spec_from_file_location("make_corpus", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- what is read by whom


def test_five_novels_of_austen_are_trained_on_and_persuasion_is_not():
    assert len(AUSTEN) == 5 and len(set(TEXTS)) == len(TEXTS) == 18
    assert HELD_OUT == "persuasion" and OTHER_AUTHOR == "moby_dick"
    assert not {HELD_OUT, OTHER_AUTHOR} & {*AUSTEN, *OTHERS}


@pytest.mark.parametrize("reader", [train.training_sources, lambda: text.train_tokenizer(300)])
def test_neither_models_nor_tokenizer_read_what_is_held_out(reader, monkeypatch):
    read = []

    def stand_in(name):
        read.append(name)
        return f"This stands for {name}."

    monkeypatch.setattr(text, "load_text", stand_in)
    reader()
    assert sorted(read) == sorted((*AUSTEN, *OTHERS))


def test_no_passage_of_persuasion_stands_in_a_training_text(held_out):
    # By name alone it could be there under another title.
    passages = [p[:80] for p in held_out.split("\n\n") if len(p) >= 200][::4]
    assert len(passages) > 100
    for name in (*AUSTEN, *OTHERS):
        content = text.load_text(name)
        assert not [p for p in passages if p in content], name


def test_training_sources_hold_the_texts_with_an_end_after_each(monkeypatch):
    monkeypatch.setattr(text, "load_text", lambda name: f"This stands for {name}.")
    for source, names in zip(train.training_sources(), (AUSTEN, OTHERS), strict=True):
        ends = (source == 0).nonzero().flatten().tolist()
        assert ends[-1] == len(source) - 1
        starts = [0, *(end + 1 for end in ends[:-1])]
        parts = [decode(source[i:j]) for i, j in zip(starts, ends, strict=True)]
        assert parts == [f"This stands for {name}." for name in names]


# ---- the tokenizer


def test_the_vocabulary_is_the_models():
    tokenizer = text.load_tokenizer()
    assert tokenizer.get_vocab_size() == train.VOCAB
    assert tokenizer.token_to_id(text.END) == 0
    assert {config.vocab for config in train.CONFIGS.values()} == {train.VOCAB}


def test_a_novels_tokens_stand_for_its_bytes_and_give_it_back(held_out):
    tokens = encode(held_out)
    assert tokens.dtype == torch.int64
    assert text.token_bytes()[tokens].sum().item() == len(held_out.encode("utf-8"))
    assert decode(tokens) == held_out


@given(st.text(max_size=60))
@example("<|end|>")  # a text that spells the special token is text all the same
@example("a <|end|>\n<|end|> b")
@example("  leading, trailing  \r\n\t\x00 and 數字 é e\u0301 👩‍👩‍👧 \u202e\ufeff")
@settings(max_examples=100)
def test_every_text_is_encoded_without_loss(content):
    tokens = encode(content)
    assert decode(tokens) == content
    assert text.token_bytes()[tokens].sum().item() == len(content.encode("utf-8"))
    assert 0 not in tokens


def test_each_byte_has_a_token_and_the_end_has_no_bytes():
    lengths = text.token_bytes()
    assert lengths.shape == (train.VOCAB,)
    assert lengths[0] == 0 and lengths[1:].min() == 1
    assert (lengths == 1).sum() == 256


def test_half_a_character_is_shown_as_such():
    first = encode("數")[:1]
    assert decode(first) == "\ufffd"


def test_a_trained_tokenizer_merges_what_comes_often(monkeypatch):
    monkeypatch.setattr(text, "load_text", lambda name: "zqzq zqzq zqzq")
    tokenizer = text.train_tokenizer(300)
    assert len(encode("zqzq", tokenizer)) == 1
    assert len(encode("abcd", tokenizer)) == 4
    assert text.token_bytes(tokenizer)[encode("zqzq", tokenizer)].tolist() == [4]


def test_a_saved_tokenizer_is_read_back(copied, monkeypatch):
    monkeypatch.setattr(text, "load_text", lambda name: "zqzq zqzq zqzq")
    text.save_tokenizer(text.train_tokenizer(300))
    assert len(encode("zqzq")) == 1


# ---- files that are not what they were


def test_an_unknown_text_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown text 'persuassion'; nearest: persuasion"):
        text.load_text("persuassion")
    with pytest.raises(ValueError, match="unknown text"):
        text.load_text("../README.md")


def refusal(read):
    with pytest.raises(ValueError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_text_cut_short_is_named_and_refused(copied):
    path = copied / "corpus" / "cranford.txt"
    assert text.load_text("cranford").startswith("I\n\nOur Society")
    path.write_bytes(path.read_bytes()[:-1])
    message = refusal(lambda: text.load_text("cranford"))
    assert message.startswith("data/corpus/cranford.txt is altered or cut short")
    assert "384320 bytes" in message


def test_a_text_with_one_letter_altered_is_named_and_refused(copied):
    path = copied / "corpus" / "cranford.txt"
    path.write_bytes(path.read_bytes().replace(b"Amazons", b"amazons", 1))
    assert "cranford.txt is altered" in refusal(lambda: text.load_text("cranford"))


def test_a_missing_or_unlisted_text_is_named(copied):
    assert "cannot read data/corpus/emma.txt" in refusal(lambda: text.load_text("emma"))
    sums = copied / "corpus" / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if "cranford" not in line))
    assert "cranford.txt is not listed in SHA256SUMS" in refusal(lambda: text.load_text("cranford"))


@pytest.mark.parametrize(
    "content", [b"short  cranford.txt\n", b"no sums at all", b"\xff\xfe", None]
)
def test_damaged_checksums_are_named(copied, content):
    sums = copied / "corpus" / "SHA256SUMS"
    sums.unlink() if content is None else sums.write_bytes(content)
    assert "data/corpus/SHA256SUMS" in refusal(lambda: text.load_text("cranford"))


def test_an_altered_tokenizer_is_refused(copied):
    path = copied / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    assert "data/tokenizer/tokenizer.json is altered" in refusal(text.load_tokenizer)


# ---- how the corpus was made


def test_the_strings_of_an_r_vector_are_read(make_corpus):
    strings = ["CHAPTER I", "", "Emma Woodhouse, handsome…"]
    content = b"X\n" + struct.pack(">iiii", 3, 0x40003, 0x30500, 5) + b"UTF-8"
    content += struct.pack(">II", 16, len(strings))
    for string in strings:
        coded = string.encode("utf-8")
        content += struct.pack(">II", 0x40009, len(coded)) + coded
    assert list(make_corpus.r_strings(content)) == strings


def test_a_paragraph_keeps_its_emphasis_and_loses_its_notes(make_corpus):
    source = (
        '<p xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops">'
        'It was <em>his</em> house,<a epub:type="noteref" href="x">1</a> or<br/>so <i>Emma</i> '
        "said<em> </em>.</p>"
    )
    found = make_corpus.plain(ElementTree.fromstring(source))
    assert found == "It was _his_ house, or so Emma said ."


def test_typographers_marks_become_a_typewriters(make_corpus):
    found = "“I—I can’t…”\u2060 he\u00a0said".translate(make_corpus.PLAIN)
    assert found == '"I--I can\'t..." he said'


def test_every_text_of_the_corpus_keeps_the_convention(make_corpus):
    made = {*make_corpus.AUSTEN.values(), *make_corpus.EBOOKS.values()}
    assert made == set(TEXTS)
    marks = {chr(code) for code in make_corpus.PLAIN}
    for name in TEXTS:
        content = text.load_text(name)
        assert content.endswith("\n") and not content.endswith("\n\n")
        assert "\r" not in content and "\n\n\n" not in content
        assert not marks & set(content)
        lines = content.removesuffix("\n").split("\n")
        assert not any(lines[1::2]) and all(lines[::2])  # a paragraph is a line
        assert not any(line != line.strip() or "  " in line for line in lines)
