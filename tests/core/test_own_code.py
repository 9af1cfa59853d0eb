"""What a user's own class consists of, and where in it something went wrong."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from fedweight.core.own_code import is_own, source_digest, where_raised, where_told

MAIN = '''
"""Mine."""
import math
from owned_more import helper, unused
from fedweight.strategies import FedAvg
import owned_whole

RATE = 0.1
OTHER = 3

def scale(x):
    return helper(x) * RATE * owned_whole.factor

class Base:
    pass

class Mine(Base):
    """Weigh."""
    def weights(self, x):
        return scale(x) + math.pi  # as it was

class Another:
    rate = OTHER

if __name__ == "__main__":
    print(Mine())
'''
MORE = (
    "def inner():\n    return 1\ndef helper(x):\n    return inner() * x\nunused = 2\n"
)
WHOLE = "factor = 2\n"


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the digest of a class of a module that is imported anew."""
    monkeypatch.syspath_prepend(tmp_path)
    names = {"owned": MAIN, "owned_more": MORE, "owned_whole": WHOLE}

    def of(name: str = "Mine", **changes: tuple[str, str]) -> str:
        for module, text in names.items():
            sys.modules.pop(module, None)
            old, new = changes.get(module, ("", ""))
            assert old in text
            (tmp_path / f"{module}.py").write_text(text.replace(old, new))
        importlib.invalidate_caches()
        sys.dont_write_bytecode = True
        return source_digest(getattr(importlib.import_module("owned"), name))

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield of
    for module in names:
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("module", "change"),
    [
        ("owned", ("math.pi", "math.tau")),
        ("owned", ("RATE = 0.1", "RATE = 0.2")),
        ("owned", ("class Base:\n    pass", "class Base:\n    x = 1")),
        ("owned", ("import math\n", "import math\nmath.pi = math.pi\n")),
        ("owned_more", ("return 1", "return 2")),
        ("owned_more", ("inner() * x", "inner() / x")),
        ("owned_whole", ("factor = 2", "factor = 3")),
    ],
)
def test_what_a_class_needs_is_in_its_digest(
    digest: Any, module: str, change: tuple[str, str]
) -> None:
    assert digest(**{module: change}) != digest() != ""


@pytest.mark.parametrize(
    ("module", "change"),
    [
        ("owned", ("  # as it was", "  # as it is\n")),
        ("owned", ("OTHER = 3", "OTHER = 4")),
        ("owned", ("print(Mine())", "print(3)")),
        ("owned", ("class Another:", "class Third:\n    pass\n\nclass Another:")),
        ("owned_more", ("unused = 2", "unused = 3")),
    ],
)
def test_what_a_class_does_not_need_is_not(
    digest: Any, module: str, change: tuple[str, str]
) -> None:
    assert digest(**{module: change}) == digest()


def test_an_object_has_the_digest_of_what_was_imported(
    digest: Any, tmp_path: Path
) -> None:
    before = digest()
    (tmp_path / "owned.py").write_text(MAIN.replace("math.pi", "math.tau"))
    assert source_digest(sys.modules["owned"].Mine) == before


def test_what_is_installed_has_none() -> None:
    from fedweight.strategies import FedAvg

    assert source_digest(FedAvg) == source_digest(int) == source_digest(Path) == ""
    assert source_digest(3) == ""


def test_the_place_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import json\ndef f():\n    json.loads('{')\n")
    code = compile(
        (tmp_path / "mine.py").read_text(), str(tmp_path / "mine.py"), "exec"
    )
    scope: dict[str, Any] = {}
    exec(code, scope)
    with pytest.raises(ValueError, match="line 1 column") as caught:
        scope["f"]()
    assert is_own(str(tmp_path / "mine.py"))
    assert where_raised(caught.value) == "mine.py, line 3"
    import traceback

    text = "".join(traceback.format_exception(caught.value))
    assert where_told(f"client 3, train: ValueError\n{text}") == "mine.py, line 3"
    assert where_told("no power") == ""
