import json

import pytest

# Each program starts several processes that import PyTorch, which a machine whose disk
# is busy may take a minute for.
pytestmark = pytest.mark.timeout(300)

ENGINES = ("floor", "jax")

# Older ones read no numbers of NumPy 2.4 where they stand in for a card.
TRITON = "3.9"

# Clients of some sizes, by Triton and as fedweight trains them on a CPU: models, losses
# and hits; and whether the same bits come again.
RAGGED = """
import numpy as np
import torch
from fedweight.clients import TrainingSettings
from fedweight.clients.objectives import Plain
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.task import Tasks
from fedweight.core.rng import Purpose, keys
from fedweight.data import Examples
from fedweight.data.parts import Parts
sizes, clients = np.array(sizes), len(sizes)
parts = Parts(
    Examples(*trainer.draw(np.random.default_rng(1), "S", sizes.sum())),
    np.cumsum(sizes) - sizes, sizes,
)
own = keys(0, Purpose.SHUFFLE, 1, range(clients))
tasks = Tasks(parts, np.array(epochs), own, np.zeros(clients, np.uint64))
for momentum in 0.0, 0.9:
    settings = TrainingSettings(batch_size=20, momentum=momentum)
    module = trainer.make("S", "cpu")
    alike = BatchedTrainer(module, Plain(), settings).train_rows(
        module.save(), tasks, learning_rate=0.1
    )
    for precision in precisions:
        many = triton.ManyMLPs(
            trainer.make("S", device), settings, tasks, 0.1, precision,
            triton.SHAPES[:1],
        )
        rows = many.train().clone()
        print(trainer.difference(rows, alike.rows) < limit)
        print(trainer.difference(many.losses[None], [alike.losses]) < limit)
        print(float((many.correct.cpu() - alike.correct).abs().max()) <= 1e4 * limit)
        print(torch.equal(many.train(), rows))
"""


def test_on_a_card_peers_run_where_they_are_installed_or_say_so(in_benchmarks):
    code = (
        "import throughput as t\n"
        "from engines import environments as e\n"
        "e.PEERS['pfl'] = e.Peer('pfl==0.6.0')\n"
        "e.importlib.util.find_spec = {'jax': 'there'}.get\n"
        "t.Work.write = lambda *_: 'cuda, a card'\n"
        "engines = ['pfl', 'fluke']\n"
        "for row in t.measure(t.Work('S', 2), engines, 1, 0.05, 1, device='cuda'):\n"
        "    print(row['updates_per_second'], row['note'], row['device'], sep=': ')\n"
        "print(e.python_of('jax', 'cuda') == sys.executable)"
    )
    said = " ".join(in_benchmarks(code))
    assert said == (
        "None: no pfl here: pip install pfl==0.6.0: cuda, a card "
        "None: measured on CPUs only: cuda, a card True"
    )


@pytest.mark.gpu
@pytest.mark.ray
def test_throughput_on_a_gpu(tmp_path, run):
    arguments = ["--work", "S2", "--engines", "floor", "local", "ray", "flwr"]
    arguments += ["--repetitions", "1", "--workers", "2", "--plan", "batched-2"]
    rows = run(
        *("throughput", *arguments, "--seconds", "0.05", "--device", "cuda"),
        file=tmp_path / "rows.json",
    )
    for row in rows:
        assert row["note"] == ""
        assert row["agrees"] is True
        assert row["device"].startswith("cuda, ")


@pytest.mark.gpu
def test_gpu(tmp_path, run):
    # Triton comes with a PyTorch for CUDA.
    arguments = ["--small", "--only", "trainer, S2", "rounds, S6, local, batched"]
    arguments += ["trainer, S6, triton, tf32x3"]
    content = run("gpu", *arguments, file=tmp_path / "rows.json")
    _, *rows = content["rows"]
    assert content["device"].startswith("cuda, ")
    for row in rows:
        assert row["note"] == ""
        assert row["launches"] >= 1
        assert min(row["card_mb"], row["card_us"]) > 0
    trainers = [row for row in rows if row["kind"] == "trainer"]
    assert [row["engine"] for row in trainers] == ["", "triton", "triton"]
    for row in trainers:
        assert row["difference"] < 1e-4
        assert min(row["over_memory"], row["over_arithmetic"]) > 0


@pytest.mark.gpu
def test_triton_by_hand_on_a_gpu(in_benchmarks):
    code = f"""
from engines import trainer, triton
sizes = [1 + 37 * k % 101 for k in range(300)]
epochs = [1 + k % 3 for k in range(300)]
device, precisions, limit = "cuda", ("ieee", "tf32x3"), 1e-4
{RAGGED}
# Models whose last ones lie beyond 2 ** 31 values, where there is room; else bytes.
many = 43_000 if torch.cuda.mem_get_info()[0] > 16e9 else 11_000
tasks = trainer.tasks_of("S", many)
settings, shapes = trainer.SETTINGS, triton.SHAPES[:1]
model = trainer.make("S", device)
rows = triton.ManyMLPs(model, settings, tasks, 0.05, shapes=shapes).train()
expected = trainer.alone("S", tasks[many - 2 :])
print(trainer.difference(rows[-2:], expected) < limit)
"""
    assert in_benchmarks(code) == ["True"] * 17


def test_clients_at_once_agree_with_training_one_by_one(in_benchmarks):
    code = (
        "import torch\n"
        "from engines import trainer as t\n"
        "tasks = t.tasks_of('S', 3)\n"
        "rows = t.at_once('S', tasks, 'cpu')()\n"
        "expected = t.alone('S', tasks[:2])\n"
        "print(len(rows), t.difference(rows, expected) < 1e-5)\n"
        "print(t.difference(rows.flip(0), expected) < 1e-5)\n"
        "print(t.difference(rows * torch.nan, expected))"
    )
    assert in_benchmarks(code) == ["3", "True", "False", "1000000000.0"]


def test_what_a_client_update_costs_a_gpu_at_the_least(in_benchmarks):
    code = (
        "import gpu\n"
        "from engines import trainer as t\n"
        # The start, three times in each of four steps, the sum; and 128 examples.
        "print(t.least_bytes(10, 8), 4 * 10 * (1 + 3 * 4 + 1) + 128 * 8)\n"
        # Two products forward; backward all but that for the examples' gradient.
        "first, second = 784 * 64, 64 * 10\n"
        "print(t.operations_of('S'), 128 * 2 * (2 * first + 3 * second))\n"
        "card = dict(launches=10, bytes=100, operations=1000)\n"
        "counts = dict(launches=5, bytes=50, operations=2000)\n"
        "print(*gpu.over_bounds(card, 2, counts).values())"
    )
    bytes_, by_hand, operations, products, *over = map(float, in_benchmarks(code))
    assert bytes_ == by_hand
    assert operations == products
    assert over == [4, 4, 1]


def test_clients_at_once_that_are_too_many_are_halved(in_benchmarks):
    code = (
        "from engines import trainer as t\n"
        "def make(limit, words):\n"
        "    def update(chunk):\n"
        "        if chunk > limit: raise RuntimeError(words)\n"
        "        return chunk\n"
        "    return lambda chunk: lambda: update(chunk)\n"
        "too_many = 'Expected canUse32BitIndexMath(input) to be true'\n"
        "print(t.as_many_as_fit(make(300, too_many), 1024)[::2])\n"
        "print(t.as_many_as_fit(make(2, 'CUDA out of memory.'), 4)[::2])\n"
        "for limit, words in (0, 'CUDA out of memory'), (300, 'device-side assert'):\n"
        "    try: t.as_many_as_fit(make(limit, words), 1024)\n"
        "    except RuntimeError as error: print(error)"
    )
    said = " ".join(in_benchmarks(code))
    assert said == "(256, 256) (2, 2) CUDA out of memory device-side assert"


def test_all_rows_of_a_gpu_can_be_tried_on_a_cpu(tmp_path, run):
    file = tmp_path / "rows.json"
    tried = ["--device=cpu", "--small", "--seconds=0.01"]
    content = run("gpu", *tried, "--only", "trainer, S4", file=file)
    card, trainer = content["rows"]
    assert content["device"] == "cpu"
    assert content["torch"]
    assert "cores" in content["machine"]
    assert card["row"] == "card"
    assert (trainer["row"], trainer["note"]) == ("trainer, S4", "")
    assert trainer["updates_per_second"] > 0
    assert (trainer["chunk"], trainer["difference"] < 1e-5) == (4, True)
    # What is there is not measured again, and what there is no time for says so.
    again = run(
        *("gpu", *tried, "--minutes=0", "--only", "trainer"),
        file=file,
    )
    left = "not measured: 0 minutes were over"
    by_hand = ("S6, triton, ieee", "S2, triton, ieee", "S6, triton, tf32x3")
    others = ("S6", "S2", "M2", "M4", "M6", *by_hand)
    assert again["rows"][:2] == [trainer, card]
    assert {row["row"]: row["note"] for row in again["rows"][2:]} == {
        f"trainer, {work}": left for work in others
    }


def test_a_row_that_fails_takes_no_other_with_it(tmp_path, in_benchmarks):
    file = tmp_path / "rows.json"
    words = {"dies": "read said; echo a >&2; echo a card died >&2", "hangs": "sleep 60"}
    for name, does in words.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    code = f"""
import pathlib, gpu
from engines.cases import Case
file, folder = pathlib.Path({str(file)!r}), pathlib.Path({str(tmp_path)!r})
def python_of(engine, device):
    if engine == "absent":
        raise gpu.environments.NotInstalledError("no such engine here")
    return str(folder / engine) if engine in {list(words)} else sys.executable
gpu.environments.python_of = python_of
cases = [
    Case("rounds", "S2", "floor"),
    Case("rounds", "S2", "dies"),
    Case("rounds", "S2", "hangs", limit=0.5),
    Case("rounds", "S2", "absent"),
    Case("trainer", "S2", "absent"),
    Case("rounds", "S2", "local", plan="loop"),
]
measuring = gpu.Measuring("cpu", {{"rows": []}}, file, 0.01, True, folder)
measuring.measure(cases, 5)
# Nothing takes the place of what says more.
measuring.measure([*cases, Case("rounds", "S2", "late")], 0)
"""
    in_benchmarks(code)
    rows = json.loads(file.read_text())["rows"]
    assert [row["note"] for row in rows] == [
        "",
        "failed: a card died",
        "failed: no answer within 0.5 s",
        "no such engine here",
        "no such engine here",
        "",
        "not measured: 0 minutes were over",
    ]
    assert "updates_per_second" not in rows[1]
    assert rows[5]["agrees"] is True
    log = file.with_suffix(".log").read_text()
    assert log.startswith("---- rounds, S2, dies\na\na card died\n")


def test_strategies_of_the_rows_are_made(in_benchmarks):
    code = (
        "import numpy as np\n"
        "from engines import local as l\n"
        "from engines.cases import all_cases\n"
        "from engines.job import MODELS\n"
        "x, y = np.zeros((2, 1, 28, 28), np.float32), np.zeros(2, np.int64)\n"
        "proxy = l.Examples(x, y)\n"
        "for name in dict.fromkeys(case.strategy for case in all_cases()):\n"
        "    made = l.weighing_of(name, MODELS['S'](), proxy, 'cpu', seed=0)\n"
        "    print(type(made).__name__)"
    )
    assert in_benchmarks(code) == ["FedAvg", "FedLAW", "FedCE", "IDA"]


def test_what_a_card_was_seen_to_do(tmp_path, in_benchmarks):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\nfor n in 500 1500 900 4; do echo $n; done; exec sleep 60\n"
    )
    smi.chmod(0o755)
    code = (
        "import os, time, gpu\n"
        "from engines.card import covered\n"
        f"os.environ['PATH'] = {str(tmp_path)!r} + ':' + os.environ['PATH']\n"
        "memory = gpu.Memory('cuda')\n"
        "time.sleep(0.5)\n"
        "print(memory.end() == 1000 * 2**20 / 1e6, gpu.Memory('cpu').end())\n"
        "print(covered([(5, 6), (0, 2), (1, 3), (1, 2)]), covered([]))\n"
        "words = 'a.py::one[a b] PASSED [ 1%]\\na.py::two FAILED [99%]\\n= 1 too'\n"
        "print(gpu.counts_of(words))"
    )
    assert " ".join(in_benchmarks(code)) == (
        "True None 4.0 0.0 {'passed': 1, 'failed': 1, 'which_failed': ['a.py::two']}"
    )


def test_what_the_readme_says_of_a_gpu(tmp_path, in_benchmarks):
    file = tmp_path / "README.md"
    code = f"""
import pathlib, gpu
from engines.cases import Case, rounds
def row(case, **found):
    return {{**case.row(), "date": "2026-12-01", **found}}
(floor, local, ida) = (
    rounds("S1000", "floor")[0], rounds("S1000", "local batched-1000")[0],
    rounds("S1000", "local batched-1000", strategy="ida")[0],
)
rows = [
    row(Case("card")),
    row(floor, updates_per_second=212.4, difference=0.0),
    row(local, updates_per_second=10270.0, agrees=True, difference=2e-7,
        host_us=99.6),
    row(rounds("S1000", "local auto")[0], updates_per_second=5606.0,
        agrees=False, difference=0.1),
    row(rounds("L4", "floor")[0], updates_per_second=31.25, card_mb=1.0),
    row(rounds("M1000", "local auto")[0], updates_per_second=3.0, card_mb=7500.0),
    row(ida, updates_per_second=5135.0),
    row(Case("trainer", "M4096"), updates_per_second=2e3, chunk=2048,
        over_launches=350.0, over_memory=15.2, over_arithmetic=23.0,
        note="2048 at once: 4096 were too many"),
    row(Case("trainer", "S4096", "triton", plan="ieee"), updates_per_second=3e5),
    row(Case("quick start", "fedlaw", device="auto"), seconds=24.04),
    row(Case("plans", "S1000"), ratio_to_best=0.954, plan="batched-40 on cpu"),
    row(Case("tests"), passed=3, failed=2),
]
content = dict(device="cuda, a card", machine="16 cores", rows=rows)
file = pathlib.Path({str(file)!r})
file.write_text("before\\n" + gpu.BEGIN + "\\nold\\n" + gpu.END + "\\nafter\\n")
gpu.write_readme(content, file)
"""
    in_benchmarks(code)
    text = file.read_text()
    assert text.startswith("before\n<!-- by benchmarks/gpu.py -->\n\nOn a card and 16")
    assert text.endswith("\n\n<!-- end of gpu.py -->\nafter\n")
    assert [line for line in text.splitlines() if line.startswith("| ")] == [
        "| | loop of PyTorch | Flower | pfl | JAX by hand | local, auto "
        "| local, by hand | Ray |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| S1000 | 212 | – | – | – | 5,606 | 10,270 | – |",
        "| M1000 | – | – | – | – | 3.0 | – | – |",
        "| L4 | 31.2 | – | – | – | – | – | – |",
        "| | device = auto | batched-20 on the card | CPU |",
        "| --- | --- | --- | --- |",
        "| fedlaw | 24.0 | – | – |",
    ]
    facts = " ".join(text.split()).split(" * ")[1:]
    assert facts[:-1] == [
        "The trainer alone, M, 2048 at once: 2,000; in times of its bounds: 350 of "
        "launches, 15.2 of memory, 23 of arithmetic.",
        "The trainer alone, S, 4096 at once, in Triton by hand, ieee: 300,000.",
        "ida, S1000: 0.50 of what FedAvg makes.",
        "M1000 takes 7.5 GB of the card.",
        "The host takes 100 microseconds an update of S1000.",
        "Final weights agree with the plain loop's to 2e-07, but for rounds, S1000, "
        "local, auto.",
        "What auto chooses, in times of the best by hand: S1000 0.95 (batched-40 on "
        "cpu).",
        "`pytest -m gpu`: 3 passed, 2 failed.",
    ]
    assert facts[-1].startswith(
        "Not measured, or not as told: trainer, M4096 (2048 at once: 4096 were"
    )


def test_the_readme_has_no_figures_of_a_gpu_but_those_that_are_there(in_benchmarks):
    code = """
import json, pathlib
import gpu
text = (gpu.ROOT / "README.md").read_text("utf-8")
written = text.split(gpu.BEGIN)[1].split(gpu.END)[0]
files = sorted(gpu.results.RESULTS.glob("gpu-*.json"), key=lambda file: file.stem)
if files:
    content = json.loads(files[-1].read_text("utf-8"))
    print(written.split() == " ".join(gpu.section(content)).split())
else:
    print("No figures of a GPU are recorded here yet." in written)
"""
    assert in_benchmarks(code) == ["True"]


@pytest.mark.slow  # A compiler starts, and JAX is no dependency: where it is installed.
def test_jax_by_hand_agrees_with_the_plain_loop(tmp_path, run):
    pytest.importorskip("jax")
    file = tmp_path / "rows.json"
    names = [f"rounds, {work}, {engine}" for work in ("S6", "M4") for engine in ENGINES]
    content = run("gpu", "--device=cpu", "--small", "--only", *names, file=file)
    found = {row["row"]: row for row in content["rows"]}
    for work in ("S6", "M4"):
        assert found[f"rounds, {work}, jax"]["note"] == ""
        assert found[f"rounds, {work}, jax"]["agrees"] is True


@pytest.mark.slow  # Triton is no dependency either, and here Python stands in for it.
def test_triton_by_hand_agrees_with_training_one_by_one(in_benchmarks):
    pytest.importorskip("triton", minversion=TRITON)
    code = f"""
import os
os.environ["TRITON_INTERPRET"] = "1"
from engines import trainer, triton
tasks = trainer.tasks_of("S", 2)
rows = triton.at_once("S", tasks, "cpu")[1]()
expected = trainer.alone("S", tasks)
print(trainer.difference(rows, expected) < 1e-5)
print(trainer.difference(rows.flip(0), expected) < 1e-5)
# Batches that are not full, nor a power of 2; clients that end early; one example.
sizes, epochs = [45, 7, 64, 1], [2, 3, 1, 1]
device, precisions, limit = "cpu", ("ieee",), 1e-5
{RAGGED}
"""
    assert in_benchmarks(code) == ["True", "False", *["True"] * 8]


@pytest.mark.slow
def test_triton_by_hand_compiles_for_a_card(in_benchmarks):
    pytest.importorskip("triton")
    code = """
import re
from engines import triton
for precision, momentum in ("ieee", False), ("ieee", True), ("tf32x3", False):
    needs, made = triton.compiled(triton.SHAPES[0], precision, momentum=momentum)
    print(needs.spilled <= 64, needs.shared <= 227 * 1024)
    # Threads wait for each other before they read what others have written.
    print(len(re.findall(r"^ +(?:gpu|ttg)[.]barrier", made, re.M)))
"""
    assert in_benchmarks(code) == ["True", "True", "1"] * 3
