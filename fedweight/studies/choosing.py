"""Where and how a run's clients train: as its file says, or as is fastest here."""

from __future__ import annotations

import numpy as np
import torch

from ..clients import TrainingApp
from ..core.layout import Layout
from ..core.threads import num_cores
from ..messages.arrays import FlatRecord
from ..simulations import Plan
from ..simulations.grid import usable_plan
from ..simulations.planner import (
    WORTH_A_CARD,
    WORTH_MEASURING,
    Choice,
    choose_plan,
    estimated_seconds,
    machine,
    plans_for,
)
from .components import Components
from .configuration import Configuration

# Of [engine], what says where clients train and how many at a time: it never changes a
# result, so it must not lead to another plan.
NEVER_CHANGES = ("name", "workers", "gpus-per-worker", "address", "threads")


def choose(
    components: Components, client_app: TrainingApp, initial: FlatRecord
) -> Choice:
    """Return where and how clients are trained: as told, or as is fastest here.

    Not at once where that does not give what each alone gives.
    """
    told = Plan.parse(components.configuration["engine"]["plan"])
    number, devices = components.data.num_clients, components.devices
    if told is not None and len(devices) == 1:
        plan = usable_plan(told, client_app, number, {})
        return Choice(components.device, plan, {"by": "engine.plan and engine.device"})
    apps = {components.device: client_app}

    def app_of(device: str) -> TrainingApp:
        if device not in apps:
            apps[device] = components.client_app(device)
        return apps[device]

    table = dict(components.configuration["engine"])
    training = dict(components.configuration["training"])
    rounds, cohort = components.configuration["run"]["rounds"], components.cohort()
    sizes, module = components.known_sizes, components.make_model()
    steps = -(-sizes // training["batch-size"]) * training["epochs"]
    seconds = estimated_seconds(
        int(rounds * cohort * steps.mean()),
        training["batch-size"],
        Layout.of_module(module).num_parameters,
    )
    plans = {d: [told] if told else plans_for(d, module, cohort) for d in devices}
    least = WORTH_MEASURING if devices == ["cpu"] else WORTH_A_CARD
    if devices[-1] == "cpu" and (plans == {"cpu": [Plan()]} or seconds < least):
        plan = usable_plan(told or Plan(), app_of("cpu"), number, {})
        short = f"it is estimated to take {seconds:g} s: too short to measure"
        no_choice = "there is no other way to train"
        return Choice("cpu", plan, {"by": short if seconds < least else no_choice})
    made, own = components.objective(), components.chosen_objective()
    around = "" if type(made) is type(own) else type(made).__name__
    workers = None
    if components.engine() == "ray":
        workers = {d: _ray_workers(components, d) for d in devices}
    return choose_plan(
        app_of,
        initial,
        plans,
        clients=np.flatnonzero(sizes)[:cohort].tolist(),
        num_clients=number,
        cohort=cohort,
        rounds=rounds,
        estimate=seconds,
        threads=table["threads"] or None,
        workers=workers,
        about={
            "model": str(module),
            "objective": dict(components.configuration["objective"]),
            **({"around it": around} if around else {}),
            "training": training,
            "engine": {k: v for k, v in table.items() if k not in NEVER_CHANGES},
            "cohort": cohort,
            "examples": int(np.median(sizes)),
            **machine(),
        },
    )


def as_chosen(
    components: Components, configuration: Configuration, choice: Choice
) -> Configuration:
    """Return a configuration that repeats what was chosen.

    With a device only where it was chosen among several: without a card it is the
    CPU in any case.
    """
    chosen = configuration.having("engine", "plan", str(choice.plan))
    if len(components.devices) > 1:
        chosen = chosen.having("engine", "device", choice.device)
    return chosen


def _ray_workers(components: Components, device: str) -> int:
    """Return how many workers Ray will have, as far as is known before."""
    told = int(components.configuration["engine"]["workers"])
    return told or (num_cores() if device == "cpu" else torch.cuda.device_count())
