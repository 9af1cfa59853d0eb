"""What the package promises as a whole: who imports whom, and what nobody does."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import fedweight
from fedweight.core.extras import EXTRAS

PACKAGE = Path(fedweight.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Yield the full name of every module or attribute that a file imports."""
    module = name_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                start = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def chain(node):
    """Return ``a.b.c`` of an attribute access, or ``""``."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def test_the_helpers_see_what_is_there():
    found = set(imports(PACKAGE / "clients" / "cohort_trainer.py"))
    assert {"fedweight.messages.keys", "flwr.app.Context"} <= found
    assert "fedweight.core.errors.ClientError" in found
    assert "fedweight.clients.steps.loop.train" in found
    assert len(FILES) > 30


def test_importing_fedweight_imports_nothing_heavy():
    heavy = ("torch", "flwr", "ray", "altair", "pandas", "sklearn", "numpy")
    code = f"import sys, fedweight; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"


def test_the_command_lines_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom fedweight.cli import parser\nparser().format_help()\n"
        "print([m for m in ('torch', 'flwr', 'ray') if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_a_look_at_a_run_does_not_wait_for_pytorch():
    code = (
        "import sys\nfrom fedweight.studies import Run\n"
        "import fedweight.studies.report\n"
        "from fedweight import clients, data, models, strategies\n"
        "from fedweight.clients.registries import PROBES, QUERIES\n"
        "several = (strategies.STRATEGIES, clients.OBJECTIVES, models.MODELS)\n"
        "for kind in (*several, PROBES, QUERIES):\n"
        "    assert all(kind.descriptions().values())\n"
        "print([m for m in ('torch', 'flwr', 'ray') if m in sys.modules])"
    )
    assert python(code) == "[]"


NOT_ON_A_DEVICE = {p for packages in EXTRAS.values() for p in packages}

DEVICE = """
import sys, tomllib
absent = {absent!r}
for package in absent:
    sys.modules[package] = None  # as if it were not installed
from flwr.app import ConfigRecord, Context, Message, RecordDict
from fedweight import apps, models
from fedweight.core.module import FlatModule
from fedweight.messages import _flower
from fedweight.messages.arrays import FlatRecord

with open("pyproject.toml", "rb") as file:
    given = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
config = {{
    f"{{table}}.{{key}}": value
    for table, keys in given.items() if isinstance(keys, dict)
    for key, value in keys.items()
}}
config |= {{"num-classes": 3, "data.name": "npz", "model.name": "softmax"}}
model = models.build("softmax", (2,), 3, seed=0)
start = FlatRecord(FlatModule(model).save())
with _flower.task_identity(run_id=0):
    context = Context(1, 2, {{"data-path": {site!r}}}, RecordDict(), config)
    told = ConfigRecord({{"server-round": 1}})
    content = RecordDict({{"arrays": start, "config": told}})
    message = Message(content, dst_node_id=2, message_type="train")
    reply = apps.client_app(message, context)
[metrics] = reply.content.metric_records.values()
print(metrics["num-examples"])
print([name for name in {packages!r} if sys.modules.get(name)])
"""


def write_site(path):
    rng = np.random.default_rng(0)
    y = np.arange(50) % 3
    np.savez(path, x=rng.normal(size=(50, 2)).astype(np.float32), y=y)
    return str(path)


@pytest.mark.parametrize("installed", [True, False])
def test_a_device_trains_without_what_runs_and_reports_need(tmp_path, installed):
    packages = sorted(NOT_ON_A_DEVICE)
    absent = [] if installed else packages  # If it is there, nobody asks for it.
    site = write_site(tmp_path / "site.npz")
    code = DEVICE.format(absent=absent, packages=packages, site=site)
    assert python(code).splitlines() == ["40", "[]"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_a_device_lacks_is_imported_where_it_is_used(path):
    own = ("fedweight.simulations.ray.", "fedweight.core.kernels")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            needed = name.partition(".")[0] in NOT_ON_A_DEVICE
            assert not needed or name_of(path).startswith(own), name


def test_the_extras_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = {"scikit-learn": "sklearn", "vl-convert-python": "vl_convert"}
    for extra, packages in EXTRAS.items():
        declared = [
            re.match(r"[\w-]+", line)[0]
            for line in project["optional-dependencies"][extra]
        ]
        found = {names.get(name, name) for name in declared} - {"fedweight"}
        assert found == set(packages), extra
    base = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    assert not {names.get(name, name) for name in base} & NOT_ON_A_DEVICE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "a run needs pandas, which is not installed. Install fedweight["),
        (["report", "."], "rounds.csv cannot be read: a run's folder needs pandas"),
        (["check", "x.csv"], "a CSV file needs pandas"),
        (
            ["compare", "--strategies", "fedavg,ida", "--seeds", "0,1"],
            "a comparison needs pandas",
        ),
    ],
)
def test_a_missing_extra_is_one_line(tmp_path, arguments, message):
    (tmp_path / "x.csv").write_text("a,b\n1,0\n2,1\n")
    for name in ("config.toml", "rounds.csv", "clients.csv", "partition.csv"):
        (tmp_path / name).write_text("round\n1\n" if name == "rounds.csv" else "")
    code = (
        "import sys, os\nsys.modules['pandas'] = None\n"
        f"os.chdir({str(tmp_path)!r})\nfrom fedweight.cli import main\n"
        f"sys.stderr = sys.stdout\nprint(main({arguments!r}))"
    )
    line, status = python(code).splitlines()
    assert line.startswith(f"fedweight: {message}")
    assert status == "2"


def test_what_sums_nothing_does_not_wait_for_a_compiler():
    """FedAvg on a server never needs Numba, which takes long to import."""
    code = (
        "import sys, torch\n"
        "import fedweight.strategies, fedweight.clients, fedweight.apps\n"
        "import fedweight.simulations, fedweight.studies.runner\n"
        "from fedweight.core.updates import StackedUpdates\n"
        "updates = StackedUpdates([torch.ones(2)], torch.zeros(2))\n"
        "print('numba' in sys.modules)\n"
        "updates.norms()\n"
        "print('numba' in sys.modules)\n"
    )
    assert python(code).split() == ["False", "True"]


@pytest.mark.parametrize(
    "name",
    [
        *("fedweight", "fedweight.clients", "fedweight.clients.objectives"),
        *("fedweight.models", "fedweight.simulations", "fedweight.strategies"),
        "fedweight.studies",
    ],
)
def test_what_is_exported_is_there_and_listed(name):
    package = importlib.import_module(name)
    for exported in package.__all__:
        assert getattr(package, exported) is not None
        assert exported in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_a_server_or_a_device_needs_no_ray_and_no_plots():
    code = (
        "import sys\n"
        "for name in ('ray', 'altair', 'vl_convert'): sys.modules[name] = None\n"
        "import fedweight.clients, fedweight.strategies, fedweight.apps\n"
        "from fedweight.strategies import STRATEGIES\n"
        "from fedweight.clients import OBJECTIVES\n"
        "print(len(STRATEGIES.descriptions()), len(OBJECTIVES.descriptions()))\n"
        "import fedweight.simulations, fedweight.studies.runner\n"
    )
    strategies, objectives = map(int, python(code).split())
    assert strategies >= 6
    assert objectives >= 2


PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp")


def test_only_one_file_touches_what_is_private_to_flower():
    for path in FILES:
        if path.name == "_flower.py":
            continue
        for imported in imports(path):
            if imported == "flwr" or imported.startswith("flwr."):
                assert imported.startswith(PUBLIC_FLOWER), f"{path}: {imported}"
                assert "._" not in imported, f"{path}: {imported}"


FORBIDDEN = ("pickle.load", "pickle.loads", "torch.load", "cloudpickle.load")
# Where a driver and its own workers, of one run, send each other objects.
UNPICKLES = {"simulations/workers/worker.py", "simulations/workers/processes.py"}
# Seed the streams of the process, or look at them, for models and strategies that draw
# from them.
SEEDS = {
    "clients/noise.py",
    "clients/trying.py",
    "server/checkpoint.py",
    "simulations/isolation.py",
}
# Names of numpy.random that make a stream of one's own.
OWN_STREAM = {"Generator", "PCG64", "SeedSequence"}


def test_nobody_unpickles_or_draws_from_a_global_stream():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        seeds = path.relative_to(PACKAGE).as_posix() in SEEDS
        for node in ast.walk(ast.parse(text)):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            name = chain(node) if isinstance(node, ast.Attribute) else ""
            if path.relative_to(PACKAGE).as_posix() not in UNPICKLES:
                assert name not in FORBIDDEN, f"{where}: {name}"
            for module in ("np.random.", "numpy.random."):
                if name.startswith(module) and not seeds:
                    drawn = name.removeprefix(module)
                    assert drawn in OWN_STREAM, f"{where}: {name}"
            if isinstance(node, ast.Call) and chain(node.func).endswith("np.load"):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("allow_pickle") == "False", where
        used = [m for m in imports(path) if f"{m}.".startswith("random.")]
        assert seeds or not used, path
        assert not any(m.startswith("pickle.") for m in imports(path)), path


def test_the_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fedweight.__version__
