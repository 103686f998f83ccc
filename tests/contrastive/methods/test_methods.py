"""Each method's step, recomputed from its networks' outputs by plain loops."""

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from contrastive.config import UserError
from contrastive.distributed import Rows
from contrastive.fit_checks import check_method, check_views
from contrastive.methods.build import find_method
from contrastive.methods.in_batch import other_images
from contrastive.methods.moco import Moco
from contrastive.objectives.build import build_objective
from tests import tiny
from tests.contrastive.objectives.cases import NAMES
from tests.reference import losses as reference


def outcome(module, batch, step=0):
    """Views of a batch and what the method's step gave for them."""
    module.eval()  # batch statistics stay, so that passes can be repeated
    views = module.views(batch.images, batch.ids, 0)
    return views, module.method.step(views, Rows.of(batch.ids), step)


def embed(module, view):
    with torch.no_grad():
        return module.networks.embed(view).double().numpy()


def test_simclr_is_nt_xent():
    module, batch = tiny.module("method=simclr"), tiny.batch()
    (first, second), found = outcome(module, batch)
    expected = reference.nt_xent(embed(module, first), embed(module, second), 0.2)
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)
    assert found.diagnostics["effective_negatives"] > 1


LABELS = torch.arange(40) % 3
FROM_THE_BATCH = {
    "info_nce": reference.info_nce,
    "dcl": reference.dcl,
    "dclw": partial(reference.dclw, sigma=0.5),
    "debiased": partial(reference.hcl, tau_plus=0.1, beta=0.0),
    "hcl": partial(reference.hcl, tau_plus=0.1, beta=1.0),
    "supcon": partial(
        reference.supcon,
        same=2 * [[LABELS[i] == LABELS[j] for j in range(8) if j != i for _ in "ab"] for i in range(8)],
    ),
}


def with_loss(name):
    """Return SimCLR's module with another loss."""
    module = tiny.module("method=simclr", "mining.class_prior=0.1")
    config = tiny.config(f"objective.name={name}").objective
    module.method.objective = build_objective(config, module.config.mining, in_batch=True, labels=LABELS)
    return module


@pytest.mark.parametrize("name", FROM_THE_BATCH)
def test_a_loss_takes_both_views_of_all_other_images_as_negatives(name):
    module, batch = with_loss(name), tiny.batch()
    views, found = outcome(module, batch)
    first, second = (embed(module, view) for view in views)
    others = [[view[j] for j in range(8) if j != i for view in (first, second)] for i in range(8)]
    expected = FROM_THE_BATCH[name](
        [*first, *second],
        [([key], [1.0]) for key in (*second, *first)],
        2 * [(rows, [1.0] * len(rows)) for rows in others],
        0.2,
    )
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", sorted(FROM_THE_BATCH.keys() - {"dclw"}))  # its weights are constants
def test_its_gradient_is_that_of_its_value_in_both_views_and_all_roles(name, monkeypatch):
    module = with_loss(name)
    monkeypatch.setattr(module.networks, "encode_frames", lambda view: view)
    monkeypatch.setattr(module.networks, "embed_frames", partial(normalize, dim=1))
    views = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = Rows.of(torch.tensor([0, 3, 1]))  # the first two are of one class
    views.requires_grad_()
    assert torch.autograd.gradcheck(lambda pair: module.method.step([*pair], rows, 0).loss, views)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "neighbour_info_nce"])
def test_every_loss_takes_its_negatives_from_the_batch_with_gradient_to_both_views(name):
    module, images = with_loss(name), tiny.batch()
    views = [view.clone().requires_grad_() for view in module.views(images.images, images.ids, 0)]
    module.eval()
    loss = module.method.step(views, Rows.of(images.ids), 0).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(view.grad.abs().sum() > 0 for view in views)


def test_nnclr_finds_each_prediction_from_the_neighbour_of_the_other_view():
    module, batch = tiny.module("method=nnclr", "encoder.predictor_hidden=16"), tiny.batch()
    (first, second), found = outcome(module, batch)
    with torch.no_grad():
        sides = [module.networks.project_and_predict(view) for view in (first, second)]
    bank = module.miner.bank
    terms = []
    for (projection, _), (_, predicted) in (sides, sides[::-1]):
        similarity = projection @ bank.key.float().T
        similarity[torch.arange(8), batch.ids] = -torch.inf  # an image's own row
        neighbours = bank.key[similarity.argmax(1)].double().numpy()
        terms.append(reference.nnclr(neighbours, predicted.double().numpy(), 0.2))
    assert found.loss.item() == pytest.approx(sum(terms) / 2, rel=1e-5)
    torch.testing.assert_close(found.keys, sides[0][0])
    assert found.diagnostics["neighbours"] == 1


def test_nnclr_starts_from_the_projection_itself_while_the_bank_is_empty():
    module, batch = tiny.module("method=nnclr", fill=False), tiny.batch()
    (first, second), found = outcome(module, batch)
    rows = [embed(module, view) for view in (first, second)]
    expected = (reference.nnclr(rows[0], rows[1], 0.2) + reference.nnclr(rows[1], rows[0], 0.2)) / 2
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)
    assert found.diagnostics["neighbours"] == 0


def test_a_checkpoint_of_the_loss_that_was_named_nnclr_is_refused():
    module = tiny.module("method=nnclr")
    module.method.check_checkpoint({"objective": "nnclr"})
    with pytest.raises(UserError, match=r"objective\.name: neighbour_info_nce into the config\.yaml"):
        module.method.check_checkpoint({})
    tiny.module("objective.name=info_nce").method.check_checkpoint({})


def test_a_neighbour_is_the_positive_and_no_negative():
    module, batch = (
        tiny.module("method=neighbour", "objective.name=neighbour_info_nce", "mining=all_rows"),
        tiny.batch(),
    )
    (first, second), found = outcome(module, batch)
    assert found.diagnostics["neighbours"] == 1
    query = embed(module, first)
    with torch.no_grad():
        key = module.networks.embed_key(second)
    bank = module.miner.bank.key.float()
    similarity = key @ bank.T
    similarity[torch.arange(8), batch.ids] = -torch.inf
    nearest = similarity.argmax(1)
    terms = []
    for i in range(8):
        # Every other row: the batch's stand as their fresh keys.
        fresh = [key[j].double().numpy() for j in range(8) if j != i and j != nearest[i]]
        stale = [bank[j].double().numpy() for j in range(8, 40) if j != nearest[i]]
        others = [row @ query[i] / 0.2 for row in fresh + stale]
        positive = bank[nearest[i]].double().numpy() @ query[i] / 0.2
        terms.append(torch.tensor([positive, *others]).logsumexp(0).item() - positive)
    assert found.loss.item() == pytest.approx(sum(terms) / 8, rel=1e-4)


UNLIKE = "augment.view_2.noise=0.0"
IN_BATCH = ["mining.method=in_batch", "objective.symmetric=true"]


def queries_and_keys(module, views):
    with torch.no_grad():
        queries = [module.networks.embed(view) for view in views]
        return queries, [module.networks.embed_key(view) for view in views[:2]]


def test_symmetric_in_the_batch_is_moco_v3():
    module, batch = tiny.module(*IN_BATCH, UNLIKE, "encoder.predictor_hidden=16"), tiny.batch()
    views, found = outcome(module, batch)
    queries, keys = queries_and_keys(module, views)
    rows = [row.double().numpy() for row in (*queries, *keys)]
    assert found.loss.item() == pytest.approx(reference.moco_v3(*rows, 0.2), rel=1e-5)
    torch.testing.assert_close(found.keys, keys[1])


@pytest.mark.parametrize(("symmetric", "pairs"), [(False, 3), (True, 6)])
def test_local_views_are_queries_against_global_keys(symmetric, pairs):
    settings = ["augment.num_local=2", "augment.local_size=8", f"objective.symmetric={symmetric}"]
    module, batch = tiny.module("mining=band", *settings), tiny.batch()
    views, found = outcome(module, batch)
    assert [view.shape[-1] for view in views] == [16, 16, 8, 8]
    queries, keys = queries_and_keys(module, views)
    matched = [(queries[0], keys[1])] + [(queries[1], keys[0])] * symmetric
    matched += [(query, keys[side]) for side in ([1, 0] if symmetric else [1]) for query in queries[2:]]
    assert len(matched) == pairs
    losses = [module.method.objective(*pair, found.negatives)[0] for pair in matched]
    torch.testing.assert_close(found.loss, torch.stack(losses).mean())


def test_local_views_meet_the_negatives_of_the_key_that_they_are_matched_with():
    module = tiny.module(*IN_BATCH, UNLIKE, "augment.num_local=2", "augment.local_size=8")
    views, found = outcome(module, tiny.batch())
    queries, keys = queries_and_keys(module, views)
    matched = [(queries[0], keys[1]), (queries[1], keys[0])]
    matched += [(query, key) for key in keys for query in queries[2:]]
    losses = [cross_entropy(query @ key.T / 0.2, torch.arange(8)) for query, key in matched]
    torch.testing.assert_close(found.loss, torch.stack(losses).mean())


STYLES = normalize(torch.tensor([[1.0, 0.1], [-1.0, 0.1]]), dim=1)


@pytest.mark.parametrize(
    ("settings", "chance"), [(IN_BATCH, 8), (["mining.method=in_batch"], 8), (["mining=all_rows"], 40)]
)
def test_who_sees_only_how_a_view_was_made_guesses(settings, chance, monkeypatch):
    """Views 0 and 1 are told apart, images are not: each query is the style of the key that it will meet."""
    module = tiny.module(*settings, UNLIKE, "encoder.projector_dim=2", fill=False)
    monkeypatch.setattr(module.networks, "keys", lambda view, *_: STYLES[view.long()])
    monkeypatch.setattr(module.networks, "embed", lambda view: STYLES[1 - view.long()])
    views = [torch.zeros(8), torch.ones(8)]
    for first in range(0, 40, 8):
        rows = torch.arange(first, first + 8)
        module.miner.write(module.method.step(views, Rows.of(rows), 0).keys, rows, 0)
    loss = module.method.step(views, Rows.of(torch.arange(8)), 1).loss
    assert loss.item() > math.log(chance) - 1e-5


def test_a_symmetric_loss_on_keys_of_the_bank_needs_views_that_are_alike(caplog):
    def check(*settings, resumed=False):
        module = tiny.module("objective.symmetric=true", *settings)
        check_views(module.config, module.miner, type(module.method), resumed=resumed)

    refused = [("mining=band",), ("mining=all_rows",), ("mining=full_bank",)]
    refused += [("method=neighbour", "mining.method=in_batch")]
    for settings in refused:
        with pytest.raises(UserError, match=r"the augmentation alone.*make the views alike"):
            check(UNLIKE, *settings)
        check(*settings)
        check(UNLIKE, "objective.symmetric=false", *settings)
    for settings in (["mining.method=in_batch"], ["method=simclr"], ["method=nnclr"], ["method=sogclr"]):
        check(UNLIKE, *settings)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    check(UNLIKE, "mining=band", resumed=True)
    assert "a new run of these settings would be refused" in caplog.text


def test_methods_without_key_network_have_none_and_resume_checkpoints_that_had_one():
    module = tiny.module("method=simclr")
    assert not [name for name, _ in module.named_parameters() if "key" in name]
    before = {name.removeprefix("networks."): value for name, value in module.state_dict().items()}
    weights = {f"key_{name}": value for name, value in before.items() if not name.startswith("predictor")}
    checkpoint = {"state_dict": before | weights}
    assert module.named_weights(checkpoint["state_dict"]).keys() == module.state_dict().keys()


@pytest.mark.parametrize("method", ["simclr", "nnclr"])
def test_a_look_up_ahead_for_negatives_of_the_batch_is_refused(method):
    config = tiny.config(f"method={method}", "mining.query=stored")
    with pytest.raises(UserError, match=rf"method={method} does not use.*mining\.query=fresh"):
        check_method(config, find_method(config), method)
    check_method(tiny.config("mining.query=stored"), Moco, "moco")


def test_a_method_that_collapses_without_a_predictor_is_refused_without():
    class Byol(Moco):
        needs_predictor = True

    with pytest.raises(UserError, match=r"method=byol collapses.*set encoder\.predictor_hidden"):
        check_method(tiny.config(), Byol, "byol")
    check_method(tiny.config("encoder.predictor_hidden=8"), Byol, "byol")


def test_a_loss_of_another_method_is_refused():
    with pytest.raises(UserError, match=r"is the loss of method=neighbour, and method=moco"):
        tiny.config("objective.name=neighbour_info_nce")


@pytest.mark.parametrize(("loss", "method"), [("nt_xent", "simclr"), ("nnclr", "nnclr")])
def test_a_method_that_is_named_as_a_loss_is_refused(loss, method):
    with pytest.raises(UserError, match=rf"name={loss}: is method={method} with objective.name=info_nce"):
        tiny.config(f"method={method}", f"objective.name={loss}")


def test_a_row_is_never_its_own_negative_in_the_batch():
    rows = normalize(torch.randn(3, 4), dim=1)
    negatives, gathered = other_images([rows, rows], Rows.of(torch.tensor([7, 8, 9])))
    assert gathered.shape == (3, 2, 4)
    assert negatives.shared_ids.tolist() == [7, 7, 8, 8, 9, 9]
    excluded = negatives.shared_log_weight == -torch.inf
    assert excluded.nonzero().tolist() == [[0, 0], [0, 1], [1, 2], [1, 3], [2, 4], [2, 5]]
