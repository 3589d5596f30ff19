"""One footing: every place that prints the k-NN of a network prints the same number."""

import json

import pytest
from conftest import inside
from papers import CASES

from tools import evaluate

pytestmark = pytest.mark.usefixtures("slim")

# one of each script that trains
FAMILIES = ("cmc nce", "moco", "patch", "debiased", "transformed moco", "ring ir", "ring cmc")


def accuracies(path) -> list[float]:
    """Return the k-NN accuracies of a run's records."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["knn_acc1"] for record in records if "knn_acc1" in record]


@pytest.mark.parametrize("name", FAMILIES)
def test_three_places_print_one_k_nn(module_folder, name):
    """The monitor during training, the linear evaluation, and tools/evaluate.py."""
    case = CASES[name]
    with inside(module_folder):
        case.module.main(case.run_in(name, "--epochs", "1", "--knn-every", "1", "--knn-k", "20"))
        (log,) = (module_folder / name).rglob("metrics.jsonl")
        (monitor,) = accuracies(log)
        small = ["--demo", "--knn-k", "20", "--epochs", "1", "--device", "cpu"]
        evaluate.main([name, *small, "--views", "1", "--out", f"{name} judged"])
        judged = json.loads((module_folder / f"{name} judged" / "result.json").read_text())
        assert judged["knn_acc1"] == pytest.approx(monitor, abs=1e-4)
        if case.linear is None:
            return
        case.evaluation.main(case.linear_of(name, f"{name} linear", "--knn-k", "20"))
    (result,) = (module_folder / f"{name} linear").rglob("result.json")
    assert json.loads(result.read_text())["knn_acc1"] == pytest.approx(monitor, abs=1e-4)
