"""Make the texts of this folder again from their sources, and write SHA256SUMS.

    python data/corpus/make_corpus.py JANEAUSTENR EBOOKS

JANEAUSTENR is the folder `usr/lib/R/site-library/janeaustenr` of the unpacked Debian package
r-cran-janeaustenr (1.0.0-1): `data/Rdata.rdx` and `data/Rdata.rdb` hold the six novels.
EBOOKS is a folder of Standard Ebooks' repositories, each under its own name, such as
`charlotte-bronte_jane-eyre`, with the files of `src/epub`.

Both become plain text in one convention, so that a model meets one: a paragraph is a line, an
empty line parts two; straight quotes, `--` for a dash, `...` for an ellipsis, `_emphasis_` kept
where the source marks it so. Front matter, notes and the publisher's pages are left out.

Only the standard library is needed.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

AUSTEN = {
    "emma": "emma",
    "mansfieldpark": "mansfield_park",
    "northangerabbey": "northanger_abbey",
    "persuasion": "persuasion",
    "prideprejudice": "pride_and_prejudice",
    "sensesensibility": "sense_and_sensibility",
}
EBOOKS = {
    "ann-radcliffe_the-mysteries-of-udolpho": "the_mysteries_of_udolpho",
    "anne-bronte_the-tenant-of-wildfell-hall": "the_tenant_of_wildfell_hall",
    "charlotte-bronte_jane-eyre": "jane_eyre",
    "charlotte-bronte_villette": "villette",
    "elizabeth-gaskell_cranford": "cranford",
    "elizabeth-gaskell_north-and-south": "north_and_south",
    "emily-bronte_wuthering-heights": "wuthering_heights",
    "fanny-burney_evelina": "evelina",
    "george-eliot_middlemarch": "middlemarch",
    "george-eliot_the-mill-on-the-floss": "the_mill_on_the_floss",
    "herman-melville_moby-dick": "moby_dick",
    "william-makepeace-thackeray_vanity-fair": "vanity_fair",
}
PLAIN = str.maketrans(
    {
        "‘": "'", "’": "'", "“": '"', "”": '"',
        "—": "--", "–": "-", "⸺": "----", "⸻": "------", "‑": "-", "−": "-",
        "…": "...",
        "\u00a0": " ", "\u200a": "", "\u2009": " ", "\u202f": " ",
        "\u2060": "", "\ufeff": "", "\u200e": "",
    }
)  # fmt: skip
XHTML = "{http://www.w3.org/1999/xhtml}"
EPUB_TYPE = "{http://www.idpf.org/2007/ops}type"


def r_strings(serialized: bytes) -> Iterator[str]:
    """The strings of one serialized R character vector (XDR, version 3)."""
    # A header, then the vector: a flag word whose low byte is 16, and the number of strings.
    # Each string is a flag word whose low byte is 9, its length, and its bytes.
    start = serialized.index(b"UTF-8") + 5
    kind, count = struct.unpack_from(">II", serialized, start)
    assert kind & 0xFF == 16, kind
    at = start + 8
    for _ in range(count):
        kind, length = struct.unpack_from(">II", serialized, at)
        assert kind & 0xFF == 9 and length < 2**31, (kind, length)
        at += 8
        yield serialized[at : at + length].decode("utf-8")
        at += length


def austen(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and paragraphs of each novel."""
    index = gzip.decompress((folder / "data" / "Rdata.rdx").read_bytes())
    data = (folder / "data" / "Rdata.rdb").read_bytes()
    # The index holds an (offset, length) pair for each variable, in the order of the names.
    pairs = [
        struct.unpack_from(">II", index, found.end())
        for found in re.finditer(rb"\x00\x00\x00\x0d\x00\x00\x00\x02", index)
    ]
    for source, (offset, length) in zip(sorted(AUSTEN), pairs, strict=False):
        # The length of the content, four bytes, stands before the stream.
        compressed = data[offset : offset + length]
        content = zlib.decompress(compressed[4:])
        lines = [line.translate(PLAIN).strip() for line in r_strings(content)]
        text = re.sub(r" +", " ", "\n".join(lines))
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\n+", text)]
        paragraphs = [p for p in paragraphs if p]
        # The title page ends where the first chapter or volume begins.
        first = next(
            i for i, p in enumerate(paragraphs) if re.match(r"(CHAPTER|Chapter|VOLUME) ", p)
        )
        paragraphs = paragraphs[first:]
        if re.fullmatch(r"(FINIS|THE END|Finis)\.?", paragraphs[-1]):
            paragraphs.pop()
        yield AUSTEN[source], paragraphs


def plain(element: ElementTree.Element) -> str:
    """The text of an element, emphasis as _underscores_, references to notes left out."""
    parts = [element.text or ""]
    for child in element:
        kind = child.get(EPUB_TYPE, "")
        if "noteref" not in kind:
            inner = plain(child)
            marked = child.tag == f"{XHTML}em" and inner.strip()
            parts.append(f"_{inner}_" if marked else " " if child.tag == f"{XHTML}br" else inner)
        parts.append(child.tail or "")
    return "".join(parts)


def ebook(folder: Path) -> list[str]:
    """The paragraphs of a Standard Ebooks repository, in reading order."""
    source = folder / "src" / "epub"
    contents = ElementTree.parse(source / "content.opf").getroot()
    spaces = {"opf": "http://www.idpf.org/2007/opf"}
    files = {item.get("id"): item.get("href") for item in contents.iterfind(".//opf:item", spaces)}
    paragraphs = []
    for reference in contents.iterfind(".//opf:itemref", spaces):
        href = files[reference.get("idref")]
        if not re.search(r"(chapter|letter|epilogue|prelude|finale|etymology|extracts)", href):
            continue
        for element in ElementTree.parse(source / href).getroot().iter():
            if element.tag in {f"{XHTML}{tag}" for tag in ("h2", "h3", "h4", "p")}:
                text = " ".join(plain(element).translate(PLAIN).split())
                if text:
                    paragraphs.append(text)
    return paragraphs


def main(austen_folder: str, ebook_folder: str) -> None:
    """Write every text and the checksums beside this script."""
    here = Path(__file__).resolve().parent
    texts = dict(austen(Path(austen_folder)))
    for folder, name in EBOOKS.items():
        texts[name] = ebook(Path(ebook_folder) / folder)
    sums = []
    for name, paragraphs in sorted(texts.items()):
        content = ("\n\n".join(paragraphs) + "\n").encode("utf-8")
        (here / f"{name}.txt").write_bytes(content)
        sums.append(f"{hashlib.sha256(content).hexdigest()}  {name}.txt\n")
        print(f"{name:28} {len(content):9,} bytes  {len(paragraphs):6,} paragraphs")
    (here / "SHA256SUMS").write_text("".join(sums), encoding="ascii")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
