"""EK-FAC scores by kronfluence, for weights and examples in a file; started by influence.py."""

import argparse
import tempfile
from typing import Any

import kronfluence.factor.config as factor_config
import numpy as np
import torch
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from torch import nn
from torch.utils.data import ConcatDataset, TensorDataset

SCALES = (
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
)  # of the damping, times the mean eigenvalue; 0.1 is its default
DRAWS = (1, 10)  # labels drawn for each example; 1 is its default
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Classification(Task):
    """Cross-entropy, whose Fisher matrix is that of labels drawn from the network."""

    def __init__(self, measure: str):
        self.measure = measure

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Any:
        inputs, labels = batch
        outputs = model(inputs)
        if sample:
            with torch.no_grad():
                labels = torch.multinomial(torch.softmax(outputs, dim=-1), 1).flatten()
        return nn.functional.cross_entropy(outputs, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
        if self.measure == "loss":
            return self.compute_train_loss(batch, model)
        inputs, labels = batch
        outputs = model(inputs)
        right = nn.functional.one_hot(labels, outputs.shape[-1]).bool()
        others = outputs.masked_fill(right, -torch.inf).logsumexp(dim=-1)
        return -(outputs[right] - others).sum()


def network(arrays: Any) -> nn.Module:
    layers = [nn.Linear(*arrays[f"{name}_w"].shape) for name in ("first", "second")]
    for layer, name in zip(layers, ("first", "second"), strict=True):
        layer.weight.data = torch.tensor(arrays[f"{name}_w"].T.copy())
        layer.bias.data = torch.tensor(arrays[f"{name}_b"])
    return nn.Sequential(layers[0], ACTIVATIONS[str(arrays["activation"])](), layers[1])


def scores(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each measure, number of draws and damping."""
    train, test = (
        TensorDataset(
            torch.tensor(arrays[f"{kind}inputs"]), torch.tensor(arrays[f"{kind}labels"]).long()
        )
        for kind in ("", "test_")
    )
    found = {}
    for measure in ("loss", "margin"):
        for draws in DRAWS:
            torch.manual_seed(0)
            task = Classification(measure)
            model = prepare_model(network(arrays), task)
            for scale, matrix in _scores(model, task, train, test, draws).items():
                found[f"{measure}/{draws} draws, {scale:g} x"] = matrix
    return found


def _scores(
    model: nn.Module, task: Classification, train: TensorDataset, test: TensorDataset, draws: int
) -> dict[float, np.ndarray]:
    """Of each damping; the factors are of ``draws`` labels for each example."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("digits", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.fit_all_factors(
            "ekfac",
            ConcatDataset([train] * draws),
            per_device_batch_size=len(train),
            factor_args=FactorArguments(strategy="ekfac"),
        )
        for scale in SCALES:
            factor_config.HEURISTIC_DAMPING_SCALE = scale
            name = f"scores_{scale}"
            analyzer.compute_pairwise_scores(
                name,
                "ekfac",
                test,
                train,
                per_device_query_batch_size=len(test),
                per_device_train_batch_size=len(train),
                score_args=ScoreArguments(damping_factor=None),
            )
            matrix = analyzer.load_pairwise_scores(name)["all_modules"]
            found[scale] = matrix.numpy().astype(np.float64)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="an .npz file of weights and examples")
    parser.add_argument("target", help="the .npz file of scores")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with np.load(args.source) as arrays:
        np.savez(args.target, **scores(dict(arrays)))


if __name__ == "__main__":
    main()
