"""Texts that are no prose: what is valid, and the sources. The samples are written by hand."""

import gzip
import importlib.metadata
import io
import math
import random
import re
import wave
import zipfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import corridor
import numpy as np
import pytest
import rdkit
from debs import hum, publish_deb, sound_members, wave_file
from PIL import Image
from rdkit import Chem
from test_wheels import publish

from data import (
    chorales,
    episodes,
    genome,
    levels,
    molecules,
    music,
    series,
    sketch,
    sounds,
    tunes,
    waves,
    wheels,
)
from data.report import Report
from data.splits import SPLITS, TEST, TRAIN, VAL
from tinyfm.batches.text import MODALITIES


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder of packages."""
    monkeypatch.setattr(wheels, "FOLDER", tmp_path / "packages")
    wheels.FOLDER.mkdir()
    return wheels.FOLDER


# ---- molecules -----------------------------------------------------------------------------------

RIGHT = (
    "C", "CCO", "CC(=O)O", "C#N", "c1ccccc1", "c1cc[nH]c1", "c1ccncc1", "c1ccsc1", "C(C)(C)(C)C",
    "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "C1CC1", "O=S(=O)(C)C", "ClCBr", "[H]N=C", "c1ccc2ccccc2c1",
    "c1ccc(-c2ccccc2)cc1", "O=c1cc[nH]cc1", "C1=CC=CC=C1",
)  # fmt: skip
WRONG = {
    "": "no atom",
    "C1CC": "ring 1 is not closed",
    "C(C": "not closed",
    "CC)C": "none opened",
    "C()C": "none opened, or around nothing",
    "(C)C": "no atom before",
    "C==C": "no atom before",
    "=C": "no atom before",
    "CC=": "not closed",
    "C11": "itself",
    "C1C1": "neighbour",
    "C=1CC#1": "two kinds",
    "C(C)(C)(C)(C)C": "C, has 5 bonds, at most 4",
    "CO(C)C": "O, has 3 bonds, at most 2",
    "FF(C)": "F, has 2 bonds",
    "c1cccc1": "double bonds of an aromatic ring",
    "c1ccnc1": "double bonds of an aromatic ring",
    "cc": "in no ring",
    "C[nH]": "in no ring",
    "CX": "'X' at place 2",
    "C.C": "'.' at place 2",
    "C[N+]": "no sign",
}


def test_a_molecule_is_one_whose_rings_and_valences_hold():
    assert [text for text in RIGHT if molecules.fault(text)] == []
    for text, what in WRONG.items():
        assert what in molecules.fault(text), text


def test_spellings_of_a_molecule_have_one_key():
    same = [("CCO", "OCC"), ("c1ccncc1", "n1ccccc1"), ("CC(=O)Nc1ccccc1", "c1ccc(NC(C)=O)cc1")]
    same.append(("[H]N=CC", "CC=N"))
    for one, other in same:
        assert molecules.key(one) == molecules.key(other)
        assert molecules.formula(one) == molecules.formula(other)  # else they are not compared
    for one, other in (("CCO", "COC"), ("C=CC", "CCC"), ("C1CCCCC1", "c1ccccc1")):
        assert molecules.key(one) != molecules.key(other)
    known = molecules.MODALITY.known(["OCC", "COC", "CCN"], ["CCO", "CCN"])
    assert known == [True, False, True]


def test_the_splits_of_molecules_are_those_of_their_package(folder, monkeypatch):
    def csv(texts):
        return gzip.compress("\n".join(["SMILES", *texts, ""]).encode())

    train = ["C" * n for n in range(1, 400)]
    test = ["N" * n for n in range(1, 400)]
    members = {molecules.MEMBER.format("train"): csv(train)}
    members[molecules.MEMBER.format("test")] = csv(test)
    publish(monkeypatch, molecules, members)
    parts = ((TRAIN, "train", 0.0, 0.5), (VAL, "train", 0.5, 0.6), (TEST, "test", 0.0, 0.1))
    monkeypatch.setattr(molecules, "PARTS", parts)
    report = Report()
    found = list(molecules.documents(report))
    by_split = {split: {d.text for d in found if d.split == split} for split in (TRAIN, VAL, TEST)}
    assert by_split[TRAIN] | by_split[VAL] < set(train) and by_split[TEST] < set(test)
    assert not by_split[TRAIN] & by_split[VAL]
    assert 150 < len(by_split[TRAIN]) < 250 and 20 < len(by_split[VAL]) < 60
    assert (report.found, report.used) == (798, len(found))


@pytest.mark.parametrize("source", MODALITIES.values(), ids=MODALITIES)
def test_without_the_package_the_command_is_said(source, folder, monkeypatch):
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    episodes.load.cache_clear()
    command = source.PACKAGE.command.replace(str(folder), "data/cache/packages")
    assert command in re.sub(r" \\\n +", " ", source.__doc__)
    with pytest.raises(ValueError, match=re.escape(source.PACKAGE.command)):
        next(source.documents())
    identity = source.PACKAGE.version if source is episodes else source.PACKAGE.sha256
    assert identity in source.version()
    assert source.MODALITY.fault("?") and source.PACKAGE.licence


def test_prompts_that_start_nothing_are_refused():
    cases = [
        (molecules, "CC(=O)c1cc", ["CC)C", "C==", "CX", "C1C1"]),
        (genome, "ACGT", ["ACGU", "hello"]),
        (
            tunes,
            "M:6/8\\nL:1/8\\nK:G\\nd|gfg",
            ["gfg", "M:x\\nL:1/8\\nK:G\\n", "M:6/8\\nL:1/8\\nK:H\\n"],
        ),
        (chorales, "OLH<OLH<\\nQLH<", ["hello", "<HLO", "OLH<OLH~"]),
        (
            levels,
            "XX--------------\\nX",
            ["hello", "X" * 17, "XX\\nX", "\\n".join(["X" * 16] * 24 + ["X"])],
        ),
    ]
    for source, right, wrong in cases:
        assert source.MODALITY.read_prompt(right) == right.replace("\\n", "\n")
        for prompt in wrong:
            with pytest.raises(ValueError, match=re.escape(f"--prompt {prompt[:20]!r}"[:-1])):
                source.MODALITY.read_prompt(prompt)


DRUGS = (
    "CC(=O)Oc1ccccc1C(=O)O", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "CC(C)Cc1ccc(C(C)C(=O)O)cc1",
    "CC(=O)Nc1ccc(O)cc1", "COc1ccc2nc(S(=O)Cc3ncc(C)c(OC)c3C)[nH]c2c1",
    "Clc1ccccc1C1(NC)CCCCC1=O", "CN1CCc2cc(Cl)c(O)cc2C(c2ccccc2)C1", "O=C1CN=C(c2ccccc2)c2ccccc2N1",
    "Cc1ncc(CO)c(CO)c1O", "N#Cc1ccc(F)cc1C#N", "CCN(CC)CCOC(=O)c1ccc(N)cc1", "c1ccsc1-c1ccco1",
)  # fmt: skip


def test_a_molecule_is_drawn_with_even_bonds_and_regular_rings(tmp_path):
    for text in DRUGS:
        molecule = molecules.parse(text)
        x = sketch.place(len(molecule.atoms), molecule.bonds)
        lengths = [np.linalg.norm(x[i] - x[j]) for i, j in molecule.bonds]
        assert min(lengths) > 0.6 and max(lengths) < 1.5  # crowded ones give way
    benzene = molecules.parse("c1ccccc1")
    x = sketch.place(6, benzene.bonds)
    radii = np.linalg.norm(x, axis=1)
    assert radii == pytest.approx(np.ones(6), abs=0.01)  # a hexagon of side 1
    naphthalene = molecules.parse("c1ccc2ccccc2c1")
    found = sketch.rings(10, naphthalene.bonds)
    assert sorted(map(len, found)) == [6, 6] and len({*found[0], *found[1]}) == 10
    assert sketch.rings(4, molecules.parse("CCCC").bonds) == []
    atoms = {"NH2": ("N", False, 0, [1]), "O": ("O", False, 0, [2]), "OH": ("O", False, 0, [1])}
    atoms |= {
        "NH": ("[nH]", True, 1, [0, 0]),
        "N": ("n", True, 0, [0, 0]),
        "Cl": ("Cl", False, 0, [1]),
    }
    atoms |= {"": ("c", True, 0, [0, 0, 1]), "H": ("[H]", False, 0, [1])}
    for text, atom in atoms.items():
        assert sketch.label(*atom) == text
    molecules.draw([*DRUGS, "C"], tmp_path / "drugs")
    with Image.open(tmp_path / "drugs.png") as image:
        assert image.width > 4 * sketch.SIDE and image.height > 3 * sketch.SIDE


def test_molecules_are_those_of_rdkit():
    """Other spellings of a molecule have its key. Texts with a changed sign are judged alike but
    for a few, mostly of aromatic sulphur and of triple bonds in aromatic rings."""
    rdkit.RDLogger.DisableLog("rdApp.*")
    for text in DRUGS:
        molecule = Chem.MolFromSmiles(text)
        for seed in range(8):
            (other,) = Chem.MolToRandomSmilesVect(molecule, 1, randomSeed=seed)
            assert not molecules.fault(other) and molecules.key(other) == molecules.key(text)
    assert len(set(map(molecules.key, DRUGS))) == len(DRUGS)

    rng = random.Random(0)
    signs = [
        "C",
        "N",
        "O",
        "S",
        "F",
        "Cl",
        "c",
        "n",
        "o",
        "s",
        "[nH]",
        "(",
        ")",
        "1",
        "2",
        "3",
        "=",
        "#",
        "-",
    ]
    judged = Counter()
    for text in DRUGS * 100:
        parts = molecules.TOKEN.findall(text)
        place = rng.randrange(len(parts))
        parts[place : place + rng.randrange(2)] = rng.sample(signs, rng.randrange(2))
        changed = "".join(parts)
        judged[not molecules.fault(changed), Chem.MolFromSmiles(changed) is not None] += 1
    assert judged[True, True] > 100 and judged[False, False] > 300
    assert judged[True, False] <= 0.005 * judged.total()
    assert judged[False, True] <= 0.02 * judged.total()


# ---- genome --------------------------------------------------------------------------------------


def test_a_stretch_of_a_genome_has_a_long_open_frame():
    gene = "ATG" + "GCA" * 200
    stop = "TAACTAATTAGC"  # a stop in each of the six frames, or nearly
    assert genome.longest_frame("GCATAAGCAGCA") == 4  # the frames of the other strand are open
    assert genome.longest_frame(genome.other_strand(gene)) == genome.longest_frame(gene)
    assert genome.other_strand("ACCT") == "AGGT"
    assert genome.fault(gene + stop * 40) == ""
    assert genome.fault(stop * 80) == "no reading frame is open for 160 codons"
    assert "too short" in genome.fault(gene)
    assert "'N' at place 4" in genome.fault("ACGN")


def test_regions_of_a_genome_are_held_out_whole(folder, monkeypatch):
    monkeypatch.setattr(genome, "REGION", 250)
    monkeypatch.setattr(genome, "BLOCK", 50)
    rng = np.random.default_rng(0)
    bases = "".join(rng.choice(list("ACGT"), size=20 * genome.REGION + 7))
    lines = [">a genome", *(bases[i : i + 80] for i in range(0, len(bases), 80)), ""]
    publish(monkeypatch, genome, {genome.MEMBER: gzip.compress("\n".join(lines).encode())})
    found = list(genome.documents())
    by_split = {split: [d.text for d in found if d.split == split] for split in SPLITS}
    assert "".join(by_split[VAL]) == bases[5 * genome.REGION : 6 * genome.REGION]
    assert "".join(by_split[TEST]) == bases[15 * genome.REGION : 16 * genome.REGION]
    one, other = by_split[TRAIN][::2], by_split[TRAIN][1::2]
    assert (
        "".join(one)
        == bases[: 5 * genome.REGION]
        + bases[6 * genome.REGION : 15 * genome.REGION]
        + (bases[16 * genome.REGION :])
    )
    assert [genome.other_strand(text) for text in one] == other
    known = genome.copied([one[3][5:48], by_split[TEST][0]], by_split[TRAIN])
    assert known == [True, False]


# ---- tunes ---------------------------------------------------------------------------------------

JIG = "M:6/8\nL:1/8\nK:G\nd|gfg d2B|G2G B/c/dB|c>BA z3|(3ABc d2-d3:|"


def test_the_notes_of_a_tune_by_hand():
    """G major has F sharp; c>B is 3/2 and 1/2; (3ABc are three in the time of two."""
    tune = tunes.parse(JIG.replace(" ", ""))
    assert tune.metre == Fraction(3, 4)
    (part,) = tune.parts
    assert [note.pitch for note in part[1]] == [79, 78, 79, 74, 71]
    assert [note.length * 8 for note in part[3]] == [Fraction(3, 2), Fraction(1, 2), 1, 3]
    assert part[3][-1].pitch is None
    assert [note.length * 8 for note in part[4]] == [Fraction(2, 3)] * 3 + [2, 3]
    assert [note.tied for note in part[4]] == [False, False, False, True, False]
    assert tunes.fault(JIG.replace(" ", "")) == "a bar does not add up to the metre"  # 7 of 6
    assert tunes.describe(JIG.replace(" ", "")) == {"share of right bars": (4, 5), "bars": (5, 1)}
    # An accidental holds for its bar; C, is an octave below C.
    pitches = [n.pitch for n in tunes.parse("M:4/4\nL:1/4\nK:F\n^CCBC,|C=Bc'").notes]
    assert pitches == [61, 61, 70, 48, 60, 71, 84]


FINE = "M:3/4\nL:1/4\nK:Em\nB|e2f|g3|a2g|f2:|B|e3|a3|e2|]\n"
BAD_TUNES = {
    FINE.replace("g3", "g2"): "does not add up",
    FINE.replace("f2:|B", "f2B:|"): "",  # a whole bar at the end of a part
    FINE.replace("B|e2f", "Be2f|"): "does not add up",  # longer than the metre
    FINE.replace("a2g", "a2h"): "'h' among the notes",
    FINE.replace("a2g", "a0g3"): "has no length",
    FINE.replace("M:3/4\n", ""): "no line M:",
    FINE.replace("M:3/4", "M:3/5"): "M:3/5 is no metre",
    FINE.replace("M:3/4", "M:999/4"): "M:999/4 is no metre",
    FINE.replace("K:Em", "K:H"): "K:H is no key",
    "M:3/4\nL:1/4\nK:G\ng3|a3|\n": "fewer than 4 bars",
    "M:3/4\nL:1/4\nK:G\nz3|z3|z3|z3|\n": "fewer than 4 bars",
    "": "no line M:",
}


def test_a_tune_is_one_whose_bars_add_up():
    assert tunes.fault(FINE) == ""
    for text, what in BAD_TUNES.items():
        found = tunes.fault(text)
        assert (what in found) if what else not found, (text, found)


BOOK = """% A book
X:1
T:The Jig
M:6/8
L:1/8
K:G
"G"dc|B2(A {c}GAB)|~c2d e.d^c | d2B G2A|\\
B3 !trill![DA]2u:|
w: words

X:2
T:The Jig, again
M:6/8
L:1/8
K:A
ed|c2B ABc|d2e fe^d|e2c A2B|c3 B2:|

X:3
T:Changes
M:6/8
L:1/8
K:G
GAB|
M:2/4
GA|

X:4
T:Free
M:none
K:G
GAB

X:5
T:Short
M:C
K:E Minor
EFGA|
"""


def test_tunes_are_melodies_and_known_in_every_key(folder, monkeypatch):
    monkeypatch.setattr(tunes, "COPY", 8)
    publish(monkeypatch, tunes, {"music21/corpus/airdsAirs/a.abc": BOOK.encode(), "b.abc": b"X:1"})
    report = Report()
    (found,) = tunes.documents(report)
    assert found.text == "M:6/8\nL:1/8\nK:G\ndc|B2AGAB|c2ded^c|d2BG2A|B3A2:|\n"
    assert tunes.fault(found.text) == ""
    reasons = {reason: len(names) for reason, names in report.skipped.items()}
    assert reasons["a near duplicate"] == 1  # the same in A
    assert reasons["it changes its metre, key or voice"] == 1
    assert reasons["fewer than 9 notes"] == 1
    assert report.found == 5
    other = "M:6/8\nL:1/8\nK:A\nGAB|d2ed2e|ed|c2BABc|d2efe^d|e2cA2B|c3B2:|\n"
    assert tunes.copied([other, FINE], [found.text]) == [True, False]


def test_a_tune_becomes_midi_sound_and_a_picture(tmp_path):
    """Of the MIDI file the bytes of the header and of the first note, by the standard."""
    tunes.draw([FINE, FINE], tmp_path / "tune.abc")
    content = (tmp_path / "tune.mid").read_bytes()
    assert content[:14] == b"MThd\0\0\0\x06\0\0\0\x01\x01\xe0"
    assert int.from_bytes(content[18:22], "big") == len(content) - 22
    first = b"\0\xff\x51\x03\x07\xa1\x20" + b"\0\x90\x47\x50" + b"\x83\x60\x80\x47\x50"
    assert content[22 : 22 + len(first)] == first  # 120 a minute; B for 480 ticks
    assert content.endswith(b"\xff\x2f\0")
    with wave.open(str(tmp_path / "tune.wav"), "rb") as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 22_050)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    quarters = 2 * (21 + 2)  # of a tune, and the pause
    assert len(samples) == pytest.approx(quarters * 0.5 * 22_050, abs=100)
    # The first second starts with B, 493.9 Hz, for half of it.
    spectrum = np.abs(np.fft.rfft(samples[:11_025]))
    assert spectrum.argmax() * 2 == pytest.approx(493.9, abs=2)
    assert (tmp_path / "tune.png").is_file()
    assert [music.variable(n) for n in (0, 127, 128, 16384)] == [
        b"\0",
        b"\x7f",
        b"\x81\0",
        b"\x81\x80\0",
    ]
    tied = tunes.played([tunes.parse("M:4/4\nL:1/4\nK:C\nC-C2-|CD")])
    assert [(note.pitch, note.length) for note in tied[:2]] == [(60, 1), (62, Fraction(1, 4))]


# ---- chorales ------------------------------------------------------------------------------------

C_MAJOR, G_MAJOR = "OLH<", "OJGC"
BARS = [C_MAJOR * 4, *[C_MAJOR * 8 + G_MAJOR * 8] * 4, C_MAJOR * 12]
CHORALE = chorales.arrange(BARS)


def test_a_chorale_has_bars_voices_and_a_melody():
    quarter = C_MAJOR * 4
    assert CHORALE.startswith(f"{quarter}\n{quarter} {quarter} {G_MAJOR * 4} {G_MAJOR * 4}\n")
    assert chorales.fault(CHORALE) == ""
    assert chorales.arrange([C_MAJOR * 6]) == f"{C_MAJOR * 2} {quarter}\n"  # of an upbeat, the end
    assert [voice[0] for voice in chorales.voices_of(CHORALE)] == [67, 64, 60, 48]  # G4, E4, C4, C3
    melody = "".join(C_MAJOR.replace("O", letter) * 4 for letter in "OQSOOQ")
    assert chorales.steps(melody) == (2, 2, -4, 2)  # the two O are one note
    assert chorales.steps(chorales.transpose(melody, 3)) == (2, 2, -4, 2)
    crossed = CHORALE.replace("OJGC", "OJLC")  # the tenor sings E4, the alto D4
    assert chorales.describe(crossed) == {
        "share of right bars": (6, 6), "bars": (6, 1), "share of crossed sixteenths": (32, 80)
    }  # fmt: skip
    wrong = {
        "fewer than 4 bars": chorales.arrange(BARS[:3]),
        "a bar does not add up to the metre": CHORALE.replace(f"{C_MAJOR} ", "", 1),
        "a quarter has other than four sixteenths": CHORALE.replace(
            f"{C_MAJOR} ", f" {C_MAJOR}", 1
        ),
        "a letter is no note of the bass": CHORALE.replace("<", "~"),
        "a voice is silent": CHORALE.replace("<", ".").replace("C", "."),
        "voices cross in more than 25% of the sixteenths": crossed,
    }
    for reason, text in wrong.items():
        assert chorales.fault(text) == reason
    assert chorales.right_bars("OLH<OL\n" * 5) == (0, 5)  # 6 letters are no metre
    (copy, other) = chorales.copied([melody * 9, CHORALE], [chorales.transpose(melody * 9, -2)])
    assert (copy, other) == (True, False)


def music_xml(voices: dict[str, str]) -> bytes:
    """A compressed score: voices, each with an upbeat of a quarter and then bars of "C4 D4 ..."."""
    parts = ""
    for bars in voices.values():
        measures = ""
        for bar in bars.split("|"):
            notes = ""
            for word in bar.split():
                step, alter, octave = re.fullmatch(r"(.)(#?)(\d?)", word).groups()
                pitch = f"<step>{step}</step><alter>{len(alter)}</alter><octave>{octave}</octave>"
                pitch = "<rest/>" if step == "z" else f"<pitch>{pitch}</pitch>"
                notes += f"<note>{pitch}<duration>2</duration></note>"
            measures += f"<measure>{notes}</measure>"
        head = "<attributes><divisions>2</divisions><time><beats>4</beats><beat-type>4</beat-type>"
        parts += "<part>" + measures.replace("<note>", f"{head}</time></attributes><note>", 1)
        parts += "</part>"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("META-INF/container.xml", "<container/>")
        archive.writestr("a.xml", f"<score-partwise>{parts}</score-partwise>")
    return file.getvalue()


def test_chorales_are_read_out_of_scores_and_trained_in_all_keys(folder, monkeypatch):
    bar = "|G4 G4 G4 z"
    voices = {"s": "G4" + bar * 4, "a": "E4" + "|E4 D#4 E4 E4" * 4}
    voices |= {"t": "C4" + "|C4 B3 C4 C4" * 4, "b": "C3" + "|C3 G3 C3 C3" * 4}
    members = {
        "music21/corpus/bach/a.mxl": music_xml(voices),
        "music21/corpus/bach/b.mxl": music_xml(voices | {"fifth": voices["a"]}),
        "music21/corpus/bach/c.mxl": music_xml(voices | {"b": "C3"}),
        "music21/corpus/other/d.mxl": b"",
    }
    publish(monkeypatch, chorales, members)
    monkeypatch.setattr(chorales, "split_of", lambda melody, share: TRAIN)
    report = Report()
    own, *moved = [document.text for document in chorales.documents(report)]
    quarters = ("OLH<" * 4, "OKGC" * 4, "OLH<" * 4, ".LH<" * 4)
    assert own == "OLH<" * 4 + "\n" + (" ".join(quarters) + "\n") * 4
    assert {reason: len(names) for reason, names in report.skipped.items()} == {
        "it has other than four voices": 1,
        "it changes its metre, or its voices have different lengths": 1,
    }
    # From six semitones lower to five higher, all voices stay in their ranges.
    assert [ord(text[0]) - ord("O") for text in moved] == [*range(-6, 0), *range(1, 6)]
    low = chorales.transpose(own, -6)
    assert len(chorales.keys_of(chorales.transpose(low, -6))) < len(moved)  # the bass has no F#1


def test_a_chorale_becomes_midi_with_a_track_a_voice(tmp_path):
    chorales.draw([CHORALE], tmp_path / "hymn.mid")
    content = (tmp_path / "hymn.mid").read_bytes()
    assert content[:14] == b"MThd\0\0\0\x06\0\1\0\x04\x01\xe0"
    assert content.count(b"MTrk") == 4
    # Three voices hold their first note and their last one for three quarters; the soprano never
    # moves. Behind each track's last note comes the pause.
    assert content.count(music.variable(3 * 480) + b"\x80") == 3 * 2
    assert content.count(music.variable(2 * 480) + b"\xff\x2f\0") == 4
    with wave.open(str(tmp_path / "hymn.wav"), "rb") as file:
        seconds = file.getnframes() / file.getframerate()
    assert seconds == pytest.approx((4 + 4 * 16 + 12) * 0.125 + 1, abs=0.01)  # and the pause
    assert (tmp_path / "hymn.png").is_file()


# ---- series --------------------------------------------------------------------------------------


def weather(days: int = 80, gap: int | None = None) -> bytes:
    """A TMY3 file of a wave with noise, in all columns; sunlight is constant."""
    rng = np.random.default_rng(0)
    lines = ["0,place", ",".join(["Date", *series.COLUMNS])]
    for hour in range(24 * days):
        values = [10 + 5 * math.sin(hour / 24 * 2 * math.pi) + rng.normal() for _ in range(5)]
        if hour == gap:
            values[0] = series.GAP
        lines.append(",".join(["1", *(f"{value:.2f}" for value in values), "0"]))
    return "\n".join(lines).encode()


def test_series_are_windows_in_order_of_time(folder, monkeypatch):
    members = dict.fromkeys(series.MEMBERS, weather())
    members[series.MEMBERS[0]] = weather(gap=100)
    publish(monkeypatch, series, members)
    report = Report()
    found = list(series.documents(report))
    assert {len(d.text) for d in found} == {192} and not any(series.fault(d.text) for d in found)
    # Of 80 days 24 are training, with 17 windows of 8 days; the others 21 each.
    whole = [d for d in found if "703165TY" in d.name and "Dew" in d.name]
    assert [sum(d.split == split for d in whole) for split in SPLITS] == [17, 21, 21]
    reasons = {reason: len(names) for reason, names in report.skipped.items()}
    assert reasons == {"gaps": 5, "a constant past": 2 * 59}


def test_forecasts_by_hand():
    """A past that repeats 0 to 23 each day: its mean error of yesterday is 0 but for rounding."""
    past = np.tile(np.arange(24.0), 7)
    mean, scale = series.scale_of(past)
    assert (mean, scale) == (11.5, 6)
    letters = series.encode(past, mean, scale)
    width = 2 * series.LIMIT / series.BINS
    assert np.abs(series.decode(letters) - (past - 11.5) / 6).max() <= width / 2 + 1e-9
    assert series.encode(np.array([1e9, -1e9]), 0, 1) == "~!"
    assert (series.decode("\ufffd\n") == series.decode("~!")).all()  # signs that a model may write
    (guess,) = series.as_yesterday(letters, [])
    assert series.errors(guess, [guess]) == {"MASE": 0, "weighted quantile loss": 0}
    # Yesterday's error on the past is 2 bins, that of the forecast 3: MASE 1.5. All quantiles are
    # equal, so their loss is the mean of |y - f| over that of |y|.
    past = "".join(chr(80 + 2 * (day % 2)) * 24 for day in range(7))
    truth, guess = past + chr(83) * 24, past + chr(80) * 24
    found = series.errors(truth, [guess])
    assert found["MASE"] == pytest.approx(1.5)
    y = abs(series.decode(chr(83))[0])
    assert found["weighted quantile loss"] == pytest.approx(3 * width / y)
    others = [chr(80 + i) * 192 for i in range(-20, 20)]
    nearest = series.as_nearest(chr(82) * 168, others)
    assert nearest[:3] == [chr(82) * 168 + chr(80 + i) * 24 for i in (2, 1, 3)]
    assert len(nearest) == series.NEAREST
    quantiles = series.forecast([past + chr(70 + i) * 24 for i in range(11)])
    assert quantiles[4, 0] == pytest.approx(series.decode(chr(75))[0])


def test_a_series_as_prompt_and_its_forecast(tmp_path):
    numbers = 100 + np.tile(np.arange(24.0), 8)
    prompt = " ".join(map(str, numbers))
    start = series.read_prompt(prompt)
    assert len(start) == series.PAST
    lines = series.answer(prompt, series.as_yesterday(start, []) * 3).splitlines()
    assert len(lines) == 25
    assert [float(v) for v in lines[24].split()] == pytest.approx([24, 123, 123, 123], abs=0.7)
    series.draw(series.as_yesterday(start, []) * 3, tmp_path / "a")
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("1 2 3", "has 3 numbers, and a past has 168"),
        ("5 " * 168, "the series is constant, 5"),
        ("1 nan " + "3 4 " * 83, "has 1 gap"),
        ("1 2 x", "such as 12.5 13 12.8"),
    ],
)
def test_a_series_that_cannot_be_forecast(prompt, what):
    with pytest.raises(ValueError, match=what):
        series.read_prompt(prompt)


# ---- levels --------------------------------------------------------------------------------------


def level(*rows: str) -> str:
    """A piece from its rows, the highest first; rows above are empty."""
    grid = ["-" * 24] * (16 - len(rows)) + list(rows)
    return "\n".join("".join(column) for column in zip(*grid[::-1]))


GROUND = "X" * 24
LEVELS = {
    "": (GROUND,),
    "a gap that a jump crosses": ("XXXXXXXXX------XXXXXXXXX",),
    "a wall of four": ("---------X--------------",) * 4 + (GROUND,),
    "platforms": ("-" * 12 + "=" * 12,) + ("-" * 24,) * 3 + ("=" * 12 + "-" * 12,) + ("-" * 24,),
}
NO_LEVELS = {
    "a gap too wide": ("XXXXX-------------XXXXXX",),
    "a wall of six": ("---------X--------------",) * 6 + (GROUND,),
    "spikes": ("-----^^^^^^^^^^^^^^-----", GROUND),
    "nothing to stand on": ("-" * 24,),
}


def test_a_level_is_one_with_a_path():
    for name, rows in LEVELS.items():
        assert levels.fault(level(*rows)) == "", name
    for name, rows in NO_LEVELS.items():
        assert levels.fault(level(*rows)) == "there is no path from the left to the right", name
    assert levels.fault("X") == "1 column, not 24"
    assert levels.fault(level(GROUND).replace("X", "Q", 1)) == "'Q' in column 1 is no tile"
    assert levels.fault(level(GROUND)[:-1]) == "column 24 has 15 rows, not 16"


STRF = """(supertux-tiles (tiles (width 2) (height 2) (ids 0 1
 2 3) (attributes 0 1 3 1024) (image "a.png")))"""
SECTOR = """; a remark with (
(supertux-level (name "a (b") (sector (name "main")
  (snowball (direction "left") (x {x}) (y 416))
  (tilemap (solid #f) (width 1) (height 1) (tiles 1))
  (tilemap (solid #t) (speed 1) (width 40) (height 18) (tiles {tiles}))))"""


def test_pieces_of_a_level_out_of_a_deb(folder, monkeypatch):
    grid = np.zeros((18, 40), dtype=int)
    grid[-3] = 1
    grid[-6, 10:14] = 2
    grid[-4, 20] = 3
    text = SECTOR.format(x=5 * 32 + 3, tiles=" ".join(map(str, grid.ravel())))
    place = "./usr/share/games/supertux2/levels/world1/{}.stl"
    members = {levels.TILES: STRF, place.format("a"): text, place.format("b"): "(supertux-level"}
    publish_deb(monkeypatch, levels, {name: own.encode() for name, own in members.items()})
    report = Report()
    found = list(levels.documents(report))
    assert [d.name for d in found] == ["world1/a.stl, piece 1", "world1/a.stl, piece 2"]
    assert (report.found, report.used) == (2, 2)
    assert report.skipped == {"a bracket is not closed": ["world1/b.stl"]}
    columns = found[0].text.split("\n")
    assert columns[0] == "X" + "-" * 15
    assert columns[10] == "X--=" + "-" * 12
    assert columns[20] == "X^" + "-" * 14
    assert columns[5] == "X-e" + "-" * 13
    assert levels.fault(found[0].text) == ""
    path = levels.PACKAGE.path
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match="is not whole, or another file"):
        next(levels.documents())


# ---- sounds --------------------------------------------------------------------------------------


def test_samples_are_written_by_mu_law():
    """0.5 has y = ln(1 + 127.5) / ln 256 = 0.8757 and the bin round(1.8757 / 2 * 255) = 239."""
    samples = np.array([-1, 0, 0.5, 1, 2, -3])
    assert sounds.to_bins(samples).tolist() == [0, 128, 239, 255, 255, 0]
    bins = np.arange(256)
    assert np.array_equal(sounds.to_bins(sounds.to_samples(bins)), bins)
    assert sounds.to_samples(np.array([0, 1]), 2) == pytest.approx([-1, 1])  # a bit a sample
    text = sounds.encode(samples)
    assert text[0] == sounds.SIGNS[0] and text[2] == sounds.SIGNS[239]
    assert len(sounds.SIGNS) == 256 and sounds.SIGNS.isprintable() and sounds.SIGNS.isalpha()
    soft = np.random.default_rng(0).uniform(-0.01, 0.01, 999)
    loud = 90 * soft
    for own in (soft, loud):  # a step is at most ln 256 / 255 of 1 / mu + |x|
        error = np.abs(sounds.decode(sounds.encode(own)) - own)
        assert (error <= 1.03 * np.log(256) / 255 * (1 / 255 + np.abs(own))).all()


def test_a_sound_has_a_voice_or_a_tone():
    tone = hum(8000)
    noise = np.random.default_rng(0).normal(size=8000)
    smooth = np.convolve(noise, np.ones(8) / 8, mode="same")
    assert sounds.fault(sounds.encode(tone)) == ""
    assert sounds.fault(sounds.encode(np.concatenate((0.2 * noise[:6000], tone[:2000])))) == ""
    assert "no voice" in sounds.fault(sounds.encode(0.2 * noise))
    assert "no voice" in sounds.fault(sounds.encode(0.5 * smooth))
    assert sounds.fault(sounds.encode(0.001 * tone)) == "silent"
    assert sounds.fault(sounds.encode(tone[:500])) == "shorter than 1000 samples"
    assert sounds.fault(sounds.encode(tone) + "?") == "'?' at place 8001 is no sample"
    found = sounds.describe(sounds.encode(tone))
    moments, count = found["share of voiced moments"]
    assert moments > 0.9 * count
    decibels = 10 * np.log10(np.square(tone).mean())
    assert found["decibels"] == pytest.approx((decibels, 1), abs=0.05)


def test_sounds_out_of_a_deb(folder, monkeypatch):
    members = sound_members(40)
    place = "./usr/share/asterisk/sounds/en/{}.wav"
    for name in ("minute", "queue-minutes", "digits/h-7", "digits/7"):
        members[place.format(name)] = wave_file(hum(1200))
    members[place.format("fast")] = wave_file(hum(1200), rate=16000)
    members[place.format("cut")] = wave_file(hum(1200))[:-400]
    publish_deb(monkeypatch, sounds, members)
    report = Report()
    found = {d.name: d for d in sounds.documents(report)}
    assert (report.found, report.used, len(found)) == (47, 44, 44)
    assert report.skipped.pop("silent") == ["silence/1"]
    assert report.skipped.pop("it is cut short: 1,000 of 1,200 samples") == ["cut"]
    (rest,) = report.skipped.items()
    assert "16,000 samples a second" in rest[0] and rest[1] == ["fast"]
    assert set(SPLITS) == {d.split for d in found.values()}
    assert found["minute"].split == found["queue-minutes"].split
    assert sounds.decode(found["minute"].text) == pytest.approx(hum(1200), abs=0.01)
    groups = {
        "digits/h-7": "7", "digits/7": "7", "vm-for": "for", "letters/h": "h", "letters/p": "p",
        "confbridge-mute-in": "mute", "conf-adminmenu-menu8": "adminmenu", "spy-iax2": "spyiax",
        "queue-minutes": "minute", "vm-opts-full": "opt", "auth-thankyou": "thankyou",
    }  # fmt: skip
    assert {name: sounds.group_of(name) for name in groups} == groups


def test_a_stretch_of_silence_is_no_copy():
    silence = sounds.SIGNS[128] * 100
    one, other = sounds.encode(hum(500)), sounds.encode(hum(501))
    texts = [silence + other, other + one[100:150] + other, silence]
    assert sounds.copied(texts, [one + silence]) == [False, True, False]


def test_a_wave_file_as_prompt_and_what_is_wrong_with_others(tmp_path):
    path = tmp_path / "a.wav"
    tone = hum(9000)
    path.write_bytes(wave_file(tone))
    text = sounds.read_prompt(str(path))
    assert len(text) == 4000
    assert sounds.decode(text) == pytest.approx(tone[:4000], abs=0.01)
    plain = wave_file(tone)
    wrong = {
        wave_file(tone, rate=44_100): "44,100 samples a second of 16 bits in 1 channel,.*ffmpeg",
        wave_file(tone, channels=2): "in 2 channels",
        wave_file(tone, width=1): "of 8 bits",
        wave_file(tone, width=3): "of 24 bits",
        plain.replace(b"fmt \x10\0\0\0\1\0", b"fmt \x10\0\0\0\3\0"): "unknown format: 3; .*ffmpeg",
        plain[:-1000]: "cut short: 8,500 of 9,000",
        wave_file(tone[:0]): "no samples",
        wave_file(0 * tone): "silent",
        plain[:20]: "ends too early",
        b"text": "plain samples",
        b"": "ends too early",
    }
    for content, what in wrong.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"--prompt .*a.wav: .*{what}"):
            sounds.read_prompt(str(path))
    with pytest.raises(ValueError, match=r"no file: give a \.wav file"):
        sounds.read_prompt("hello")


def test_sounds_are_written_as_a_wave_file_and_a_picture(tmp_path):
    texts = [sounds.encode(hum(4000, 1000)), sounds.encode(hum(2000))]
    sounds.draw(texts, tmp_path / "s.txt")
    with wave.open(str(tmp_path / "s.wav"), "rb") as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 8000)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    assert len(samples) == 4000 + 2000 + 2000  # with a pause
    assert samples[:4000] == pytest.approx(sounds.decode(texts[0]), abs=1e-4)
    assert (tmp_path / "s.png").is_file()
    image = waves.picture(samples)[:, :, 0]
    assert image.shape == (2 * 129, 2 * 126)  # 256 / 2 + 1 tones, a column every 64 samples
    assert image[:, 40].argmax() == 2 * (128 - 32)  # 1000 of 4000 Hz, from below


# ---- episodes ------------------------------------------------------------------------------------

WALK = """go to a green ball
##?????
..#?...
..#^.h.
right
...h...
.......
...^...
forward
"""
EPISODES = {
    WALK: "",
    WALK.replace("forward", "left"): "the goal is not reached",
    WALK + "...h...\n...^...\nleft\n": "the goal is reached by action 2 of 3",
    WALK.replace("...h", "...g"): "view 2 contradicts an earlier one",
    WALK.replace("a green", "the red"): "the goal is not reached",
    WALK.replace("green", "pink"): "'go to a pink ball' is no mission",
    WALK.replace("forward\n", ""): "the last line is no action",
    WALK.replace("...h", "..h"): "'..h...' is no row of 7 cells",
    WALK.replace("...^", "..^."): "the robot is not in the middle of the last row",
    "go to the red key\nleft\n": "a view has 0 rows, not 1 to 7",
}


def test_an_episode_is_one_whose_views_agree_and_whose_last_action_reaches_the_goal():
    for text, what in EPISODES.items():
        assert episodes.fault(text) == what, text
    # The wall ahead stops it; what was at the left is ahead after a turn.
    blocked = "go to the red key\n...#...\n..a^...\nforward\n...#...\n..{}^...\nleft\n"
    assert episodes.fault(blocked.format("a")) == episodes.fault(blocked.format("?")) == ""
    assert episodes.fault(blocked.format(".")) == "view 2 contradicts an earlier one"
    prompt = "go to a red key\\n...^...\\nleft"
    assert episodes.read_prompt(prompt) == prompt.replace("\\n", "\n") + "\n"
    for wrong in ("open the door", "go to the red key\\nup"):
        with pytest.raises(ValueError, match="such as 'go to the red ball'"):
            episodes.read_prompt(wrong)


def test_episodes_of_the_expert_reach_their_goals_and_a_player_does_what_it_writes(
    monkeypatch, tmp_path
):
    corridor.install(monkeypatch)
    report = Report()
    found = list(episodes.documents(report))
    assert not any(episodes.fault(d.text) for d in found)
    assert len({d.text for d in found}) == len(found) == report.used
    reasons = {reason: len(names) for reason, names in report.skipped.items()}
    assert reasons["the expert carries an obstacle away"] == 2 * 18  # those with something grey
    assert reasons["the same episode as an earlier one"] == report.used  # here both levels are one
    assert report.found == 240 == report.used + sum(reasons.values())
    # The split of an episode is that of its world: here a seed is a world.
    splits = {d.name.split()[-1]: d.split for d in found}
    assert set(splits.values()) == set(SPLITS)
    held = episodes.seeds("GoToObj", TEST, 3)
    assert held == episodes.seeds("GoToLocal", TEST, 3)
    assert all(splits.get(str(seed), TEST) == TEST for seed in held)
    # A player that knows the expert's texts does as well as the expert does.
    monkeypatch.setattr(episodes, "PLAYED", 3)
    monkeypatch.setattr(episodes, "PAST", 1000)
    followed = [
        [e.text(), list(e.actions)] for e in episodes.play(episodes.follow_expert, "GoToObj")
    ]
    asked = []

    def answer(texts):
        asked.extend(texts)
        return [next(d for d, _ in followed if d.startswith(text))[len(text) :] for text in texts]

    expert = episodes.results(episodes.follow_expert)["success, GoToObj"]
    assert episodes.play_texts("GoToObj", answer) == expert
    assert not any(episodes.play_texts("GoToObj", lambda texts: ["nonsense"] * len(texts)))
    mission = followed[0][0].split("\n")[0]
    (long,) = episodes.play(lambda running: ["wait"] * len(running), "GoToObj", held[:1])
    assert len(long.actions) == 12 and not long.reached
    assert long.text(100).startswith(mission) and len(long.text(100)) <= 100 < len(long.text())
    # For a model that sees: what was seen before each action.
    taken = list(episodes.steps("GoToObj", held))
    assert [action for _, _, action in taken] == [
        action for _, actions in followed for action in actions
    ]
    assert taken[0][0].shape == (56, 56, 3) and taken[0][1] == mission
    # The same in the splits, with mission and action as captions.
    monkeypatch.setattr(episodes, "PICTURED", 120)
    stepped = list(episodes.records())
    own = [r for r in stepped if r.split == TEST][: len(taken)]
    assert [r.captions for r in own] == [step[1:] for step in taken][: len(own)]
    assert all(np.array_equal(r.image, step[0]) for r, step in zip(own, taken))
    assert own and {r.split for r in stepped} <= set(SPLITS)
    assert own[0].label == f"{mission}: {taken[0][2]}"
    episodes.draw([d.text for d in found[:2]], tmp_path / "a")
    assert (tmp_path / "a.png").is_file()


def test_another_version_of_an_installed_package_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0.0")
    with pytest.raises(
        ValueError, match=r"minigrid 2\.0\.0 is installed, so run: pip install minigr"
    ):
        episodes.PACKAGE.check()
