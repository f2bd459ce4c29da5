"""The contenders of `comparison.py`, each with its whole harness inside the clock; what it imports is loaded before."""

from __future__ import annotations

import logging
import os
import time
import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING

from simulations.benchmarks.comparison_workload import Clock, Times, Workload

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Context, Message
    from flwr.clientapp import ClientApp
    from torch import Tensor, nn

CORES = 2
"""That Flower's simulation engine may use."""
NOTES = ("accounting", "answering")
"""Mean CPU seconds of a ClientApp in the last round: of Opacus' accountant, and of all that it does."""


def _versions(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names}


def fedtide(workload: Workload, rounds: int) -> Times:
    """The inline engine, with ledgers, receipts, admission, checkpoints; the run's model is built inside the clock."""
    from simulations.forking import begin_importing

    begin_importing(workload.settings.sites)
    import torch

    from client.app import SITES_FOLDER
    from common.assets import home, language_model
    from common.config import read_plan
    from common.events.catalog import Catalog
    from common.models.build import build_model, item_texts
    from server.app import NODES_EXPECTED, REGISTRY_FOLDER, RUN_FOLDER
    from server.runs import RunFolder
    from simulations.engines import run_in_this_process
    from simulations.sites import SimulatedSite

    torch.set_num_threads(1)
    folder, settings = workload.folder, workload.settings
    events = settings.users * settings.events
    sites = [
        SimulatedSite(f"site-{n}", folder / "sites" / f"{n:05d}", settings.users, events)
        for n in range(settings.sites)
    ]
    plan, catalog = read_plan(folder / "plan.json"), Catalog.load(folder / "catalog.jsonl")
    with Clock(from_start=True) as clock:
        run = RunFolder.create(folder / "runs", plan, catalog)
        built = build_model(
            plan.model,
            item_texts(catalog.texts, catalog.categories),
            language_model(plan.model.encoder),
            cache=home() / "item-vectors",
            categories=catalog.categories,
            witness_places=plan.privacy.witness_places,
        )
        run.save_round(0, built.model.trainable_state())
        clock.lap()
        environment = {
            RUN_FOLDER: str(run.path),
            SITES_FOLDER: str(folder / "sites"),
            REGISTRY_FOLDER: str(folder / "registry"),
            NODES_EXPECTED: str(settings.sites),
        }
        run_in_this_process(environment, sites)
    records = run.records()
    if [len(record["admitted"]) for record in records] != [settings.sites] * rounds:
        raise RuntimeError("not every site was admitted in every round")
    return clock.times(rounds, _versions("torch", "opacus"))


def flower(workload: Workload, rounds: int) -> Times:
    """Flower's simulation engine and FedAvg; each ClientApp wraps its model by Opacus on every message."""
    import torch
    from flwr.app import ArrayRecord
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
    from opacus.layers import DPLSTM

    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    torch.set_num_threads(1)
    clock, server = Clock(from_start=True), ServerApp()
    sites = workload.settings.sites

    @server.main()  # type: ignore[untyped-decorator]
    def serve(grid: Grid, _context: Context) -> None:
        def round_ended(_round: int, _arrays: ArrayRecord) -> None:
            clock.lap()

        strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites, min_evaluate_nodes=0
        )
        start = ArrayRecord(workload.model(DPLSTM).state_dict())
        found = strategy.start(grid, start, num_rounds=rounds, evaluate_fn=round_ended)
        answers = found.train_metrics_clientapp[rounds]
        clock.notes |= {name: float(answers[name]) for name in NOTES}

    with clock:
        run_simulation(
            server_app=server,
            client_app=_flower_client(workload),
            num_supernodes=sites,
            backend_config={
                "init_args": {"num_cpus": CORES, "include_dashboard": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    if len(clock.laps) != rounds + 1:
        raise RuntimeError("Flower's run did not come to its end")
    return clock.times(rounds, _versions("flwr", "ray", "opacus", "torch"))


def _flower_client(workload: Workload) -> ClientApp:
    from flwr.app import Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    client = ClientApp()

    @client.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        began = time.process_time()
        arrays, seconds = _opacus_round(message, context, workload)
        metrics: dict[str, float | int] = {
            "num-examples": workload.settings.users,
            **dict(zip(NOTES, (seconds, time.process_time() - began), strict=True)),
        }
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    return client


def _opacus_round(message: Message, context: Context, workload: Workload) -> tuple[ArrayRecord, float]:
    """One local epoch: 1 / q steps on Poisson batches. The new weights, and the seconds of the accountant."""
    import torch
    from flwr.app import ArrayRecord
    from opacus import PrivacyEngine
    from opacus.layers import DPLSTM
    from torch.utils.data import DataLoader, TensorDataset

    warnings.simplefilter("ignore")
    logging.getLogger("opacus").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    settings = workload.settings
    model = workload.model(DPLSTM)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = TensorDataset(*workload.site(int(context.node_config["partition-id"])))
    losses: nn.Module = _losses(model)
    engine = PrivacyEngine()
    private, optimiser, loader = engine.make_private(
        module=losses,
        optimizer=torch.optim.SGD(losses.parameters(), lr=settings.learning_rate),
        data_loader=DataLoader(data, batch_size=settings.users_a_step, shuffle=True),
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=settings.clip_norm,
    )
    steps = 0
    for items, times in loader:
        optimiser.zero_grad()
        private(items, times).mean().backward()
        optimiser.step()
        steps += 1
    if steps != settings.steps:
        raise RuntimeError(f"{steps} steps, but {settings.steps} were wanted")
    began = time.process_time()
    engine.get_epsilon(delta=settings.delta)
    return ArrayRecord(model.state_dict()), time.process_time() - began


def _losses(model: nn.Module) -> nn.Module:
    """A module whose forward pass is `per_user_loss`: the form that Opacus wraps and pfl-research calls."""
    from torch import nn

    from common.models.batches import HistoryBatch

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, items: Tensor, times: Tensor) -> Tensor:
            found: Tensor = self.model.per_user_loss(HistoryBatch(items, times))  # type: ignore[operator]
            return found

        def loss(self, items: Tensor, times: Tensor) -> Tensor:
            found: Tensor = self(items, times).mean()
            return found

        def metrics(self, items: Tensor, times: Tensor) -> dict[str, object]:
            from pfl.metrics import Weighted

            return {"users": Weighted(len(items), 1)}  # no forward pass: nobody else evaluates either

    return Losses().train()


def pfl(workload: Workload, rounds: int) -> Times:
    """pfl-research's simulated backend in one process; its Gaussian mechanism on each site's update, at the site."""
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data import FederatedDataset, get_user_sampler
    from pfl.data.dataset import Dataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel
    from pfl.privacy.gaussian_mechanism import GaussianMechanism

    import common.models.families.recommend  # noqa: F401

    torch.set_num_threads(1)
    settings, clock = workload.settings, Clock(from_start=True)

    class Laps(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(
            self, _metrics: object, _model: object, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            clock.lap()
            return False, Metrics()

    with clock:
        module = _losses(workload.model(torch.nn.LSTM))
        model = PyTorchModel(
            module,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(module.parameters(), 1.0),
        )
        data = FederatedDataset(
            lambda number: Dataset(workload.site(number), user_id=str(number)),
            get_user_sampler("minimize_reuse", list(range(settings.sites))),
        )
        mechanism = GaussianMechanism(settings.clip_norm, settings.noise_multiplier)
        clock.lap()
        FederatedAveraging().run(
            NNAlgorithmParams(
                central_num_iterations=rounds,
                evaluation_frequency=rounds + 1,
                train_cohort_size=settings.sites,
                val_cohort_size=None,
            ),
            SimulatedBackend(data, data, postprocessors=[mechanism]),
            model,
            NNTrainHyperParams(
                local_batch_size=settings.users_a_step,
                local_num_epochs=1,
                local_learning_rate=settings.learning_rate,
            ),
            NNEvalHyperParams(local_batch_size=None),
            callbacks=[Laps()],
        )
    return clock.times(rounds, _versions("pfl", "torch"))
