"""English to train on, from what a machine has: manuals, documentation, docstrings of installed Python packages.

    python benchmarks/curves/english.py OUTPUT_DIR [--roots DIR ...]
    spark-submit jobs/tokenize.py --input OUTPUT_DIR --glob "*.txt" --vocab-size 2048 --output TOKENS_DIR

Another machine has other text, so losses of two machines are two tables: ``__main__.py`` names the tokens by a hash.
"""

import argparse
import ast
import gzip
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOTS = ("/usr/share/doc", "/usr/share/vim", "/usr/share/man/man1", "/usr/share/man/man7", "/usr/lib/node_modules")
TEXT = {"", ".txt", ".md", ".rst", ".adoc", ".gz"}
# Lists of what somebody changed, logs of tests, and pages that a program wrote from one template.
_NO_PROSE = re.compile(r"change|news|history|\.sum|\.json|\.html|\.js|^gcloud|^bq_|^gsutil", re.IGNORECASE)
LONGEST = 2_000_000
# A document that is nearly all one of these is a table, a changelog of hashes or another language.
_PROSE = re.compile(r"[a-z ]")
_ROFF = re.compile(r"^\.\\\".*$|^\.[A-Za-z]{1,3}\b ?|\\f[BIRP]|\\&|\\-", re.MULTILINE)


def files(roots: list[Path]) -> Iterator[str]:
    for root in roots:
        for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink()):
            if (path.suffix in TEXT or re.fullmatch(r"\.\d", path.suffix)) and not _NO_PROSE.search(path.name):
                data = path.read_bytes()
                if path.suffix == ".gz":
                    data = gzip.decompress(data)
                text = data.decode("utf-8", "replace")
                yield _ROFF.sub("", text) if "/man/" in str(path) else text


def docstrings(roots: list[Path]) -> Iterator[str]:
    """Of each Python file, all its docstrings."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
            yield "\n\n".join(text for text in found if text)


def english(documents: Iterator[str], seen: set[str]) -> Iterator[str]:
    """Documents that are long enough, look like prose, and are not there already; paragraphs come once."""
    for document in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", document):
            name = hashlib.blake2b(paragraph.encode("utf-8", "replace"), digest_size=8).hexdigest()
            if name not in seen and len(_PROSE.findall(paragraph)) > 0.7 * len(paragraph) > 0:
                seen.add(name)
                kept.append(paragraph.strip("\n"))
        text = "\n\n".join(kept)
        if 500 < len(text) < LONGEST:
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--roots", type=Path, nargs="+", default=[Path(root) for root in ROOTS])
    parser.add_argument(
        "--packages", type=Path, nargs="+", default=[Path(p) for p in sys.path if p.endswith("packages")]
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    seen: set[str] = set()
    characters = number = 0
    for source in (files(arguments.roots), docstrings([Path(ast.__file__).parent, *arguments.packages])):
        for text in english(source, seen):
            (arguments.output / f"{number:06d}.txt").write_text(text + "\n", encoding="utf-8")
            characters, number = characters + len(text), number + 1
    print(f"{number} documents, {characters:,} characters")


if __name__ == "__main__":
    main()
