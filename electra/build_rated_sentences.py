"""Build `electra/archive/rated_sentences.tsv.xz` from the source archive of the Python package vaderSentiment (MIT).

    python -m electra.build_rated_sentences                                  # downloads the pinned archive
    python -m electra.build_rated_sentences --sdist vaderSentiment-3.3.2.tar.gz

Every line of the result is `source TAB id TAB score TAB sentence`: the mean of 20 people's ratings between -4
(extremely negative) and 4 (extremely positive). Kept are the film review snippets and the product review snippets; the
newspaper editorials, which are whole articles, and the tweets, which are people's own messages, are left out. The same
bytes come out on every machine with the same liblzma.
"""

from __future__ import annotations

import hashlib
import html
import io
import lzma
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from common.cli import Parser
from common.errors import UserError, run_main
from common.files import write_atomically

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
KEPT = {"movies": "movieReviewSnippets_GroundTruth.txt", "products": "amazonReviewSnippets_GroundTruth.txt"}
ARCHIVE = Path(__file__).resolve().parent / "archive" / "rated_sentences.tsv.xz"


def download(folder: Path) -> Path:
    """The source archive by pip, which does not install it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run(
        [*command, f"{PACKAGE}=={VERSION}"], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    found = list(folder.glob("*.tar.gz"))
    if done.returncode != 0 or len(found) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{PACKAGE}: pip could not fetch its source archive ({reason}); give it with --sdist")
    return found[0]


def read_lines(sdist: Path) -> list[str]:
    """The lines of the result, in the order of the sources' files; a sentence that comes again is left out.

    Raises:
        UserError: not the pinned archive.
    """
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != SHA256:
        raise UserError(f"{sdist}: SHA-256 is {found}, expected {SHA256} ({PACKAGE} {VERSION})")
    lines, seen = [], set()
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile(INNER)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as ratings:
            for source, name in KEPT.items():
                file = ratings.extractfile(f"hutto_ICWSM_2014/{name}")
                assert file is not None
                for line in file.read().decode("utf-8").splitlines():
                    key, score, text = line.split("\t", 2)
                    sentence = " ".join(html.unescape(text).split())
                    if sentence and sentence.lower() not in seen:
                        seen.add(sentence.lower())
                        lines.append(f"{source}\t{key}\t{float(score):.4g}\t{sentence}")
    return lines


def main() -> None:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sdist", type=Path, help=f"the source archive of {PACKAGE} {VERSION}")
    parser.add_argument("--output", type=Path, default=ARCHIVE, help="archive to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        lines = read_lines(arguments.sdist or download(Path(name)))
    data = lzma.compress(("\n".join(lines) + "\n").encode(), lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    write_atomically(arguments.output, lambda path: path.write_bytes(data))
    print(f"{len(lines)} sentences, {len(data)} bytes in {arguments.output}")


if __name__ == "__main__":
    run_main(main)
