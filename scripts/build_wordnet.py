"""Write the WordNet files that ship in the package, from ``data.noun`` of Debian's wordnet-base 1:3.0-37.

    apt-get install wordnet-base
    python scripts/build_wordnet.py /usr/share/wordnet/data.noun

Writes into src/netgloss/data: ``wordnet30_closure.tsv`` (the synsets of ImageNet-1k and CIFAR-10 with all ancestors),
``wnids_imagenet1k.txt`` and ``wnids_cifar10.txt`` (one wnid a line, in class order) and ``wordnet30_license.txt`` (the
notice that stands at the head of ``data.noun``, without its line numbers). Any other ``data.noun`` is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from netgloss.classifiers import imagenet_wnids
from netgloss.metrics.consistency.taxonomy import CLOSURE, CLOSURE_SHA256, Taxonomy, read_data_noun

DATA_NOUN_SHA256 = "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"
# airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck
CIFAR10 = ["n02691156", "n02958343", "n01503061", "n02121620", "n02430045"]
CIFAR10 += ["n02084071", "n01639765", "n02374451", "n04194289", "n04490091"]
HEADER = """\
# format_version 1
# source: data.noun of WordNet 3.0 (Debian wordnet-base 1:3.0-37), hypernyms @ and @i; wnid, first lemma, parents
# licence: wordnet30_license.txt
"""


def closure(nouns: Taxonomy, wnids: list[str]) -> str:
    """The body of the file: ``wnids`` and all their ancestors, sorted."""
    nouns.check(wnids)
    kept = sorted(set().union(*(nouns.ancestors(wnid) for wnid in wnids)))
    return "".join(f"{wnid}\t{nouns.names[wnid]}\t{','.join(nouns.parents[wnid])}\n" for wnid in kept)


def notice(data_noun: bytes) -> str:
    """The licence at the head of ``data.noun``: lines of two blanks, a number, a blank and the text."""
    head = [line for line in data_noun.decode("ascii").splitlines() if line.startswith("  ")]
    return "".join(line[2:].partition(" ")[2].rstrip() + "\n" for line in head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_noun", type=Path)
    path = parser.parse_args().data_noun
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != DATA_NOUN_SHA256:
        sys.exit(f"{path} is not the data.noun of wordnet-base 1:3.0-37 (sha256 {found})")
    imagenet = imagenet_wnids("imagenet-1k")
    assert imagenet is not None
    body = closure(read_data_noun(path), [*imagenet, *CIFAR10])
    assert hashlib.sha256(body.encode("ascii")).hexdigest() == CLOSURE_SHA256
    for name, text in {
        CLOSURE.name: HEADER + body,
        "wnids_imagenet1k.txt": "\n".join(imagenet) + "\n",
        "wnids_cifar10.txt": "\n".join(CIFAR10) + "\n",
        "wordnet30_license.txt": notice(content),
    }.items():
        (CLOSURE.parent / name).write_text(text, encoding="ascii", newline="\n")


if __name__ == "__main__":
    main()
