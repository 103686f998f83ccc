"""Negatives of a query's own clip: which frames they show, and the losses with them by plain loops."""

import pytest
import torch

from contrastive.augment.moments import DrawMoments
from contrastive.augment.views import Views
from contrastive.config import UserError
from contrastive.distributed import Rows
from contrastive.encoders.build import build_encoder
from contrastive.fit_checks import check_method, check_sees_order
from contrastive.methods.build import find_method
from contrastive.methods.in_batch import other_images
from contrastive.methods.own_negatives import disturb
from contrastive.objectives.build import build_objective
from memory_bank.negatives import Negatives
from tests import tiny
from tests.contrastive.objectives.cases import NAMES, Case, all_losses, make_case, unit
from tests.reference import losses as reference

KINDS = ("shuffle", "reverse", "freeze")
T = 4


def numbered(b, t):
    """Clips whose pixels are the numbers of their frames."""
    return torch.arange(t, dtype=torch.float32)[None, :, None, None, None].expand(b, t, 3, 2, 2)


def order(kind, b=64, t=T, *, ids=None, seed=0, step=0):
    """The frames that each disturbed clip shows."""
    ids = torch.arange(b) if ids is None else ids
    disturbed = disturb(kind, numbered(len(ids), t), ids, seed, step)
    assert (disturbed == disturbed[..., :1, :1, :1]).all()
    return disturbed[..., 0, 0, 0].long()


@pytest.mark.parametrize("t", [2, 3, 8])
def test_shuffled_clips_have_all_frames_in_another_order(t):
    found = order("shuffle", t=t)
    uniform = torch.arange(t)
    assert torch.equal(found.sort(1).values, uniform.expand(64, t))
    assert not (found == uniform).all(1).any()
    orders = {tuple(row) for row in found.tolist()}
    assert len(orders) == {2: 1, 3: 5}.get(t, len(orders))
    assert t < 8 or len(orders) > 60


def test_reversed_clips_run_backwards_and_frozen_ones_show_any_one_frame():
    assert (order("reverse") == torch.arange(T).flip(0)).all()
    frozen = order("freeze")
    assert (frozen == frozen[:, :1]).all()
    assert {*frozen[:, 0].tolist()} == {*range(T)}


@pytest.mark.parametrize("kind", ["shuffle", "freeze"])
def test_the_order_depends_on_seed_step_and_row_alone(kind):
    rows = torch.tensor([5, 9, 7])
    whole = order(kind, t=8)
    assert torch.equal(order(kind, t=8, ids=rows), whole[rows])
    assert not torch.equal(order(kind, t=8, step=1), whole)
    assert not torch.equal(order(kind, t=8, seed=1), whole)


def test_own_rows_are_negatives_of_their_query_alone():
    case = make_case()
    rows = unit(5, 2, 7, seed=9)
    both = case.negatives.with_own(rows)
    assert torch.equal(both.hard[both.hard_index][:, 4:], rows)
    assert torch.equal(both.hard[both.hard_index][:, :4], case.negatives.hard[case.negatives.hard_index])
    assert both.hard_ids[:, 4:].eq(-1).all()
    assert both.hard_log_weight[:, 4:].eq(0).all()
    assert both.shared is case.negatives.shared


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", ["info_nce", "dcl"])
def test_a_loss_with_own_rows_is_what_the_loops_say(name, empty):
    case = make_case()
    before = Negatives.none(case.query) if empty else case.negatives
    both = Case(case.query, case.key, before.with_own(unit(5, 1, 7, seed=9)))
    expected = getattr(reference, name)(both.queries, both.positives, both.others, 0.3)
    loss = build_objective(tiny.config(f"objective.name={name}", "objective.temperature=0.3").objective)
    assert loss(both.query, both.key, both.negatives)[0].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("hcl", "debiased")])
def test_every_loss_pushes_the_query_from_its_own_row(name):
    case = make_case(p=0)
    query = case.query.requires_grad_()
    own = unit(5, 1, 7, seed=9)
    all_losses()[name](query, case.key, Negatives.none(case.query.detach()).with_own(own))[0].backward()
    assert ((query.grad * own[:, 0]).sum(1) > (query.grad * case.key).sum(1)).all()


def clip_views(count=2, size=16):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, T, 3, size, size, generator=generator) for _ in range(count)]


def step(*settings, views=None):
    """A method's step on clips: the views, the module, and the outcome."""
    head = ("encoder.temporal=nuta", "encoder.temporal_args={dim: 8}", f"data.frames={T}")
    module = tiny.module(*head, *settings)
    module.eval()  # batch statistics stay, so that passes can be repeated
    views = views or clip_views()
    return views, module, module.method.step(views, Rows.of(torch.arange(8)), 3)


def disturbed(module, view):
    return disturb(module.config.objective.own_negatives, view, torch.arange(8), module.config.run.seed, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_moco_embeds_the_disturbed_query_view_with_the_key_network(kind):
    views, module, found = step(f"objective.own_negatives={kind}", "objective.symmetric=true", "mining=band")
    assert found.negatives.hard_index.shape[1] == 4  # what monitors see is what was mined
    pairs = []
    with torch.no_grad():
        for query, key in (views, views[::-1]):
            own = module.networks.embed_key(disturbed(module, query))
            rows = module.networks.embed(query), module.networks.embed_key(key)
            pairs.append(Case(*rows, found.negatives.with_own(own[:, None])))
    expected = [reference.info_nce(each.queries, each.positives, each.others, 0.2) for each in pairs]
    assert found.loss.item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    without = [
        reference.info_nce(p.queries, p.positives, [(r[:4], w[:4]) for r, w in p.others], 0.2) for p in pairs
    ]
    assert found.loss.item() > sum(without) / 2


def test_simclr_embeds_it_with_gradient_and_local_clips_have_their_own():
    views = clip_views() + clip_views(1, 8)
    settings = ("method=simclr", "objective.own_negatives=reverse", "augment.num_local=1")
    _, module, found = step(*settings, views=views)
    embedded = [module.networks.embed(view).detach().double() for view in views]
    losses = []
    for query, key in ((0, 1), (1, 0), (2, 0), (2, 1)):
        own = module.networks.embed(disturbed(module, views[query])).detach().double()
        for i in range(8):
            others = [*(rows[j] for j in range(8) if j != i for rows in embedded[:2]), own[i]]
            logits = torch.stack([embedded[key][i], *others]) @ embedded[query][i] / 0.2
            losses.append(logits.logsumexp(0) - logits[0])
    assert found.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    found.loss.backward()
    assert module.networks.encoder.over_time.join.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["resnet10", "r3d_10"])
@pytest.mark.parametrize(("kind", "training"), [("reverse", True), ("shuffle", True), ("freeze", False)])
def test_simclr_learns_what_a_second_pass_of_the_disturbed_clips_teaches(kind, training, name):
    head = ("encoder.temporal=nuta", "encoder.temporal_args={dim: 8}") if name == "resnet10" else ()
    settings = (
        "method=simclr",
        f"encoder.name={name}",
        f"data.frames={T}",
        f"objective.own_negatives={kind}",
    )
    module = tiny.module(*head, *settings).double().train(training)  # of frozen clips, batch norms see others
    views, rows = [view.double() for view in clip_views()], Rows.of(torch.arange(8))
    sizes = []
    module.encoder.image_encoder.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    loss = module.method.step(views, rows, 3).loss
    loss.backward()
    found = {key: weight.grad for key, weight in module.networks.named_parameters()}
    assert sizes == ([8 * T] * 2 if head else [8] * 4)  # a network of clips is run again
    module.zero_grad(set_to_none=True)
    embed = module.networks.embed
    both = [embed(view) for view in views]
    negatives, _ = other_images(both, rows)
    against = [negatives.with_own(embed(disturbed(module, view))[:, None]) for view in views]
    objective = module.method.objective
    second = (objective(both[0], both[1], against[0])[0] + objective(both[1], both[0], against[1])[0]) / 2
    second.backward()
    near = {"rtol": 1e-5, "atol": 1e-7}  # embeddings are float32
    torch.testing.assert_close(loss, second, **near)
    for key, weight in module.networks.named_parameters():
        torch.testing.assert_close(
            found[key], weight.grad, **near, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_local_clips_have_negatives_of_their_own():
    views = clip_views() + clip_views(1, 8)
    _, module, found = step("objective.own_negatives=reverse", "augment.num_local=1", views=views)
    losses = []
    with torch.no_grad():
        key = module.networks.embed_key(views[1])
        for view in (views[0], views[2]):
            own = module.networks.embed_key(disturbed(module, view))
            negatives = found.negatives.with_own(own[:, None])
            losses.append(module.method.objective(module.networks.embed(view), key, negatives)[0])
    torch.testing.assert_close(found.loss, torch.stack(losses).mean())


def test_without_the_option_nothing_is_embedded_twice(monkeypatch):
    monkeypatch.setattr("contrastive.methods.method.disturb", None)
    step("objective.own_negatives=none")


@pytest.mark.parametrize("method", ["nnclr", "sogclr"])
def test_a_method_without_negatives_of_single_queries_is_refused(method):
    config = tiny.config(f"method={method}", "data.frames=4", "objective.own_negatives=shuffle")
    with pytest.raises(UserError, match=rf"own_negatives=shuffle: method={method} .*use method=moco"):
        check_method(config, find_method(config), method)
    for other in ("moco", "neighbour", "simclr"):
        check_method(config, find_method(tiny.config(f"method={other}")), other)


@pytest.mark.parametrize("name", ["debiased", "hcl"])
def test_a_loss_that_assumes_a_fair_sample_is_refused(name):
    config = tiny.config(f"objective.name={name}", "data.frames=4", "objective.own_negatives=freeze")
    with pytest.raises(UserError, match="own_negatives=freeze makes them of the query's own clip"):
        build_objective(config.objective, config.mining, in_batch=True)


def test_a_head_that_is_blind_to_order_is_refused_where_only_order_differs():
    for kind in ("shuffle", "reverse", "freeze", "clips"):
        for head in ("mean", "attention"):
            settings = (f"objective.own_negatives={kind}", f"encoder.temporal={head}")
            config = tiny.config("data.frames=4", "augment.time.max_gap=0.2", *settings)
            encoder = build_encoder(config.encoder, 16, 4)
            if head == "mean" and kind in ("shuffle", "reverse"):
                with pytest.raises(UserError, match=f"{kind}: encoder.temporal=mean does not see the order"):
                    check_sees_order(config, encoder)
            else:
                check_sees_order(config, encoder)


def test_images_are_refused():
    with pytest.raises(UserError, match=r"own_negatives=reverse changes the order .*data\.frames=1; leave"):
        tiny.config("objective.own_negatives=reverse")
    with pytest.raises(UserError, match="own_negatives='backwards': allowed are none, clips, shuffle"):
        tiny.config("data.frames=4", "objective.own_negatives=backwards")


@pytest.mark.parametrize("method", ["moco", "simclr"])
def test_another_clip_of_the_video_is_a_negative_and_no_view(method):
    views = [*clip_views(), *clip_views(3)[2:]]
    settings = ("objective.own_negatives=clips", "augment.time.max_gap=0.25", f"method={method}")
    _, module, found = step(*settings, views=views)
    embed = module.networks.embed_key if method == "moco" else module.networks.embed
    with torch.no_grad():
        first, second = (module.networks.embed(view) for view in views[:2])
        negatives = found.negatives.with_own(embed(views[2])[:, None])
        pairs = [(first, embed(views[1]))] if method == "moco" else [(first, second), (second, first)]
        losses = [module.method.objective(*pair, negatives)[0] for pair in pairs]
    torch.testing.assert_close(found.loss.detach(), torch.stack(losses).mean())


def test_the_other_clip_is_half_of_the_room_away_and_viewed_last():
    config = tiny.config(
        "data.frames=2", "objective.own_negatives=clips", "augment.time.max_gap=0.2", "augment.num_local=1"
    )
    rows = torch.arange(200)
    starts, speeds = DrawMoments(config.augment.time, 0, 3)(rows, 0)
    assert torch.equal(starts[:, :2], DrawMoments(config.augment.time, 0)(rows, 0)[0])
    assert ((starts[:, 2] - starts[:, 0]).abs() - 0.5).abs().max() < 1e-9
    assert (starts[:, 2] - starts[:, 1]).abs().min() >= 0.3 - 1e-9
    assert ((starts >= 0) & (starts < 1)).all()
    assert speeds.shape == (200, 3)
    frames = torch.zeros(4, 6, 3, 16, 16, dtype=torch.uint8)
    frames[:, 4:] = 255
    views = Views(config.augment, config.data, 0)(frames, rows[:4], 0)
    assert [tuple(view.shape) for view in views] == [(4, 2, 3, 16, 16)] * 2 + [(4, 2, 3, 8, 8)] + [
        (4, 2, 3, 16, 16)
    ]
    assert views[3].mean() > 1 > views[0].mean()
    without = Views(config.augment, config.data, 0)(frames[:, :4], rows[:4], 0)
    assert all(torch.equal(*pair) for pair in zip(views, without, strict=False))
    with pytest.raises(UserError, match=r"max_gap=1: objective\.own_negatives=clips .*0\.25 or less"):
        tiny.config("data.frames=2", "objective.own_negatives=clips")
