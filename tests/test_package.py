"""The package `negatives`: files that need torch alone, their contracts, and docs/losses.md."""

import ast
import contextlib
import doctest
import importlib
import io
import re
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, equal
from torch import nn

from common import batchnorm
from common.memory import MemoryBank, Queue, bank_scores, queue_logits
from common.nce import NCE, info_nce, nce_loss
from debiased.loss import debiased_loss, unbiased_loss
from feature_transform.transform import Rule, negatives, pair
from nonsem_neg.negatives import contrast_logits, patch_negatives
from ring.negatives import Comparison, conditional_loss, ring_loss

MAPPED = dict(re.findall(r'^"(\S+\.py)" = "(\S+)"$', (ROOT / "pyproject.toml").read_text(), re.M))
PAGE = (ROOT / "docs" / "losses.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
ELSEWHERE = [block for block in BLOCKS if block.startswith("# with ")]
LOOPS = [block for block in BLOCKS if block not in ELSEWHERE]
B, D, K = 8, 16, 64


def unit(*shape, seed=0):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=-1)


QUERY, MEMORY = unit(B, D), unit(K, D, seed=2)
INDEX = torch.arange(B)
WIDE = unit(B, D + 1)


def module_of(path: str):
    return importlib.import_module(path.removesuffix(".py").replace("/", "."))


# -------------------------------------------------------------------------------------- the package


@pytest.mark.parametrize("path", MAPPED)
def test_a_packaged_file_needs_torch_alone(path):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add("a relative import" if node.level else node.module.partition(".")[0])
    assert imported <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", MAPPED)
def test_examples_in_docstrings(path):
    torch.manual_seed(0)
    result = doctest.testmod(module_of(path))
    assert result.attempted >= 2 and result.failed == 0


def test_the_wheel_alone_runs_the_loops_of_the_page(tmp_path, monkeypatch):
    """The wheel is unpacked, as pip does with one, and used in a process that has no checkout."""
    hatchling = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(ROOT)
    wheel = zipfile.ZipFile(tmp_path / hatchling.build_wheel(str(tmp_path)))
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {*MAPPED.values()}
    requirements = re.findall(r"Requires-Dist: (.*)", read(wheel, "METADATA"))
    assert [name[:5] for name in requirements] == ["torch"]
    site = tmp_path / "site"
    wheel.extractall(site)
    ends = "assert not {'common', 'runner', 'tools', 'ring'} & {*sys.modules}, 'of the checkout'"
    code = "\n".join([f"import sys; sys.path.insert(0, {str(site)!r})", *LOOPS, ends])
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def read(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_every_module_has_a_loop_of_about_twenty_lines():
    assert LOOPS[1:] and ELSEWHERE
    for block in LOOPS[1:]:
        assert block.count("\n") <= 24, block
    for target in MAPPED.values():
        name = target.removesuffix(".py").replace("/", ".")
        assert f"| `{name}` |" in PAGE and f"from {name} import" in PAGE


# ------------------------------------------------------------------------------------ the contracts


def losses() -> dict:
    """Return {name: loss of (query, key, memory)} of the package, and modules with state anew."""
    bank, criterion = MemoryBank(K, D), NCE(K)
    with torch.no_grad():
        bank.memory.copy_(unit(K, D, seed=5))
    rows = torch.arange(B * 9).view(B, 9) % K
    labels = torch.arange(B) % 3
    order = torch.arange(K).flip(0)
    nonsem = unit(B, 2, D, seed=3)

    def transformed(query, key, memory):
        moved, positive = pair(query, key, torch.tensor(1.5))
        mixed = negatives(memory, torch.tensor(0.3), order)
        return info_nce(torch.cat([(moved * positive).sum(1, keepdim=True), moved @ mixed.T], 1))

    def non_semantic(query, key, memory):
        return info_nce(contrast_logits(query, key, memory, nonsem, 0.2, alpha=2.0))

    return {
        "debiased": lambda q, k, m: debiased_loss(q, k)[0],
        "debiased, cold": lambda q, k, m: debiased_loss(q, k, 0.02)[0],
        "unbiased": lambda q, k, m: unbiased_loss(q, k, labels)[0],
        "non-semantic": non_semantic,
        "queue": lambda q, k, m: info_nce(queue_logits(q, k, m, 0.2)),
        "bank": lambda q, k, m: info_nce(bank.logits(q, rows)),
        "nce": lambda q, k, m: criterion(bank.logits(q, rows))[0],
        "ring": lambda q, k, m: ring_loss(q, k, m, outer=0.5, inner=0.2),
        "transformed": transformed,
    }


def values(context=contextlib.nullcontext) -> list:
    """Return the value in a context, and the gradients to query and key, of every loss."""
    found = []
    for loss in losses().values():
        query, key = (unit(B, D, seed=seed).requires_grad_() for seed in (0, 1))
        with context():
            value = loss(query, key, unit(K, D, seed=2))
        gradients = torch.autograd.grad(value, (query, key), allow_unused=True)
        found.append((value.detach(), *(x for x in gradients if x is not None)))
    return found


def test_losses_are_float32_inside_autocast():
    expected = values()
    found = values(lambda: torch.autocast("cpu", torch.bfloat16))
    for name, exact, inside in zip(losses(), expected, found):
        if name != "transformed":  # its product is the caller's
            assert equal(exact, inside), name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_losses_without_gradients_leave_nothing_behind(context):
    expected = values()
    with context():
        for loss, (value, *_) in zip(losses().values(), expected):
            assert torch.equal(loss(unit(B, D), unit(B, D, seed=1), unit(K, D, seed=2)), value)
    assert equal(values(), expected)  # nothing that was made there is used afterwards


@pytest.mark.filterwarnings("ignore")
def test_losses_are_one_graph():
    norm = batchnorm.split(nn.Sequential(nn.BatchNorm2d(4)), 2)
    queue, bank = Queue(K, D), MemoryBank(K, D)

    def step(every, query, key):
        values = [loss(query, key, MEMORY) for loss in every.values()]
        values.append(norm(query.view(B, 4, 2, 2)).square().mean())
        queue.enqueue(key)
        bank.update(key, INDEX)
        return torch.stack(values)

    query, key = unit(B, D).requires_grad_(), unit(B, D, seed=1)
    found = torch.compile(step, fullgraph=True, backend="eager")(losses(), query, key)
    assert queue.queue_ptr == B and torch.equal(queue.queue[:B], key)
    expected = step(losses(), query, key)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(value.sum(), query)[0] for value in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_memory_continues_from_its_state():
    def steps(queue, bank, criterion, first, last):
        for seed in range(first, last):
            feat = unit(B, D, seed=seed)
            rows = torch.arange(B * 9).view(B, 9) % K
            yield criterion(bank.logits(feat, rows))[0]
            yield info_nce(queue.logits(feat, feat))
            bank.update(feat, rows[:, 0])
            queue.enqueue(feat)

    torch.manual_seed(0)
    modules = nn.ModuleList([Queue(20, D), MemoryBank(K, D), NCE(K)])
    written = io.BytesIO()
    list(steps(*modules, 0, 3))
    torch.save(modules.state_dict(), written)
    rest = list(steps(*modules, 3, 6))
    resumed = nn.ModuleList([Queue(20, D), MemoryBank(K, D), NCE(K)])
    written.seek(0)
    resumed.load_state_dict(torch.load(written, weights_only=True))
    assert equal(list(steps(*resumed, 3, 6)), rest)
    assert equal(modules.state_dict(), resumed.state_dict())


BAD = {  # name: (call, what the message has)
    "temperature 0, queue": (lambda: queue_logits(QUERY, QUERY, MEMORY, 0), "temperature 0 must"),
    "temperature 0, bank": (lambda: MemoryBank(K, D).logits(QUERY, INDEX[:, None], 0), "ture 0 mu"),
    "temperature 0, debiased": (lambda: debiased_loss(QUERY, QUERY, 0), "temperature 0 must"),
    "temperature 0, ring": (
        lambda: ring_loss(QUERY, QUERY, MEMORY, outer=0.5, temperature=0),
        "temperature 0 must",
    ),
    "temperature 0, nonsem": (
        lambda: contrast_logits(QUERY, QUERY, MEMORY, None, 0),
        "temperature 0 must",
    ),
    "not unit, queue": (lambda: queue_logits(2 * QUERY, QUERY, MEMORY, 1), "query has a .* 2, exp"),
    "not unit, bank": (
        lambda: MemoryBank(K, D).logits(2 * QUERY, INDEX[:, None]),
        "feat has a row",
    ),
    "not unit, debiased": (lambda: debiased_loss(QUERY, 2 * QUERY), "z2 has a row of length 2"),
    "not unit, ring": (lambda: ring_loss(2 * QUERY, QUERY, MEMORY, outer=0.5), "query has a row"),
    "not unit, nonsem": (
        lambda: contrast_logits(QUERY, 2 * QUERY, MEMORY, None, 1),
        "key has a row of length 2, .*normalize",
    ),
    "empty queue": (lambda: queue_logits(QUERY, QUERY, MEMORY[:0], 1), r"queue is \(0, 16\)"),
    "empty bank": (lambda: bank_scores(QUERY, MEMORY[:0], INDEX[:, None]), r"bank is \(0, 16\)"),
    "empty queue, nonsem": (
        lambda: contrast_logits(QUERY, QUERY, MEMORY[:0], None, 1),
        r"queue is \(0, 16\): expected",
    ),
    "empty memory, ring": (
        lambda: conditional_loss(QUERY, INDEX, MEMORY[:0], Comparison(Rule(), (0, 1), 1)),
        r"memory is \(0, 16\): expected",
    ),
    "empty memory, transform": (lambda: negatives(MEMORY[:0], None, None), r"rows are \(0, 16\)"),
    "no negative": (lambda: info_nce(torch.zeros(4, 1)), r"logits are \(4, 1\): expected"),
    "no negative, nce": (lambda: nce_loss(torch.zeros(4, 1), 10), r"logits are \(4, 1\)"),
    "another width, queue": (lambda: queue_logits(WIDE, WIDE, MEMORY, 1), r"query is \(8, 17\)"),
    "another width, bank": (lambda: bank_scores(WIDE, MEMORY, INDEX[:, None]), r"query is \(8, 17"),
    "another width, ring": (lambda: ring_loss(WIDE, WIDE, MEMORY, outer=0.5), r"query is \(8, 17"),
    "another width, nonsem": (
        lambda: contrast_logits(QUERY, WIDE, MEMORY, None, 1),
        r"key is \(8, 17\): expected 8 times rows of length 16",
    ),
    "another length, nonsem": (
        lambda: contrast_logits(QUERY, QUERY, MEMORY, unit(7, 2, D), 1),
        r"nonsem is \(7, 2, 16\)",
    ),
    "another length, key": (
        lambda: queue_logits(QUERY, QUERY[:7], MEMORY, 1),
        "expected one shape",
    ),
    "another length, ring": (
        lambda: ring_loss(QUERY, QUERY[:7], MEMORY, outer=1),
        "expected one shape",
    ),
    "another length, pair": (lambda: pair(QUERY, QUERY[:7], None), r"key \(7, 16\): expected"),
    "another length, views": (lambda: debiased_loss(QUERY, QUERY[:7]), r"\(7, 16\): expected"),
    "labels": (lambda: unbiased_loss(QUERY, QUERY, INDEX[:7]), r"labels are \(7,\): expected"),
    "rows": (lambda: bank_scores(QUERY, MEMORY, INDEX[:7, None]), r"rows are \(7, 1\): expected"),
    "coefficient": (lambda: pair(QUERY, QUERY, torch.ones(7, 1)), r"coefficient is \(7, 1\)"),
    "order": (
        lambda: negatives(MEMORY, torch.tensor(0.5), INDEX),
        "order is .8,.: expected a perm",
    ),
    "ring of nothing": (lambda: ring_loss(QUERY, QUERY, MEMORY, outer=0.001), "the ring is empty"),
    "ranks": (
        lambda: conditional_loss(QUERY, INDEX, MEMORY, Comparison(Rule(), (3, 99), 1)),
        "ranks 3 to 99 are no ring among 64",
    ),
    "count": (lambda: ring_loss(QUERY, QUERY, MEMORY, outer=0.5, count=3), "needs a generator"),
    "rule": (lambda: Rule(positives="vector"), "positives 'vector' must be None or one of scalar"),
    "alpha": (lambda: Rule(pos_alpha=0), "alphas 0 and 1.6 must be above 0"),
    "mode": (lambda: NCE(10, "mean"), "mode 'mean' must be 'ema' or 'oneshot'"),
    "length of a queue": (lambda: Queue(0, D), "k 0 must be at least 1"),
    "length of a bank": (lambda: MemoryBank(0, D), "n 0 must be at least 1"),
    "groups": (lambda: batchnorm.split(nn.BatchNorm2d(3), 0), "splits 0 must be at least 1"),
    "patches": (
        lambda: patch_negatives(torch.zeros(2, 3, 8, 9), 1, (2, 3), torch.Generator()),
        r"images are \(2, 3, 8, 9\): expected squares",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument_its_value_and_what_fits(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_input_changes_no_state():
    modules = nn.ModuleList([Queue(20, D), MemoryBank(K, D), NCE(K)])
    before = {name: value.clone() for name, value in modules.state_dict().items()}
    queue, bank, criterion = modules
    calls = [
        lambda: queue.enqueue(WIDE),
        lambda: queue.enqueue(unit(21, D)),
        lambda: bank.update(WIDE, INDEX),
        lambda: bank.update(QUERY, INDEX[:7]),
        lambda: criterion(torch.zeros(4, 1)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"\(8, 17\)|\(21, 16\)|\(7,\)|\(4, 1\)"):
            call()
    assert equal(modules.state_dict(), before)


# ------------------------------------------------------------------------------- in other libraries


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["lightly", "pytorch_lightning"])
def test_loops_with_other_libraries(library, monkeypatch, tmp_path):
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    for path, target in MAPPED.items():
        monkeypatch.setitem(
            sys.modules, target.removesuffix(".py").replace("/", "."), module_of(path)
        )
    (block,) = [block for block in ELSEWHERE if f"{library}" in block]
    exec(compile("\n".join([BLOCKS[0], block]), "losses.md", "exec"), {"__name__": "page"})


@pytest.mark.filterwarnings("ignore")
def test_losses_in_lightlys_examples_take_a_step():
    """MoCo's heads and key encoder, and SimCLR's head, with every loss in place of lightly's."""
    modules = pytest.importorskip("lightly.models.modules")
    utils = pytest.importorskip("lightly.models.utils")
    torch.manual_seed(0)
    x = torch.randn(2, B, 12)
    for name, loss in losses().items():
        moco = nn.Sequential(nn.Linear(12, D), modules.MoCoProjectionHead(D, D, D))
        key_network = nn.Sequential(nn.Linear(12, D), modules.MoCoProjectionHead(D, D, D))
        utils.deactivate_requires_grad(key_network)
        simclr = nn.Sequential(nn.Linear(12, D), modules.SimCLRProjectionHead(D, D, D))
        for network, other in ((moco, key_network), (simclr, simclr)):
            query, key = (F.normalize(net(y), dim=1) for net, y in zip((network, other), x))
            optimizer = torch.optim.SGD(network.parameters(), 0.1)
            before = network[0].weight.detach().clone()
            loss(query, key, unit(K, D, seed=2)).backward()
            optimizer.step()
            utils.update_momentum(moco, key_network, m=0.99)
            assert not torch.equal(network[0].weight, before), name


@pytest.mark.filterwarnings("ignore")
def test_losses_stand_where_pytorch_metric_learnings_stand():
    """Its loop calls loss_func(embeddings, labels), with two views of every class in a batch."""
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    outputs = torch.cat([unit(B, D), unit(B, D, seed=1)]).requires_grad_()
    embeddings = F.normalize(outputs, dim=1)  # they do this themselves
    ours = debiased_loss(*embeddings.chunk(2), temperature=0.5, tau_plus=0)[0]
    expected = theirs.NTXentLoss(temperature=0.5)(embeddings, torch.arange(B).repeat(2))
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(loss, outputs, retain_graph=True) for loss in (ours, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    memory = theirs.CrossBatchMemory(theirs.NTXentLoss(temperature=0.2), D, memory_size=K)
    memory(embeddings[B:], torch.arange(B))  # its rows are a memory as ours are
    for name, loss in losses().items():
        assert loss(*embeddings.chunk(2), memory.embedding_memory).isfinite(), name
