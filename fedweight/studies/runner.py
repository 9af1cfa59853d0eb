"""One run: from a simulation file to a run's folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from ..clients import TrainingApp
from ..clients.noise import seeded
from ..core.errors import ConfigurationError, DataError
from ..core.extras import require
from ..core.layout import FlatModel
from ..core.module import FlatModule
from ..core.precision import gpu_arithmetic
from ..core.signals import interruptible
from ..core.texts import listed, shown
from ..core.threads import one_thread
from ..data import DataSet
from ..messages import keys
from ..messages.arrays import FlatRecord, leaves_out_base
from ..messages.grids import bring_base, read_by
from ..server import loop
from ..server.checkpoint import not_carried
from ..server.last_phase import after_rounds
from ..server.loop import ServerState
from ..server.wrapped import with_inner
from ..simulations import Plan, SimulationGrid, simulate
from ..strategies import WeightingStrategy
from .callbacks import BestModel, EarlyStopping, OwnCallbacks, checked_callbacks
from .choosing import as_chosen, choose
from .components import (
    Components,
    engine_arguments,
    has_our_loop,
    own_loop,
    prepare,
)
from .configuration import Configuration
from .feasibility import check_feasible
from .folder import (
    CHECKPOINT,
    Overwrite,
    cannot_repeat,
    check_free,
    check_repeats,
    new_folder,
    old_folder,
)
from .foreign import keep_frozen, settling
from .given import as_settings, of_main, setting_map, whole_tables
from .keeper import Keeper, Remembers, go_on, read_checkpoint
from .kept import write_kept
from .origins import check_same
from .own_strategies import try_own
from .pages import report_or_say
from .progress import Wanted, check_progress, telling
from .reader import table_of
from .recorder import OF_THE_PLAN, Recorder
from .result import Run
from .trackers import Tracking, told_apart

log = logging.getLogger("fedweight")

GIVEN_IN_PYTHON = cannot_repeat(
    "its data were given in Python",
    "give them again: fedweight.run(file, dataset=...)",
)


def preface_of(settings: Mapping[str, Any], dataset: DataSet | None) -> str:
    """Return what ``config.toml`` begins with where it is not enough."""
    if dataset is not None:
        return GIVEN_IN_PYTHON
    unnamed = of_main(settings)
    if not unnamed:
        return ""
    return cannot_repeat(
        f"{listed(unnamed)} is of the script or notebook that ran it",
        "put it into a module of its own, and name that",
    )


def make_ready(
    components: Components,
    *,
    simulated: bool = True,
    callbacks: Sequence[loop.Callback] = (),
) -> tuple[Strategy, TrainingApp, FlatRecord]:
    """Make what a run starts with, or refuse it before anything is written.

    Where the run is not ``simulated``, who takes part is not known before.
    ``callbacks`` are the user's.

    Returns
    -------
    tuple
        The strategy, the ClientApp and the initial model.
    """
    Plan.parse(components.configuration["engine"]["plan"])
    strategy = components.strategy()
    client_app = components.client_app()
    initial = FlatRecord(_what_travels(components, strategy))
    check_feasible(components, strategy, client_app, simulated=simulated)
    if callbacks and not has_our_loop(strategy):
        raise ConfigurationError(
            f"callbacks: {own_loop(components.configuration)}, which calls none. Leave "
            "them out."
        )
    return strategy, client_app, initial


def flat_of(initial: FlatRecord) -> FlatModel:
    """Return the initial model that :func:`make_ready` has made, as vectors."""
    assert initial.flat is not None
    return initial.flat


def _what_travels(components: Components, strategy: Strategy) -> FlatModel:
    """Return the initial model, without what no round changes.

    A strategy that is not ours may want all of it.
    """
    whole = FlatModule(components.make_model()).save()
    ours = any(isinstance(one, WeightingStrategy) for one in with_inner(strategy))
    return whole.travelling() if ours else whole


def run(
    file: str | Path | None = None,
    *,
    strategy: str | type | Strategy | None = None,
    engine: str | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    dataset: DataSet | None = None,
    report: bool = True,
    progress: Wanted = True,
    callbacks: Sequence[loop.Callback] = (),
    overwrite: bool = False,
) -> Run:
    """Run a simulation and write its folder.

    Ctrl-C and SIGTERM end it early, with all that was recorded written.

    Parameters
    ----------
    file : str or Path, optional
        A simulation file; the quick start by default.
    strategy : str, class or object, optional
        A strategy's name, class, or the strategy itself with its options: short for
        the setting ``strategy``.
    engine, seed : optional
        Short for the settings ``engine.name`` and ``run.seed``.
    out : str or Path, optional
        The run's folder; by default a new one under ``runs/``.
    settings : Mapping or sequence of str
        Override keys of the file: ``{"partition.alpha": 0.1}``, or texts as on the
        command line, ``["partition.alpha=0.1"]``. A table may be given as a whole, as
        a dictionary of keys, a class or function, or a made object: ``{"server":
        ServerAdam(learning_rate=0.1), "model": Net}``. An object says all of its table.
    dataset : DataSet, optional
        Data of your own instead of the file's ``[data]``.
    report : bool
        Write ``report.html`` at the end.
    progress : bool or Callable[[Progress], None], optional
        A bar in a terminal or a notebook (True), or nothing (False or None); or what is
        called after every round.
    callbacks : Sequence[Callable[[ServerState], bool | None]]
        Called after every round, when it is recorded, with what the loop holds then:
        :class:`~fedweight.server.loop.ServerState`. One that returns True ends the
        run. A :class:`~fedweight.studies.Tracker` is told what is recorded instead.
    overwrite : bool
        Remove the run that is in the folder already, as one that crashed leaves it.
        A folder that holds anything else, or a run that goes on, is refused all the
        same.

    Returns
    -------
    Run
        The folder, as pandas frames and plots.

    Raises
    ------
    ConfigurationError, DataError, EngineError
        Before anything is written.
    OutputError
        A file cannot be written. Those that were written before are whole.

    Examples
    --------
    >>> import fedweight
    >>> result = fedweight.run(
    ...     strategy="ida", settings={"run.rounds": 2}
    ... )  # doctest: +SKIP
    >>> result.rounds["test_accuracy"].plot()  # doctest: +SKIP
    """
    require("a run", "studies", "pandas")
    settings = setting_map(settings)
    short = {"strategy": strategy, "engine.name": engine, "run.seed": seed}
    given = {key: value for key, value in short.items() if value is not None}
    whole = whole_tables({**settings, **given})
    settings = as_settings({**settings, **given})
    if file is not None and dataset is None and "data.name" not in settings:
        check_repeats(Path(file))
    configuration = Configuration.read(file, settings, name_of_own(dataset), whole)
    dataset = as_of_now(dataset)
    check_free(out, overwrite)
    name = configuration["strategy"]["name"].rsplit(":", 1)[-1].lower()
    label = f"{configuration['run']['name']}-{name}-seed{configuration['run']['seed']}"
    return run_configured(
        configuration,
        out,
        label,
        dataset=dataset,
        preface=preface_of(settings, dataset),
        report=report,
        progress=progress,
        callbacks=callbacks,
        overwrite=overwrite,
    )


def name_of_own(dataset: DataSet | None) -> str | None:
    """Return what data that are given in Python are called, if they are data."""
    if dataset is not None and not isinstance(dataset, DataSet):
        raise DataError(
            f"dataset must be a fedweight.data.DataSet, got {shown(dataset)}. A file "
            "is named by data.name and data.path."
        )
    return None if dataset is None else dataset.name


def as_of_now(dataset: DataSet | None) -> DataSet | None:
    """Return data that are known by what they hold now: a user may have changed it."""
    return None if dataset is None else replace(dataset)


def run_configured(
    configuration: Configuration,
    out: str | Path | None,
    label: str,
    *,
    dataset: DataSet | None = None,
    preface: str = "",
    report: bool = True,
    progress: Wanted = True,
    callbacks: Sequence[loop.Callback] = (),
    overwrite: Overwrite = False,
    tried: bool = False,
) -> Run:
    """Run a configuration, as :func:`run` does what it is told.

    Parameters
    ----------
    configuration : Configuration
        What to run.
    out, label : optional
        The run's folder, or what one under ``runs/`` is called.
    dataset, report, progress, callbacks, overwrite : optional
        As :func:`run` takes them.
    preface : str
        Comments that ``config.toml`` begins with.
    tried : bool
        Whether a strategy of the user's own has been tried before.
    """
    tracking, own_callbacks = told_apart(checked_callbacks(callbacks))
    check_progress(progress)
    components = prepare(configuration, dataset)
    made = make_ready(components, callbacks=own_callbacks)
    if not tried:
        try_own(components, made[0], flat_of(made[2]))
    choice = components.choice = choose(components, *made[1:])
    if choice.device != components.device:
        components.device = choice.device
        made = make_ready(components, callbacks=own_callbacks)
    # What was measured is part of the configuration now: it repeats the run.
    components.configuration = as_chosen(components, configuration, choice)
    return _simulated(
        components,
        made,
        choice.plan,
        {"chosen": choice.why},
        new_folder(out, label, overwrite),
        report=report,
        progress=progress,
        callbacks=own_callbacks,
        tracking=tracking,
        preface=preface,
    )


def resume(
    folder: str | Path,
    *,
    report: bool = True,
    progress: Wanted = True,
    callbacks: Sequence[loop.Callback] = (),
) -> Run:
    """Go on with a run that was stopped, from its last checkpoint.

    Its folder then holds what an uninterrupted run would have written, but for what the
    clock said.

    Parameters
    ----------
    folder : str or Path
        The run's folder.
    report : bool
        Write ``report.html`` at the end.
    progress : bool or Callable[[Progress], None], optional
        As :func:`run` takes it.
    callbacks : Sequence[Callable[[ServerState], bool | None]]
        As :func:`run` takes them. No checkpoint holds what they remember.

    Raises
    ------
    DataError
        If the folder is not a run's, or has no checkpoint of this run.
    ConfigurationError
        If the run is going on, or its data were given in Python.
    """
    require("a run", "studies", "pandas")
    before = Run(Path(folder))
    config = before.folder / "config.toml"
    check_repeats(config)
    configuration = Configuration.read(config)
    if before.complete:
        raise ConfigurationError(
            f"the run in {before.folder} is complete: there is nothing to go on with."
        )
    tracking, own_callbacks = told_apart(checked_callbacks(callbacks))
    check_progress(progress)
    checkpoint = read_checkpoint(before.folder, configuration)
    components = prepare(configuration)
    check_same(before.folder, configuration, components.digest)
    engine = table_of(before.environment, "engine")
    if configuration["engine"]["device"] == "auto":  # There may be a card by now.
        components.device = str(engine.get("device", components.device))
    made = make_ready(components, callbacks=own_callbacks)
    # How clients train, if the device had no room for as many as were to.
    plan = Plan.parse(str(engine.get("plan", configuration["engine"]["plan"])))
    return _simulated(
        components,
        made,
        plan or Plan(),
        {key: engine[key] for key in OF_THE_PLAN if key in engine},
        old_folder(before.folder),
        report=report,
        progress=progress,
        callbacks=own_callbacks,
        tracking=tracking,
        checkpoint=checkpoint,
    )


def _simulated(
    components: Components,
    made: tuple[Strategy, TrainingApp, FlatRecord],
    plan: Plan,
    about: Mapping[str, Any],
    take: AbstractContextManager[Path],
    *,
    report: bool,
    progress: Wanted,
    callbacks: Sequence[loop.Callback] = (),
    tracking: Tracking,
    preface: str = "",
    checkpoint: Mapping[str, Any] | None = None,
) -> Run:
    """Simulate a run that is ready, and write its folder.

    ``about`` is what its record says of the plan.
    """
    strategy, client_app, initial = made
    configuration = components.configuration
    began = time.perf_counter()
    folder: Path | None = None
    recorder: Recorder | None = None
    server_app = ServerApp()

    with interruptible(), ExitStack() as stack:

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            nonlocal folder, recorder
            # The clients' engine is there: nothing is left that could be refused.
            folder = stack.enter_context(take)
            assert isinstance(grid, SimulationGrid)
            if checkpoint is None:
                grid.store.keep_in(folder)
            else:
                grid.store.restore(folder, checkpoint["store"])
            recorder = Recorder(folder, components, strategy, told, began, tracking)
            try:
                with recorder.recording(
                    {"plan": str(plan), **about},
                    preface=preface,
                    anew=checkpoint is None,
                ):
                    serve(
                        grid,
                        components,
                        strategy,
                        initial,
                        recorder,
                        checkpoint,
                        callbacks,
                    )
                    if configuration["run"]["keep-clients"]:
                        write_kept(folder, grid.store, components.personal_layout)
                # Only now, with the model written, is there nothing to go on with.
                (folder / CHECKPOINT).unlink(missing_ok=True)
            finally:
                if not (folder / CHECKPOINT).exists():
                    grid.store.clear()

        try:
            with quiet_flower(), telling(progress) as told:
                simulate(
                    server_app,
                    client_app,
                    num_clients=components.data.num_clients,
                    threads=configuration["engine"]["threads"] or None,
                    plan=plan,
                    **engine_arguments(configuration)
                    | {"gpus_per_worker": components.gpus_per_worker()},
                )
            assert folder is not None
            result = Run(folder)
            if report:
                report_or_say(result)
        except BaseException as stop:
            if recorder is not None and recorder.goes_on:
                assert folder is not None
                stop.add_note(_what_was_recorded(folder))
            raise
    return result


def _what_was_recorded(folder: Path) -> str:
    said = f"What was recorded is in {folder}. To see it: fedweight report {folder}"
    if (folder / CHECKPOINT).is_file():
        said += f". To go on from the last checkpoint: fedweight resume {folder}"
    return said


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep Flower's log to warnings; what a round did is in the run's folder."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def serve(
    grid: Grid,
    components: Components,
    strategy: Strategy,
    initial: FlatRecord,
    recorder: Recorder,
    checkpoint: Mapping[str, Any] | None = None,
    callbacks: Sequence[loop.Callback] = (),
) -> None:
    """Be the server: let the strategy run its rounds, and record them.

    With a ``checkpoint`` only those that come after it. ``callbacks`` are the user's.
    """
    configuration = components.configuration
    recorder.grid = grid
    schema = components.schema
    told = {} if schema is None else {keys.SCHEMA: schema.write()}
    if leaves_out_base(initial, recorder.base.layout):
        told[keys.BASE] = recorder.base.digest
        bring_base(grid, recorder.base)
    elif recorder.base.digest:
        keep_frozen(strategy, recorder.base)
    personal = components.personal()
    ends = personal is not None and personal.when == "end"
    if ends:
        recorder.will_end()
    if any(isinstance(one, WeightingStrategy) for one in with_inner(strategy)):
        read_by(grid, components.codec())
    epochs = configuration["training"]["epochs"]
    table = configuration["run"]
    rounds, timeout = table["rounds"], table["timeout"] or None
    state = ServerState(
        initial,
        train_config=ConfigRecord({keys.LOCAL_EPOCHS: epochs, **told}),
        evaluate_config=ConfigRecord(dict(told)),
    )
    # A strategy that is not ours may draw from the process's streams.
    products = gpu_arithmetic(components.precision, components.device)
    with one_thread(), seeded(table["seed"], torch.device("cpu")), products:
        if has_our_loop(strategy):
            stopping = EarlyStopping(
                table["stop-metric"], table["stop-after"], table["stop-delta"]
            )
            best = BestModel(table["keep-best"], recorder.folder, recorder.write_best)
            own = OwnCallbacks(callbacks)
            # What is tested depends on whether the round is the last one, and what a
            # checkpoint holds on what all others have made of the round.
            recorder.over = lambda: bool(stopping.reason)
            several: list[loop.Callback] = [stopping, recorder, best, own]
            others: dict[str, Remembers] = {
                "recorder": recorder,
                "stopping": stopping,
                "best": best,
            }
            if isinstance(grid, SimulationGrid):
                _tell_what_is_not_carried(strategy)
                several.append(
                    Keeper(
                        configuration,
                        strategy,
                        grid,
                        recorder.folder,
                        others,
                        lambda: bool(stopping.reason or own.reason),
                    )
                )
            if checkpoint is None:
                recorder(state)
            else:
                assert isinstance(grid, SimulationGrid)
                state = go_on(checkpoint, strategy, grid, others, initial)
            state = loop.federate(
                strategy,
                grid,
                state,
                until=rounds,
                timeout=timeout,
                schedule=components.schedule(),
                callbacks=several,
            )
            if state.round < rounds:
                recorder.stopped(state.round, stopping.reason or own.reason)
        else:  # It runs its rounds in a way of its own.
            with settling(strategy, grid):
                strategy.start(
                    grid,
                    initial,
                    num_rounds=rounds,
                    timeout=timeout,  # type: ignore[arg-type]
                    train_config=state.train_config,
                    evaluate_config=state.evaluate_config,
                    evaluate_fn=recorder.after_round,
                )
            state = replace(state, arrays=recorder.arrays or initial, round=rounds)
        if ends:
            recorder.personal(after_rounds(strategy, grid, state, timeout))


def _tell_what_is_not_carried(strategy: Strategy) -> None:
    """Name, at the start, what a run that is resumed would not have."""
    odd = not_carried(strategy)
    if odd:
        log.warning(
            "a run of %s that is stopped cannot go on with the same bits: no "
            "checkpoint can hold its %s",
            type(strategy).__name__,
            listed(odd),
        )
