"""The step: what enters the loss, what does not, and in which order."""

import pytest
import torch

from contrastive.data.batch import Batch
from tests import tiny
from tests.forked import run_forked
from tests.reference import losses as reference


@pytest.fixture
def parts():
    """A module on 40 rows with a filled bank, and a batch of rows 0 to 7; no trainer."""

    def make(*overrides):
        return tiny.module("mining=band", *overrides), tiny.batch()

    return make


def loss_of(module, batch):
    torch.manual_seed(1)
    return module.training_step(batch, 0).detach()


@pytest.mark.parametrize("preset", ["band", "hardest", "uniform", "all_rows", "full_bank"])
def test_what_is_in_the_bank_decides_the_loss(parts, preset):
    module, batch = parts(f"mining={preset}", "mining.num_hard=4", "mining.num_uniform=4")
    module.eval()  # batch statistics stay, so that only the bank differs
    before = loss_of(module, batch)
    assert torch.equal(before, loss_of(module, batch))
    other = torch.nn.functional.normalize(torch.randn(40, 8), dim=1)
    module.miner.write(other, torch.arange(40), 0)
    assert not torch.equal(before, loss_of(module, batch))


@pytest.mark.parametrize("preset", ["band", "hardest", "uniform", "all_rows", "full_bank"])
def test_a_querys_own_row_is_never_its_negative(parts, preset):
    module, batch = parts(f"mining={preset}", "mining.num_hard=4", "mining.num_uniform=40")
    module.eval()
    loss_of(module, batch)
    negatives = module.last.negatives
    own = batch.ids[:, None]
    used = negatives.hard_log_weight > -torch.inf
    assert not ((negatives.hard_ids == own) & used).any()
    shared = negatives.shared_log_weight > -torch.inf
    assert not ((negatives.shared_ids[None] == own) & shared).any()
    assert used.any() or shared.any()


def test_the_loss_is_info_nce_of_the_queries_keys_and_mined_rows(parts):
    """Recomputed from the parts by a plain loop."""
    module, batch = parts()
    module.eval()
    loss = loss_of(module, batch)
    view_1, view_2 = module.views(batch.images, batch.ids, 0)
    with torch.no_grad():
        query, key = module.networks.embed(view_1).double(), module.networks.embed_key(view_2).double()
    negatives, temperature = module.last.negatives, module.config.objective.temperature
    terms = []
    for row in range(8):
        positive = (query[row] @ key[row] / temperature).exp()
        used = [
            *negatives.hard[negatives.hard_index[row]][negatives.hard_log_weight[row] == 0],
            *negatives.shared[negatives.shared_log_weight[row] == 0],
        ]
        others = [(query[row] @ vector.double() / temperature).exp() for vector in used]
        terms.append(-(positive / (positive + sum(others))).log())
    assert loss.double() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_views_grow_in_the_middle_of_the_run(parts, monkeypatch):
    module, batch = parts("augment.first_size=8", "augment.global_size=12")
    assert module.plan.total_steps == 10
    sides = []
    step = module.method.step
    monkeypatch.setattr(
        module.method, "step", lambda views, *rest: sides.append(views[0].shape[-1]) or step(views, *rest)
    )
    for number in (0, 4, 5, 9):
        monkeypatch.setattr(type(module), "global_step", number)
        loss_of(module, batch)
    module.plan.end_after(20)  # as a time budget may: step 9 is in the first half now
    loss_of(module, batch)
    assert sides == [8, 8, 12, 12, 8]


def test_the_symmetric_loss_is_the_mean_of_both_directions(parts):
    module, batch = parts("objective.symmetric=true")
    module.eval()
    loss = loss_of(module, batch)
    negatives = module.last.negatives
    view_1, view_2 = module.views(batch.images, batch.ids, 0)
    with torch.no_grad():
        forward, _ = module.method.objective(
            module.networks.embed(view_1), module.networks.embed_key(view_2), negatives
        )
        backward, _ = module.method.objective(
            module.networks.embed(view_2), module.networks.embed_key(view_1), negatives
        )
    assert loss == pytest.approx(((forward + backward) / 2).item(), rel=1e-6)
    assert forward != pytest.approx(backward.item(), rel=1e-3)


def test_a_predictor_stands_on_the_querys_side_alone(parts):
    module, batch = parts("encoder.predictor_hidden=16")
    module.eval()
    view, _ = module.views(batch.images, batch.ids, 0)
    features = module.networks.projector(module.encoder(view))
    hidden = torch.relu(module.networks.predictor[1](features @ module.networks.predictor[0].weight.T))
    predicted = hidden @ module.networks.predictor[3].weight.T + module.networks.predictor[3].bias
    torch.testing.assert_close(module.networks.embed(view), predicted / predicted.norm(dim=1, keepdim=True))
    keys = features / features.norm(dim=1, keepdim=True)  # the key network is a copy still
    torch.testing.assert_close(module.networks.embed_key(view), keys)
    loss_of(module, batch)
    module.training_step(batch, 0).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in module.networks.predictor.parameters())


@pytest.mark.parametrize("symmetric", [False, True])
def test_simclr_compares_the_query_network_with_itself(parts, symmetric):
    """And is symmetric by itself; the bank gets what view 2 became."""
    module, batch = parts("method=simclr", f"objective.symmetric={symmetric}")
    module.eval()
    loss = loss_of(module, batch)
    view_1, view_2 = module.views(batch.images, batch.ids, 0)
    with torch.no_grad():
        query, key = module.networks.embed(view_1), module.networks.embed(view_2)
    expected = reference.nt_xent(query.double().numpy(), key.double().numpy(), 0.2)
    assert module.config.objective.temperature == 0.2
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(module._unwritten[-1][0], key)
    assert not module._unwritten[-1][0].requires_grad


def test_keys_carry_no_gradient_and_queries_do(parts):
    module, batch = parts()
    module.training_step(batch, 0).backward()
    assert all(weight.grad is None for weight in module.networks.key_encoder.parameters())
    assert all(
        weight.grad is not None and weight.grad.abs().sum() > 0 for weight in module.encoder.parameters()
    )


def test_a_micro_batch_left_out_has_gradients_of_0_whatever_the_weights(parts):
    module, batch = parts()
    module.networks.projector[0].weight.data[0, 0] = float("inf")
    loss = module.training_step(Batch(batch.images[:1], batch.ids[:1]), 0)
    loss.backward()
    assert loss == 0
    assert all((w.grad == 0).all() for w in module.parameters() if w.requires_grad)


def test_an_image_has_the_same_views_in_any_batch(parts):
    module, batch = parts("augment=moco_v2", "data.image_size=16")
    whole = module.views(batch.images, batch.ids, 3)
    order = torch.tensor([5, 2, 7])
    part = module.views(batch.images[order], batch.ids[order], 3)
    for view, expected in zip(part, whole, strict=True):
        torch.testing.assert_close(view, expected[order], rtol=0, atol=1e-6)
    later = module.views(batch.images, batch.ids, 4)
    assert not torch.equal(later[0], whole[0])
    assert not torch.equal(whole[0], whole[1])


def test_weights_lie_as_the_views_do_and_the_loss_is_that_of_weights_that_do_not(parts):
    module, batch = parts()
    convolutions = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert convolutions
    for convolution in convolutions:
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    loss = loss_of(module, batch)
    other, _ = parts()
    other.to(memory_format=torch.contiguous_format)
    assert convolutions[0].weight.stride() != next(other.encoder.parameters()).stride()
    torch.testing.assert_close(loss_of(other, batch), loss, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_compiled_networks_and_views_train_as_plain_ones():
    """Loss, gradients and keys in two epochs, and one graph for both; aot_eager traces all but C++."""
    run_forked(compare_compiled, limit_s=300)


def compare_compiled(number):
    from contrastive import compiling
    from contrastive.module import ContrastiveModule

    compiling.COMPILER = "aot_eager"

    def made(compiled):
        settings = ["mining.min_fill=0", "augment=weak", f"run.compile={compiled}"]
        module = tiny.module(*settings, rows=8, epochs=3, fill=False)
        batch, results = tiny.batch(), []
        for epoch in range(2):
            ContrastiveModule.global_step = epoch
            module.zero_grad()
            torch.manual_seed(epoch)
            loss = module.training_step(batch, 0)
            loss.backward()
            module.miner.write(*module._unwritten[-1], epoch)
            results += [loss.detach(), module._unwritten[-1][0]]
            results += [weight.grad for weight in module.encoder.parameters()]
        return results

    for plain, compiled in zip(made("false"), made("true"), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 3, counters


@pytest.mark.parametrize(("half", "fused"), [(False, True), (True, False)])
def test_the_fused_attention_is_not_used_where_its_backward_is_slow(half, fused):
    """In bfloat16 on a CPU it takes most of a step; in float32 a run stays as it was, to the bit."""
    small = "{patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}"
    module = tiny.module("encoder.name=vit_tiny", "encoder.width=64", f"encoder.args={small}", "mining=band")
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = module.training_step(tiny.batch(), 0)
    names, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [each for each, _ in node.next_functions if each is not None]
    assert any(name.startswith("ScaledDotProductFlash") for name in names) == fused


def test_what_run_compile_means_by_device(monkeypatch):
    from contrastive import compiling as module

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert module.compiler("auto", cpu) is None
    assert (module.compiler("true", cpu), module.compiler("false", gpu)) == ("inductor", None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/cc" if name == "gcc" else None)
    assert module.compiler("auto", gpu) == "inductor"
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module.compiler("auto", gpu) is None
