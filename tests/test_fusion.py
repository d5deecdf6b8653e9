"Late fusion: the features are what they are called, and the weights are where the likelihood is highest."
import numpy as np
import pytest
import torch

from flare.experiments import run
from flare.fusion import Fused, FusionConfig, fuse, earlier_items
from flare.masking import TrainingBatches, evaluation_batches
from flare.models import FlareConfig, FlareModel
from flare.records import TAUGHT, code_digest, configs, parameters_of, read_record, staleness
from flare.sequences import Holdout, Sequences
from shop import write_project

ITEMS, USERS = 30, 200


@pytest.fixture(scope="module")
def model():
    "Random weights and contexts; three items have no text."
    torch.manual_seed(0)
    model = FlareModel(FlareConfig(n_items=ITEMS, max_len=8, hidden_size=16, heads=2, ffn_size=32, layers=1, modalities=("text",), text_width=8,
                                   latents=1, perceiver_size=16, perceiver_heads=2, perceiver_layers=1)).eval()
    with torch.no_grad():
        model.context_table.rows.normal_()
        model.context_table.rows[:3] = model.no_text
    return model


@pytest.fixture(scope="module")
def holdout():
    "Users who never choose an item again."
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(ITEMS)[: rng.integers(2, 7)] for _ in range(USERS)]
    return Holdout(np.arange(USERS), Sequences.from_lists([d[:-1] for d in drawn]), np.array([d[-1] for d in drawn]))


def test_features_are_what_they_are_called(model):
    history = [[4, 7, 4, 1], [5]]  # one item twice
    (batch,) = evaluation_batches(Sequences.from_lists(history), np.array([9, 2]), ITEMS, 8)
    fused = Fused(model)
    found = dict(zip(fused.names, fused.features(batch).detach()))
    unit = model.context_table.rows / model.context_table.rows.norm(dim=1, keepdim=True)
    unit[:3] = 0
    for user, items in enumerate(history):
        for k in (1, 2, 3):
            expected = unit[items[-k]] @ unit.T if len(items) >= k else torch.zeros(ITEMS)
            torch.testing.assert_close(found[f"text, {k} back"][user], expected)
        torch.testing.assert_close(found["text, all"][user], unit[items].mean(0) @ unit.T)
        assert found["the last item"][user].nonzero().flatten().tolist() == [items[-1]]
        assert found["any item"][user].nonzero().flatten().tolist() == sorted(set(items))
    torch.testing.assert_close(found["logits"], model.score(batch))
    fused.weights = torch.randn(len(fused.names))
    torch.testing.assert_close(fused.score(batch), torch.tensordot(fused.weights, fused.features(batch), 1))


def test_masks_inside_a_sequence_see_what_stands_before_them_only():
    sequences = Sequences.from_lists([np.arange(6), np.arange(6, 13)])
    for batch in TrainingBatches(sequences, ITEMS, 2, 10, 32, 0.5, 0.0, None, 0).epoch(0):
        mask, item, back = (x.numpy() for x in earlier_items(batch, ITEMS))
        targets = batch.targets.numpy()[mask]
        assert len(item) and (item < targets).all() and (targets - item == back).all()
        assert ((item < 6) == (targets < 6)).all() and not set(item) & set(batch.targets.tolist())


def test_what_never_comes_again_is_ruled_out_and_the_likelihood_is_at_its_highest(model, holdout):
    fused = fuse(model, holdout, 8, budget=ITEMS * 7 * 32)  # several batches
    assert dict(zip(fused.names, fused.weights.tolist()))["any item"] < -3
    (batch,) = evaluation_batches(holdout.history, holdout.targets, ITEMS, 8)
    weights = fused.weights.clone().requires_grad_()
    with torch.no_grad(): features = fused.features(batch)
    loss = torch.nn.functional.cross_entropy(torch.tensordot(weights, features, 1), batch.targets)
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() < 0.02
    assert loss < torch.nn.functional.cross_entropy(features[0], batch.targets)


def test_a_step_that_goes_too_far_is_halved(holdout):
    torch.manual_seed(0)
    sure = FlareModel(FlareConfig(n_items=ITEMS, max_len=8, hidden_size=16, heads=2, ffn_size=32, layers=1)).eval()
    with torch.no_grad(): sure.output_bias.normal_(std=8)  # and wrong
    fused = fuse(sure, holdout, 8)
    (batch,) = evaluation_batches(holdout.history, holdout.targets, ITEMS, 8)
    with torch.no_grad(): logits = torch.tensordot(fused.weights, fused.features(batch), 1)
    assert torch.nn.functional.cross_entropy(logits, batch.targets) < np.log(ITEMS)  # better than to know nothing


def test_a_slice_is_a_part_of_the_whole(model, holdout):
    fused = fuse(model, holdout, 8)
    (batch,) = evaluation_batches(holdout.history.take(np.arange(9)), holdout.targets[:9], ITEMS, 8)
    with torch.no_grad():
        whole, score = fused.score(batch), fused.scorer(batch)
        torch.testing.assert_close(whole, torch.tensordot(fused.weights, fused.features(batch), 1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.cat([score(slice(0, 11)), score(slice(11, ITEMS))], 1), whole)


def test_a_model_without_texts_has_its_logits_and_repetitions(holdout):
    torch.manual_seed(0)
    bare = FlareModel(FlareConfig(n_items=ITEMS, max_len=8, hidden_size=16, heads=2, ffn_size=32, layers=1)).eval()
    fused = fuse(bare, holdout, 8)
    assert fused.names == ["logits", "the last item", "any item"] and fused.weights[2] < -3
    assert Fused(bare, FusionConfig(fusion_recent=0)).names == fused.names


def test_bad_input_is_refused(model, holdout):
    nobody = Holdout(holdout.users[:0], holdout.history.take(np.arange(0)), holdout.targets[:0])
    with pytest.raises(ValueError, match="no users"): fuse(model, nobody, 8)
    with pytest.raises(ValueError, match="fusion_recent is -1; it must be at least 0"): FusionConfig(fusion_recent=-1)
    broken = FlareModel(FlareConfig(n_items=ITEMS, max_len=8, hidden_size=16, heads=2, ffn_size=32, layers=1)).eval()
    with torch.no_grad(): broken.output_bias[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"): fuse(broken, holdout, 8)


@pytest.mark.parametrize("model", ["flare_fused", "bert4rec_fused"])
def test_a_run_is_trained_as_the_model_it_is_named_after(model, tmp_path):
    project = write_project(tmp_path / "project")
    small = dict(hidden_size=16, heads=2, ffn_size=32, layers=1, max_len=10, epochs=1, perceiver_size=16, perceiver_heads=2,
                 perceiver_layers=1, latents=1)
    root = project / "paper"
    record = run("fusion", model, str(project / "shop"), parameters=small, root=root, progress=False)
    plain = run("fusion", TAUGHT[model], str(project / "shop"), parameters=small, root=root, progress=False)
    assert record.cost["steps"] == plain.cost["steps"] and "teach_seconds" in record.cost and "teach_seconds" not in plain.cost
    assert record.metrics["test"] != plain.metrics["test"] and set(record.metrics) - set(plain.metrics) == {"fusion"} and not staleness(read_record(record.path(root)))
    assert set(code_digest(model)) - set(code_digest(TAUGHT[model])) == {"flare.fusion"}
    assert set(parameters_of(model)) - set(parameters_of(TAUGHT[model])) == {"fusion_users"} | ({"fusion_recent"} if model == "flare_fused" else set())
    assert configs(model, parameters_of(model), 9, 0)[0].modalities == (("text",) if model == "flare_fused" else ())
