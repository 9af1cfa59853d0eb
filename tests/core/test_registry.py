import sys

import pytest

from fedweight.core.errors import ConfigurationError
from fedweight.core.registry import Registry, load_object

THINGS = Registry("thing", {"path": "os.path:join", "list": "builtins:list"})


def test_a_name_is_what_it_stands_for():
    import os.path

    assert THINGS.resolve("path") is os.path.join
    assert THINGS.resolve("fractions:Fraction").__name__ == "Fraction"


def test_an_unknown_name_is_met_with_all():
    with pytest.raises(ConfigurationError) as caught:
        THINGS.resolve("lst")
    assert str(caught.value) == (
        "there is no thing 'lst'. Did you mean 'list'? There are list, path; your own "
        "is written 'module:name'."
    )


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("no_such_module:x", "there is no module 'no_such_module'"),
        ("os.nothing:x", "there is no module 'os.nothing'"),
        ("os.path:jion", "Did you mean 'join'?"),
        (":x", "must be written 'package.module:name'"),
        ("os:", "must be written 'package.module:name'"),
        (".os:x", "must be written 'package.module:name'"),
        ("os..path:x", "must be written 'package.module:name'"),
        ("./own.py:x", "must be written 'package.module:name'"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(path, text):
    with pytest.raises(ConfigurationError) as caught:
        load_object("thing", path)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ones_own_module_is_found_where_one_is(tmp_path, monkeypatch):
    (tmp_path / "own_registry_thing.py").write_text("'Doc.'\nhere = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_object("thing", "own_registry_thing:here") == 3
    sys.modules.pop("own_registry_thing")


def test_an_error_inside_ones_own_module_is_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_broken.py").write_text("import no_such_dependency\n")
    (tmp_path / "own_raising.py").write_text("raise RuntimeError('mine')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_object("thing", "own_broken:x")
    with pytest.raises(RuntimeError, match="mine"):
        load_object("thing", "own_raising:x")


def test_descriptions_are_first_lines():
    lines = THINGS.descriptions()
    assert list(lines) == ["list", "path"]
    assert lines["list"] == list.__doc__.strip().splitlines()[0]
