"""fedweight on its local grid, in this process; see also :mod:`engines.ray`."""

from flwr.app import ArrayRecord, ConfigRecord, Context

import fedweight
from fedweight.clients import TrainingApp, TrainingSettings, client_number
from fedweight.data import ClientData, Examples
from fedweight.simulations.simulate import make_grid
from fedweight.strategies import FedAvg

from .talk import start
from .work import BATCH, CLASSES, LEARNING_RATE, MODELS, SAMPLES, SEED, flat


def main(engine: str = "local") -> None:
    """Run rounds as told, with an app, a strategy and a grid as a user makes them."""
    talk, job = start(f"fedweight {fedweight.__version__}")
    x, y = job.x, job.y
    nothing = Examples(x[:0], y[:0])

    def data(context: Context) -> ClientData:
        k = client_number(context)
        part = slice(k * SAMPLES, (k + 1) * SAMPLES)
        return ClientData(Examples(x[part], y[part]), nothing)

    app = TrainingApp(
        MODELS[job.work.model],
        data,
        num_classes=CLASSES,
        settings=TrainingSettings(
            epochs=1, batch_size=BATCH, learning_rate=LEARNING_RATE
        ),
        seed=SEED,
    )
    workers = job.workers if engine == "ray" else None
    with make_grid(app, job.cohort, engine=engine, workers=workers) as grid:
        strategy = FedAvg(fraction_evaluate=0.0, seed=SEED)
        arrays = ArrayRecord(job.model().state_dict())
        round = 0
        while talk.next_round(lambda: flat(arrays.to_numpy_ndarrays())):
            round += 1
            messages = strategy.configure_train(round, arrays, ConfigRecord(), grid)
            replies = grid.send_and_receive(messages)
            new, _ = strategy.aggregate_train(round, replies)
            if new is None:
                raise RuntimeError(strategy.history[-1].reason)
            arrays = new


if __name__ == "__main__":
    main()
