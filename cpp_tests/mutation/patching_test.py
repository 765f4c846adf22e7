"""What a patch matches; and every mutant still applies, which takes a second: whether the tests
catch them is for `make test-long`."""

from __future__ import annotations

import shutil
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "fuzz"))

import find_cpu_mutants
import find_mutants
import kernel_score_mutation_test
import score_mutation_test
from mutation_test import MUTANTS
from patching import patch, patched, without_comments

KERNEL = Path(__file__).resolve().parents[2] / "kernel"
SOURCE = """\
  wait<0>();
  barrier();  // "K" has landed: wait<0>();
  load(k, /* the next
             one */ next);
  asm("call x; // not a comment");
  barrier();
  store(out);
"""
AS_CODE = (
    'wait<0>(); barrier(); load(k, next); asm("call x; // not a comment"); barrier(); store(out);'
)


def code(text: str) -> str:
    return " ".join(without_comments(text).split())


def check(old: str, new: str, replaced: str) -> None:
    """`old` in SOURCE becomes `new` where AS_CODE has `replaced`, and nothing else changes."""
    assert AS_CODE.count(replaced) == 1
    assert code(patch(SOURCE, old, new)) == code(AS_CODE.replace(replaced, new)), old


def refusal(old: str, text: str = SOURCE) -> str:
    """What patch() says, without the text it was given."""
    try:
        patch(text, old, "x")
    except ValueError as error:
        return str(error).partition(":")[0]
    return ""


class PatchTest(unittest.TestCase):
    def test_comments_do_not_count(self) -> None:
        assert code(SOURCE) == AS_CODE
        check("barrier(); load(k, next);", "load(k, next);", "barrier(); load(k, next);")
        check("barrier();  // V is there\nload(k, next);", "", "barrier(); load(k, next);")
        check("wait<0>();", "wait<1>();", "wait<0>();")

    def test_white_space_does_not_count(self) -> None:
        for old in ("store(out);", "store ( out ) ;", "\nstore(\n    out);\n"):
            check(old, "keep(out);", "store(out);")
        assert patch("int  row\n= 1;", "int row = 1;", "x") == "x"

    def test_words_are_whole(self) -> None:
        for old in ("tore(out);", "store(ou"):
            assert refusal(old) == "found 0 times instead of once"
        assert refusal("int row;", "introw;") == "found 0 times instead of once"
        assert refusal("introw;", "int row;") == "found 0 times instead of once"

    def test_strings_are_code(self) -> None:
        check('x; // not a comment");', 'y");', 'x; // not a comment");')

    def test_once_or_not_at_all(self) -> None:
        for old in ("barrier();", 'barrier();  // "K" has landed'):
            assert refusal(old) == "found 2 times instead of once"
        assert refusal("landed") == "found 0 times instead of once"
        assert refusal("// a comment alone") == "no code to look for"

    def test_new_text_is_taken_as_it_is(self) -> None:
        assert patch("a = b;", "b", r"\1 \g<0> \n") == r"a = \1 \g<0> \n;"

    def test_lines_keep_their_numbers(self) -> None:
        lines = patch(SOURCE, "store(out);", "keep(out);").splitlines()
        assert len(lines) == len(SOURCE.splitlines())
        assert lines[-1].strip() == "keep(out);"


class MutantsTest(unittest.TestCase):
    def test_every_mutant_applies(self) -> None:
        mutants = MUTANTS + find_cpu_mutants.MUTANTS + find_cpu_mutants.CACHE_MUTANTS
        for mutant in mutants:
            with self.subTest(kernel=mutant.kernel, name=mutant.name):
                for file, text in patched(KERNEL, mutant.patches).items():
                    assert code(text) != code((KERNEL / file).read_text()), "changes nothing"
        print(f"{len(mutants)} mutants tried")

    def test_every_mutant_of_scores_applies(self) -> None:
        for plant in (score_mutation_test.plant, kernel_score_mutation_test.plant):
            with self.subTest(plant=plant.__module__), tempfile.TemporaryDirectory() as name:
                shutil.copytree(KERNEL, Path(name) / "kernel")
                plant(Path(name) / "kernel")

    def test_no_mutant_quotes_a_comment(self) -> None:
        for mutant in MUTANTS + find_cpu_mutants.MUTANTS + find_cpu_mutants.CACHE_MUTANTS:
            for _, *texts in mutant.patches:
                for text in texts:
                    assert code(text) == " ".join(text.split()), mutant.name

    def test_planted_mutants_exist(self) -> None:
        names = [mutant.name for mutant in MUTANTS]
        for planted in find_mutants.PLANTED:
            assert names.count(planted) == 1, planted


if __name__ == "__main__":
    unittest.main()
