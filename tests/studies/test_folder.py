import csv
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedweight.core.errors import ConfigurationError, DataError, OutputError
from fedweight.studies import folder as folder_module
from fedweight.studies.folder import (
    LOCK,
    Table,
    alone_in,
    check_free,
    new_folder,
    rows_of,
)


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def take(*arguments, **options):
    """Take a folder, and end at once as a run that leaves its configuration."""
    with new_folder(*arguments, **options) as folder:
        (folder / "config.toml").write_text(A_RUN)
        return folder


A_RUN = "[run]\nrounds = 1\n[strategy]\nname = 'ida'\n"


def test_a_new_folder_has_a_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [take(None, "a").as_posix() for _ in range(3)]
    assert made == ["runs/a", "runs/a-2", "runs/a-3"]
    assert all((tmp_path / name).is_dir() for name in made)


@pytest.mark.parametrize("name", ["/etc/x", "../../x", "a/b", "a\\b"])
def test_a_runs_name_never_leads_out_of_runs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    made = take(None, name)
    assert made.resolve().parent == tmp_path / "runs"


@pytest.mark.parametrize("name", [".", "..", "/", "", "./a", "-"])
def test_a_runs_folder_is_not_hidden(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert take(None, f"{name}-fedavg-seed0").name[0].isalpha()


def test_a_folder_of_ones_own_must_be_empty(tmp_path):
    for _ in range(2):
        with new_folder(tmp_path / "x" / "y", "a") as made:
            assert made == tmp_path / "x" / "y"
            assert made.is_dir()
        assert list(made.iterdir()) == []
    (tmp_path / "x" / "y" / ".hidden").touch()
    with pytest.raises(ConfigurationError, match="not an empty folder"):
        take(tmp_path / "x" / "y", "a")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="not an empty folder"):
        take(tmp_path / "file", "a")


@pytest.mark.parametrize("out", ["file/run", "n" * 5000, "nul\0"], ids=len)
def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    said = "cannot be made|longer than a path can be|must not hold NUL"
    with pytest.raises(ConfigurationError, match=said) as caught:
        take(out, "a")
    assert out[:3] in str(caught.value)
    assert len(str(caught.value)) < 500
    if "/" not in out:
        with pytest.raises(ConfigurationError, match="cannot be made"):
            take(None, out)


def test_no_run_can_be_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    with pytest.raises(ConfigurationError, match="cannot be made"):
        take(None, "a")


# One run at a time.


def test_a_folder_is_taken_by_one_run_at_a_time(tmp_path):
    with new_folder(tmp_path / "x", "a") as folder:
        for overwrite in (False, True):
            with pytest.raises(ConfigurationError, match="another run is writing"):
                take(folder, "a", overwrite=overwrite)
        (folder / "config.toml").write_text(A_RUN)
        with pytest.raises(ConfigurationError, match="another run is writing"):
            take(folder, "a", overwrite=True)
        assert (folder / "config.toml").read_text() == A_RUN
    assert [path.name for path in folder.iterdir()] == ["config.toml"]


def test_of_many_that_begin_at_once_one_has_the_folder(tmp_path):
    """Threads lock as processes do: each has a file of its own."""
    start = threading.Barrier(8)
    ended = threading.Barrier(8)

    def begin(folder):
        start.wait()
        try:
            with new_folder(folder, "a"):
                ended.wait()
                return 1
        except ConfigurationError:
            ended.wait()
            return 0

    with ThreadPoolExecutor(8) as pool:
        for turn in range(20):
            assert sum(pool.map(begin, [tmp_path / f"run-{turn}"] * 8)) == 1


def test_what_a_crashed_run_left_can_be_replaced(tmp_path, caplog):
    folder = take(tmp_path / "x", "a")
    for name in ("clients.csv", "rounds.csv", ".rounds.csv.part", LOCK):
        (folder / name).write_text("half")
    with pytest.raises(ConfigurationError, match="say --overwrite"):
        take(folder, "a")
    assert (folder / "clients.csv").exists()
    with new_folder(folder, "a", overwrite=True):
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert "removing the run in" in caplog.text
    for name in ("clients.csv", "config.toml", "rounds.csv"):
        assert name in caplog.text
    assert take(folder, "a") == folder  # It is empty now.


def test_a_run_that_crashed_before_its_first_file_blocks_nothing(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / LOCK).touch()
    take(tmp_path / "x", "a")


def test_the_default_folder_can_be_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [take(None, "a", overwrite=True).as_posix() for _ in range(2)]
    assert made == ["runs/a", "runs/a"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"notes.txt": "mine"}, "has notes.txt."),
        ({"config.toml": A_RUN, "notes.txt": ""}, "has notes.txt."),
        ({"config.toml": A_RUN, "model.safetensors/part": ""}, "model.safetensors"),
        ({"config.toml": "[tool]\n"}, "has no config.toml of a run."),
        ({"config.toml": "half of a [fi"}, "has no config.toml of a run."),
        ({"report.html": "<html>"}, "has no config.toml of a run."),
        ({".git/HEAD": ""}, "has .git."),
    ],
)
def test_only_a_run_is_ever_removed(tmp_path, content, said):
    for name, text in content.items():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigurationError, match="Nothing was removed") as caught:
        take(tmp_path / "x", "a", overwrite=True)
    assert said in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "mine.html").write_text("mine")
    folder = take(tmp_path / "x", "a")
    (folder / "report.html").symlink_to(tmp_path / "mine.html")
    with new_folder(folder, "a", overwrite=True):
        pass
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_what_would_be_refused_is_told_before_anything_is_made(tmp_path):
    check_free(None)
    check_free(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    folder = take(tmp_path / "x", "a")
    check_free(folder, overwrite=True)
    assert (folder / "config.toml").exists()
    with pytest.raises(ConfigurationError, match="not an empty folder"):
        check_free(folder)


# Tables.


def test_a_table_grows_by_rows_and_columns(tmp_path):
    table = Table(tmp_path / "t.csv", ["round", "reason"])
    table.append([{"round": 1, "reason": 'said "no, never"'}])
    table.append([{"round": 2, "cosine": 0.5}])
    table.append([{"reason": "two\nlines", "extra": "x,y", "round": 3}])
    table.write()
    assert read(tmp_path / "t.csv") == [
        ["round", "reason", "cosine", "extra"],
        ["1", 'said "no, never"', "", ""],
        ["2", "", "0.5", ""],
        ["3", "two\nlines", "", "x,y"],
    ]


def test_an_optional_column_has_its_place_once_it_is_needed(tmp_path):
    table = Table(tmp_path / "t.csv", ["a", "name", "b"], optional=["name"])
    table.append([{"a": 'x, "y"', "b": 1}, {"a": "two\nlines", "more": 2}])
    assert read(tmp_path / "t.csv")[0] == ["a", "b", "more"]
    table.append([{"a": 3, "name": "site A"}])
    table.append([{"a": 4, "b": 5}])
    table.write()
    assert read(tmp_path / "t.csv") == [
        ["a", "name", "b", "more"],
        ['x, "y"', "", "1", ""],
        ["two\nlines", "", "", "2"],
        ["3", "site A", "", ""],
        ["4", "", "5", ""],
    ]


def test_floats_are_written_in_full_and_nothing_as_nothing(tmp_path):
    table = Table(tmp_path / "t.csv", ["a", "b", "c", "d"])
    table.append([{"a": 0.1 + 0.2, "b": math.nan, "c": None, "d": math.inf}])
    table.write()
    assert read(tmp_path / "t.csv")[1] == ["0.30000000000000004", "", "", "inf"]


def test_the_first_rows_are_there_at_once(tmp_path):
    table = Table(tmp_path / "t.csv", ["a"])
    table.append([{"a": 1}])
    assert read(tmp_path / "t.csv") == [["a"], ["1"]]


def test_what_is_there_is_not_written_again(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        folder_module, "write_whole", lambda *given: written.append(given)
    )
    table = Table(tmp_path / "t.csv", ["a"])
    (tmp_path / "t.csv").write_text("a\n")
    table.append([{"a": 1}])
    assert len(written) == 1
    for number in range(5):
        table.append([{"a": number}])
    assert len(written) == 1
    assert read(tmp_path / "t.csv") == [["a"], *([str(n)] for n in range(5))]


def test_a_row_of_which_a_part_is_written_is_taken_back(tmp_path, monkeypatch):
    """A full disk: what was there before is whole, and the row comes later."""
    path = tmp_path / "t.csv"
    table = Table(path, ["a"])
    table.append([{"a": 1}])
    opened = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def tell(self):
            return self.file.tell()

        def write(self, data):
            self.file.write(data[:1])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda path, mode: Full(opened(path, mode)))
    with pytest.raises(OutputError, match=r"t\.csv cannot be written: No space left"):
        table.append([{"a": 2}])
    monkeypatch.undo()
    assert path.read_bytes() == b"a\n1\n"
    table.append([{"a": 3}])
    assert path.read_bytes() == b"a\n1\n2\n3\n"


@pytest.mark.parametrize("cut", range(1, 26))
def test_a_part_of_a_row_is_no_row(tmp_path, cut):
    """What a process that is killed while it writes may leave."""
    path = tmp_path / "t.csv"
    table = Table(path, ["a", "b"])
    table.append([{"a": 1, "b": "x"}])
    whole = path.read_bytes()
    table.append([{"a": 'said "no"', "b": "two\nlines"}])
    rest = path.read_bytes()[len(whole) :]
    assert len(rest) == 26
    path.write_bytes(whole + rest[:cut])
    assert rows_of(path) == [["a", "b"], ["1", "x"]]


def test_a_cut_within_a_character_and_a_lone_return_cost_no_table(tmp_path):
    path = tmp_path / "t.csv"
    table = Table(path, ["a"])
    table.append([{"a": "c\rd"}, {"a": "Mü"}])
    table.append([{"new": 1}])
    assert rows_of(path) == [["a", "new"], ["c\rd", ""], ["Mü", ""], ["", "1"]]
    path.write_bytes(path.read_bytes() + "ü".encode()[:1])
    assert len(rows_of(path)) == 4


def test_a_table_goes_on_from_its_state(tmp_path):
    def rows(numbers):
        return [{"a": n, **({"late": n} if n > 2 else {})} for n in numbers]

    whole, half = (Table(tmp_path / f"{n}.csv", ["a"]) for n in ("whole", "half"))
    whole.append(rows(range(6)))
    half.append(rows(range(2)))
    state = half.state
    half.append(rows(range(2, 5)))  # More than the checkpoint knows of.
    again = Table(half.path, ["a"])
    again.restore(state)
    assert read(half.path) == [["a"], ["0"], ["1"]]
    again.append(rows(range(2, 6)))
    assert half.path.read_bytes() == whole.path.read_bytes()
    half.path.write_text("a\n0\n")
    with pytest.raises(DataError, match="has 1 rows, and 2 when"):
        Table(half.path, ["a"]).check(state)


values = st.one_of(
    st.none(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(alphabet=st.sampled_from("ab,\"'\n ;é="), max_size=6),
)
table_rows = st.lists(
    st.dictionaries(st.sampled_from(["a", "b", "c,d", 'e"']), values), max_size=6
)


@given(rows=table_rows)
def test_any_table_can_be_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    table = Table(path, ["first", "b", "a"], optional=["b"])
    for row in rows:
        table.append([row])
    table.write()
    header, *lines = read(path)
    assert header == table.columns
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        expected = ["" if row.get(c) is None else str(row[c]) for c in header]
        assert line == expected


def test_thousands_of_columns_are_written_in_seconds(tmp_path):
    """A class is a column of partition.csv; each used to be looked for in a list."""
    columns = ["client", *(f"label_{c}" for c in range(20_000))]
    table = Table(tmp_path / "t.csv", columns)
    began = time.perf_counter()
    table.append(dict.fromkeys(columns, k) for k in range(20))
    table.append([dict.fromkeys([*columns, "more"], 1)])
    table.write()
    assert time.perf_counter() - began < 10
    header, *lines = read(tmp_path / "t.csv")
    assert header == [*columns, "more"]
    assert lines[3] == ["3"] * len(columns) + [""]
    assert lines[-1] == ["1"] * len(header)


def test_a_comparisons_folder_is_one_process_at_a_time(tmp_path):
    said = "another 'fedweight compare' is"
    with (
        alone_in(tmp_path),
        pytest.raises(ConfigurationError, match=said),
        alone_in(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())
    nothing = pytest.raises(ConfigurationError, match="nothing can be written to")
    with nothing, alone_in(tmp_path / "nowhere"):
        pass
